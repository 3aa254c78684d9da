"""Which estimators of derivatives exist, where each would be wrong, and what to take instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from hf_kdtl.models.run_context import RunContext
from hf_kdtl.objectives.base import check_option

Estimator = Literal["auto", "vjp", "split", "finite_difference", "hvp"]
# Where the error of a trained ViT's gradient is least: benchmarks/estimators.py. Differences take x + step u with
# u ~ N(0, 1) in every pixel; the central difference inside split has a length, along u / ||u||.
STEP, STEP_CENTRAL, STEP_ALONG = 0.0005, 0.002, 0.03


class EstimatorChoice(NamedTuple):
    """One estimator with its options."""

    estimator: str
    central: bool = False
    step: float = 0.0
    beside: str = ""
    """Other options that it goes with, as they are typed."""

    def __str__(self) -> str:
        return self.estimator + (", central" if self.central else "") + (f", step {self.step:g}" if self.step else "")

    @property
    def typed(self) -> str:
        """What to type for it."""
        central = ", central=true" if self.central and self.estimator == "split" else ""
        return f"{self.beside}estimator={self.estimator!r}{central}"


WHY = {
    "noise": "forwards only, of noisy pixels.",
    "vjp": "exact, by double backward through math attention.",
    "split": "no double backward; exact in forward mode, to the step's order as a central difference.",
    "finite_difference": "forwards only, along random directions.",
    "hvp": "exact, by double backward through math attention and composed layer norms.",
}


def choices_of(valid: Sequence[str], central: bool = False, step: float | None = None) -> tuple[EstimatorChoice, ...]:
    """The estimators of these names as they would be run, split in both its forms unless one is asked for."""
    found: list[EstimatorChoice] = []
    for name in valid:
        if name == "finite_difference":
            found.append(EstimatorChoice(name, central, step or (STEP_CENTRAL if central else STEP)))
        elif name == "split":
            found += [EstimatorChoice(name)] * (not central) + [EstimatorChoice(name, True, step or STEP_ALONG)]
        else:
            found.append(EstimatorChoice(name))
    return tuple(found)


def wanted_choices(
    estimator: str, valid: Sequence[str], central: bool, step: float | None
) -> tuple[EstimatorChoice, ...]:
    """What an `estimator` option allows, in the order in which it is taken: "auto" leaves the choice among vjp and
    split, and takes no finite difference unless that is what the table begins with."""
    if estimator == "auto":
        names = [name for name in valid if name != "finite_difference"]
        return choices_of(valid[:1] if valid[0] == "finite_difference" else names, central, step)
    return choices_of([estimator], central, step)[:1]


def choose_estimator(
    wanted: Sequence[EstimatorChoice], alternatives: Sequence[EstimatorChoice], context: RunContext
) -> tuple[EstimatorChoice, str]:
    """The first of the wanted choices that is right in a setting, and why it was taken.

    Raises:
        ValueError: when none is, with the first of the alternatives that is right, and what to type for it.
    """
    wrong = problem(wanted[0], context)
    for choice in wanted:
        if not problem(choice, context):
            return choice, WHY[choice.estimator] + (f" Not {wanted[0]}: {wrong}." if wrong else "")
    instead = next((f"use {choice.typed}" for choice in alternatives if not problem(choice, context)), None)
    off = {
        "torch.compile": context.compiled,
        "gradient checkpointing": context.checkpointing,
        "FSDP2": context.sharded,
    }
    without = " and ".join(what for what, on in off.items() if on) or "it"
    raise ValueError(f"{wrong}; {instead or f'no estimator is right here: do without {without}'}.")


def problem(choice: EstimatorChoice, context: RunContext) -> str:
    """Why an estimator gives wrong numbers in a setting; empty where it is right."""
    if choice.estimator == "noise":
        return ""
    if choice.estimator in ("vjp", "hvp"):
        if context.sharded:
            return "under FSDP2 a double backward gives zero gradients, silently"
        if context.compiled:
            return "torch.compile has no double backward"
        if context.checkpointing and choice.estimator == "hvp":
            return "composed layer norms are not recomputed under gradient checkpointing"
        return ""
    if choice.step == 0:
        what = "torch.compile" if context.compiled else "gradient checkpointing" if context.checkpointing else ""
        return f"forward mode does not run under {what}" if what else ""
    if context.low_precision:
        return (
            f"{' and '.join(context.low_precision)} (less than 32 bits), whose rounding a difference would take "
            "for a slope (load it in float32; bf16=True keeps float32 weights)"
        )
    if context.tf32:
        return "CUDA's TF32 is on, whose rounding a difference would take for a slope (set tf32=False)"
    if context.nonsmooth_layers:
        return (
            f"{' and '.join(context.nonsmooth_layers)}: a difference crosses the kinks and is no derivative (its "
            "gradient is off by 10 to 100 times)"
        )
    return ""


def missing_derivative(error: Exception) -> str:
    """What to do where an operation of the model has no second derivative in torch; empty for another error."""
    if not ("derivative for" in str(error) and "not implemented" in str(error)):
        return ""
    return (
        f"an operation of the student or the teacher has no second derivative in torch ({error}). Use an objective "
        "that runs forwards alone: noisy_kd, or jacobian with distance='squared' (or 'fisher'), output='all', "
        "estimator='finite_difference'."
    )


def check_estimator(
    name: str, estimator: Any, central: bool, step: Any, valid: tuple[str, ...], table: str = ""
) -> None:
    """Raises ValueError for an estimator that does not fit the other options, or options that it does not read."""
    check_option(name, "estimator", estimator, estimator in ("auto", *valid), f"auto or {' or '.join(valid)}{table}")
    reads_step = estimator == "finite_difference" or (estimator == "auto" and valid[0] == "finite_difference")
    named = ["estimator='finite_difference'"] * ("finite_difference" in valid)
    differs = "set " + " or ".join([*named, *["estimator='split', central=true"] * ("split" in valid)])
    check_option(name, "central", central, not central or reads_step or estimator == "split", f"false: {differs}")
    check_option(name, "step", step, step is None or reads_step or central, f"nothing: {differs}")
