"""The rules: their laws on the gradients of a ViT that conflict, and what they refuse."""

import inspect
import math

import pytest
import torch

from hf_kdtl.functional.surgery import conflict, inner_products, total
from hf_kdtl.gradient_rules import GRADIENT_RULES
from tests.gradient_rules.small import Small, dot
from tests.reference import surgery as slow

NEVER_HURT = [{"form": "one_sided"}, {"form": "orthogonal", "alpha": 0.3, "decay": 0.5}]
both_forms = pytest.mark.parametrize("options", NEVER_HURT, ids=["one_sided", "orthogonal"])
both_scopes = pytest.mark.parametrize("scope", ["global", "tensor"])
EPOCH = 2  # so that c is 0.3 * 0.5**2


def written(small, rule, task, transfer, epoch=EPOCH):
    """What the optimizer gets."""
    window = small.window(**rule)
    window.add(task, transfer, small.pairs)
    window.write(epoch)
    return small.gradients()


def conflicting(ratio=None, **terms):
    """A ViT whose two gradients conflict, its terms, g and d; `ratio` scales d to ||d|| = ratio ||g||."""
    small = Small()
    factor = 1.0
    if ratio is not None:
        g, d = small.sides(**terms)
        factor = ratio * math.sqrt(dot(g, g) / dot(d, d))
    task, transfer = small.terms(wrong=factor, **terms)
    g, d = small.sides(wrong=factor, **terms)
    return small, task, transfer, g, d


@both_forms
@both_scopes
@pytest.mark.parametrize("ratio", [1.0, 1e4])
def test_law_and_reference_on_a_vit(options, scope, ratio):
    small, task, transfer, g, d = conflicting(ratio)
    assert total(inner_products(g, d)).cosine < -0.2
    assert math.sqrt(dot(d, d) / dot(g, g)) == pytest.approx(ratio, rel=1e-4)
    plain = [a if b is None else b if a is None else a + b for a, b in zip(g, d, strict=True)]
    assert dot(g, plain) < 0.9 * dot(g, g)  # with no rule the law is broken
    result = written(small, {"rule": "never_hurt", "scope": scope, **options}, task, transfer)
    assert dot(g, result) >= dot(g, g) * (1 - 1e-5)
    if scope == "tensor":
        for a, r in zip(g, result, strict=True):
            assert dot([a], [r]) >= dot([a], [a]) * (1 - 1e-5)
    expected = slow.combine(g, d, options["form"], scope, 0.3 * 0.5**EPOCH)
    size = math.sqrt(max(dot(g, g), dot(d, d)))
    for r, want in zip(result, expected, strict=True):
        if r is None:
            assert not want.any()
        else:
            torch.testing.assert_close(r.double().flatten(), want, rtol=1e-6, atol=1e-6 * size)


@both_scopes
def test_pcgrad_against_the_reference(scope):
    small, task, transfer, g, d = conflicting()
    result = written(small, {"rule": "pcgrad", "scope": scope}, task, transfer)
    for r, want in zip(result, slow.combine(g, d, "pcgrad", scope), strict=True):
        torch.testing.assert_close(torch.zeros(len(want)) if r is None else r.flatten(), want.float())
    if scope == "global":
        p = total(inner_products(g, d))
        assert dot(g, result) == pytest.approx(p.task * (1 - p.cosine**2), rel=1e-5)


@both_scopes
@pytest.mark.parametrize("name", ["never_hurt", "pcgrad"])
def test_where_nothing_conflicts_it_is_the_plain_sum(name, scope):
    small = Small()
    task, transfer = small.terms(shift=0, wrong=0.5)  # d = g / 2
    g, d = small.sides(shift=0, wrong=0.5)
    result = written(small, {"rule": name, "scope": scope}, task, transfer)
    for r, a, b in zip(result, g, d, strict=True):
        assert (r is None and a is None) or torch.equal(r, a + b)


@both_forms
@both_scopes
def test_a_projector_keeps_its_gradient_unscaled(options, scope):
    small, task, transfer, g, d = conflicting(features=1e-4)
    place = [name for name, _ in small.parameters].index("features.weight")
    assert g[place] is None and d[place].abs().max() > 0 and total(inner_products(g, d)).cosine < -0.2
    result = written(small, {"rule": "never_hurt", "scope": scope, **options}, task, transfer)
    torch.testing.assert_close(result[place], d[place], rtol=1e-6, atol=0)
    others = [i for i in range(len(g)) if i != place]
    assert any(not torch.allclose(result[i], g[i] + d[i], rtol=1e-3) for i in others)  # the rule was at work


