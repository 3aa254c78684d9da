"""The student without its adapters, as its own teacher."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_kdtl.models.adapters import adapted, adapters_off, check_base_kept, plain_state
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.labels import is_multi_label
from hf_kdtl.models.teachers.source import Batch, SourceInfo
from hf_kdtl.models.teachers.teacher import Teacher


class SelfTeacher(Teacher):
    """The student itself with its adapters off, in eval mode: no second set of weights in memory.

    `match` says which student. Its own head answers, as it was before the adapters: a `modules_to_save` head
    is off too.
    """

    def __init__(self) -> None:
        self._hold(None)
        self._checked = False

    def match(self, student: nn.Module, processing_class: Any, compare_classes: bool | Collection[str]) -> None:
        """Take the student whose adapters are turned off.

        Raises:
            ValueError: when it has none, or has some that changed its weights when they were added.
        """
        if not adapted(student):
            raise ValueError(
                f"teacher='self' is the student with its adapters off, and {type(student).__name__} has none. Give "
                "it some: peft.get_peft_model(model, LoraConfig(...)); or pass a copy: teacher=copy.deepcopy(model)."
            )
        check_base_kept(student, "teacher='self'")
        if student is not self.model:
            self._hold(student)
            self._checked = False
        self._geometry, self._multi_label = {}, is_multi_label(student)
        self.notes = ["the teacher is the student with its adapters off; no second copy is held."]

    def eval_context(self) -> Any:
        """A context in which the model answers as the teacher."""
        return adapters_off(self.model)

    def to(self, device: torch.device) -> SelfTeacher:
        """It goes where the student goes."""
        return self

    def capture(self, pixel_values: Tensor, needs: Needs, batch: Batch | None = None) -> Capture:
        """What it gives for pixel_values (B, C, h, w).

        Raises:
            ValueError: at the first call, when training would change it.
        """
        if not self._checked:
            self._check_frozen(pixel_values[:1])
            self._checked = True
        return super().capture(pixel_values, needs, batch)

    def modules(self) -> list[nn.Module]:
        """None: the student's own weights answer."""
        return []

    def provenance(self) -> SourceInfo:
        """The student's, without its adapters."""
        size = sum(value.numel() for value in plain_state(self.model).values())
        return replace(super().provenance(), parameters=size, trainable=0, adapters=None, is_student=True)

    def _check_frozen(self, pixel_values: Tensor) -> None:
        """Refuse trainable weights that answer with the adapters off: the teacher would move with the student."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        with torch.enable_grad(), self.eval_context():
            answer = self.model(pixel_values=pixel_values).logits.sum()
        if not answer.requires_grad:
            return
        found = torch.autograd.grad(answer, list(trained.values()), allow_unused=True)
        moving = [name for name, g in zip(trained, found, strict=True) if g is not None]
        if moving:
            raise ValueError(
                f"teacher='self' must stay as it is, and {moving[:3]} are trained and answer with the adapters off "
                "too. Train them apart from the base (LoraConfig: bias='none', modules_to_save=['classifier']), or "
                "pass a copy: teacher=copy.deepcopy(model)."
            )
