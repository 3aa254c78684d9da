"""Divergences: the doctests, and the precision they promise."""

import doctest
import math

import pytest
import torch

from hf_kdtl.functional import divergences as d


def test_doctests():
    assert doctest.testmod(d).failed == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_computed_in_float32(dtype):
    z = (torch.randn(4, 100) * 8).to(dtype)
    got = d.log_probabilities(z, 2.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.log_softmax(z.double() / 2, -1), rtol=1e-5, atol=1e-5)
    assert d.cross_entropy(z, torch.tensor([0, 1, 2, -100])).dtype == torch.float32
    assert d.standardize(z).dtype == torch.float32


@pytest.mark.parametrize("temperature", [1e3, 1e4, 1e6])
def test_high_temperatures_have_their_limit(temperature):
    """tau^2 KL -> var(z_S - z_T) / 2 over the classes, whose gradient is its centred difference / K."""
    z_s, z_t = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
    value = temperature**2 * d.kl(d.log_probabilities(z_t, temperature), d.log_probabilities(z_s, temperature))
    apart = (z_s - z_t).detach().double()
    torch.testing.assert_close(value, apart.var(-1, correction=0) / 2, rtol=5e-3, atol=0)
    (gradient,) = torch.autograd.grad(value.sum(), z_s)
    torch.testing.assert_close(gradient, ((apart - apart.mean(-1, keepdim=True)) / 10).float(), rtol=5e-2, atol=1e-4)


def test_jensen_shannon_is_bounded_and_symmetric_at_one_half():
    p, q = (torch.log_softmax(30 * torch.randn(50, 6, dtype=torch.float64), -1) for _ in range(2))
    value = d.jensen_shannon(p, q)
    assert (value >= 0).all() and (value <= math.log(2) + 1e-12).all() and value.max() > 0.6
    torch.testing.assert_close(value, d.jensen_shannon(q, p))


def test_a_constant_row_standardises_to_zero_with_zero_gradient():
    z = torch.full((2, 5), 3.0, requires_grad=True)
    value = d.standardize(z)
    assert (value == 0).all()
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert torch.isfinite(gradient).all()


HARD, SOFT = torch.tensor([0, 2, -100, 1]), torch.tensor([[0.25, 0.5, 0.25], [0.0, 0.0, 1.0], [-100.0] * 3])


@pytest.mark.parametrize(
    "labels",
    [
        HARD,
        HARD.int(),
        torch.full((4,), -100),
        SOFT,
        SOFT.double(),
        SOFT.half(),
        torch.eye(3).long(),  # one-hot rows
        torch.softmax(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), -1).bfloat16(),
        torch.zeros(0, dtype=torch.long),
    ],
)
def test_labels_that_are_indices_or_distributions_are_accepted(labels):
    d.check_labels(labels, 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([1, 2, 3, 1]), r"go from 1 to 3 and there are 3 classes.*from 0 to 2.*count from 1, subtract 1"),
        (torch.tensor([0, 1, -1]), r"go from -1 to 1 .*-100 for an unlabelled image\.$"),
        (torch.tensor([0, 7, -100]), r"go from 0 to 7 .*unlabelled image\.$"),
        (torch.tensor([0.0, 1.0, 2.0]), r"torch\.float32 of shape \(3,\).*int\(label\).*of shape \(3, 3\)"),
        (torch.tensor([[0], [1]]), r"shape \(2, 1\) and there are 3 classes.*squeeze\(1\)"),
        (torch.full((4, 4), 0.25), r"shape \(4, 4\) and there are 3 classes.*\(B, 3\)\.$"),
        (torch.zeros(2, 3, 3), r"shape \(2, 3, 3\)"),
        (torch.tensor(1), r"shape \(\)"),
        (torch.tensor([[100.0, 0, 0], [0, 40.0, 60.0]]), r"2 of 2 rows.*sums to 100.*percentages: divide them by 100"),
        (torch.tensor([[1.0, 1, 0], [0, 1.0, 0]]), r"1 of 2 rows.*sums to 2.*problem_type = 'multi_label_class"),
        (torch.tensor([[0.0, 0, 0]]), r"sums to 0.*multi_label.*all -100"),
        (torch.tensor([[1, 0, 1]]), r"1 of 1 rows.*multi_label"),
        (torch.tensor([[0.6, 0.6, 0.1]]), r"sums to 1\.3.*by softmax; for independent probabilities"),
        (torch.tensor([[2.0, -0.5, -0.5]]), r"from -0\.5 to 2; expected numbers from 0"),
        (torch.tensor([[-100.0, 0.5, 0.5]]), r"from -100 to 0\.5"),
        (torch.tensor([[float("nan"), 0.5, 0.5]]), r"sums to nan"),
    ],
)
def test_other_labels_are_refused_with_what_they_look_like(labels, message):
    with pytest.raises(ValueError, match=message):
        d.check_labels(labels, 3)


@pytest.mark.parametrize("labels", [torch.tensor([0.0, 1.0]), torch.tensor([[0], [1]]), torch.full((2, 4), 0.25)])
def test_cross_entropy_refuses_labels_of_another_form(labels):
    with pytest.raises(ValueError, match="expected class indices"):
        d.cross_entropy(torch.zeros(2, 3), labels)
