"""Distances to the start and the smallest singular values: equal to the slow references, and what they promise."""

import doctest

import pytest
import torch

from hf_kdtl.functional import start as f
from tests.functional.agree import assert_agree, randn
from tests.reference import start as slow

SHAPES = [(3, 4), (5,), (2, 1, 3)]


def _weights(seed=0):
    return [randn(*shape, seed=seed + i) for i, shape in enumerate(SHAPES)]


def test_doctests():
    assert doctest.testmod(f).failed == 0


def test_l2_sp_agrees_with_the_reference():
    then = _weights(10)
    assert_agree(lambda *now: f.l2_sp(now, then), lambda *now: slow.half_squared_distance(now, then), *_weights())


def test_l2_sp_has_its_gradient_in_closed_form_and_keeps_only_its_inputs():
    now, then = [w.requires_grad_() for w in _weights()], [w.requires_grad_() for w in _weights(10)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        value = f.l2_sp(now, then)
    assert set(kept) <= {t.data_ptr() for t in (*now, *then)} and len(kept) == 3
    gradients = torch.autograd.grad(3 * value, [*now, *then], allow_unused=True)
    for gradient, a, b in zip(gradients[:3], now, then, strict=True):
        torch.testing.assert_close(gradient, 3 * (a - b).detach(), rtol=1e-15, atol=0)
    assert gradients[3:] == (None, None, None), "the start is not trained"


def test_l2_sp_has_the_second_derivative_of_autograd():
    now, then = [w.requires_grad_() for w in _weights()], _weights(10)
    assert torch.autograd.gradgradcheck(lambda *w: f.l2_sp(w, then), now)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_l2_sp_sums_many_numbers_well_and_small_ones_in_float32(dtype):
    then = torch.randn(2000, 1000).to(dtype)
    now = (then + 0.01 * torch.rand(2000, 1000).to(dtype)).requires_grad_()
    exact = 0.5 * (now.double() - then.double()).square().sum()
    value = f.l2_sp([now], [then])
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=2e-6 if dtype == torch.float32 else 2e-3)
    assert torch.autograd.grad(value, now)[0].dtype == dtype


def test_l2_sp_refuses_what_does_not_go_together():
    now = _weights()
    for then, sentence in (
        (_weights()[:2], r"3 and 2 tensors"),
        ([now[0], now[2], now[1]], r"\(5,\) and \(2, 1, 3\)\) cannot be compared; expected at least one"),
        ([now[0][:1], *now[1:]], r"\(3, 4\) and \(1, 4\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            f.l2_sp(now, then)
    with pytest.raises(ValueError, match="0 and 0 tensors"):
        f.l2_sp([], [])


@pytest.mark.parametrize(("shape", "k"), [((5, 8), 1), ((5, 8), 4), ((8, 5), 2)])
def test_smallest_singular_agrees_with_the_reference(shape, k):
    assert_agree(lambda x: f.smallest_singular(x, k), lambda x: slow.smallest_singular(x, k), randn(*shape))


@pytest.mark.parametrize("features", [torch.zeros(4, 6), torch.ones(4, 6), torch.eye(4, 6), 1e4 * torch.eye(6, 4)])
def test_smallest_singular_has_a_finite_gradient_where_values_repeat_or_vanish(features):
    x = features.clone().requires_grad_()
    value = f.smallest_singular(x, 2)
    (gradient,) = torch.autograd.grad(value, x)
    expected = slow.smallest_singular(features.double(), 2).item()
    assert value.item() == pytest.approx(expected, abs=1e-6) and torch.isfinite(gradient).all()
    # homogeneous of degree 2: <x, gradient> is twice the value
    assert (x * gradient).sum().item() == pytest.approx(2 * expected, abs=1e-5)


def test_smallest_singular_is_of_rows_and_columns_alike_and_precise_under_autocast():
    x = randn(6, 4).float()
    values = f.smallest_singular(x, 2), f.smallest_singular(x.T, 2), f.smallest_singular(x[torch.randperm(6)], 2)
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])
    with torch.autocast("cpu", torch.bfloat16):
        half = x.bfloat16()
        value = f.smallest_singular(half, 2)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), slow.smallest_singular(half.double(), 2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [0, 4, 5])
def test_smallest_singular_refuses_a_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k is {k} and the features are 4 images x 6 channels"):
        f.smallest_singular(randn(4, 6), k)


def test_channel_distance_agrees_with_the_reference():
    weights = torch.softmax(randn(4, seed=3), 0)
    assert_agree(
        lambda s, t: f.channel_distance(s, t, weights),
        lambda s, t: slow.channel_distance(s, t, weights),
        randn(3, 5, 4),
        randn(3, 5, 4, seed=1),
    )


def test_channel_distance_computes_half_precisions_in_float32():
    s, t, weights = randn(2, 6, 8).bfloat16(), randn(2, 6, 8, seed=1).bfloat16(), torch.full((8,), 0.125)
    value = f.channel_distance(s, t, weights)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), f.channel_distance(s.double(), t.double(), weights), rtol=1e-5, atol=0)


def test_channel_importance_is_the_standardised_softmax_of_the_first_order_rise():
    hidden, gradient = randn(3, 5, 6), randn(3, 5, 6, seed=1)
    rise = torch.stack([-sum((h * g)[c] for h, g in zip(hidden.flatten(0, 1), gradient.flatten(0, 1), strict=True))
                        for c in range(6)])  # fmt: skip
    weights = f.channel_importance(hidden, gradient)
    torch.testing.assert_close(weights, slow.importance(rise), rtol=1e-12, atol=0)
    torch.testing.assert_close(f.channel_importance(hidden, 1e-9 * gradient), weights, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="any of the 6 channels to 0 changes the loss by the same"):
        f.channel_importance(hidden, torch.zeros_like(gradient))
