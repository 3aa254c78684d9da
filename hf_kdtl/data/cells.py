"""What a cell of labels says: nothing, a whole number, or a class by its text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

UNLABELLED = -100


def is_unlabelled(cell: Any) -> bool:
    """Whether an image has no label: nothing, blanks or -100, in a table as in an archive.

    >>> [is_unlabelled(cell) for cell in (None, " ", -100, "-100", 0, "0")]
    [True, True, True, True, False, False]
    """
    return cell is None or cell == UNLABELLED or (isinstance(cell, str) and cell.strip() in ("", str(UNLABELLED)))


def whole_numbers(texts: Iterable[str | None]) -> list[int | None] | None:
    """The texts as integers, where every one is written as an integer is, or every one as "3.0", as pandas writes
    integers with gaps; else None: 01 and 1 are two classes, and stay text.

    >>> whole_numbers(["1", None]), whole_numbers(["1.0", "2.0"]), whole_numbers(["01", "1"])
    ([1, None], [1, 2], None)
    """
    found = list(texts)
    for ending in ("", ".0"):
        if all(text is None or _is_integer(text, ending) for text in found):
            return [None if text is None else int(text.removesuffix(ending)) for text in found]
    return None


def _is_integer(text: str, ending: str) -> bool:
    digits = text.removesuffix(ending)
    # Two texts must not become one number: not 01, nor +1, nor 1_000, nor the digits of other scripts.
    return re.fullmatch(r"0|-?[1-9][0-9]{0,17}", digits) is not None and digits + ending == text
