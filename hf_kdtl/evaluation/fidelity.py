"""How alike a student and its teacher are inside: what moves their answers, what their blocks hold, where they look.

Agreement of their answers (`agreement`, `teacher_kl`) is among the metrics.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from hf_kdtl.evaluation.cka import CKA, FEWEST
from hf_kdtl.functional.attention import align_columns, attention_rows, mean_heads
from hf_kdtl.functional.divergences import jensen_shannon, log_probabilities
from hf_kdtl.functional.features import unit
from hf_kdtl.models.forward.attention_hooks import Attention
from hf_kdtl.models.forward.capture import Capture, Needs, capture
from hf_kdtl.models.forward.geometry import LayerGeometry
from hf_kdtl.models.forward.modes import evaluating
from hf_kdtl.models.labels import match_labels
from hf_kdtl.models.pairing import Layers, Pair, PairingPlan, plan
from hf_kdtl.models.teachers import SignalSource, as_source


def jacobian_cosine(student: nn.Module, teacher: SignalSource, pixel_values: Tensor) -> Tensor:
    """cos(d log p_S,c / d x, d log p_T,c / d x) of every image, (B,), in [-1, 1]: do the same pixels move both?

    c is the class that the teacher finds likeliest. x are the student's pixels; the teacher's re-normalisation and
    resizing are part of its function. Log-probabilities, because a logit's gradient sees a shift of all logits, which
    changes no answer. A gradient of 0 has no direction: the cosine is then 0.

    Args:
        student: in eval mode, for BatchNorm couples the images in train mode.
        teacher: matched to the student (`Teacher.match`), classes included.
        pixel_values: (B, C, h, w) of the student.

    Cost: a forward and a backward of each model.

    Raises:
        ValueError: when no gradient leads to the pixels (a quantised model), or the pixels are integers.

    Source: gradients as in Srinivas & Fleuret 2018, arXiv 1803.00443 [paper]; their cosine is [ours].

    >>> from types import SimpleNamespace
    >>> class Linear(nn.Linear):
    ...     def forward(self, pixel_values):
    ...         return SimpleNamespace(logits=super().forward(pixel_values.flatten(1)))
    >>> from hf_kdtl.models import Teacher
    >>> one, other = Linear(2, 2), Linear(2, 2)
    >>> one.weight.data, other.weight.data = torch.eye(2), torch.tensor([[3.0, 1.0], [0.0, 1.0]])
    >>> jacobian_cosine(one, Teacher(other), torch.ones(1, 1, 1, 2))  # (1, -1) against (3, 0)
    tensor([0.7071], dtype=torch.float64)
    """
    needs = Needs(input_gradient=True, order=1, fraction=1.0)
    its, mine = teacher.capture(pixel_values, needs), capture(student, pixel_values, needs)
    top = its.logits.argmax(-1, keepdim=True)
    slopes = []
    for got in (mine, its):
        scores = log_probabilities(got.logits).gather(1, top.to(got.logits.device))[:, 0]
        slopes.append(got.input_gradient(scores, create_graph=False).flatten(1).double())
    return (unit(slopes[0]) * unit(slopes[1])).sum(1).clamp(-1, 1)


def attention_agreement(pair: Pair, student: Attention, teacher: Attention) -> Tensor:
    """1 - JSD / ln 2 of where the class tokens of two blocks look, (B,), in [0, 1]; 1 where they look at the same.

    The rows that the objective `attention_map` compares: mean over heads, the teacher's patches on the student's grid
    by area, class with class, other prefix tokens dropped and the row renormalised.

    Raises:
        ValueError: for blocks without full attention, a class token or a grid.

    Label: [ours].
    """
    if problem := _no_attention(pair):
        raise ValueError(problem)
    rows = (_class_row(student, pair.student, pair), _class_row(teacher, pair.teacher, pair))
    return (1 - jensen_shannon(*rows) / math.log(2)).clamp(0, 1)


def fidelity(
    student: nn.Module,
    teacher: Any,
    batches: Iterable[Tensor],
    processing_class: Any = None,
    layers: Layers = "uniform",
) -> dict[str, Any]:
    """Jacobian cosine, CKA and attention agreement of a student and its teacher, as JSON takes them.

    A block's feature for CKA is the mean over its patch tokens (or over its map); class and register tokens are left
    out, so that models with and without them compare.

    Args:
        student: in eval mode within this function.
        teacher: a `Teacher`, a model or a path. It is moved to the student's device.
        batches: the student's pixel_values, (B, C, h, w) each. A batch of fewer than 4 images is left out of CKA.
        processing_class: the student's image processor; needed where the teacher has one.
        layers: which blocks attention is compared of, as in the objectives.

    Returns:
        images; jacobian_cosine (mean over images); cka {matrix: a row a teacher block, a column a student block (None
        where a feature is constant), images}; attention_agreement {mean, pairs: [{student, teacher, agreement}]}.
        What these models do not give is None, and `reasons` says why under the same name.

    Cost: two forwards and a backward of each model, and CKA's O(B^2).

    Raises:
        ValueError: when there is no image, or the teacher's pixels cannot be matched (`Teacher.match`).
    """
    found = _Fidelity(student, teacher, processing_class, layers)
    with evaluating(student):
        for pixel_values in batches:
            found.add(pixel_values)
    return found.result()


class _Fidelity:
    """What `fidelity` has found in the batches so far."""

    def __init__(self, student: Any, teacher: Any, processing_class: Any, layers: Layers):
        self.student, self.layers = student, layers
        # A new one, so that what a trainer made of the given one stays.
        self.teacher = copy.copy(as_source(teacher))
        self.reasons: dict[str, str] = {}
        try:
            match_labels(student.config, self.teacher.provenance())
        except ValueError as error:
            self.reasons["jacobian_cosine"] = str(error)
        self.teacher.match(student, processing_class, compare_classes=not self.reasons)
        self.plan: PairingPlan | None = None
        self.pairs: list[Pair] = []  # whose attention is compared
        self.images, self.cka = 0, CKA()
        self.cosines: list[float] = []
        self.agreements: list[Tensor] = []

    def add(self, pixel_values: Tensor) -> None:
        x = pixel_values.to(self.student.device, self.student.dtype)
        if not self.images:
            self.teacher.to(x.device)
            self._look(x)
        self.images += len(x)
        if "jacobian_cosine" not in self.reasons:
            try:
                self.cosines += jacobian_cosine(self.student, self.teacher, x).tolist()
            except ValueError as error:
                self.reasons["jacobian_cosine"] = str(error)
        if self.plan is not None:
            self._compare(x, self.plan)

    def _look(self, x: Tensor) -> None:
        """Find the blocks, and what cannot be compared of them."""
        try:
            self.plan = plan(self.student, self.teacher, pixel_values=x)
        except ValueError as error:
            self.reasons |= {"cka": str(error), "attention_agreement": str(error)}
            return
        pairs = self.plan.pair(self.layers)
        if problem := next(filter(None, map(_no_attention, pairs)), None):
            self.reasons["attention_agreement"] = problem
        else:
            self.pairs = pairs

    @torch.no_grad()
    def _compare(self, x: Tensor, plan: PairingPlan) -> None:
        needs = [
            Needs(hidden_states=frozenset(range(len(model.layers))), attention=frozenset(attention))
            for model, attention in (
                (plan.student, [pair.student_layer for pair in self.pairs]),
                (plan.teacher, [pair.teacher_layer for pair in self.pairs]),
            )
        ]
        mine, its = capture(self.student, x, needs[0], plan.student), self.teacher.capture(x, needs[1])
        if len(x) >= FEWEST:
            self.cka.update(_features(mine), _features(its))
        if self.pairs:
            here = [pair.at(mine.geometry, its.geometry) for pair in self.pairs]
            sides = ((pair, mine.attention[pair.student_layer], its.attention[pair.teacher_layer]) for pair in here)
            self.agreements.append(torch.stack([attention_agreement(*side) for side in sides], 1))

    def result(self) -> dict[str, Any]:
        if not self.images:
            raise ValueError("there is no image; expected batches of the student's pixel_values.")
        if "cka" not in self.reasons and not self.cka.images:
            self.reasons["cka"] = f"no batch has {FEWEST} images or more, which the unbiased estimator needs."
        known: dict[str, Any] = {
            "jacobian_cosine": lambda: fmean(self.cosines),
            "cka": self._cka,
            "attention_agreement": self._agreement,
        }
        values = {name: None if name in self.reasons else value() for name, value in known.items()}
        return {"images": self.images, **values, "reasons": self.reasons}

    def _cka(self) -> dict[str, Any]:
        rows = [[None if math.isnan(v) else v for v in row] for row in self.cka.value().tolist()]
        return {"matrix": rows, "images": self.cka.images}

    def _agreement(self) -> dict[str, Any]:
        means = torch.cat(self.agreements).mean(0).tolist()
        pairs = [
            {"student": pair.student_layer, "teacher": pair.teacher_layer, "agreement": mean}
            for pair, mean in zip(self.pairs, means, strict=True)
        ]
        return {"mean": fmean(means), "pairs": pairs}


def _features(got: Capture) -> list[Tensor]:
    """(B, D) of every block: the mean over its patch tokens, or over its map."""
    assert got.geometry is not None
    hidden = [got.hidden_states[i] for i in range(len(got.geometry.layers))]
    return [
        h.double().mean((-2, -1)) if h.ndim == 4 else h[:, len(layer.prefix) :].double().mean(1)
        for h, layer in zip(hidden, got.geometry.layers, strict=True)
    ]


_FOUND = {"none": "none", "windowed": "attention in windows", "reduced": "fewer keys than tokens"}


def _no_attention(pair: Pair) -> str | None:
    """Why the class tokens' attention of two blocks cannot be compared, if so."""
    for who, layer in (("student", pair.student), ("teacher", pair.teacher)):
        if layer.attention != "full":
            return f"{pair}: full attention is needed; the {who}'s block has {_FOUND[layer.attention]}."
        if "class" not in layer.prefix:
            return f"{pair}: the {who} has no class token, whose attention is compared."
        if layer.grid is None:
            return f"{pair}: the {who}'s tokens are on no known grid, so patches cannot be matched."
    return None


def _class_row(attention: Attention, layer: LayerGeometry, pair: Pair) -> Tensor:
    """log of what the class token attends to, (B, 1 + P_S): itself, then the patches of the student's grid."""
    row = layer.prefix.index("class")
    if attention.weights is not None:
        weights = attention.weights[:, :, row : row + 1].double()
        log_p = weights.clamp(min=torch.finfo(torch.float64).tiny).log()
    else:
        assert attention.query is not None and attention.key is not None
        bias = attention.bias
        if bias is not None:
            bias = bias.expand(*bias.shape[:-2], attention.query.shape[2], -1)[..., row : row + 1, :]
        query, key = attention.query[:, :, row : row + 1].double(), attention.key.double()
        log_p = attention_rows(query, key, attention.scale, bias)
    assert layer.grid is not None and pair.student.grid is not None
    aligned = align_columns(mean_heads(log_p), (row,), len(layer.prefix), layer.grid, pair.student.grid)
    return aligned[:, 0, 0]
