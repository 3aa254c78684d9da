"""Gradient rules: equal to exact fractions, and their laws on gradients that conflict."""

import doctest
import math

import pytest
import torch

from hf_kdtl.functional import surgery
from hf_kdtl.functional.surgery import conflict, inner_products, one_sided, orthogonal, pcgrad, total
from tests.functional.agree import Sizes, randn
from tests.reference import surgery as slow

SHAPES = [(16, 8), (8,), (2,), (1,), (3, 4, 2)]
RULES = {
    "one_sided": one_sided,
    "orthogonal": lambda g, d, scope="global", **kw: orthogonal(g, d, 0.3, scope, **kw),
    "pcgrad": pcgrad,
}
both_scopes = pytest.mark.parametrize("scope", ["global", "tensor"])
all_rules = pytest.mark.parametrize("rule", RULES)
protecting = pytest.mark.parametrize("rule", ["one_sided", "orthogonal"])


def gradients(cosine=-0.6, ratio=1.0, dtype=torch.float32, shapes=SHAPES):
    """g and d with the same cosine and ratio of lengths in each tensor; of a single number, the same sign."""
    task, transfer = [], []
    for i, shape in enumerate(shapes):
        g, other = randn(*shape, seed=2 * i), randn(*shape, seed=2 * i + 1)
        across = other - (g * other).sum() / (g * g).sum() * g
        sine = math.sqrt(1 - cosine**2) if g.numel() > 1 else 0.0
        across = across / across.norm() if g.numel() > 1 else torch.zeros_like(g)
        d = ratio * g.norm() * (cosine * g / g.norm() + sine * across)
        task.append(g.to(dtype))
        transfer.append(d.to(dtype))
    return task, transfer


def dot(x, y):
    return sum((a.double() * b.double()).sum().item() for a, b in zip(x, y, strict=True))


def test_doctests():
    assert doctest.testmod(surgery).failed == 0


@all_rules
@both_scopes
@pytest.mark.parametrize("cosine", [-0.6, 0.6, "mixed"])
@pytest.mark.parametrize("ratio", [1.0, 1e4])
def test_agrees_with_exact_fractions(rule, scope, cosine, ratio):
    g, d = gradients(-0.6 if cosine == "mixed" else cosine, ratio)
    if cosine == "mixed":
        d = [(-1) ** i * x for i, x in enumerate(d)]
        g[0], d[1], g[2], d[2] = None, None, torch.zeros(2), d[2]
    got = RULES[rule](g, d, scope)
    expected = slow.combine(g, d, rule, scope, 0.3)
    for x, want, a, b in zip(got, expected, g, d, strict=True):
        assert x.dtype == torch.float32 and x.shape == (a if b is None else b).shape
        # to the rounding of float32, of the largest that went in
        size = max(y.double().norm().item() for y in (*g, *d) if y is not None)
        torch.testing.assert_close(x.double().flatten(), want, rtol=1e-6, atol=1e-6 * size)
    got = RULES[rule](*([None if x is None else x.double() for x in side] for side in (g, d)), scope)
    for x, want in zip(got, expected, strict=True):
        torch.testing.assert_close(x.flatten(), want, rtol=1e-10, atol=1e-10 * size)


@protecting
@both_scopes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4])
def test_the_task_loses_nothing(rule, scope, ratio, dtype):
    g, d = gradients(-0.5, ratio, dtype)
    assert total(inner_products(g, d)).cosine < -0.2
    assert dot(g, [a + b for a, b in zip(g, d, strict=True)]) < dot(g, g) * 0.6  # the plain sum does lose
    result = RULES[rule](g, d, scope)
    assert dot(g, result) >= dot(g, g) * (1 - 1e-5)
    if scope == "tensor":
        for a, r in zip(g, result, strict=True):
            assert dot([a], [r]) >= dot([a], [a]) * (1 - 1e-5)


@protecting
def test_many_short_tensors_at_the_edge_of_float32(rule):
    # Rounding alone would break the law in about half of these.
    g, d = gradients(-0.5, 1e4, shapes=[(2,), (3,)] * 100)
    for a, r in zip(g, RULES[rule](g, d, "tensor"), strict=True):
        assert dot([a], [r]) >= dot([a], [a]) * (1 - 1e-5)
        assert dot([a], [r]) <= dot([a], [a]) * (1 + 5e-3)  # and no more is added than rounding takes


