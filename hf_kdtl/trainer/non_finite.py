"""The errors for losses and gradients that are not finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_kdtl.checkpoints.manifest import verify
from hf_kdtl.checkpoints.rotation import checkpoints
from hf_kdtl.models.teachers.source import called


def check_finite(trainer: Any, result: dict[str, Any], pixel_values: Tensor) -> None:
    """Raises FloatingPointError where the loss of a micro-batch, as `Distiller` returns it, is nan or infinite."""
    if not math.isfinite(loss := result["loss"].item()):
        counted, weights = result["counted"], trainer.distiller.weights
        terms = {k: (weights[k] * s / counted[k].clamp(min=1)).item() for k, s in result["sums"].items()}
        if unmeasured := unmeasured_weights(weights):
            raise ValueError(unmeasured)
        step, folder = trainer.state.global_step, trainer.args.output_dir
        broken = int((~pixel_values.flatten(1).isfinite().all(1)).sum())
        cure = f"{broken} images of the batch have pixel_values that are nan or infinite: check what makes them."
        cure = cure if broken else _broken_model(trainer, pixel_values)
        cure = cure or "Lower the learning rate or that term's weight, or check the data."
        raise non_finite_loss_error(step, loss, terms, folder, cure)


def unmeasured_weights(weights: dict[str, float]) -> str:
    """Why a total cannot be had yet; empty where every weight is a number."""
    unknown = [key for key, weight in weights.items() if math.isnan(weight)]
    return f"the weight of {', '.join(unknown)} is auto, which train() measures first: call that." if unknown else ""


@torch.no_grad()
def _broken_model(trainer: Any, pixel_values: Tensor) -> str:
    """Which model has weights or class outputs that are not finite, and what to do; empty where none has."""
    if trainer.sharded:  # the other processes would have to look, too
        return ""
    sources = {called(name): source for name, source in trainer.distiller.sources.items()}
    modules = {who: source.modules() for who, source in sources.items()}
    if trainer.state.global_step == 0:  # later it is what training made of them
        modules["the student"] = [trainer.model]
    for who, held in modules.items():
        named = (pair for module in held for pair in module.named_parameters())
        if bad := next((name for name, value in named if not value.isfinite().all()), None):
            return f"The weights of {who} are nan or infinite, such as {bad}: open another file of it."
    for who, source in sources.items():
        if (model := source.classifier()) is not None:
            with source.eval_context():
                logits = getattr(model(pixel_values=source.pixels(pixel_values)), "logits", None)
            if logits is not None and not logits.isfinite().all():
                dtype = str(logits.dtype).removeprefix("torch.")
                return f"The class outputs of {who} are nan or infinite ({dtype}): open it with dtype=torch.float32."
    return ""


def non_finite_loss_error(
    step: int, loss: float, terms: dict[str, float], output_dir: str | None, cure: str
) -> FloatingPointError:
    """The error for a loss that is nan or infinite. `terms` are weighted means over the micro-batch."""
    broken = [key for key, value in terms.items() if not math.isfinite(value)]
    largest = max(terms, key=lambda key: math.inf if math.isnan(terms[key]) else abs(terms[key]))
    shown = ", ".join(f"{key} {value:.4g}" for key, value in terms.items())
    return FloatingPointError(
        f"the loss is {loss} at step {step}: {', '.join(broken) or 'the sum of the terms'} is not finite. Weighted "
        f"terms: {shown}; the largest is {largest}. {_last_good(output_dir)} {cure}"
    )


def non_finite_gradient_error(step: int, norm: float, output_dir: str | None) -> FloatingPointError:
    """The error for a gradient that is nan or infinite where the loss was not."""
    return FloatingPointError(
        f"the gradient's norm is {norm} at step {step}; the weights were not changed. {_last_good(output_dir)} "
        "Lower the learning rate, or check the data."
    )


def _last_good(output_dir: str | None) -> str:
    complete = [c for c in checkpoints(output_dir or "") if not verify(c, contents=False)]
    return f"The latest complete checkpoint is {complete[-1]}." if complete else "No checkpoint was written yet."
