"""What objectives on derivatives by the pixels have in common: which images, which estimator, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from hf_kdtl.functional import derivatives as fd
from hf_kdtl.functional.divergences import labelled
from hf_kdtl.functional.random import chosen
from hf_kdtl.models.capture import Capture, Needs
from hf_kdtl.models.pairing import PairingPlan
from hf_kdtl.models.passes import Direction
from hf_kdtl.models.setting import Setting
from hf_kdtl.objectives.base import Batch, Objective, check_option, is_number

Estimator = Literal["auto", "vjp", "split", "finite_difference", "hvp"]
Output = Literal["teacher_top1", "label", "projection", "all"]
STEP, STEP_CENTRAL = 0.0005, 0.002
"""Of finite differences: x + step u, u ~ N(0, 1) in every pixel. Where the error of a trained ViT's gradient is least:
benchmarks/estimators.py."""
STEP_ALONG = 0.03
"""Of a central difference inside split: its length, along u / ||u||."""


class DerivativeObjective(Objective):
    """Runs `measure` on the images that take part. A value of `fraction` f counts 1 / f, so its mean stays.

    Args:
        fraction: share of the images, in (0, 1], that take part, each by its own draw.
        probes: directions or projections that are averaged.
    """

    name: str
    of_classes = True
    """Whether class outputs are differentiated; then there must be at least two."""
    compares_classes = True

    def __init__(self, *, fraction: float, probes: int, estimator: str, central: bool, step: float | None):
        super().__init__()
        check_option(self.name, "fraction", fraction, is_number(fraction) and 0 < fraction <= 1, "a number in (0, 1]")
        whole = isinstance(probes, int) and not isinstance(probes, bool)
        check_option(self.name, "probes", probes, whole and probes >= 1, "a whole number of at least 1")
        check_option(self.name, "central", central, isinstance(central, bool), "true or false")
        positive = step is None or (is_number(step) and step > 0)
        check_option(self.name, "step", step, positive, "a number greater than 0, or nothing")
        self.fraction, self.probes, self.estimator, self.central, self.step = (
            fraction,
            probes,
            estimator,
            central,
            step,
        )
        self._way: Way | None = None

    # ---- Which estimator ----

    def ways(self) -> tuple[Way, ...]:
        """The estimators that fit the options, in the order in which "auto" takes them."""
        raise NotImplementedError

    def prepare(self, setting: Setting) -> list[str]:
        if not setting.trainable:
            raise ValueError("the student has no trainable parameter, so no gradient path. Unfreeze some of it.")
        if setting.sharded and self.fraction < 1:
            raise ValueError(
                "under FSDP2 all processes must run the same forwards, and a fraction may be none on one "
                "of them; use fraction=1."
            )
        ways = self.ways()
        problems = [_problem(way, setting) for way in ways]
        right = [way for way, problem in zip(ways, problems, strict=True) if not problem]
        if not right:
            raise ValueError(problems[0])
        self._way = right[0]
        why = _WHY[self._way.estimator] + (f" Not {ways[0].estimator}: {problems[0]}" if problems[0] else "")
        found = [f"estimator {self._way}: {why}"]
        if setting.batch_norm:
            found.append(
                "BatchNorm: derivative passes use the running statistics, since batch statistics tie images to each "
                "other; in training the chosen images therefore run once more."
            )
        return found

    @property
    def way(self) -> Way:
        """The estimator that `prepare` settled on; without it, the first that fits."""
        return self._way or self.ways()[0]

    def needs(self, plan: PairingPlan | None) -> tuple[Needs, Needs]:
        way = self.way
        if way.estimator == "finite_difference":
            steps = (way.step, -way.step) if way.central else (way.step,)
            shifts = frozenset(Direction("normal", s, k) for s in steps for k in range(self.probes))
            both = Needs(directions=shifts, fraction=self.fraction)
            return both, both
        student = Needs(input_gradient=True, order=1 if way.central else 2, fraction=self.fraction)
        return student, Needs(input_gradient=True, order=1, fraction=self.fraction)

    # ---- Which images ----

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        part = student.differentiated or student
        if part.x is None:  # no image was chosen
            return student.logits.new_zeros(student.logits.shape[0])
        if self.of_classes and student.logits.shape[-1] < 2:
            raise ValueError(f"objective {self.name!r}: the models have one class (K = 1); at least 2 are compared.")
        rows = student.rows
        inner = batch if rows is None else _of_rows(batch, rows)
        taken = chosen(inner["draws"], self.fraction, part.x)
        value = self.measure(part, teacher.differentiated or teacher, inner)
        weight = taken.to(value.dtype) / self.fraction
        value = value * weight.reshape(-1, *[1] * (value.ndim - 1))
        if rows is None:
            return value
        return value.new_zeros(student.logits.shape[0], *value.shape[1:]).index_copy(0, rows, value)

    def measure(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        """The value of images that all take part, (b,) or (b, pairs)."""
        raise NotImplementedError

    # ---- How a gradient is matched ----

    def matched(self, student: Capture, scalar: Callable[[Capture], Tensor], phi: fd.Phi) -> Tensor:
        """phi of the student's input gradient of a scalar, (b,), by the settled estimator: vjp or split."""
        if self.way.estimator == "vjp":
            return fd.vjp(phi, scalar(student), student.leaf())
        step = self.way.step if self.way.central else None
        return fd.split(phi, scalar(student), student.leaf(), lambda u: student.directional(u, scalar, step))

    def slope(self, model: Capture, quantity: Callable[[Tensor], Tensor], probe: int, batch: Batch) -> Tensor:
        """The difference quotient of a quantity of the logits along direction `probe`."""
        draws, step = batch["draws"], self.way.step
        ahead = quantity(model.at(Direction("normal", step, probe), draws))
        if self.way.central:
            return (ahead - quantity(model.at(Direction("normal", -step, probe), draws))) / (2 * step)
        return (ahead - quantity(model.at(Direction("normal", 0.0, probe), draws))) / step


