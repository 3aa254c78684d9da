"""What an objective is, in a sentence: for the help of the commands."""

from __future__ import annotations

import inspect

from hf_kdtl.objectives.base import Objective


def first_sentence(kind: type[Objective]) -> str:
    """What an objective is, from its docstring."""
    return inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")
