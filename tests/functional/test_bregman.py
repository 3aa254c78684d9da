"""Bregman representations: equal to slow references and to PCA, their laws, and saturated outputs."""

import dataclasses
import doctest
import math
from itertools import pairwise

import pytest
import scipy.linalg
import torch
from sklearn.decomposition import PCA

from hf_kdtl.functional import bregman, links
from hf_kdtl.functional.bregman import fit
from hf_kdtl.functional.links import LINKS, coefficients, conjugate, find, leaky_relu
from tests.functional.agree import Sizes, randn
from tests.reference import bregman as slow

all_links = pytest.mark.parametrize("name", LINKS)


def before(n=120, d=6, noise=0.3, size=1.0):
    """Pre-activations near two directions of uneven strength."""
    a = randn(n, 2) * torch.tensor([1.5, 1.0]) @ randn(2, d, seed=1) + noise * randn(n, d, seed=2)
    return size * a + 0.5 * randn(d, seed=3)


def outputs(name, **kw):
    return LINKS[name].f(before(**kw))


def full(name, d=6):
    return d - 1 if name == "softmax" else d


def worst(x):
    return x.abs().max().item()


def gradient(rep, y):
    return (rep.decode(rep.encode(y)) - y) @ rep.directions


@pytest.mark.parametrize("module", [bregman, links])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


# links


@all_links
def test_links_agree_with_the_reference(name):
    link, a, b, v = LINKS[name], 2 * randn(5, 4), 2 * randn(5, 4, seed=1), randn(5, 4, seed=2)
    y = link.f(b)
    for i in range(5):
        assert link.potential(a)[i].item() == pytest.approx(slow.F[name](a[i]).item(), abs=1e-12)
        torch.testing.assert_close(link.f(a)[i], slow.f(name, a[i]), rtol=0, atol=1e-12)
        torch.testing.assert_close(link.hessian(a, v)[i], slow.hessian(name, a[i]) @ v[i], rtol=0, atol=1e-12)
        assert link.divergence(a, y)[i].item() == pytest.approx(slow.divergence(name, a[i], b[i]), abs=1e-12)
    shift = b.mean(-1, keepdim=True) if name == "softmax" else 0
    torch.testing.assert_close(link.inverse(y), b - shift, rtol=1e-9, atol=1e-9)


@all_links
def test_divergence_is_zero_at_equality_and_never_negative(name):
    link, a = LINKS[name], 8 * randn(200, 5)
    assert worst(link.divergence(a, link.f(a))) < 1e-13
    near = a + 1e-9 * randn(200, 5, seed=1)
    assert (link.divergence(near, link.f(a)) >= 0).all()
    assert link.divergence(a.flip(0), link.f(a)).min() > 1e-3


def test_saturated_outputs_have_a_finite_divergence():
    big = torch.tensor([[40.0, -40.0], [800.0, 0.0]], dtype=torch.float64)
    for name in ("tanh", "sigmoid", "softmax"):
        link = LINKS[name]
        y = link.f(big).round()  # 1, 0, -1 to the last bit
        assert worst(link.divergence(big, y)[:1]) < 1e-15 and link.divergence(big, y).isfinite().all()
        assert link.divergence(torch.zeros_like(big), y).isfinite().all() and link.slope(big).min() >= 0
    assert LINKS["tanh"].slope(big)[0, 0] == pytest.approx(4 * math.exp(-80), rel=1e-9, abs=0)
    y = torch.tensor([[1 - 1e-30, 1e-30]], dtype=torch.float64)
    a = LINKS["softmax"].inverse(y)
    assert a[0, 0].item() == pytest.approx(34.5388, abs=1e-4)  # 15 ln 10
    assert LINKS["softmax"].f(a)[0, 1].item() == pytest.approx(1e-30, rel=1e-9, abs=0)


def test_leaky_relu_of_another_slope():
    link, a = leaky_relu(0.3), randn(4, 3)
    torch.testing.assert_close(link.f(a), torch.nn.functional.leaky_relu(a, 0.3))
    assert fit(link.f(before()), 6, link).explained > 1 - 1e-12
    for slope in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="the slope of leaky_relu is"):
            leaky_relu(slope)


# coefficients and directions


