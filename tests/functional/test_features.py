"""Feature distances: equal to the channel-by-channel reference over grids and widths, and their laws."""

import doctest
import math

import pytest
import torch

from hf_kdtl.functional import features as f
from tests.functional.agree import assert_agree, randn
from tests.reference import features as slow

GRIDS = [((3, 3), (3, 3)), ((2, 2), (3, 3)), ((3, 2), (2, 2)), ((1, 4), (3, 1)), ((4, 4), (2, 3))]
OPTIONS = [(n, d) for n in ("both", "teacher", "none") for d in ("mse", "smooth_l1", "cosine")]


def test_doctests():
    assert doctest.testmod(f).failed == 0


@pytest.mark.parametrize("mode", ["code", "paper"])
@pytest.mark.parametrize(("grid_s", "grid_t"), GRIDS)
def test_attention_transfer_agrees_with_the_reference(grid_s, grid_t, mode):
    h_s, h_t = randn(3, math.prod(grid_s), 4), randn(3, math.prod(grid_t), 6, seed=1)
    assert_agree(
        lambda s, t: f.attention_transfer(s, t, grid_s, grid_t, mode),
        lambda s, t: slow.attention_transfer(s, t, grid_s, grid_t, mode),
        h_s,
        h_t,
    )


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_attention_transfer_is_zero_with_zero_gradient_at_equality(mode):
    h = randn(2, 9, 4).requires_grad_()
    value = f.attention_transfer(h, h.detach().clone(), (3, 3), (3, 3), mode)
    assert (value == 0).all()
    (gradient,) = torch.autograd.grad(value.sum(), h)
    assert (gradient == 0).all()


def test_attention_transfer_sees_only_the_pattern():
    h, order = randn(2, 6, 4), torch.tensor([1, 0])
    # neither the strength nor the sign nor the order of the channels
    other = -3e12 * h[..., torch.tensor([2, 0, 3, 1])]
    assert f.attention_transfer(h, other, (2, 3), (2, 3)).max() < 1e-28
    different = randn(2, 6, 4, seed=1)
    value = f.attention_transfer(h, different, (2, 3), (2, 3))
    torch.testing.assert_close(f.attention_transfer(h[order], different[order], (2, 3), (2, 3)), value[order])
    assert value.min() > 1e-3


@pytest.mark.parametrize("mode", ["code", "paper"])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e12])
def test_attention_transfer_of_dead_or_huge_features_is_finite(mode, size):
    h = (size * torch.ones(2, 4, 3)).requires_grad_()
    value = f.attention_transfer(h, torch.randn(2, 9, 3), (2, 2), (3, 3), mode)
    (gradient,) = torch.autograd.grad(value.sum(), h)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all() and (value > 0).all()


@pytest.mark.parametrize(("normalize", "distance"), OPTIONS)
def test_feature_distance_agrees_with_the_reference(normalize, distance):
    assert_agree(
        lambda s, t: f.feature_distance(s, t, normalize, distance),
        lambda s, t: slow.feature_distance(s, t, normalize, distance),
        2 * randn(3, 5, 4),
        2 * randn(3, 5, 4, seed=1) + 0.5,
    )


@pytest.mark.parametrize(("normalize", "distance"), OPTIONS)
def test_feature_distance_is_zero_where_it_says(normalize, distance):
    s, order = randn(3, 5, 4), torch.tensor([2, 0, 1])
    if normalize == "teacher":  # the student gives the normed feature itself
        s = torch.nn.functional.layer_norm(s, (4,), eps=1e-6)
        t = 3 * s + 1
        assert f.feature_distance(s, t, normalize, distance).max() < 1e-6
    else:
        assert (f.feature_distance(s, s.clone(), normalize, distance) == 0).all()
    t = randn(3, 5, 4, seed=1)
    value = f.feature_distance(s, t, normalize, distance)
    assert value.min() > 1e-2
    torch.testing.assert_close(f.feature_distance(s[order], t[order], normalize, distance), value[order])


def test_cosine_distance_of_zero_vectors():
    zero, one = torch.zeros(1, 3, requires_grad=True), torch.ones(1, 3)
    for other, expected in ((zero.detach(), 0.0), (one, 1.0)):
        for value in (f.cosine_distance(zero, other), f.cosine_distance(other, zero)):
            assert value.item() == expected
            (gradient,) = torch.autograd.grad(value.sum(), zero)
            assert (gradient == 0).all()
    tiny = 1e-30 * torch.tensor([1.0, 0.0])
    torch.testing.assert_close(f.cosine_distance(tiny, torch.tensor([0.0, 1e30])), torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distance", ["mse", "smooth_l1", "cosine"])
def test_half_precisions_are_computed_in_float32_also_under_autocast(dtype, distance):
    s, t = randn(2, 6, 8).to(dtype), randn(2, 6, 8, seed=1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        values = f.feature_distance(s, t, "both", distance), f.attention_transfer(s, t, (2, 3), (2, 3))
    exact = f.feature_distance(s.double(), t.double(), "both", distance)
    assert values[0].dtype == values[1].dtype == torch.float32
    torch.testing.assert_close(values[0].double(), exact, rtol=1e-4, atol=1e-6)
    exact = f.attention_transfer(s.double(), t.double(), (2, 3), (2, 3))
    torch.testing.assert_close(values[1].double(), exact, rtol=1e-4, atol=1e-6)


def test_refusals_say_what_was_found_and_expected():
    x = randn(2, 4, 3)
    with pytest.raises(ValueError, match="mode is 'norm'; expected 'code' or 'paper'"):
        f.attention_transfer(x, x, (2, 2), (2, 2), "norm")
    with pytest.raises(ValueError, match="4 patches do not lie on a grid of 3 x 3 = 9"):
        f.attention_transfer(x, x, (3, 3), (2, 2))
    with pytest.raises(ValueError, match="normalize is 'student'; expected 'both' or 'teacher' or 'none'"):
        f.feature_distance(x, x, "student")
    with pytest.raises(ValueError, match="distance is 'l1'"):
        f.feature_distance(x, x, distance="l1")
    with pytest.raises(ValueError, match=r"\(2, 4, 3\) and \(2, 4, 2\) cannot be compared; project the student"):
        f.feature_distance(x, x[..., :2])
