"""Matching of Hessians: how the slopes of a class output change along the pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from hf_kdtl.functional import derivatives as fd
from hf_kdtl.functional.derivatives import OF, Of
from hf_kdtl.functional.hessian import product, second_quotient
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.forward.perturbations import Direction
from hf_kdtl.objectives.base import Batch, check_option
from hf_kdtl.objectives.derivatives import DerivativeObjective, label_index
from hf_kdtl.objectives.estimators import EstimatorChoice, check_estimator

STEP = 0.01
"""Of second differences: x +- STEP v, v = +-1. benchmarks/estimators.py."""


class Hessian(DerivativeObjective):
    """Hessian matching, per image: H = d^2 o_c / dx^2 of student and teacher along random v of -1 and 1, the same for
    both.

    hvp: the distance of H_S v and H_T v: normalized || H_S v/||.|| - H_T v/||.|| ||^2, in [0, 4], or squared
    || H_S v - H_T v ||^2, whose mean over v is the squared Frobenius norm of H_S - H_T. curvature: (v'H_S v - v'H_T
    v)^2.

    Args:
        what: hvp | curvature.
        distance: normalized | squared; curvature is always squared.
        output: which class c: teacher_top1 (the teacher's, for both) | label (an image without one counts 0).
        of: the outputs o: logit (default) | logprob | centred.
        estimator: auto | hvp (two backwards before the last one) | finite_difference (curvature alone: o(x + s v) +
            o(x - s v) - 2 o(x) = s^2 v'Hv + O(s^4)). auto is hvp.
        step: s of the finite difference.
        probes: directions v that are averaged.
        fraction: share of the images, in (0, 1], that take part.

    Cost: arithmetic against a logit-KD step, of which 1.00 is the KD step itself: hvp 4.1, finite_difference 3.0.

    Raises:
        ValueError: for a net with kinks (ReLU, max-pooling): it is piecewise linear, its Hessian 0 almost everywhere
            or blind to its bends; for options that do not go together; under FSDP2 or torch.compile for hvp.

    Label: [ours]; the idea of matching Hessians is in the abstract of Kokane, Uddin & Xu 2024, arXiv 2407.04871, whose
    text could not be read.
    """

    name = "hessian"
    citation = """@article{kokane2024improving,
  title = {Improving Knowledge Distillation in Transfer Learning with Layer-wise Learning Rates},
  author = {Kokane and Uddin and Xu},
  year = {2024}, eprint = {2407.04871}, archivePrefix = {arXiv}
}"""

    def __init__(
        self,
        *,
        what: Literal["hvp", "curvature"] = "hvp",
        distance: Literal["normalized", "squared"] | None = None,
        output: Literal["teacher_top1", "label"] = "teacher_top1",
        of: Of | None = None,
        estimator: Literal["auto", "hvp", "finite_difference"] = "auto",
        step: float | None = None,
        probes: int = 1,
        fraction: float = 1.0,
    ):
        super().__init__(fraction=fraction, probes=probes, estimator=estimator, central=False, step=step)
        check_option(self.name, "what", what, what in ("hvp", "curvature"), "'hvp' or 'curvature'")
        distances = (None, "squared") if what == "curvature" else (None, "normalized", "squared")
        shown = " or ".join(filter(None, distances))
        check_option(self.name, "distance", distance, distance in distances, f"{shown} with what={what!r}")
        check_option(self.name, "output", output, output in ("teacher_top1", "label"), "'teacher_top1' or 'label'")
        check_option(self.name, "of", of, of is None or of in OF, " or ".join(OF))
        valid = ("hvp", "finite_difference") if what == "curvature" else ("hvp",)
        check_estimator(self.name, estimator, False, step, valid, f" with what={what!r}")
        self.what, self.output, self.of = what, output, of
        self.distance = distance or ("normalized" if what == "hvp" else "squared")
        self.needs_labels = output == "label"
        self.takes_soft_labels = output != "label"
        self.counts = "labelled" if output == "label" else "images"

    def choices(self) -> tuple[EstimatorChoice, ...]:
        return self.alternatives()[1:] if self.estimator == "finite_difference" else self.alternatives()[:1]

    def alternatives(self) -> tuple[EstimatorChoice, ...]:
        beside = "" if self.what == "curvature" else "what='curvature', "
        return EstimatorChoice("hvp"), EstimatorChoice("finite_difference", True, self.step or STEP, beside)

    def prepare(self, context):
        if context.nonsmooth_layers:
            raise ValueError(
                f"{' and '.join(context.nonsmooth_layers)}: such a net is piecewise linear, so its Hessian is 0 "
                "almost everywhere or blind to its bends. Use jacobian, or models with smooth activations (GELU, "
                "SiLU)."
            )
        return super().prepare(context)

    def needs(self, plan):
        if self.choice.estimator == "finite_difference":
            steps = (self.choice.step, -self.choice.step)
            shifts = frozenset(Direction("rademacher", s, k) for s in steps for k in range(self.probes))
            both = Needs(directions=shifts, fraction=self.fraction)
            return both, both
        student = Needs(input_gradient=True, order=3, fraction=self.fraction)
        return student, replace(student, order=2)

    def measure(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        index, labelled = label_index(batch) if self.output == "label" else (teacher.logits.argmax(-1), None)

        def quantity(logits: Tensor) -> Tensor:
            return fd.scores(logits, self.of or "logit").gather(1, index[:, None])[:, 0]

        if self.choice.estimator == "finite_difference":
            mine, its = (self._difference(model, quantity, batch) for model in (student, teacher))
            value = (mine - its.detach()).square().mean(0)
        else:
            value = self._by_products(student, teacher, quantity, batch)
        return value if labelled is None else torch.where(labelled, value, 0.0)

    def _by_products(self, student: Capture, teacher: Capture, quantity, batch: Batch) -> Tensor:
        gradients = [model.input_gradient(quantity(model.logits)) for model in (student, teacher)]
        values = []
        for probe in range(self.probes):
            v = Direction("rademacher", 1.0, probe).draw(batch["draws"], student.input_leaf().detach())
            mine = product(gradients[0], student.input_leaf(), v)
            its = product(gradients[1], teacher.input_leaf(), v, create_graph=False)
            if self.what == "curvature":
                values.append(((mine - its) * v).flatten(1).sum(1).square())
            else:
                values.append((fd.normalized if self.distance == "normalized" else fd.squared)(mine, its))
        return torch.stack(values).mean(0)

    def _difference(self, model: Capture, quantity, batch: Batch) -> Tensor:
        """The curvature along every probe, (probes, b)."""
        step, found = self.choice.step, []
        for probe in range(self.probes):
            ahead, here, behind = (
                quantity(model.logits_at(Direction("rademacher", s, probe), batch["draws"]))
                for s in (step, 0.0, -step)
            )
            found.append(second_quotient(ahead, here, behind, step))
        return torch.stack(found)
