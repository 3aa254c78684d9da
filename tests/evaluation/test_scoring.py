"""What is kept of logits, against slow versions."""

import doctest
import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.special import softmax

from hf_kdtl.evaluation import scoring
from hf_kdtl.evaluation.metrics import paired_scores
from hf_kdtl.evaluation.records import Bin
from hf_kdtl.evaluation.scoring import (
    accuracy_interval,
    calibration_interval,
    correct,
    diagnostics,
    largest_disagreements,
    reliability,
)
from hf_kdtl.utils import text

NAMES = ["cat", "dog", "emu"]


def random(seed, n=40):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(n, 3)) * 2, draw.integers(0, 3, n)


def test_doctests():
    assert doctest.testmod(scoring).failed == doctest.testmod(text).failed == 0


def test_accuracy_interval_is_the_bootstrap():
    right = np.arange(80) < 52
    draw = np.random.default_rng(0)
    means = [right[draw.integers(0, 80, 80)].mean() for _ in range(20_000)]
    low, high = accuracy_interval(right)
    # A resample's mean moves in steps of 1/80, and its quantile may fall on the next one.
    assert np.abs(np.quantile(means, [0.025, 0.975]) - [low, high]).max() <= 1.01 / 80
    assert low < 52 / 80 < high
    narrow = accuracy_interval(right, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_no_interval_where_no_image_differs():
    assert accuracy_interval([True] * 5) is None and accuracy_interval(np.zeros(5, bool)) is None


def test_unlabelled_images_are_neither_right_nor_wrong():
    assert correct(np.eye(3), np.array([0, -100, 1])).tolist() == [True, False]


def test_paired_scores_adds_what_it_is_given():
    (logits, labels), (teacher, _), (baseline, _) = random(0), random(1), random(2)
    alone = paired_scores(logits, labels)
    both = paired_scores(logits, labels, teacher, baseline)
    assert "agreement" not in alone and "negative_flip_rate" not in alone
    assert alone.items() <= both.items()
    assert set(both) - set(alone) == {"agreement", "teacher_kl", "agreement_teacher_wrong", "negative_flip_rate"}
    assert both["agreement"] == np.mean(logits.argmax(1) == teacher.argmax(1))
    flips = sum(b == y != s for s, b, y in zip(logits.argmax(1), baseline.argmax(1), labels, strict=True))
    assert both["negative_flip_rate"] == flips / 40 > 0
    assert paired_scores(logits, labels, logits, logits)["negative_flip_rate"] == 0


def test_diagnostics_count_every_labelled_image_once():
    logits, labels = random(3)
    labels[labels == 2] = 1  # a class without images
    labels[:4] = -100
    found = diagnostics(logits, labels, NAMES)
    slow = {name: {} for name in NAMES}
    for row, label in zip(logits.argmax(1), labels, strict=True):
        if label >= 0:
            slow[NAMES[label]][NAMES[row]] = slow[NAMES[label]].get(NAMES[row], 0) + 1
    assert found["confusion"] == slow and slow["emu"] == {}
    assert sum(one["images"] for one in found["reliability"]) == 36
    right = sum(slow[name].get(name, 0) for name in NAMES) / 36
    assert found["accuracy_interval"][0] < right < found["accuracy_interval"][1]


@pytest.mark.parametrize("scale", [1, 1e4])
def test_largest_disagreements(scale):
    student, teacher = (scale * random(seed)[0] for seed in (4, 5))
    teacher[7] = student[7]

    def divergence(i):
        p, q = softmax(student[i]), softmax(teacher[i])
        terms = ((a, (a + b) / 2) for one, other in ((p, q), (q, p)) for a, b in zip(one, other, strict=True))
        return sum(a * math.log(a / m) for a, m in terms if a > 0) / 2

    found = largest_disagreements(student, teacher, 40)
    values = [divergence(i) for i in found]
    assert sorted(found) == list(range(40))
    assert all(a >= b - 1e-9 for a, b in pairwise(values))
    assert largest_disagreements(student, teacher, 3) == found[:3]
    if scale == 1:
        assert found[-1] == 7 and values[0] > 0.1


@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0])
def test_the_interval_of_the_bins_is_the_bootstrap_over_the_images(scale):
    logits, labels = random(6, n=400)
    logits = scale * (logits + 1.5 * np.eye(3)[labels])
    confidence, right = softmax(logits, axis=1).max(1), logits.argmax(1) == labels
    draw = np.random.default_rng(1)
    rows = draw.integers(0, 400, (4000, 400))
    slow = np.quantile((confidence - right)[rows].mean(1), [0.025, 0.975])
    found = calibration_interval([Bin.of(one) for one in reliability(logits, labels)])
    assert np.abs(found - slow).max() < 0.006  # of a width of 0.08: two bootstraps differ by about as much
    assert found[0] < (confidence - right).mean() < found[1]


def test_no_calibration_interval_where_nothing_varies():
    assert calibration_interval([]) is None and calibration_interval([Bin(5, 0.9, 1.0)]) is None
