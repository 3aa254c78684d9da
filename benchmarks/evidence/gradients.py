"""Which pixels a teacher's likeliest class depends on, for the views of table 1: what jacobian reads of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.evidence.views import Answers, shown_to
from hf_kdtl.models import Capture, Teacher
from hf_kdtl.models.forward.needs import Needs


class KnownGradient(Capture):
    """A capture whose gradient by the pixels was taken before."""

    known: Tensor

    def input_gradient(self, scalar: Tensor, create_graph: bool = True) -> Tensor:
        """(B, 3, h, w) of the likeliest class's logit, whatever the scalar: that is what jacobian asks by default."""
        return self.known


class AnswersAndGradients(Answers):
    """The teacher's logits, and the direction of the gradient of its likeliest class's logit by the student's pixels.

    Args:
        logits: (n V, K).
        gradients: (n V, 3, h, w), of length 1 each; for the distance `normalized` alone.
    """

    def __init__(self, logits: Tensor, gradients: Tensor):
        super().__init__(logits)
        self.gradients = gradients

    def unserved(self, needs: Needs) -> str:
        held = Needs(logits=True, input_gradient=True, order=1, fraction=1.0)
        return "" if needs | held == held else f"only logits and their gradients are held, and this reads {needs}."

    def capture(self, pixel_values: Tensor, needs: Needs, batch: Any = None) -> Capture:
        found = KnownGradient(logits=super().capture(pixel_values, needs, batch).logits)
        found.known = self.gradients[batch["image_index"]].float()
        return found


def gradients_of(teacher: Teacher, pixels: np.ndarray, logits: Tensor, file: Path) -> Tensor:
    """(n V, 3, h, w) float16 of (n, V, 3, h, w) uint8 views, each divided by its length; made on first use."""
    if not file.exists():
        views, top = pixels.reshape(-1, *pixels.shape[2:]), logits.argmax(1)
        parts = np.array_split(np.arange(len(views)), max(1, len(views) // 100))
        found = np.concatenate([_directions(teacher, views[part], top[part]) for part in tqdm(parts, "gradients")])
        np.save(file, found)
    return torch.from_numpy(np.load(file))


def _directions(teacher: Teacher, pixels: np.ndarray, classes: Tensor) -> np.ndarray:
    x = (torch.from_numpy(pixels) / 255).requires_grad_()
    logits = teacher.classifier()(shown_to(teacher, x)).logits
    (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), x)
    return torch.nn.functional.normalize(gradient.flatten(1)).view_as(gradient).half().numpy()
