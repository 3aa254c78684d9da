"""Written-out layers against torch's own, and their derivatives against elementary operations, in float64."""

import doctest
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from hf_kdtl.functional import closed_forms as m
from hf_kdtl.functional.derivatives import GELU, LAYER_NORM, PATCHES, Replaced, differentiable

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_doctests():
    assert doctest.testmod(m).failed == 0


def _elementary_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_gelus_derivatives_are_those_of_its_formula(k):
    x = torch.linspace(-5, 5, 41, dtype=torch.float64).requires_grad_()
    want, got = _elementary_gelu(x), m.gelu(x)
    torch.testing.assert_close(got, want, **EXACT)
    for _ in range(k):
        (want,) = torch.autograd.grad(want.sum(), x, create_graph=True)
        (got,) = torch.autograd.grad(got.sum(), x, create_graph=True)
        torch.testing.assert_close(got, want, **EXACT)
    torch.testing.assert_close(m.gelu_derivative(x.detach(), k), want.detach(), **EXACT)


def test_a_second_pass_through_a_gelu_computes_no_derivative_again(monkeypatch):
    """And is not spoilt by what happened to the first one's result."""
    computed = []
    monkeypatch.setattr(m, "gelu_derivative", lambda x, k, of=m.gelu_derivative: computed.append(k) or of(x, k))
    x = _random(5).requires_grad_()
    value = m.gelu(x)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    kept = first.detach().clone()
    (second,) = torch.autograd.grad((value + first).sum(), x)
    assert computed == [1, 2]
    (of_formula,) = torch.autograd.grad(_elementary_gelu(x).sum(), x, create_graph=True)
    torch.testing.assert_close(kept, of_formula.detach(), **EXACT)
    torch.testing.assert_close(second, kept + torch.autograd.grad(of_formula.sum(), x)[0], **EXACT)


def test_a_gelus_derivatives_go_with_its_graph():
    """No cycle through them holds a step's memory until garbage is collected."""
    x = _random(5).requires_grad_()
    value = m.gelu(x)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    known = value.grad_fn.known
    assert sorted(known) == [1, 2] and not any(derivative.requires_grad for derivative in known.values())
    held = weakref.ref(known[1])
    gc.disable()
    try:
        del value, first, second, known
        assert held() is None
    finally:
        gc.enable()


def test_half_precision_gelu_is_rounded_once():
    x = _random(200).to(torch.bfloat16)
    for k in (1, 2, 3):
        exact = m.gelu_derivative(x.double(), k)
        got = m.gelu_derivative(x, k)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-6)


def test_the_tanh_form_of_gelu_is_torchs_own():
    x = _random(20).requires_grad_()
    assert torch.equal(m.gelu(x, approximate="tanh"), F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("options", [{}, {"weight": 1}, {"weight": 1, "bias": 1, "eps": 1e-2}])
def test_the_composed_layer_norm_is_the_layer_norm(options):
    x = _random(3, 5, 4)
    options = {k: _random(5, 4, seed=2) if v == 1 else v for k, v in options.items()}
    expected = F.layer_norm(x, (5, 4), **options)
    with Replaced(LAYER_NORM):
        torch.testing.assert_close(F.layer_norm(x, (5, 4), **options), expected, **EXACT)
        layer = torch.nn.LayerNorm(4, elementwise_affine=False).double()
        torch.testing.assert_close(layer(x), F.layer_norm(x, (4,)), **EXACT)


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_norms_slope_is_that_of_elementary_operations_with_its_gradient(affine):
    x, u, w = _random(3, 5, 4).requires_grad_(), _random(3, 5, 4, seed=1), _random(3, 5, 4, seed=3)
    weight, bias = (_random(4, seed=4).requires_grad_(), _random(4, seed=5)) if affine else (None, None)
    found = {}
    for kind in (m.layer_norm, m.layer_norm_with_slope):
        with forward_ad.dual_level():
            value, slope = forward_ad.unpack_dual(kind(forward_ad.make_dual(x, u), (4,), weight, bias))
        gradients = torch.autograd.grad((slope * w).sum(), [x, weight] if affine else [x])
        found[kind] = (value, slope, *gradients)
    for got, want in zip(found[m.layer_norm_with_slope], found[m.layer_norm], strict=True):
        torch.testing.assert_close(got, want, **EXACT)
    assert torch.equal(m.layer_norm_with_slope(x, (4,), weight, bias), m.layer_norm(x, (4,), weight, bias))


@pytest.mark.parametrize("size", [(8, 8), (9, 11)])  # what does not fill a patch is left out
@pytest.mark.parametrize("kernel", [(4, 4), (4, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_cutting_an_image_into_patches_is_the_convolution(size, kernel, bias):
    x = _random(2, 3, *size).requires_grad_()
    layer = torch.nn.Conv2d(3, 5, kernel, stride=kernel, bias=bias).double()
    want = layer(x)
    with Replaced(PATCHES):
        got = layer(x)
    torch.testing.assert_close(got, want, **EXACT)
    weights = _random(*want.shape, seed=2)
    for a, b in zip(
        *(torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()]) for y in (got, want)), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"stride": 4, "padding": 1}, {"stride": 4, "dilation": 2}, {"stride": 4, "groups": 3}]
)
def test_other_convolutions_are_torchs_own(options):
    x = _random(2, 3, 12, 12)
    layer = torch.nn.Conv2d(3, 6, 4, **options).double()
    expected = layer(x)
    with Replaced(PATCHES):
        assert torch.equal(layer(x), expected)
        assert torch.equal(F.conv2d(x, layer.weight, layer.bias, **options), expected)
        padded = torch.nn.Conv2d(3, 6, 3, padding="same").double()
        assert padded(x).shape == (2, 6, 12, 12)


