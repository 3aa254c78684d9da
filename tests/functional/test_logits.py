"""DKD's parts and DIST's correlations: identities, degenerate cases and extreme logits."""

import doctest
import itertools

import pytest
import torch

from hf_kdtl.functional import logits as m
from hf_kdtl.functional.divergences import kl, log_probabilities
from hf_kdtl.models.forward.capture import Capture
from hf_kdtl.objectives import OBJECTIVES
from tests.functional.agree import randn


def test_doctests():
    assert doctest.testmod(m).failed == 0


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_parts_add_up_to_the_full_divergence(classes):
    """KL = TCKD + (1 - p_T[y]) NCKD: the decomposition that gives the method its name."""
    z_s, z_t = 3 * randn(20, classes), 3 * randn(20, classes, seed=1)
    labels = torch.arange(20) % classes
    target, rest = m.decoupled(z_s, z_t, labels, 2.0)
    log_t = log_probabilities(z_t, 2.0)
    remaining = 1 - log_t.exp().gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(target + remaining * rest, kl(log_t, log_probabilities(z_s, 2.0)))
    assert (target >= 0).all() and (rest >= 0).all()
    assert (rest == 0).all() == (classes == 2)


def test_an_unlabelled_image_counts_nothing_whatever_its_logits():
    z_s = torch.tensor([[1.0, 2.0, 3.0], [1e4, -1e4, 0.0]], requires_grad=True)
    parts = m.decoupled(z_s, torch.tensor([[3.0, 0.0, 1.0], [-1e4, 1e4, 0.0]]), torch.tensor([1, -100]))
    (gradient,) = torch.autograd.grad(sum(parts).sum(), z_s)
    assert all(p[1] == 0 and p[0] > 0 for p in parts)
    assert (gradient[1] == 0).all() and gradient[0].abs().max() > 0


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_extreme_logits_give_finite_values_and_gradients(classes, dtype):
    signs = torch.tensor(list(itertools.product((-1e4, 0, 1e4), repeat=classes))).to(dtype)
    for size in (1.0, 0.01, 0.036):  # in between lie probabilities that are not quite 0
        z_s = (size * signs).requires_grad_()
        z_t = size * signs.flip(0).roll(1, 1)
        labels = torch.arange(len(signs)) % classes
        for parts in (m.decoupled(z_s, z_t, labels), m.correlations(z_s, z_t), m.correlations(z_s, z_t, 4.0)):
            (gradient,) = torch.autograd.grad(sum(p.sum() for p in parts), z_s)
            assert all(torch.isfinite(p).all() for p in parts) and torch.isfinite(gradient).all()
            assert all(p.dtype == torch.float32 for p in parts)


def test_the_rest_is_exact_where_a_mask_of_minus_1000_is_not():
    """A target logit of 1e4 leaves the rest at softmax(0, 1, 2), and its divergence is seen."""
    z_s, z_t = torch.tensor([[1e4, 2.0, 1.0, 0.0]]), torch.tensor([[1e4, 0.0, 1.0, 2.0]])
    _, rest = m.decoupled(z_s, z_t, torch.tensor([0]))
    expected = kl(torch.log_softmax(z_t[:, 1:], 1), torch.log_softmax(z_s[:, 1:], 1))
    torch.testing.assert_close(rest, expected)
    masked = [torch.log_softmax(z - 1000.0 * torch.tensor([1, 0, 0, 0]), 1) for z in (z_t, z_s)]
    assert kl(*masked).item() == 0, "the usual mask sees nothing here"


@pytest.mark.parametrize("labels", [torch.full((4, 3), 1 / 3), torch.ones(4), torch.zeros(4, 3, dtype=torch.long)])
def test_soft_labels_are_refused_with_a_way_out(labels):
    z = randn(4, 3)
    objective = OBJECTIVES["decoupled_kd"]()
    with pytest.raises(ValueError, match=r"expected class indices .* or use logit_kd, which needs no labels"):
        objective(Capture(logits=z), Capture(logits=z), {"labels": labels})


def test_pearson_distance_agrees_with_corrcoef_and_ignores_scale():
    x, y = randn(7, 9).exp(), randn(7, 9, seed=1).exp()
    expected = torch.stack([1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(x, y, strict=True)])
    torch.testing.assert_close(m.pearson_distance(x.log(), y.log()), expected)
    torch.testing.assert_close(m.pearson_distance(x.log() - 1e3, y.log() + 1e3), expected)
    underflowed = m.pearson_distance(x.log().float() - 200, y.log().float())
    torch.testing.assert_close(underflowed.double(), expected, rtol=1e-3, atol=1e-4)
    assert (m.pearson_distance(x.log(), x.log()) == 0).all()


def test_constant_rows_and_columns_count_as_the_docstring_says():
    flat, sure = torch.zeros(3, 4), torch.tensor([[5.0, 0, 0, 0]]).repeat(3, 1)
    over_classes, over_images = m.correlations(flat, flat)
    assert (over_classes == 0).all() and (over_images == 0).all()
    over_classes, over_images = m.correlations(flat, sure)
    assert (over_classes == 1).all() and (over_images == 0).all()
    over_images = m.correlations(sure, torch.randn(3, 4))[1]
    assert (over_images == 1).all()


def test_rounding_does_not_make_a_constant_vary():
    noise = torch.randint(-2, 3, (50, 6)) * 2.0**-23  # within two roundings of 1, in float32
    nearly = (torch.full((50, 6), -2.0) + noise).requires_grad_()
    assert nearly.unique().numel() > 1
    varied = torch.randn(50, 6)
    assert (m.pearson_distance(nearly, nearly.detach().roll(1, 0)) == 0).all()
    value = m.pearson_distance(nearly, varied)
    (gradient,) = torch.autograd.grad(value.sum(), nearly)
    assert (value == 1).all() and (gradient == 0).all()
    assert (m.pearson_distance(nearly + 1e-4 * varied, varied) < 0.3).all(), "a small real variation still counts"


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_constant_rows_have_zero_gradient(which):
    z_s = (torch.zeros(3, 4) if which != "teacher" else torch.randn(3, 4)).requires_grad_()
    z_t = torch.zeros(3, 4) if which != "student" else torch.randn(3, 4)
    (gradient,) = torch.autograd.grad(sum(p.sum() for p in m.correlations(z_s, z_t)), z_s)
    assert (gradient == 0).all()


def test_a_single_image_has_no_correlation_over_images():
    assert (m.correlations(randn(1, 5), randn(1, 5, seed=1))[1] == 0).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("decoupled_kd", {"temperature": 0}),
        ("decoupled_kd", {"alpha": -1}),
        ("decoupled_kd", {"beta": "8"}),
        ("decoupled_kd", {"alpha": 0, "beta": 0}),
        ("dist", {"temperature": float("inf")}),
        ("dist", {"beta": -0.1}),
        ("dist", {"gamma": True}),
        ("dist", {"beta": 0, "gamma": 0}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match=f"objective '{name}': {list(options)[-1]} is .*; expected"):
        OBJECTIVES[name](**options)
