"""From a model's logits to what results.json keeps of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import softmax
from scipy.stats import binom

from hf_kdtl.evaluation.metrics import METRICS, reliability, scores


def paired_scores(
    logits: np.ndarray, labels: np.ndarray, teacher: np.ndarray | None = None, baseline: np.ndarray | None = None
) -> dict[str, float]:
    """`scores` of a model, and what the teacher's and the baseline's logits on the same images add to them.

    With a teacher agreement, teacher_kl and agreement_teacher_wrong; with a baseline negative_flip_rate. All logits
    (n, K) in one class order.
    """
    found = scores(logits, labels)
    if teacher is not None:
        for name in ("agreement", "teacher_kl"):
            found |= METRICS[name]().compute(predictions=logits, references=teacher)
        name = "agreement_teacher_wrong"
        found |= METRICS[name]().compute(predictions=logits, references=teacher, labels=labels)
    if baseline is not None:
        name = "negative_flip_rate"
        found |= METRICS[name]().compute(predictions=logits, labels=labels, baseline=baseline)
    return found


def diagnostics(logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """What tables and pictures of one model are made from.

    Returns:
        accuracy_interval; reliability, the bins of `ece`; confusion, {class: {class it was taken for: images}} without
        the zeros, so that a thousand classes fit.
    """
    confusion = METRICS["confusion"]().compute(predictions=logits, references=labels)["confusion"]
    return {
        "accuracy_interval": accuracy_interval(correct(logits, labels)),
        "reliability": reliability(logits, labels),
        "confusion": {
            names[i]: {names[j]: int(row[j]) for j in np.flatnonzero(row).tolist()} for i, row in enumerate(confusion)
        },
    }


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
    n, k = len(right), int(np.sum(right))
    if not 0 < k < n:
        return None
    return [float(binom.ppf(q, n, k / n)) / n for q in ((1 - level) / 2, (1 + level) / 2)]


def largest_disagreements(student: np.ndarray, teacher: np.ndarray, count: int = 12) -> list[int]:
    """The images on which two models' probabilities lie furthest apart, by Jensen-Shannon divergence, furthest first.

    Args:
        student, teacher: logits (n, K) in one class order.
    """
    p, q = (softmax(np.asarray(logits, dtype=np.float64), axis=1) for logits in (student, teacher))
    return np.argsort(-(_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2), kind="stable")[:count].tolist()


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(p, out=np.zeros_like(p), where=p > 0)).sum(1)
