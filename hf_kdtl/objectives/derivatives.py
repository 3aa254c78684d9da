"""What objectives on derivatives by the pixels have in common: which images, which estimator, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from hf_kdtl.functional import derivatives as fd
from hf_kdtl.functional.divergences import labelled
from hf_kdtl.functional.random import select_images
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.forward.perturbations import Direction
from hf_kdtl.models.pairing import PairingPlan
from hf_kdtl.models.run_context import RunContext
from hf_kdtl.objectives.base import Batch, Objective, check_option
from hf_kdtl.objectives.estimators import EstimatorChoice, choose_estimator
from hf_kdtl.utils.options import is_integer, is_number

Output = Literal["teacher_top1", "label", "projection", "all"]


class DerivativeObjective(Objective):
    """Runs `measure` on the images that take part. A value of `fraction` f counts 1 / f, so its mean stays.

    Args:
        fraction: share of the images, in (0, 1], that take part, each by its own draw. The largest fraction of a
            config decides what the passes cost.
        probes: directions or projections that are averaged.
    """

    name: str
    of_classes = True
    """Whether class outputs are differentiated; then there must be at least two."""
    compares_classes = True

    def __init__(self, *, fraction: float, probes: int, estimator: str, central: bool, step: float | None):
        super().__init__()
        check_option(self.name, "fraction", fraction, is_number(fraction) and 0 < fraction <= 1, "a number in (0, 1]")
        check_option(self.name, "probes", probes, is_integer(probes), "a whole number of at least 1")
        check_option(self.name, "central", central, isinstance(central, bool), "true or false")
        positive = step is None or (is_number(step) and step > 0)
        check_option(self.name, "step", step, positive, "a number greater than 0, or nothing")
        self.fraction, self.probes = fraction, probes
        self.estimator, self.central, self.step = estimator, central, step
        self._choice: EstimatorChoice | None = None

    # ---- Which estimator ----

    def choices(self) -> tuple[EstimatorChoice, ...]:
        """The estimators that the options allow, in the order in which "auto" takes them."""
        raise NotImplementedError

    def alternatives(self) -> tuple[EstimatorChoice, ...]:
        """All estimators of the same quantity, for the error message when none of the choices is right."""
        return self.choices()

    def prepare(self, context: RunContext) -> list[str]:
        if not context.trainable:
            raise ValueError("the student has no trainable parameter, so no gradient path. Unfreeze some of it.")
        if context.sharded and self.fraction < 1:
            raise ValueError(
                "under FSDP2 all processes must run the same forwards, and a fraction may be none on one of them; use "
                "fraction=1."
            )
        if context.coupled:
            raise ValueError(
                f"the student's {context.coupled} takes statistics of the batch or of the image in training and has "
                "none of its own, so no derivative of an image is right. Use a model with running statistics, or with "
                "group or layer norm."
            )
        if context.batch_norm and context.checkpointing:
            raise ValueError(
                "BatchNorm would be recomputed by batch statistics where the derivative pass took the running ones. "
                "Switch gradient checkpointing off."
            )
        self._choice, why = choose_estimator(self.choices(), self.alternatives(), context)
        found = [f"estimator {self._choice}: {why}"]
        if context.batch_norm:
            found.append(
                "BatchNorm: derivative passes use the running statistics, since batch statistics tie images to each "
                "other; in training the chosen images therefore run once more."
            )
        return found

    @property
    def choice(self) -> EstimatorChoice:
        """The estimator that `prepare` settled on; without it, the first that fits."""
        return self._choice or self.choices()[0]

    def needs(self, plan: PairingPlan | None) -> tuple[Needs, Needs]:
        choice = self.choice
        if choice.estimator == "finite_difference":
            steps = (choice.step, -choice.step) if choice.central else (choice.step,)
            shifts = frozenset(Direction("normal", s, k) for s in steps for k in range(self.probes))
            both = Needs(directions=shifts, fraction=self.fraction)
            return both, both
        student = Needs(input_gradient=True, order=1 if choice.central else 2, fraction=self.fraction)
        return student, Needs(input_gradient=True, order=1, fraction=self.fraction)

    # ---- Which images ----

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        part = student.differentiated or student
        if part.x is None:  # no image was chosen
            return student.pixel_values.new_zeros(len(student.pixel_values))
        if self.of_classes and student.logits.shape[-1] < 2:
            raise ValueError(f"objective {self.name!r}: the models have one class (K = 1); at least 2 are compared.")
        rows = student.differentiated_rows
        inner = batch if rows is None else _of_rows(batch, rows)
        taken = select_images(inner["draws"], self.fraction, part.x)
        value = self.measure(part, teacher.differentiated or teacher, inner)
        share = 1.0 if inner["draws"].include_all else self.fraction
        value = torch.where(taken.reshape(-1, *[1] * (value.ndim - 1)), value / share, 0.0)
        if rows is None:
            return value
        return value.new_zeros(len(student.pixel_values), *value.shape[1:]).index_copy(0, rows, value)

    def multi_label_problem(self) -> str:
        if self.needs_labels:
            return "it differentiates the output of the image's one label; take jacobian with output='teacher_top1'."
        soft = {getattr(self, "distance", ""), getattr(self, "of", "")} & {"fisher", "softmax", "logprob"}
        return f"{soft.pop()!r} is of a soft-max; take distance 'normalized' or 'squared' of 'logit'." if soft else ""

    def measure(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        """The value of images that all take part, (b,) or (b, pairs)."""
        raise NotImplementedError

    # ---- How a gradient is matched ----

    def matched(self, student: Capture, scalar: Callable[[Capture], Tensor], phi: fd.Phi) -> Tensor:
        """phi of the student's input gradient of a scalar, (b,), by the settled estimator: vjp or split."""
        if self.choice.estimator == "vjp":
            return fd.vjp(phi, scalar(student), student.input_leaf())
        step = self.choice.step if self.choice.central else None
        return fd.split(phi, scalar(student), student.input_leaf(), lambda u: student.directional(u, scalar, step))

    def slope(self, model: Capture, quantity: Callable[[Tensor], Tensor], probe: int, batch: Batch) -> Tensor:
        """The difference quotient of a quantity of the logits along direction `probe`."""
        draws, step = batch["draws"], self.choice.step
        ahead = quantity(model.logits_at(Direction("normal", step, probe), draws))
        if self.choice.central:
            return (ahead - quantity(model.logits_at(Direction("normal", -step, probe), draws))) / (2 * step)
        return (ahead - quantity(model.logits_at(Direction("normal", 0.0, probe), draws))) / step


def label_index(batch: Batch) -> tuple[Tensor, Tensor]:
    """The labels as class indices (b,), and which images have one: an unlabelled image counts 0.

    Raises:
        ValueError: for labels that are distributions.
    """
    labels = batch["labels"]
    if labels.is_floating_point():
        raise ValueError(
            f"labels are distributions of shape {tuple(labels.shape)}, and the output of one class is differentiated. "
            "Turn mixup, CutMix and other soft labels off, or use output='teacher_top1'."
        )
    return labels.clamp(min=0), labelled(labels)


def _of_rows(batch: Batch, rows: Tensor) -> Batch:
    inner: Batch = {"draws": batch["draws"].permuted(rows)}
    if "view_draws" in batch:
        inner["view_draws"] = batch["view_draws"].permuted(rows)
    if "labels" in batch:
        inner["labels"] = batch["labels"][rows]
    return inner
