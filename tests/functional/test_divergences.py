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