def test_a_convolution_inside_the_net_keeps_its_operation():
    """A block that is recomputed without the replacement would find another one."""
    inner = torch.nn.Conv2d(6, 5, 2, stride=2).double()
    with Replaced(PATCHES):
        assert "Convolution" in inner(_random(1, 6, 4, 4)).grad_fn.name()
        assert "Convolution" not in torch.nn.Conv2d(3, 5, 2, stride=2)(torch.ones(1, 3, 4, 4)).grad_fn.name()


def test_each_order_replaces_what_it_gains_by(monkeypatch):
    x = _random(2, 3, 8, 8).requires_grad_()
    for order in (0, 1, 2, 3):
        with differentiable(order):
            names = [F.gelu(x).grad_fn.name(), F.layer_norm(x, (8,)).grad_fn.name()]
        assert ("_Gelu" in names[0]) == (order >= 2)
        assert ("NativeLayerNorm" in names[1]) == (order < 3)
    assert set(GELU) == {F.gelu}


@pytest.mark.parametrize("kind", [m.layer_norm, m.layer_norm_with_slope])
def test_under_autocast_a_layer_norm_is_taken_in_float32(kind):
    x, u = _random(4, 64).bfloat16() + 8, _random(4, 64, seed=1).bfloat16()
    with forward_ad.dual_level(), torch.autocast("cpu", dtype=torch.bfloat16):
        value, slope = forward_ad.unpack_dual(kind(forward_ad.make_dual(x, u), (64,)))
    exact = F.layer_norm(x.float(), (64,))
    assert value.dtype == slope.dtype == torch.float32
    torch.testing.assert_close(value, exact)


def test_hardsigmoid_has_a_second_derivative_here_and_none_in_torch():
    x = torch.tensor([-4.0, -1.5, 0.2, 2.9, 3.5], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(m.hardsigmoid(x), F.hardsigmoid(x), **EXACT)
    (slope,) = torch.autograd.grad(m.hardsigmoid(x.square()).sum(), x, create_graph=True)
    inner = (x.square() < 3).double()
    torch.testing.assert_close(slope, 2 * x * inner / 6, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(slope.sum(), x)[0], 2 * inner / 6, **EXACT)
    (slope,) = torch.autograd.grad(F.hardsigmoid(x.square()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):  # the day this fails torch has one
        torch.autograd.grad(slope.sum(), x)


def _layers():
    """Every layer of torch.nn that can be made of no argument or of a width of 8, by name."""
    for name in dir(torch.nn):
        kind = getattr(torch.nn, name)
        if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)) or "Loss" in name or "Lazy" in name:
            continue
        for args in ((), (8,), (4, 8), (8, 8), (8, 8, 3)):
            try:
                yield name, kind(*args)
                break
            except (TypeError, ValueError, AssertionError, RuntimeError):
                continue


def _second_derivative(layer, shape):
    """None where the layer does not run on this shape, an error's text where there is no second derivative."""
    x = torch.randn(shape, requires_grad=True)
    with differentiable(2):
        try:
            y = layer(x)
            y = y[0] if isinstance(y, tuple) else y
        except Exception:
            return None
        if not y.requires_grad:
            return None
        try:
            (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            torch.autograd.grad(gradient.square().sum(), x, allow_unused=True)
        except RuntimeError as error:
            return str(error)
    return ""


def test_every_layer_of_torch_that_takes_an_image_has_a_second_derivative():
    found = {}
    for name, layer in _layers():
        for shape in ((2, 8, 6, 6), (2, 8, 6), (2, 8)):
            if (answer := _second_derivative(layer, shape)) is not None:
                found[name] = answer
                break
    assert len(found) > 60 and {"Hardsigmoid", "Hardswish", "SiLU", "BatchNorm2d", "Conv2d"} <= found.keys()
    without = {name for name, answer in found.items() if answer}
    assert without == {"CrossMapLRN2d"}, found  # Lua torch's, which no model of transformers has
