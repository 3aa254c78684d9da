"""What a `compute_loss` of a user's may do with the model that it is given: whatever the student lets it do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_kdtl.data.indexed import NOT_THE_STUDENTS
from hf_kdtl.functional.random import Draws


class AroundStudent(nn.Module):
    """A module with a student that answers for it: `config`, `vit`, `device`, and calls with the student's arguments.

    Names that begin with an underscore are not passed on: torch, accelerate and transformers mark modules by them
    (`_orig_mod`, `_ddp_params_and_buffers_to_ignore`), and the mark is of the module that has it.
    """

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student

    def __getattr__(self, name: str) -> Any:
        """What torch finds; else the student's."""
        # Not there yet while a copy or a pickle is made.
        student = self.__dict__.get("_modules", {}).get("student")
        try:
            return super().__getattr__(name)
        except AttributeError:
            if student is None or name.startswith("_"):
                raise
        return getattr(student, name)

    # Under torch_compile each model is compiled. What is around them is not: a step's needs would be those of another.
    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`loss_of` where the step's draws are among the arguments; for others the student's outputs."""
        if any(isinstance(one, Draws) for one in (*args, *kwargs.values())):
            return self.loss_of(*args, **kwargs)
        return self.student(*args, **{name: one for name, one in kwargs.items() if name not in NOT_THE_STUDENTS})

    def loss_of(self, *args: Any, **kwargs: Any) -> Any:
        """The part of the loss of a micro-batch."""
        raise NotImplementedError
