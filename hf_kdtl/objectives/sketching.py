"""The student's side of sketches of input gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from hf_kdtl.functional.derivatives import OF
from hf_kdtl.functional.resample import precise
from hf_kdtl.functional.sketch import projection, signs, sketch
from hf_kdtl.models.forward.perturbations import Sketch
from hf_kdtl.objectives.base import Batch, check_option
from hf_kdtl.utils.options import is_integer


def checked_sketch(name: str, rows: Any, of: str | None, output: str, estimator: str) -> Sketch | None:
    """The sketch of an option, which is checked; None for none."""
    if rows is None:
        return None
    check_option(name, "sketch", rows, is_integer(rows), "a whole number of at least 1")
    what = "nothing: gradients are projected, so output='teacher_top1', of class outputs, estimator vjp or split"
    fits = output == "teacher_top1" and of in (None, *OF) and estimator in ("vjp", "split")
    check_option(name, "sketch", rows, fits, what)
    return Sketch(rows, of or "logit")


def sketching(spec: Sketch, batch: Batch, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Gradients (b, C, h, w) -> their sketches (b, r), with the signs of these images."""
    draws = batch.get("view_draws", batch["draws"])
    like = precise(x.detach())
    matrix = projection(spec.rows, like[0].numel(), draws.seed).to(like)
    return partial(sketch, matrix=matrix, signs=signs(draws, like))
