"""From a model's logits to what results.json keeps of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_kdtl.evaluation.records import Bin


def diagnostics(logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """What tables and pictures of one model are made from.

    Returns:
        accuracy_interval; reliability, the bins of `ece`; confusion, {class: {class it was taken for: images}} without
        the zeros, so that a thousand classes fit.
    """
    from hf_kdtl.evaluation.metrics import Confusion

    metric = Confusion()
    metric.add_batch(predictions=logits, references=labels)
    confusion = metric.total["images"]
    return {
        "accuracy_interval": accuracy_interval(correct(logits, labels)),
        "reliability": reliability(logits, labels),
        "confusion": {
            names[i]: {names[j]: int(row[j]) for j in np.flatnonzero(row).tolist()} for i, row in enumerate(confusion)
        },
    }


def reliability(logits: Any, labels: Any) -> list[dict[str, Any]]:
    """What `ece` is made of, for a reliability diagram: one entry a bin, from the lowest confidence to the highest.

    Returns:
        {"from", "to", "images", "confidence", "accuracy"}; the last two are means over the bin's images, None where
        there are none.
    """
    from hf_kdtl.evaluation.metrics import BINS, ECE

    metric = ECE()
    metric.add_batch(predictions=logits, references=labels)
    sums = metric.total
    return [
        {"from": b / BINS, "to": (b + 1) / BINS, "images": int(n)}
        | {"confidence": float(c / int(n)) if n else None, "accuracy": int(r) / int(n) if n else None}
        for b, (n, c, r) in enumerate(zip(sums["images"], sums["confidence"], sums["right"], strict=True))
    ]


def correct(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each labelled image has its largest logit at its class, (n,)."""
    return (logits.argmax(1) == labels)[labels != -100]


def accuracy_interval(right: Sequence[bool] | np.ndarray, level: float = 0.95) -> list[float] | None:
    """The percentile bootstrap over images of an accuracy: what the choice of these images may have done to it.

    A resample of n images of which k are right has Binomial(n, k / n) right ones, so that the quantiles need no
    drawing. None where all or none are right: no resample differs, and an interval of no width would be a lie.

    >>> accuracy_interval([True] * 60 + [False] * 40)
    [0.5, 0.69]
    """
    from scipy.stats import binom

    n, k = len(right), int(np.sum(right))
    if not 0 < k < n:
        return None
    return [float(binom.ppf(q, n, k / n)) / n for q in ((1 - level) / 2, (1 + level) / 2)]


def calibration_interval(
    bins: Sequence[Bin], level: float = 0.95, resamples: int = 2000
) -> tuple[float, float] | None:
    """The percentile bootstrap over images of mean confidence minus accuracy, from the bins of `reliability`. [ours]

    An image's confidence is taken to be the mean of its bin, so that the bins are enough: what varies within a bin
    (1/15 wide) is small compared with the 0 or 1 of being correct. None where no image was counted, or none
    differs.

    >>> [round(bound, 2) for bound in calibration_interval([Bin(100, confidence=0.75, accuracy=0.6)])]
    [0.05, 0.25]
    """
    used = [one for one in bins if one.images]
    correct = [round(one.images * (one.accuracy or 0.0)) for one in used]
    counts = np.array([*correct, *(one.images - k for one, k in zip(used, correct, strict=True))])
    confidence = np.array([one.confidence or 0.0 for one in used])
    values = np.concatenate([confidence - 1, confidence])
    if np.count_nonzero(counts) < 2:
        return None
    n = counts.sum()
    means = np.random.default_rng(0).multinomial(n, counts / n, size=resamples) @ values / n
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def largest_disagreements(student: np.ndarray, teacher: np.ndarray, count: int = 12) -> list[int]:
    """The images on which two models' probabilities lie furthest apart, by Jensen-Shannon divergence, furthest first.

    Args:
        student, teacher: logits (n, K) in one class order.
    """
    from scipy.special import softmax

    p, q = (softmax(np.asarray(logits, dtype=np.float64), axis=1) for logits in (student, teacher))
    return np.argsort(-(_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2), kind="stable")[:count].tolist()


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(p, out=np.zeros_like(p), where=p > 0)).sum(1)
