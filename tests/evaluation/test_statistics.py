import doctest

import numpy as np
import pytest
from scipy import stats

from hf_kdtl.evaluation import statistics
from hf_kdtl.evaluation.statistics import holm, images_difference, mean_and_std, paired_difference


def test_doctests():
    found = doctest.testmod(statistics)
    assert found.attempted > 1 and found.failed == 0


def test_by_hand():
    # d = 1, 2, 3: mean 2, sd 1, t(2, .975) = 4.302653, half width 4.302653 / sqrt(3) = 2.484138
    found = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (found["number"], found["mean"], found["sd"]) == (3, 2.0, 1.0)
    assert found["interval"] == pytest.approx([2 - 2.484138, 2 + 2.484138], abs=1e-6)
    assert found["note"] == "95% t interval over 3 seeds"
    # t = 2 sqrt(3); of two degrees of freedom P(|T| > t) = 1 - t / sqrt(2 + t^2)
    assert found["p_value"] == pytest.approx(1 - 12**0.5 / 14**0.5)


@pytest.mark.parametrize("shift", [0.0, 2.0, -2.0])
def test_against_scipy(shift):
    a, b = np.random.default_rng(0).normal(loc=[[shift], [0]], size=(2, 6))
    expected = stats.ttest_rel(a, b)
    found, bounds = paired_difference(list(a), list(b)), expected.confidence_interval(0.95)
    assert found["interval"] == pytest.approx([bounds.low, bounds.high])
    assert found["p_value"] == pytest.approx(expected.pvalue)


def test_one_seed_has_no_interval():
    found = paired_difference([0.9], [0.8])
    assert found["mean"] == pytest.approx(0.1)
    assert (found["sd"], found["interval"], found["note"]) == (None, None, "one seed: no interval")
    assert found["p_value"] is None and mean_and_std([0.5]) == (0.5, None)


@pytest.mark.parametrize("shift", [0.0, 0.01])
def test_without_spread_there_is_no_interval(shift):
    # As rounded: 0.94 - 0.93 and 0.95 - 0.94 differ in their last digits.
    found = paired_difference([0.93 + shift, 0.94 + shift, 0.95 + shift], [0.93, 0.94, 0.95])
    assert found["mean"] == pytest.approx(shift) and found["interval"] is found["p_value"] is None
    assert found["note"] == "the same difference in all 3 seeds, no spread: no interval"
    assert paired_difference([0.94, 0.95], [0.93, 0.94])["interval"] is None
    assert paired_difference([1e-6, 3e-6], [0.0, 1e-6])["interval"] is not None


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_only_pairs(a, b):
    with pytest.raises(ValueError, match="one of each for every seed"):
        paired_difference(a, b)


# ---- Many comparisons ----


def step_down(p_values, level):
    """Holm's procedure in words: from the smallest p on, reject while p <= level / (tests that are left)."""
    rejected, left = [False] * len(p_values), len(p_values)
    for index in sorted(range(len(p_values)), key=lambda i: p_values[i]):
        if p_values[index] > level / left:
            break
        rejected[index], left = True, left - 1
    return rejected


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []


def test_holm_rejects_what_the_procedure_rejects():
    draw = np.random.default_rng(0)
    for _ in range(200):
        p = draw.beta(0.3, 3, size=draw.integers(1, 8)).tolist()
        for level in (0.01, 0.05, 0.3):
            assert [adjusted <= level for adjusted in holm(p)] == step_down(p, level)


# ---- Images of one seed ----


def test_mcnemar_by_hand():
    # Only a is right on three images, only b on none: 2 / 2^3. The images on which both agree do not matter.
    a, b = np.array([1, 1, 1, 1, 0, 1], bool), np.array([0, 0, 0, 1, 0, 1], bool)
    found = images_difference(a, b)
    assert (found["number"], found["only_a"], found["only_b"], found["mean"]) == (6, 3, 0, 0.5)
    assert found["p_value"] == 0.25 and images_difference(b, a)["p_value"] == 0.25
    assert images_difference(b, a)["mean"] == -0.5 and images_difference(b, a)["only_b"] == 3


def test_the_bootstrap_over_images_is_that_of_the_mean():
    draw = np.random.default_rng(1)
    a, b = draw.random((2, 3000)) < [[0.85], [0.8]]
    found = images_difference(a, b)
    d = a.astype(float) - b
    half = 1.96 * d.std() / 3000**0.5
    assert found["interval"] == pytest.approx([d.mean() - half, d.mean() + half], abs=0.1 * half)
    assert found == images_difference(a, b)
    wider = images_difference(a, b, level=0.99)["interval"]
    assert wider[0] < found["interval"][0] and wider[1] > found["interval"][1]


def test_images_without_a_difference():
    found = images_difference([True, False], [True, False])
    assert (found["mean"], found["interval"], found["p_value"]) == (0.0, None, 1.0)
    for a, b in (([], []), ([True], [True, False])):
        with pytest.raises(ValueError, match="expected the same ones, at least one"):
            images_difference(a, b)


def test_images_false_positives_at_the_nominal_level():
    draw = np.random.default_rng(2)
    found = [images_difference(*(draw.random((2, 400)) < 0.8), resamples=400) for _ in range(400)]
    outside = np.mean([one["interval"][0] > 0 or one["interval"][1] < 0 for one in found])
    # 400 draws of probability 0.05: standard deviation 0.011. The exact test is a little below its level.
    assert 0.02 < outside < 0.09
    assert 0.01 < np.mean([one["p_value"] <= 0.05 for one in found]) < 0.08
