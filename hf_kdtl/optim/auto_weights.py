"""Weights of the loss's terms from the sizes of their gradients: w_j = r ||w_ref g_ref|| / ||g_j||.

That weights be chosen by the size of the gradients is the advice of RKD's author (issue 6 of its repository); the rule
is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1e-4  # of the reference's gradient: below, a term is at its minimum


class MeanGradient:
    """The mean over optimizer steps of one term's gradient by the student's parameters, and its standard error.

    With g_i the gradient (n,) of step i of N and g their mean: `norm` is ||g||, and `standard_error` is
    sqrt((1 - share) sum_i ||g_i - g||^2 / (N (N - 1))), the size that g would have by chance alone, where `share` is
    how much of one pass over the data the steps are: of a complete pass the mean is exact.

    Args:
        share: from 0 to 1; it may be set later.

    Memory: one float32 tensor of the size of the student.

    >>> mean = MeanGradient()
    >>> mean.add(torch.tensor([3.0, 0.0])); mean.add(torch.tensor([3.0, 8.0]))
    >>> mean.norm, mean.standard_error
    (5.0, 4.0)
    """

    def __init__(self, share: float = 0.0) -> None:
        self.sum: Tensor | None = None
        self.share = share
        self.squares, self.steps = 0.0, 0

    def add(self, gradient: Tensor) -> None:
        """The gradient (n,) of one optimizer step: over all its images, on all processes."""
        self.sum = gradient.clone() if self.sum is None else self.sum + gradient
        self.squares += _norm(gradient) ** 2
        self.steps += 1

    @property
    def norm(self) -> float:
        """||g||. Raises RuntimeError before any step."""
        if self.sum is None:
            raise RuntimeError("no step was added.")
        return _norm(self.sum) / self.steps

    @property
    def standard_error(self) -> float:
        """Of g, as a length."""
        if self.steps < 2:
            return 0.0
        apart = (1 - self.share) * (self.squares - self.steps * self.norm**2)
        return math.sqrt(max(0.0, apart) / (self.steps * (self.steps - 1)))


def auto_weights(
    gradients: Mapping[str, MeanGradient], ratios: Mapping[str, float], reference: str, weight: float
) -> dict[str, float]:
    """{key: weight} by which each term's gradient is `ratio` times as large as the reference's, weighted.

    Args:
        gradients: by key, of the reference and of every term of `ratios`, unweighted.
        ratios: r by key.
        reference: the key of the term that has a number.
        weight: that number, above 0.

    Raises:
        ValueError: for a term whose gradient is smaller than 1e-4 of the reference's or than its own standard error,
            and for a reference without a gradient.
    """
    size = gradients[reference].norm
    if not size:
        raise ValueError(
            f"objective {reference!r}: weights that are auto are measured against its gradient, which is 0 at the "
            "start. Give them numbers."
        )
    return {key: ratio * weight * size / _checked(key, gradients[key], size) for key, ratio in ratios.items()}


def _checked(key: str, gradient: MeanGradient, size: float) -> float:
    norm, error = gradient.norm, gradient.standard_error
    why = ""
    if norm < SMALLEST * size:
        why = f"less than {SMALLEST:g} of the {size:.3g} that it is measured against"
    elif norm < error:
        why = f"less than its standard error of {error:.3g} over {gradient.steps} optimizer steps"
    if why:
        raise ValueError(
            f"objective {key!r}: weight is auto, and its gradient is {norm:.3g}, {why}: it is at its minimum at the "
            f'start; give a number, such as "weight": 0.01.'
        )
    return norm


def record(gradients: Mapping[str, MeanGradient], weights: Mapping[str, float]) -> dict[str, Any]:
    """What was measured, as JSON data: {key: {"norm", "standard_error", "weight"}}."""
    return {
        key: {"norm": found.norm, "standard_error": found.standard_error, "weight": weights[key]}
        for key, found in gradients.items()
    }


def _norm(vector: Tensor) -> float:
    return torch.linalg.vector_norm(vector, dtype=torch.float64).item()