@all_links
def test_encode_agrees_with_the_reference(name):
    a = before(n=3)
    rep = fit(outputs(name), 2, name)
    got = rep.encode(LINKS[name].f(a))
    for row, c in zip(a, got, strict=True):
        torch.testing.assert_close(c, slow.encode(name, rep.directions, rep.mean, row), rtol=1e-5, atol=1e-6)


@all_links
@pytest.mark.parametrize("k", [1, 3])
def test_encode_reaches_its_optimum_also_far_from_the_mean(name, k):
    rep = fit(outputs(name), k, name)
    for size in (1, 5, 30):
        y = LINKS[name].f(size * randn(100, 6, seed=7) + size / 2)
        assert gradient(rep, y).norm(dim=1).max() < 1e-6


@all_links
def test_a_bad_hint_changes_nothing(name):
    rep, y = fit(outputs(name), 2, name), outputs(name)
    c = coefficients(rep.link, rep.directions, rep.mean, y, hint=1e3 * randn(len(y), 2))
    torch.testing.assert_close(c, rep.encode(y), rtol=1e-5, atol=1e-6)


@all_links
def test_conjugate_keeps_the_span(name):
    link, m = LINKS[name], LINKS[name].inverse(outputs(name).mean(0))
    given = randn(6, 3) @ torch.diag(torch.tensor([1.0, 1e-3, 1e3], dtype=torch.float64))
    v = conjugate(link, m, given)
    assert worst(v.T @ link.hessian(m, v.T).T - torch.eye(3)) < 1e-12
    ones = torch.ones(6, 1, dtype=torch.float64)  # soft-max does not see them
    basis = torch.cat([v, ones], 1) if name == "softmax" else v
    left = given - basis @ torch.linalg.lstsq(basis, given).solution
    assert worst(left / given.norm(dim=0)) < 1e-10
    with pytest.raises(ValueError, match="linearly dependent"):
        conjugate(link, m, torch.cat([given, given[:, :1]], 1))


# the fit


@all_links
@pytest.mark.parametrize("k", [1, 2, 3])
def test_laws_of_the_fit(name, k):
    y, seen = outputs(name), []
    rep = fit(y, k, name, callback=lambda step, r: seen.append(r))
    link = LINKS[name]
    assert rep.directions.shape == (6, k) and rep.directions.dtype == torch.float64
    torch.testing.assert_close(rep.mean, slow.mean(name, y))
    history = [r.divergence for r in seen]
    assert all(b < a for a, b in pairwise(history)) and rep.divergence <= history[-1]
    assert name == "identity" or len(history) > 1
    for r in (*seen, rep):
        assert worst(r.directions.T @ link.hessian(r.mean, r.directions.T).T - torch.eye(k)) < 1e-6
    c = rep.encode(y)
    at = c @ rep.directions.T + rep.mean
    assert link.divergence(at, y).mean().item() == pytest.approx(rep.divergence, abs=1e-12)
    assert link.divergence(rep.mean, y).mean().item() == pytest.approx(rep.baseline)
    torch.testing.assert_close(
        c.T @ c / len(c), torch.diag(rep.spectrum), rtol=1e-6, atol=1e-6 * rep.spectrum[0].item()
    )
    assert (rep.spectrum[:-1] >= rep.spectrum[1:]).all()
    assert (rep.directions.gather(0, rep.directions.abs().argmax(0, keepdim=True)) > 0).all()
    assert rep.explained > [0.4, 0.8, 0.85][k - 1]


@all_links
def test_full_rank_reconstructs(name):
    y = outputs(name)
    rep = fit(y, full(name), name)
    assert worst(rep.decode(rep.encode(y)) - y) < 1e-6 and rep.explained == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_identity_is_pca(k):
    y = 10 * before() + 3
    rep, pca = fit(y, k, "identity"), PCA(k, svd_solver="full").fit(y.numpy())
    components = torch.tensor(pca.components_).T
    assert worst(rep.directions @ rep.directions.T - components @ components.T) < 1e-6
    assert worst(rep.decode(rep.encode(y)) - torch.tensor(pca.inverse_transform(pca.transform(y.numpy())))) < 1e-6
    torch.testing.assert_close(rep.spectrum * len(y) / (len(y) - 1), torch.tensor(pca.explained_variance_))
    assert rep.explained == pytest.approx(pca.explained_variance_ratio_.sum())
    for j in range(k):  # and each direction, up to its sign
        assert (rep.directions[:, j] @ components[:, j]).abs().item() == pytest.approx(1, abs=1e-6)


