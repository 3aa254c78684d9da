"""The rule of the layers' rates, the slow way: exact fractions of the clipped line instead of a search for a."""

import math
from itertools import pairwise

EPS = 1e-6 * math.log(2)


def ratios(measurements, momentum=0.9, eps=EPS):
    """s after a list of measurements, each a list of D."""
    s = [1.0] * len(measurements[0])
    for d in measurements:
        mean = sum(d) / len(d)
        q = [(x + eps) / (mean + eps) for x in d]
        s = [momentum * a + (1 - momentum) * b for a, b in zip(s, q, strict=True)]
    return s


def multipliers(s, sizes, r_min=0.25, r_max=4.0):
    """clip(a s) with weighted mean 1: the mean is linear between the a at which some layer meets a bound."""
    corners = sorted({bound / x for x in s for bound in (r_min, r_max)})

    def clipped(a):
        return [min(max(a * x, r_min), r_max) for x in s]

    def mean(a):
        return sum(m * n for m, n in zip(clipped(a), sizes, strict=True)) / sum(sizes)

    for low, high in pairwise(corners):
        if mean(low) <= 1 <= mean(high):
            rise = mean(high) - mean(low)
            return clipped(low + (high - low) * ((1 - mean(low)) / rise if rise else 0))
    raise AssertionError("the mean never crosses 1")
