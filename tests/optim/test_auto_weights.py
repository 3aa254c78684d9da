"""Weights from gradient sizes, against numbers one can follow, and what is refused."""

import math

import pytest
import torch

from hf_kdtl.optim.auto_weights import MeanGradient, auto_weights


def of(*steps):
    mean = MeanGradient()
    for step in steps:
        mean.add(torch.tensor(step))
    return mean


def slow(steps):
    """Norm of the mean and its standard error, coordinate by coordinate."""
    n, means = len(steps), [math.fsum(column) / len(steps) for column in zip(*steps, strict=True)]
    variance = math.fsum((v - m) ** 2 for step in steps for v, m in zip(step, means, strict=True)) / (n - 1)
    return math.sqrt(math.fsum(m * m for m in means)), math.sqrt(variance / n)


def test_mean_and_error_are_the_slow_ones():
    steps = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) + 0.3
    found, (norm, error) = of(*steps.tolist()), slow(steps.double().tolist())
    assert found.norm == pytest.approx(norm, rel=1e-6) and found.standard_error == pytest.approx(error, rel=1e-5)
    assert of([3.0, 4.0]).standard_error == 0.0  # one step has no spread


def test_each_weighted_gradient_is_ratio_times_the_references():
    gradients = {"task": of([3.0, 4.0]), "kd": of([0.0, 2.0]), "at": of([1e-3, 0.0])}
    found = auto_weights(gradients, {"kd": 1.0, "at": 0.5}, "task", 0.2)
    assert found == {"kd": pytest.approx(0.5), "at": pytest.approx(500.0)}
    scaled = auto_weights(gradients | {"kd": of([0.0, 200.0])}, {"kd": 1.0}, "task", 0.2)
    assert 100 * scaled["kd"] == pytest.approx(found["kd"], rel=1e-12)


@pytest.mark.parametrize(
    "gradient, why",
    [(of([0.0]), "less than 0.0001 of the 5"), (of([4e-4]), "less than 0.0001"),
     (of([1.0], [-0.9], [1.0], [-0.9]), "less than its standard error")],
)  # fmt: skip
def test_a_term_at_its_minimum_is_refused(gradient, why):
    with pytest.raises(ValueError, match=f"'kd'.*{why}.*at its minimum at the start; give a number"):
        auto_weights({"task": of([5.0]), "kd": gradient}, {"kd": 1.0}, "task", 1.0)


def test_a_reference_without_a_gradient_is_refused():
    with pytest.raises(ValueError, match=r"'task'.*is 0 at the start"):
        auto_weights({"task": of([0.0]), "kd": of([1.0])}, {"kd": 1.0}, "task", 1.0)


def test_of_a_complete_pass_the_mean_is_exact():
    half, passed = of([1.0], [-0.9]), of([1.0], [-0.9])
    assert half.norm < half.standard_error
    half.share, passed.share = 0.5, 1.0
    assert half.standard_error == pytest.approx(0.95 / math.sqrt(2), rel=1e-6) and passed.standard_error == 0.0
    assert auto_weights({"task": of([5.0]), "kd": passed}, {"kd": 1.0}, "task", 1.0)["kd"] == pytest.approx(
        100, rel=1e-5
    )
