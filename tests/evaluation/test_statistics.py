import numpy as np
import pytest
from scipy import stats

from hf_kdtl.evaluation.statistics import paired_difference, spread


def test_by_hand():
    # d = 1, 2, 3: mean 2, sd 1, t(2, .975) = 4.302653, half width 4.302653 / sqrt(3) = 2.484138
    found = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (found["number"], found["mean"], found["sd"]) == (3, 2.0, 1.0)
    assert found["interval"] == pytest.approx([2 - 2.484138, 2 + 2.484138], abs=1e-6)
    assert found["note"] == "95% t interval over 3 seeds"


def test_against_scipy():
    a, b = np.random.default_rng(0).normal(size=(2, 6))
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert paired_difference(list(a), list(b))["interval"] == pytest.approx([expected.low, expected.high])


def test_one_seed_has_no_interval():
    found = paired_difference([0.9], [0.8])
    assert found["mean"] == pytest.approx(0.1)
    assert (found["sd"], found["interval"], found["note"]) == (None, None, "one seed: no interval")
    assert spread([0.5]) == (0.5, None)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_only_pairs(a, b):
    with pytest.raises(ValueError, match="one of each for every seed"):
        paired_difference(a, b)