@both_scopes
@pytest.mark.parametrize("rule", [one_sided, pcgrad])
def test_where_nothing_conflicts_it_is_the_plain_sum(rule, scope):
    g, d = gradients(0.3, 7.0)
    for x, a, b in zip(rule(g, d, scope), g, d, strict=True):
        assert torch.equal(x, a + b)
    zero = [torch.zeros_like(x) for x in g]
    assert all(torch.equal(x, a) for x, a in zip(rule(g, zero, scope), g, strict=True))


def test_scopes_differ_where_tensors_disagree():
    g, d = [torch.tensor([1.0]), torch.tensor([1.0])], [torch.tensor([-1.0]), torch.tensor([2.0])]
    assert [x.item() for x in one_sided(g, d, "global")] == [0.0, 3.0]  # <g, d> = 1: the plain sum
    assert [x.item() for x in one_sided(g, d, "tensor")] == [1.0, 3.0]


@all_rules
@both_scopes
def test_no_task_gradient_gives_the_transfer_gradient_unscaled(rule, scope):
    _, d = gradients()
    for g in ([None] * len(d), [torch.zeros_like(x) for x in d]):
        assert all(torch.equal(x, y) for x, y in zip(RULES[rule](g, d, scope), d, strict=True))
    g, d = gradients()
    g[0], g[1] = None, torch.zeros_like(g[1])  # a projector, a frozen part: beside others that conflict
    result = RULES[rule](g, d, scope)
    assert torch.equal(result[0], d[0]) and torch.equal(result[1], d[1])
    assert not torch.equal(result[4], d[4])


@all_rules
@both_scopes
def test_no_transfer_gradient_gives_the_task_gradient(rule, scope):
    g, _ = gradients()
    for d in ([None] * len(g), [torch.zeros_like(x) for x in g]):
        assert all(torch.equal(x, y) for x, y in zip(RULES[rule](g, d, scope), g, strict=True))
    assert RULES[rule]([None, g[0]], [None, None], scope)[0] is None
    assert RULES[rule]([], [], scope) == []


@all_rules
@both_scopes
@pytest.mark.parametrize("side", [0, 1])
def test_absent_is_the_same_as_zero(rule, scope, side):
    absent, zero = gradients(), gradients()
    absent[side][0], zero[side][0] = None, torch.zeros_like(zero[side][0])
    for x, y in zip(RULES[rule](*absent, scope), RULES[rule](*zero, scope), strict=True):
        assert torch.equal(x, y)


@all_rules
@both_scopes
def test_tiny_gradients_stay_finite_and_protected(rule, scope):
    g, d = gradients()
    for size_g, size_d in ((1e-30, 1.0), (1.0, 1e-30), (1e-25, 1e12), (1e12, 1e12)):
        a, b = [size_g * x for x in g], [size_d * x for x in d]
        result = RULES[rule](a, b, scope)
        assert all(x.isfinite().all() for x in result)
        if rule != "pcgrad":
            assert dot(a, result) >= dot(a, a) * (1 - 1e-5)


@all_rules
@both_scopes
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_the_result(rule, scope, value):
    for side in (0, 1):
        sides = gradients()
        sides[side][0][3, 2] = value
        assert not RULES[rule](*sides, scope)[0].isfinite().all()


@all_rules
@both_scopes
def test_overwrite_holds_no_third_set_and_the_task_gradient_is_never_changed(rule, scope):
    g, d = gradients()
    g[1], d[3] = None, None
    before = [None if x is None else x.clone() for x in (*g, *d)]
    fresh = RULES[rule](g, d, scope)
    assert all(x is None or torch.equal(x, y) for x, y in zip((*g, *d), before, strict=True))
    overwritten = RULES[rule](g, d, scope, overwrite=True)
    for x, y, b in zip(overwritten, fresh, d, strict=True):
        assert (x is b or b is None) and torch.equal(x, y)
    assert all(x is None or torch.equal(x, y) for x, y in zip(g, before, strict=False))
    g, d = gradients(0.5, dtype=torch.float64)
    kept = [x.clone() for x in (*g, *d)]
    RULES[rule](g, d, scope)
    assert all(torch.equal(x, y) for x, y in zip((*g, *d), kept, strict=True))


def test_memory_is_a_few_copies_of_one_tensor():
    g, d = gradients(shapes=[(50,)] * 40)
    with Sizes() as sizes:
        one_sided(g, d, overwrite=True)
    assert max(sizes.made) == 3 * 40 * 8  # the inner products, before they are read; a tensor is 50 * 8


