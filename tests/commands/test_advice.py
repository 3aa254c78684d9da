"""Warnings when training has ended: each exactly when it should be."""

import pytest

from hf_kdtl.commands.common.advice import chance, still_learning, warnings

FALLS = [2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 0.8, 0.6]
FLAT = [2.0, 1.5, 1.2, 1.1, 1.02, 1.01, 1.0, 0.99]
UP, LEVEL = [0.2, 0.3, 0.4, 0.5], [0.2, 0.5, 0.5, 0.505]


def log(losses, scores=()):
    return [{"loss": loss} for loss in losses] + [{"eval_accuracy": score} for score in scores]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (log(FALLS, UP), True),
        (log(FALLS), True),
        (log(FALLS, LEVEL), False),  # it learns its training images by heart
        (log(FLAT, UP), False),
        (log(FALLS[:7], UP), False),  # too few points to tell
        ([], False),
    ],
)
def test_whether_it_was_still_learning(entries, expected):
    assert still_learning(entries) is expected


def test_chance_is_the_largest_class_and_two_standard_errors():
    assert chance([0, 0, 1, 1, -100]) == pytest.approx(0.5 + 2 * (0.25 / 4) ** 0.5)
    assert chance([2] * 90 + [1] * 10) == pytest.approx(0.9 + 2 * (0.09 / 100) ** 0.5)


@pytest.mark.parametrize(
    ("teacher", "student", "curves", "message"),
    [
        (0.9, 0.85, FLAT, []),
        (0.9, 0.79, FLAT, ["The student is far below"]),
        (0.9, 0.81, FALLS, ["The loss still falls"]),
        (0.9, 0.5, FALLS, ["The loss still falls", "The student is far below"]),
        (0.3, 0.1, FLAT, ["The teacher is at chance"]),
        (0.31, 0.3, FLAT, []),
        (None, 0.1, FLAT, []),
        (0.2, None, FLAT, ["The teacher is at chance"]),
    ],
)
def test_each_warning_when_it_should_and_what_to_type(teacher, student, curves, message):
    printed = warnings({"distilled-seed1": log(curves, UP)}, teacher, student, 0.3, steps=100, images=500)
    assert [text for text, start in zip(printed, message, strict=True) if not text.startswith(start)] == []
    assert all("--" in text or "hf-kdtl" in text or "Train longer first" in text for text in printed)
    if "The loss still falls" in message:
        assert "--max_steps 200" in printed[0]


def test_few_validation_images_show_nothing_of_a_teacher():
    for number, starts in ((5, "Validation has 5 labelled images: too few"), (30, "The teacher is at chance")):
        (printed,) = warnings({"distilled-seed1": log(FLAT, UP)}, 0.3, 0.1, 0.838, steps=100, images=number)
        assert printed.startswith(starts) and ("83.8%" in printed) == (number == 30)