@all_links
def test_no_worse_than_a_library_on_directions_and_coefficients_together(name):
    a = before(n=12, d=5)
    y = LINKS[name].f(a)
    rep = fit(y, 2, name, tolerance=1e-10)
    other = slow.least_divergence(name, rep.mean, a, 2, randn(5, 2, seed=8))
    assert rep.divergence <= other + 1e-6 * rep.baseline
    assert rep.divergence >= other - 1e-2 * rep.baseline  # the same quantity


@all_links
def test_random_starts_reach_the_same_divergence(name):
    y = outputs(name)
    rep = fit(y, 2, name, tolerance=1e-9)
    for seed in (10, 11, 12):
        other = fit(y, 2, name, tolerance=1e-9, start=randn(6, 2, seed=seed))
        assert other.divergence == pytest.approx(rep.divergence, abs=1e-6 * rep.baseline)


def test_it_beats_the_principal_components_it_starts_from():
    y, seen = outputs("softmax", size=2.0), []
    fit(y, 2, "softmax", callback=lambda step, r: seen.append(r.explained))
    assert seen[-1] > seen[0] + 0.02


def test_softmax_reconstructions_are_distributions():
    y = outputs("softmax")
    rep = fit(y, 2, "softmax")
    p = rep.decode(50 * randn(40, 2))
    assert (p >= 0).all() and worst(p.sum(-1) - 1) < 1e-12
    assert worst(LINKS["softmax"].f(rep.mean) @ rep.directions) < 1e-12
    shifted = rep.link.f(rep.encode(y) @ (rep.directions + 5).T + rep.mean)
    torch.testing.assert_close(shifted, rep.decode(rep.encode(y)))


def test_log_ratios_of_r_dimensions_need_one_direction_more():
    a = randn(50, 2) @ randn(2, 6, seed=1)
    y = a.softmax(-1)
    assert fit(y, 3, "softmax", tolerance=1e-12).explained > 1 - 1e-10
    assert fit(y, 2, "softmax", tolerance=1e-9).explained < 1 - 1e-4
    with pytest.raises(ValueError, match="in 3 directions"):
        fit(y, 4, "softmax")


@all_links
def test_batches_give_what_a_tensor_gives(name):
    y = outputs(name)
    entire, parts = fit(y, 2, name), fit([y[:50], y[50:51], y[51:]], 2, name)
    assert parts.divergence == pytest.approx(entire.divergence, abs=1e-10 * entire.baseline)
    torch.testing.assert_close(parts.directions, entire.directions, rtol=1e-4, atol=1e-4)
    shuffled = torch.utils.data.DataLoader(y, batch_size=32, shuffle=True)
    assert fit(shuffled, 2, name).divergence == pytest.approx(entire.divergence, abs=1e-4 * entire.baseline)


def test_memory_is_bounded_by_the_piece(monkeypatch):
    monkeypatch.setattr(links, "_HELD", 600)
    y = outputs("softmax", n=1000)
    batches = [part.clone() for part in y.split(250)]
    with Sizes() as sizes:
        fit(batches, 2, "softmax", passes=1).encode(batches[0])
    assert max(sizes.made) <= 250 * 6 * 8  # a given batch in float64, and nothing of all rows
    entire = fit(y, 2, "softmax", passes=3).divergence
    monkeypatch.setattr(links, "_HELD", 2**22)
    assert fit(y, 2, "softmax", passes=3).divergence == pytest.approx(entire, rel=1e-9)


def test_a_fit_goes_on_from_where_it_stopped():
    y = outputs("softmax")
    early, seen = fit(y, 2, "softmax", passes=1), []
    keep, start = {"tolerance": 1e-9}, early.directions
    late = fit(y, 2, "softmax", start=start, callback=lambda step, r: seen.append(r.divergence), **keep)
    assert seen[0] == pytest.approx(early.divergence, rel=1e-9)
    assert early.divergence > late.divergence + 1e-4 * late.baseline
    assert late.divergence == pytest.approx(fit(y, 2, "softmax", **keep).divergence, abs=1e-6 * late.baseline)


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_the_start_is_principal_components_in_the_metric_of_the_mean(name):
    y, seen = outputs(name), []
    rep = fit(y, 2, name, passes=1, callback=lambda step, r: seen.append(r.directions))
    centred = y - y.mean(0)
    metric = torch.stack([slow.hessian(name, rep.mean)[j] for j in range(6)])
    vectors = torch.tensor(scipy.linalg.eigh((centred.T @ centred).numpy(), metric.numpy())[1][:, -2:])
    torch.testing.assert_close(seen[0] @ seen[0].T, vectors @ vectors.T)


