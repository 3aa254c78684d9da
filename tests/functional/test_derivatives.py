"""Input gradients, directional derivatives, vjp and split: exact ones to rounding, differences to their order."""

import doctest

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import jacrev

from hf_kdtl.functional import derivatives as m
from tests.functional.smooth import Quadratic, Smooth, images, slope
from tests.support.tiny import build

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def _random(like, seed=1):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _first(net):
    return lambda x: net.logits(x)[:, 0]


def _gradients(net, value):
    found = torch.autograd.grad(value.sum(), list(net.parameters()), allow_unused=True)
    return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in _with(found, net)])


def _with(found, net):
    return zip(found, net.parameters(), strict=True)


def _jacobian(net, x):
    """d logits / d x, (B, K, C, h, w), by torch.func, image by image."""
    return torch.stack([jacrev(lambda one: net.logits(one[None])[0])(image) for image in x])


def test_doctests():
    assert doctest.testmod(m).failed == 0


def test_scores_are_the_logits_the_log_probabilities_or_the_logits_less_their_mean():
    z = 3 * torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(m.scores(z, "logit"), z)
    torch.testing.assert_close(m.scores(z, "logprob"), z - z.exp().sum(1, keepdim=True).log())
    torch.testing.assert_close(m.scores(z, "centred"), z - z.mean(1, keepdim=True))
    for of in ("logprob", "centred"):
        torch.testing.assert_close(m.scores(z + 7.0, of), m.scores(z, of))


def test_everything_is_exact_on_a_quadratic():
    net, x = Quadratic(), images()
    u = _random(x)
    gradient = (x.flatten(1) @ net.a[0] + net.b[0]).reshape(x.shape)
    along = (gradient * u).flatten(1).sum(1)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(m.input_gradient(_first(net)(leaf), leaf), gradient, **EXACT)
    torch.testing.assert_close(m.directional(_first(net), x, u), along, **EXACT)
    for step in (1e-3, 1.0, 10.0):  # a central difference has no error on a quadratic, whatever the step
        torch.testing.assert_close(m.central_difference(_first(net), x, u, step), along, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_directional_derivatives_agree_with_the_jacobian_for_one_output_and_for_many(shape):
    net, x = Smooth(), images()
    u = _random(x)

    def f(z):
        return net.logits(z) if shape else net.logits(z)[:, 1]

    expected = torch.einsum("bkchw,bchw->bk", _jacobian(net, x), u)
    expected = expected if shape else expected[:, 1]
    assert m.directional(f, x, u).shape == (4, *shape)
    torch.testing.assert_close(m.directional(f, x, u), expected, **EXACT)
    torch.testing.assert_close(m.central_difference(f, x, u, 1e-5), expected, rtol=1e-7, atol=1e-9)
    # The step is a length along u: u's own length changes the result by that factor and nothing else.
    once, thrice = (m.central_difference(f, x, k * u, 0.5) for k in (1, 3))
    torch.testing.assert_close(thrice, 3 * once, **EXACT)


@pytest.mark.parametrize("norm", [True, False])
def test_the_parameter_gradient_of_a_forward_mode_derivative_is_right(norm):
    """With a layer norm inside: the composed one makes it so."""
    net, x = Smooth(norm=norm), images()
    u = _random(x)
    leaf = x.clone().requires_grad_()
    want = _gradients(net, (m.input_gradient(_first(net)(leaf), leaf) * u).flatten(1).sum(1))
    got = _gradients(net, m.directional(_first(net), x, u))
    assert want.abs().max() > 0.1
    torch.testing.assert_close(got, want, **EXACT)


def test_torchs_own_layer_norm_still_loses_the_gradient_of_a_forward_mode_derivative():
    """The trap itself. The day this fails torch has fixed it: LAYER_NORM may go from FORWARD_MODE."""
    net, x = Smooth(), images()
    u = _random(x)
    leaf = x.clone().requires_grad_()
    derivative = (m.input_gradient(_first(net)(leaf), leaf) * u).flatten(1).sum(1)
    with forward_ad.dual_level():
        plain = forward_ad.unpack_dual(_first(net)(forward_ad.make_dual(x, u))).tangent
    torch.testing.assert_close(plain, derivative, **EXACT)  # the value is right, which is what makes it a trap
    want, got = _gradients(net, derivative), _gradients(net, plain)
    assert (got - want).norm() / want.norm() > 0.05


def test_sdpa_has_second_derivatives_only_inside_math_attention():
    """The other trap: the CPU's default kernel has neither a second derivative nor a forward mode, and says so."""
    vit, x = build("vit", image_size=16).double(), torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)

    def norms():
        g = m.input_gradient(vit(pixel_values=x).logits[:, 0], x)
        return torch.autograd.grad(g.square().sum(), vit.classifier.weight)[0]

    with pytest.raises(RuntimeError, match="not implemented"):
        norms()
    with m.math_attention():
        assert norms().abs().max() > 0


def test_the_input_gradient_of_each_image_is_that_of_the_image_alone():
    net, x = Smooth(), images()
    leaf = x.clone().requires_grad_()
    chosen = torch.tensor([0, 2, 1, 2])
    got = m.input_gradient(net.logits(leaf).gather(1, chosen[:, None])[:, 0], leaf)
    torch.testing.assert_close(got, _jacobian(net, x)[torch.arange(4), chosen], **EXACT)
    assert got.grad_fn is not None
    without = m.input_gradient(_first(net)(leaf), leaf, create_graph=False)
    assert not without.requires_grad
    assert leaf.grad is None and all(p.grad is None for p in net.parameters())


