"""What of a pair of models and of how it is run decides which derivatives are exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm

from hf_kdtl.models.passes import kinks
from hf_kdtl.models.teacher import Teacher


@dataclass(frozen=True)
class Setting:
    """Facts that objectives choose by.

    Args:
        trainable: the student has parameters that learn.
        sharded: the student is under FSDP2, where a double backward gives zero gradients or fails.
        compiled: the models run under torch.compile, which has no double backward and no forward mode.
        checkpointing: blocks are recomputed in the backward pass.
        batch_norm: the student has BatchNorm.
        kinks: {who: types of layers with kinks}, of those that have any.
        half: who has weights of less than 32 bits.
    """

    trainable: bool = True
    sharded: bool = False
    compiled: bool = False
    checkpointing: bool = False
    batch_norm: bool = False
    kinks: tuple[str, ...] = ()
    half: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, student: nn.Module, teacher: Teacher | None, compiled: bool = False, checkpointing: bool = False
    ) -> Setting:
        """Look at the models; `compiled` and `checkpointing` are what the run will do with them."""
        models = {"student": student} | ({"teacher": teacher.model} if teacher is not None else {})
        floating = {who: {p.dtype for p in m.parameters() if p.is_floating_point()} for who, m in models.items()}
        return cls(
            trainable=any(p.requires_grad for p in student.parameters()),
            sharded=any(isinstance(m, FSDPModule) for m in student.modules()),
            compiled=compiled,
            checkpointing=checkpointing or bool(getattr(student, "is_activation_checkpointing", False)),
            batch_norm=any(isinstance(m, _BatchNorm) for m in student.modules()),
            kinks=tuple(f"the {who} has {found}" for who, m in models.items() if (found := kinks(m))),
            half=tuple(who for who, dtypes in floating.items() if dtypes & {torch.float16, torch.bfloat16}),
        )
