"""What can be concluded from a few seeds, or from the images of one seed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, standard deviation over n - 1); None for one value.

    >>> mean_and_std([1.0, 2.0, 3.0])
    (2.0, 1.0)
    """
    return fmean(values), stdev(values) if len(values) > 1 else None


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of a mean; None for one value, or values without spread.

    >>> [round(bound, 3) for bound in mean_interval([1.0, 2.0, 3.0])]
    [-0.484, 4.484]
    """
    mean, sd = mean_and_std(values)
    if not sd:
        return None
    from scipy.stats import t

    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * sd / len(values) ** 0.5
    return mean - half, mean + half


def paired_difference(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> dict[str, Any]:
    """a - b over runs that are paired by seed: mean, standard deviation, Student's t interval and test.

    With d_i = a_i - b_i over n seeds the interval is mean(d) +- t_(n - 1) sd(d) / sqrt(n), and p_value the two-sided
    probability of a mean at least as far from 0 where there is no difference. Both are exact for normal differences;
    a bootstrap of 3 seeds would cover 74 % and not 95 %.

    Returns:
        number (n), mean, sd, interval [low, high], p_value, note. Where the seeds show no spread, because there is
        one or because all differ by the same amount (scores of few images do), interval and p_value are None and the
        note says so.

    Raises:
        ValueError: when the two are not of the same seeds, or there is none.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"found {len(a)} and {len(b)} values, expected one of each for every seed, at least one.")
    n, (mean, sd) = len(a), mean_and_std([x - y for x, y in zip(a, b, strict=True)])
    none = {"number": n, "mean": mean, "sd": sd, "interval": None, "p_value": None}
    if sd is None:
        return none | {"note": "one seed: no interval"}
    if sd <= 1e-12 * max(map(abs, [*a, *b])):  # equal but for rounding
        return none | {"note": f"the same difference in all {n} seeds, no spread: no interval"}
    from scipy.stats import t

    error = sd / n**0.5
    half = float(t.ppf((1 + level) / 2, n - 1)) * error
    return none | {
        "interval": [mean - half, mean + half],
        "p_value": float(2 * t.sf(abs(mean) / error, n - 1)),
        "note": f"{level:.0%} t interval over {n} seeds",
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of m tests: p-values of which each may be held against the level as if it were the only one.

    The i-th smallest (i = 0 .. m - 1) becomes the largest of (m - j) p_j over j <= i, at most 1. The chance that any
    of the tests without an effect falls below the level is then at most the level, however the tests hang together.

    >>> holm([0.25, 0.0625, 0.5])
    [0.5, 0.1875, 0.5]
    """
    found, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        found[index] = highest
    return found


def images_difference(
    a: Sequence[bool] | np.ndarray, b: Sequence[bool] | np.ndarray, level: float = 0.95, resamples: int = 2000
) -> dict[str, Any]:
    """Accuracy of two trained models on the same images, a - b: what the choice of the images may have done to it.

    The interval is the percentile bootstrap over images; p_value is McNemar's exact test: of the images that only one
    of the two gets right, each model has half where there is no difference (two-sided binomial). Neither says
    anything about another seed: they compare these two models, not the methods they were trained by.

    Args:
        a, b: (n,) whether the model is right, image by image.
        resamples: draws of n images; always the same ones.

    Returns:
        number (n), mean, only_a and only_b (images that only one gets right), interval, p_value. Without any such
        image nothing spreads and the interval is None.

    Cost: resamples x n draws; a second or so for 10,000 images.

    Raises:
        ValueError: when there is no image, or not the same number of them.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"found {len(a)} and {len(b)} images, expected the same ones, at least one.")
    d = np.asarray(a, dtype=np.int8) - np.asarray(b, dtype=np.int8)
    only_a, only_b = int((d > 0).sum()), int((d < 0).sum())
    found = {"number": len(d), "mean": float(d.mean()), "only_a": only_a, "only_b": only_b}
    if not (d != d[0]).any():
        return found | {"interval": None, "p_value": _mcnemar(only_a, only_b)}
    from scipy.stats import bootstrap

    drawn = bootstrap(
        (d,), np.mean, n_resamples=resamples, batch=max(1, 2**20 // len(d)), confidence_level=level,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return found | {"interval": [float(drawn.low), float(drawn.high)], "p_value": _mcnemar(only_a, only_b)}


def _mcnemar(only_a: int, only_b: int) -> float:
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