def test_no_gradient_path_is_an_error_and_not_a_zero():
    net, x = Smooth(), images().requires_grad_()
    with torch.no_grad():
        cut = _first(net)(x)
    for output in (cut, _first(net)(x.detach()), torch.ones(4)):
        with pytest.raises(ValueError, match=r"no gradient|gradient path"):
            m.input_gradient(output, x)


def test_central_differences_converge_with_the_square_of_the_step_in_value_and_gradient():
    net, x = Smooth(), images()
    u = _random(x)
    exact = m.directional(_first(net), x, u)
    want = _gradients(net, exact)
    steps = [0.2, 0.1, 0.05, 0.025]
    found = [m.central_difference(_first(net), x, u, s) for s in steps]
    values = [float((d - exact).detach().norm()) for d in found]
    gradients = [float((_gradients(net, d) - want).norm()) for d in found]
    assert abs(slope(steps, values) - 2) < 0.1 and abs(slope(steps, gradients) - 2) < 0.1
    steps = [1e-3, 5e-4, 2.5e-4]
    one_sided = [(_first(net)(x + s * u) - _first(net)(x)) / s for s in steps]
    assert abs(slope(steps, [float((d - exact).detach().norm()) for d in one_sided]) - 1) < 0.1


def _phis(target):
    other = target.flatten(1)
    return {
        "squared": lambda j: m.squared(j, target),
        "normalized": lambda j: m.normalized(j, target),
        "norm": lambda j: j.flatten(1).square().sum(1),
        "any": lambda j: torch.sin(j.flatten(1)).sum(1) * torch.tanh((j.flatten(1) * other).sum(1)),
    }


@pytest.mark.parametrize("phi", ["squared", "normalized", "norm", "any"])
def test_split_is_vjp_in_value_and_gradient_for_any_function_of_the_gradient(phi):
    net, x = Smooth(), images()
    function = _phis(_random(x))[phi]
    leaf = x.clone().requires_grad_()
    exact = m.vjp(function, _first(net)(leaf), leaf)
    assert exact.shape == (4,)
    want = _gradients(net, exact)
    assert want.abs().max() > 1e-3
    leaf = x.clone().requires_grad_()
    value = m.split(function, _first(net)(leaf), leaf, lambda u: m.directional(_first(net), x, u))
    torch.testing.assert_close(value, exact, **EXACT)
    torch.testing.assert_close(_gradients(net, value), want, rtol=1e-9, atol=1e-11)
    # Under other weights of the images too: each image's value carries its own gradient.
    weights = torch.tensor([0.0, 3.0, -1.0, 0.5])
    value = m.split(function, _first(net)(leaf), leaf, lambda u: m.directional(_first(net), x, u))
    again = m.vjp(function, _first(net)(leaf), leaf)
    torch.testing.assert_close(
        _gradients(net, weights * value), _gradients(net, weights * again), rtol=1e-9, atol=1e-11
    )
    assert leaf.grad is None and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("phi", ["squared", "normalized"])
def test_split_by_a_central_difference_converges_with_the_square_of_its_step(phi):
    net, x = Smooth(), images()
    function = _phis(_random(x))[phi]
    leaf = x.clone().requires_grad_()
    exact = m.vjp(function, _first(net)(leaf), leaf)
    want = _gradients(net, exact)
    steps, errors = [0.2, 0.1, 0.05, 0.025], []
    for s in steps:
        value = m.split(function, _first(net)(leaf), leaf, lambda u, s=s: m.central_difference(_first(net), x, u, s))
        torch.testing.assert_close(value, exact, **EXACT)  # the value has no step in it
        errors.append(float((_gradients(net, value) - want).norm()))
    assert abs(slope(steps, errors) - 2) < 0.1


def test_normalized_lies_in_0_to_4_and_ignores_lengths():
    a, b = _random(images(64)), _random(images(64), 2)
    value = m.normalized(a, b)
    cosine = F.cosine_similarity(a.flatten(1), b.flatten(1))
    torch.testing.assert_close(value, 2 - 2 * cosine, **EXACT)
    torch.testing.assert_close(m.normalized(1e-6 * a, 1e6 * b), value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(m.normalized(a, -2 * a), torch.full((64,), 4.0).double(), **EXACT)
    torch.testing.assert_close(m.normalized(a, 3 * a), torch.zeros(64).double(), **EXACT)
    torch.testing.assert_close(m.squared(a, b), ((a - b) ** 2).flatten(1).sum(1), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [m.normalized, m.squared])
def test_a_zero_gradient_gives_a_finite_distance_with_a_finite_gradient(function, dtype):
    a = torch.ones(5, 2, 2, 2, dtype=dtype)
    a[0], a[1], a[3] = 0, 0, 1e-30
    b = torch.ones(5, 2, 2, 2, dtype=dtype)
    b[0], b[2] = 0, 0
    a.requires_grad_()
    value = function(a, b)
    (gradient,) = torch.autograd.grad(value.sum(), a)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
    expected = [0.0, 1, 1, 0, 0] if function is m.normalized else [0.0, 8, 8, 8, 0]
    torch.testing.assert_close(value[[0, 1, 2, 4]].double(), torch.tensor(expected)[[0, 1, 2, 4]].double())