@all_rules
@both_scopes
def test_given_products_are_used_and_not_computed_again(rule, scope, monkeypatch):
    g, d = gradients()
    products = inner_products(g, d)
    expected = RULES[rule](g, d, scope)
    monkeypatch.setattr(surgery, "inner_products", None)
    got = RULES[rule](g, d, scope, products=products)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_one_inner_product_is_that_of_the_three():
    g, d = gradients()
    g[0], d[2] = None, None
    products = inner_products(g, d)
    assert surgery.dot(g, d) == pytest.approx(total(products).both, rel=1e-14)
    assert surgery.dot(d, d) == pytest.approx(total(products).transfer, rel=1e-14)
    assert surgery.dot([None], [None]) == 0.0


def test_order_of_parameters_does_not_matter():
    g, d = gradients()
    forward, backward = one_sided(g, d), one_sided(g[::-1], d[::-1])
    for x, y in zip(forward, backward[::-1], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@all_rules
def test_a_device_without_float64_computes_on_the_cpu(rule, monkeypatch):
    g, d = gradients()
    expected = RULES[rule](g, d)
    moved = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(surgery, "_NO_FLOAT64", ("cpu",))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: (moved.append(x.dtype), original(x))[1])
    got = RULES[rule](g, d)
    # Both lists for the products, both again for the result, all moved in the device's own precision.
    assert moved == [torch.float32] * (4 * len(g))
    assert all(torch.equal(x, y) and x.device == y.device for x, y in zip(got, expected, strict=True))


@both_scopes
@pytest.mark.parametrize("form", ["one_sided", "orthogonal"])
@pytest.mark.parametrize("sign", [1, -1])
def test_conflict_tells_what_was_removed(scope, form, sign):
    g, d = gradients(-0.6, 3.0, dtype=torch.float64)
    d = [sign * (x if i % 2 else -x) for i, x in enumerate(d)]
    g[1] = None  # not the rule's business, so not in the figures either
    message = conflict(inner_products(g, d), scope, form)
    result = one_sided(g, d, scope) if form == "one_sided" else orthogonal(g, d, 1.0, scope)
    left = [r - a for r, a in zip(result, g, strict=True) if a is not None]
    a, b = ([s[i] for i in (0, 2, 3, 4)] for s in (g, d))
    removed = math.sqrt(sum((x - y).square().sum().item() for x, y in zip(b, left, strict=True)) / dot(b, b))
    assert message.removed == pytest.approx(removed, abs=1e-12)
    assert message.cosine == pytest.approx(dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)), abs=1e-12)
    assert message.conflicting == sum(dot([x], [y]) < 0 for x, y in zip(a, b, strict=True)) / 4


def test_conflict_of_nothing_is_zero():
    g, _ = gradients()
    for a, b in (([], []), (g, [None] * len(g)), ([None] * len(g), g), ([x * 0 for x in g], g)):
        assert conflict(inner_products(a, b)) == (0.0, 0.0, 0.0)
    assert total([]) == (0.0, 0.0, 0.0) and total([]).cosine == 0.0


def test_conflict_counts_tensors_that_have_both():
    g = [torch.ones(1), torch.ones(1), torch.ones(1), None]
    d = [-torch.ones(1), torch.ones(1), None, -torch.ones(1)]
    assert conflict(inner_products(g, d)).conflicting == 0.5


def test_pcgrad_is_symmetric_and_does_not_protect():
    g, d = gradients(-0.5, 1.0, torch.float64)
    for x, y in zip(pcgrad(g, d), pcgrad(d, g), strict=True):
        torch.testing.assert_close(x, y)
    p = total(inner_products(g, d))
    assert dot(g, pcgrad(g, d)) == pytest.approx(p.task * (1 - p.cosine**2))


def test_refusals_say_what_was_found_and_expected():
    g, d = gradients()
    for rule in RULES.values():
        with pytest.raises(ValueError, match="scope is 'layer'; expected 'global' or 'tensor'"):
            rule(g, d, "layer")
        with pytest.raises(ValueError, match="5 task gradients and 4 transfer gradients"):
            rule(g, d[:4])
        with pytest.raises(ValueError, match=r"gradient 0 is \(16, 8\) for the task and \(8, 16\) for the transfer"):
            rule(g, [d[0].T, *d[1:]])
    for c in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"c is .*; expected a finite number from 0"):
            orthogonal(g, d, c)
    with pytest.raises(ValueError, match="form is 'both'"):
        conflict(inner_products(g, d), form="both")
