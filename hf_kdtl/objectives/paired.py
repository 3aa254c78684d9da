"""What objectives that pair layers have in common: their pairs, the checks of them, and tokens of one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from hf_kdtl.functional.resample import align_tokens
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.forward.geometry import LayerGeometry
from hf_kdtl.models.pairing import Layers, Pair, PairingPlan
from hf_kdtl.objectives.base import Batch, Objective


class PairedObjective(Objective):
    """An objective whose value is one number for each pair of layers, (B, pairs); the trainer averages the pairs.

    A mean and not a sum, so that a weight means the same at any depth.
    """

    needs_plan = True
    captures: Literal["hidden_states", "attention"] = "hidden_states"
    """Which field of `Needs` the layers go to."""

    def __init__(self, layers: Layers):
        super().__init__()
        self.layers = layers
        self.pairs: list[Pair] = []
        self.plan: PairingPlan | None = None

    def build(self, plan: PairingPlan | None) -> None:
        if plan is None:
            raise ValueError("it pairs layers of a student and a teacher, and there is no teacher.")
        self.plan, self.pairs = plan, plan.pair(self.layers)
        for pair in self.pairs:
            self.check(pair, plan)

    def check(self, pair: Pair, plan: PairingPlan) -> None:
        """Refuse a pair that cannot be compared. Raises ValueError, saying what was found and what to type."""

    def needs(self, plan: PairingPlan | None) -> tuple[Needs, Needs]:
        student = frozenset(pair.student_layer for pair in self.pairs)
        teacher = frozenset(pair.teacher_layer for pair in self.pairs)
        if self.captures == "attention":
            return Needs(attention=student), Needs(attention=teacher)
        return Needs(hidden_states=student), Needs(hidden_states=teacher)

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        return torch.stack(self.entries(student, teacher), dim=1)

    def entries(self, student: Capture, teacher: Capture) -> list[Tensor]:
        """Each pair's value, (B,), with a graph that leads through no other pair's."""
        pairs = [self._at(pair, student, teacher) for pair in self.pairs]
        return [self.compare(i, pair, student, teacher) for i, pair in enumerate(pairs)]

    def _at(self, pair: Pair, student: Capture, teacher: Capture) -> Pair:
        """The pair at the size of this batch's images, checked again where that is not the plan's size."""
        here = pair.at(student.geometry, teacher.geometry)
        if here != pair and self.plan is not None:
            self.check(here, self.plan)
        return here

    def compare(self, index: int, pair: Pair, student: Capture, teacher: Capture) -> Tensor:
        """The pair's value, (B,)."""
        raise NotImplementedError


def class_columns(pair: Pair) -> tuple[Sequence[int], Sequence[int]]:
    """Prefix tokens that have a counterpart, by index in each model: class with class, nothing else."""
    if "class" in pair.student.prefix and "class" in pair.teacher.prefix:
        return (pair.student.prefix.index("class"),), (pair.teacher.prefix.index("class"),)
    return (), ()


def aligned(
    pair: Pair, student: Tensor, teacher: Tensor, align: Callable[..., Tensor] = align_tokens
) -> tuple[Tensor, Tensor]:
    """Both on the student's grid: patches by place, the class token with the class token, other prefix tokens dropped.

    Args:
        student, teacher: tokens (B, N, D) of both blocks; or what `align` takes.
        align: `align_tokens`, or `align_columns` and `align_rows` of attention.
    """
    keep_s, keep_t = class_columns(pair)
    grid_s, grid_t = pair.student.grid, pair.teacher.grid
    assert grid_s is not None and grid_t is not None
    student = align(student, keep_s, len(pair.student.prefix), grid_s, grid_s)
    return student, align(teacher, keep_t, len(pair.teacher.prefix), grid_t, grid_s)


def as_tokens(hidden: Tensor) -> Tensor:
    """(B, N, D) of tokens as they are, or of a map (B, D, gh, gw) row by row."""
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


def patches(hidden: Tensor, layer: LayerGeometry) -> Tensor:
    """The patch tokens alone, (B, P, D)."""
    return as_tokens(hidden)[:, len(layer.prefix) :]


def check_grids(pair: Pair) -> None:
    """Raises ValueError unless both blocks' tokens lie on a known grid."""
    for who, layer in (("student", pair.student), ("teacher", pair.teacher)):
        if layer.grid is None:
            raise ValueError(
                f"{pair}: the {who}'s tokens are on no grid of the image's aspect ratio, or not in its order, so "
                "patches cannot be matched. Name other layers: layers=[[student, teacher], ...]."
            )


def check_attention(pair: Pair) -> None:
    """Raises ValueError unless both blocks attend from every token to every token."""
    for who, layer in (("student", pair.student), ("teacher", pair.teacher)):
        if layer.attention != "full":
            given = {
                "none": "gives no attention (if it has any, load it with attn_implementation='eager'; "
                "timm's call torch's kernel themselves, unseen)",
                "windowed": "attends inside windows",
                "reduced": "attends to fewer keys than it has tokens",
            }[layer.attention]
            raise ValueError(
                f"{pair}: the {who}'s block {given}; full attention is needed. Name other layers, or compare features."
            )


def over_pairs(value: Tensor) -> Tensor:
    """The mean over pairs of layers, where there are any."""
    return value.mean(1) if value.ndim == 2 else value