class Way(NamedTuple):
    """One estimator, with what it is run with."""

    estimator: str
    central: bool = False
    step: float = 0.0

    def __str__(self) -> str:
        return self.estimator + (", central" if self.central else "") + (f", step {self.step:g}" if self.step else "")


def differences(central: bool, step: float | None) -> Way:
    """Finite differences along random directions."""
    return Way("finite_difference", central, step or (STEP_CENTRAL if central else STEP))


def exact_ways(estimator: str, central: bool, step: float | None) -> tuple[Way, ...]:
    """vjp and split, in the order of "auto", or the one that was named."""
    along = Way("split", True, step or STEP_ALONG)
    if estimator == "auto":
        return (Way("vjp"), Way("split"), along)
    return (Way("vjp"),) if estimator == "vjp" else (along if central else Way("split"),)


_WHY = {
    "noise": "forwards only, of noisy pixels.",
    "vjp": "exact, by double backward through math attention.",
    "split": "no double backward; exact in forward mode, to the step's order as a central difference.",
    "finite_difference": "forwards only, along random directions.",
    "hvp": "exact, by double backward through math attention.",
}


def _problem(way: Way, setting: Setting) -> str:
    """Why an estimator gives wrong numbers in a setting, and what to type instead; empty where it is right."""
    if way.estimator == "noise":
        return ""
    if way.estimator in ("vjp", "hvp"):
        other = "estimator='split'" if way.estimator == "vjp" else "what='curvature', estimator='finite_difference'"
        if setting.sharded:
            return f"under FSDP2 a double backward gives zero gradients, silently; use {other}."
        if setting.compiled:
            return f"torch.compile has no double backward; use {other}, or torch_compile=False."
        if setting.checkpointing and way.estimator == "hvp":
            return f"the composed layer norms are not recomputed under gradient checkpointing; use {other}."
        return ""
    if way.step == 0:
        what = "torch.compile" if setting.compiled else "gradient checkpointing" if setting.checkpointing else ""
        return f"forward mode does not run under {what}; use estimator='split', central=true." if what else ""
    if setting.half:
        return (
            f"the {' and the '.join(setting.half)} has weights of less than 32 bits, whose rounding a difference "
            "would take for a slope; load it in float32 (bf16=True keeps float32 weights), or use estimator='vjp'."
        )
    if setting.kinks:
        return (
            f"{' and '.join(setting.kinks)}: a difference of step {way.step:g} crosses the kinks and is no derivative "
            "(its gradient is off by 10 to 100 times); use an exact estimator: vjp, or split in forward mode."
        )
    return ""


def check_estimator(
    name: str, estimator: Any, central: bool, step: Any, valid: tuple[str, ...], table: str = ""
) -> None:
    """Raises ValueError for an estimator that does not fit the other options, or options that it does not read."""
    check_option(name, "estimator", estimator, estimator in ("auto", *valid), f"auto or {' or '.join(valid)}{table}")
    reads_step = estimator == "finite_difference" or (estimator == "auto" and valid[0] == "finite_difference")
    differs = "set estimator='finite_difference', or estimator='split' with central=true"
    check_option(name, "central", central, not central or reads_step or estimator == "split", f"false: {differs}")
    check_option(name, "step", step, step is None or reads_step or central, f"nothing: {differs}")


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
    if "labels" in batch:
        inner["labels"] = batch["labels"][rows]
    return inner