def test_decay_goes_by_epochs():
    small = Small()
    rule = {"rule": "never_hurt", "form": "orthogonal"}
    g, _ = small.sides()
    moved = [
        [r - a for r, a in zip(written(small, rule, *small.terms(), epoch), g, strict=True) if a is not None]
        for epoch in (0, 10)
    ]
    lengths = [math.sqrt(dot(m, m)) for m in moved]
    assert lengths[1] / lengths[0] == pytest.approx(0.99**10, rel=1e-3)


def test_layer_local_is_the_sum_and_removes_nothing():
    rule = GRADIENT_RULES["layer_local"]()
    g, d = [torch.ones(2), None, torch.ones(1), None], [-torch.ones(2) / 2, torch.ones(1), None, None]
    products = inner_products(g, d)
    assert rule.local and rule.conflict(products, 0) == conflict(products)._replace(removed=0.0)
    assert conflict(products).removed > 0.5 and rule.conflict(products, 0).conflicting == 1.0
    result = rule.combine(g, d, products, 0)
    assert [r if r is None else r.tolist() for r in result] == [[0.5, 0.5], [1.0], [1.0], None]
    assert torch.equal(g[0], torch.ones(2))


@pytest.mark.parametrize("name", GRADIENT_RULES)
def test_registry(name):
    rule = GRADIENT_RULES[name]()
    assert rule.name == name and rule.citation.startswith("@") and rule.local == (name == "layer_local")
    kinds = [p.kind for p in inspect.signature(type(rule)).parameters.values()]
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for kind in kinds)
    # What is guaranteed, and what is not, where users read the name.
    text = " ".join(inspect.getdoc(type(rule)).split())
    for part in ("passed to the optimizer, on that batch", "AdamW", "test accuracy", "task_step", "Source:", "Cost:"):
        assert part in text


@both_scopes
@pytest.mark.parametrize("rule", [*NEVER_HURT, "pcgrad"], ids=["one_sided", "orthogonal", "pcgrad"])
def test_what_is_logged_goes_by_form_and_scope(rule, scope):
    name, options = (rule, {}) if isinstance(rule, str) else ("never_hurt", rule)
    _, _, _, g, d = conflicting(features=1e-4)
    products = inner_products(g, d)
    sentence = GRADIENT_RULES[name](scope=scope, **options).conflict(products, 0)
    assert sentence == conflict(products, scope, options.get("form", name)) and sentence.removed > 0.1


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("never_hurt", {"form": "both"}, "form is 'both'; expected 'one_sided' or 'orthogonal'"),
        ("never_hurt", {"form": ["one_sided"]}, r"form is \['one_sided'\]"),
        ("never_hurt", {"scope": "layer"}, "scope is 'layer'; expected 'global' or 'tensor'"),
        ("pcgrad", {"scope": None}, "gradient_rule 'pcgrad': scope is None"),
        ("never_hurt", {"alpha": 0.1}, "alpha has no effect with form 'one_sided'"),
        ("never_hurt", {"decay": 0.99}, "decay has no effect with form 'one_sided'"),
        *(
            ("never_hurt", {"form": "orthogonal", "alpha": value}, "alpha is .*; expected a number greater than 0")
            for value in (0, -1, math.nan, math.inf, True, "0.1")
        ),
        *(
            ("never_hurt", {"form": "orthogonal", "decay": value}, r"decay is .*; expected a number in \(0, 1\]")
            for value in (0, 1.01, math.nan, True, "1")
        ),
    ],
)
def test_refusals(name, options, message):
    with pytest.raises(ValueError, match=message):
        GRADIENT_RULES[name](**options)


def test_a_misspelt_option_and_the_ends_of_the_ranges():
    with pytest.raises(TypeError, match="scpoe"):
        GRADIENT_RULES["pcgrad"](scpoe="global")
    with pytest.raises(TypeError):
        GRADIENT_RULES["layer_local"](scope="global")
    assert GRADIENT_RULES["never_hurt"](form="orthogonal", decay=1).decay == 1
