"""Curves continued to other lengths, and gains in labels."""

import doctest
import math

import pytest

from hf_kdtl.evaluation import learning_curves
from hf_kdtl.evaluation.learning_curves import at_length, labels_worth


def test_examples():
    assert doctest.testmod(learning_curves) == (0, 2)


def test_a_line_over_log_steps_is_followed_exactly_and_not_too_far():
    curve = [[step, 0.3 + 0.05 * math.log2(step)] for step in (4, 8, 16)]
    assert at_length(curve, 32) == pytest.approx(0.3 + 0.05 * 5) and at_length(curve, 16) == curve[-1][1]
    assert at_length(curve, 10**6) == at_length(curve, 64) == pytest.approx(0.6)
    assert at_length([[5, 0.4]], 500) == 0.4


def test_a_gain_equals_the_labels_that_alone_would_need_for_it():
    labels, scores = [5, 10, 20], [0.2 + 0.1 * math.log2(n) for n in (5, 10, 20)]
    for gain in (-0.05, 0.0, 0.03, 0.1):
        more = labels_worth(labels, scores, gain)
        assert 0.2 + 0.1 * math.log2(20 + more) == pytest.approx(scores[-1] + gain)
    assert labels_worth(labels, scores, 0.5) == math.inf
    assert labels_worth(labels, [0.5, 0.4, 0.3], 0.1) is None
