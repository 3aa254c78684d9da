"""What short runs, and runs with fewer labels, say about longer ones and more labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

OCTAVES = 2.0  # how far a trend is followed: to four times the length that was trained
MOST = 16.0  # times as many labels, beyond which no number is given


def at_length(curve: Sequence[Sequence[float]], steps: float, octaves: float = OCTAVES) -> float:
    """A score at another length of training: the last one, moved by the trend over log2(step).

    The trend is the least-squares line through the curve, followed for at most `octaves` doublings: a curve that
    levels off would be overrated by more.

    Args:
        curve: [[step, score], ...], at least one.

    >>> at_length([[10, 0.5], [20, 0.6], [40, 0.7]], 80), round(at_length([[10, 0.5], [20, 0.6]], 10_000), 6)
    (0.8, 0.8)
    """
    last, score = curve[-1]
    if len(curve) < 2 or steps <= last:
        return score
    slope = np.polyfit([math.log2(step) for step, _ in curve], [value for _, value in curve], 1)[0]
    return float(round(score + slope * min(math.log2(steps / last), octaves), 12))


def labels_worth(labels: Sequence[float], scores: Sequence[float], gain: float) -> float | None:
    """How many labels a class beyond the last raise the score by `gain`, by the line score = a + b log2(labels).

    Args:
        labels: numbers of labels a class that a model was trained with, alone, the largest last.
        scores: what it reached with each.

    Returns:
        None where the score does not rise with the labels; inf beyond 15 times as many.

    >>> labels_worth([10, 20, 40], [0.5, 0.6, 0.7], 0.1)
    40.0
    """
    slope = np.polyfit(np.log2(labels), scores, 1)[0]
    if slope <= 1e-9:
        return None
    times = 2 ** min(gain / slope, 64.0)
    return float("inf") if times > MOST else float(round(labels[-1] * (times - 1), 6))