@all_links
def test_gradient_of_the_least_divergence(name):
    data = bregman.Data(outputs(name), LINKS[name])
    v, towards, s = data.start(2) + 0.1 * randn(6, 2, seed=4), randn(6, 2, seed=5), 1e-4
    ahead, here, behind = (bregman._run(data, v + t * towards, {}) for t in (s, 0.0, -s))
    slope = (ahead.divergence - behind.divergence) / (2 * s)
    assert (here.gradient * towards).sum().item() == pytest.approx(slope, rel=1e-3, abs=1e-8)


def test_earlier_steps_save_passes(monkeypatch):
    y, passes = outputs("softmax", size=2.0), []
    step = bregman._quasi_newton
    for remember in (True, False):
        seen = []
        monkeypatch.setattr(
            bregman, "_quasi_newton", lambda here, history, r=remember: step(here, history if r else [])
        )
        fit(y, 2, "softmax", tolerance=1e-9, callback=lambda step, r, seen=seen: seen.append(r))
        passes.append(len(seen))
    assert passes[0] < 0.5 * passes[1], passes


def test_probabilities_are_brought_to_sum_1():
    y = outputs("softmax")
    one, other = fit(y, 2, "softmax"), fit(y * (1 + 9e-4), 2, "softmax")
    assert other.divergence == pytest.approx(one.divergence, rel=1e-9)


def test_the_smallest_of_many_k():
    y = randn(60, 12) * torch.linspace(1, 2, 12)
    explained = [fit(y, k, "identity").explained for k in range(1, 13)]
    for k in range(1, 12):
        assert fit(y, (explained[k - 1] + ([0.0, *explained])[k - 1]) / 2, "identity").directions.shape[1] == k


@all_links
def test_k_by_explained_divergence_is_the_smallest(name):
    y = outputs(name)
    rep = fit(y, 0.9, name)
    k = rep.directions.shape[1]
    assert rep.explained >= 0.9 and 1 < k < full(name)
    assert fit(y, k - 1, name).explained < 0.9
    assert fit(y, 1e-3, name).directions.shape[1] == 1


