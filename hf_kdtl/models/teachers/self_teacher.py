"""The student without its adapters, as its own teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_kdtl.models.adapters import adapted, adapters_off
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.forward.geometry import ModelGeometry
from hf_kdtl.models.teachers.teacher import Teacher


class SelfTeacher(Teacher):
    """The student itself with its adapters off, in eval mode: no second set of weights in memory.

    Which student is said by `match`. Its own head answers, as it was before the adapters: a `modules_to_save` head
    is off too.
    """

    def __init__(self) -> None:
        self.model: Any = None
        self.processing_class: Any = None
        self.notes = []
        self._pixels, self._order, self._looked = None, None, False

    def match(self, student: nn.Module, processing_class: Any, compare_classes: bool) -> None:
        """Take the student whose adapters are turned off.

        Raises:
            ValueError: when it has none.
        """
        if not adapted(student):
            raise ValueError(
                f"teacher='self' is the student with its adapters off, and {type(student).__name__} has none. Give "
                "it some: peft.get_peft_model(model, LoraConfig(...)); or pass a copy: teacher=copy.deepcopy(model)."
            )
        self.model = student
        self.notes = ["the teacher is the student with its adapters off; no second copy is held."]

    def eval_context(self) -> Any:
        """A context in which the model answers as the teacher."""
        return adapters_off(self.model)

    def to(self, device: torch.device) -> SelfTeacher:
        """It goes where the student goes."""
        return self

    def __call__(self, pixel_values: Tensor, needs: Needs, geometry: ModelGeometry | None = None) -> Capture:
        """What it gives for pixel_values (B, C, h, w).

        Raises:
            ValueError: at the first call, when training would change it.
        """
        if not self._looked:
            self._check_still(pixel_values[:1])
            self._looked = True
        return super().__call__(pixel_values, needs, geometry)

    def _check_still(self, pixel_values: Tensor) -> None:
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
                "too. Train them beside the base (LoraConfig: bias='none', modules_to_save=['classifier']), or pass a "
                "copy: teacher=copy.deepcopy(model)."
            )