def test_float32_outputs_and_the_same_result_twice():
    y = outputs("softmax").float()
    one, two = fit(y, 2, "softmax"), fit(y, 2, "softmax")
    assert torch.equal(one.directions, two.directions) and one.directions.dtype == torch.float64
    assert one.encode(y).dtype == one.decode(one.encode(y).float()).dtype == torch.float64
    assert one.encode(y[:0]).shape == (0, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.mean = None


# saturated outputs


@pytest.mark.parametrize("name", ["softmax", "tanh", "sigmoid"])
@pytest.mark.parametrize("size", [10.0, 200.0])
@pytest.mark.parametrize("k", [1, None])
def test_saturated_outputs(name, size, k):
    y = outputs(name, n=60, size=size)
    assert ((y == 0) | (y == 1)).any() if size > 100 else True
    rep = fit(y, k or full(name), name, passes=5)
    assert gradient(rep, y).norm(dim=1).max() < 1e-6
    assert rep.encode(y).isfinite().all() and rep.directions.isfinite().all()
    assert rep.explained > (0.3 if k else 1 - 1e-6)
    if k is None:
        assert worst(rep.decode(rep.encode(y)) - y) < 1e-6


def test_one_hot_rows_and_rare_classes():
    rep = fit(torch.eye(5).repeat(3, 1), 4, "softmax")
    assert worst(rep.decode(rep.encode(torch.eye(5))) - torch.eye(5)) < 1e-6
    y = torch.tensor([[1 - 1e-30, 1e-30, 0.0], [0.3, 0.7, 1e-30], [1e-30, 1.0, 1e-30]], dtype=torch.float64)
    for k in (1, 2):
        rep = fit(y, k, "softmax")
        assert worst(rep.decode(rep.encode(y)) - y) < 1e-6
        assert worst(rep.directions.T @ rep.link.hessian(rep.mean, rep.directions.T).T - torch.eye(k)) < 1e-6


# refusals


@pytest.mark.parametrize(
    ("y", "k", "link", "match"),
    [
        ("identity", 2, "relu", "link 'relu' is not strictly monotone: it maps all negative numbers to 0.*leaky_relu"),
        ("identity", 2, "gelu", "link 'gelu' is not strictly monotone: it falls before it rises.*'identity'"),
        ("identity", 2, "swish", "link is 'swish'; expected 'identity', 'softmax', 'tanh', 'sigmoid', 'leaky_relu'"),
        ("identity", 2, "softmax", "rows are outside the range of 'softmax'.*probabilities that sum to 1"),
        ("identity", 2, "tanh", "outside the range of 'tanh'.*from -1 to 1"),
        ("tanh", 2, "sigmoid", "outside the range of 'sigmoid'.*from 0 to 1"),
        ("sigmoid", 2, "softmax", "outside the range of 'softmax'"),
        ("identity", 7, "identity", "k is 7.*in 6 directions.*Give k from 1 to 6"),
        ("softmax", 6, "softmax", "k is 6.*in 5 directions"),
        ("identity", 0, "identity", "k is 0; expected a number of directions from 1 to 6, or a share below 1"),
        ("identity", 1.0, "identity", "k is 1.0"),
        ("identity", True, "identity", "k is True"),
    ],
)
def test_refusals(y, k, link, match):
    with pytest.raises(ValueError, match=match):
        fit(outputs(y), k, link)


@all_links
def test_bad_rows_are_refused(name):
    y = outputs(name)
    y[3, 2] = float("nan")
    with pytest.raises(ValueError, match="1 of 120 rows are nan, such as row 3"):
        fit(y, 2, name)
    y[3, 2] = float("inf")
    with pytest.raises(ValueError, match="1 of 120 rows are outside the range"):
        fit(y, 2, name)
    for empty in (outputs(name)[:0], []):
        with pytest.raises(ValueError, match="y has no rows"):
            fit(empty, 2, name)
    with pytest.raises(ValueError, match=r"k is 4.*the 3 rows"):
        fit(outputs(name)[:3], 4, name)
    with pytest.raises(ValueError, match="all 5 rows of y are equal"):
        fit(outputs(name)[:1].repeat(5, 1), 1, name)
    with pytest.raises(ValueError, match=r"y is \(120,\); expected a tensor \(n, d\)"):
        fit(outputs(name)[:, 0], 1, name)
    with pytest.raises(ValueError, match=r"y is \(120, 5\); expected a tensor \(n, 6\)"):
        fit([outputs(name), outputs(name)[:, :5]], 1, name)


def test_constant_columns():
    y = outputs("identity")
    y[:, 2] = 0.7
    rep = fit(y, 5, "identity")
    assert worst(rep.directions[2]) < 1e-12 and rep.explained == pytest.approx(1)
    with pytest.raises(ValueError, match="in 5 directions"):
        fit(y, 6, "identity")
    for name, edge in (("softmax", 0.0), ("tanh", 1.0), ("sigmoid", 0.0)):
        y = outputs(name)
        y[:, 2] = edge
        y = y / y.sum(-1, keepdim=True) if name == "softmax" else y
        with pytest.raises(ValueError, match=r"column 2 is the same extreme value in every row .1 such columns"):
            fit(y, 2, name)


def test_rows_must_be_there_again():
    y = outputs("identity")
    with pytest.raises(ValueError, match="y is an iterator, which can be read once; give a list"):
        fit((part for part in y.split(10)), 2, "identity")

    class Shrinking:
        left = 120

        def __iter__(self):
            self.left -= 20
            return iter([y[: self.left]])

    with pytest.raises(RuntimeError, match="this pass gave 80 rows and the first one 100"):
        fit(Shrinking(), 2, "identity")


def test_other_refusals():
    y = outputs("tanh")
    with pytest.raises(ValueError, match=r"start is \(6, 3\); expected \(d, k\) = \(6, 2\)"):
        fit(y, 2, "tanh", start=randn(6, 3))
    with pytest.raises(ValueError, match="start gives the number of directions"):
        fit(y, 0.5, "tanh", start=randn(6, 3))
    rep = fit(y, 2, "tanh")
    with pytest.raises(ValueError, match="outside the range of 'tanh'"):
        rep.encode(2 * y)
    with pytest.raises(ValueError, match=r"y is \(120, 5\); expected a tensor \(n, 6\)"):
        rep.encode(y[:, :5])
    assert find(LINKS["tanh"]) is find("tanh")
