"""Attention: equal to the reference with every matrix written out, over heads, prefixes and grids; and its laws."""

import doctest
import math

import pytest
import torch

from hf_kdtl.functional import attention as a
from hf_kdtl.functional import resample
from tests.functional.agree import Sizes, assert_agree, randn
from tests.reference import attention as slow

# student heads, teacher heads, prefixes, kept prefix tokens, grids
PAIRS = [
    pytest.param(2, 2, 1, 1, (0,), (0,), (2, 2), (2, 2), id="same"),
    pytest.param(2, 3, 1, 1, (0,), (0,), (2, 2), (3, 3), id="finer-teacher"),
    pytest.param(1, 2, 2, 1, (0,), (0,), (3, 2), (2, 2), id="distillation-token-coarser-teacher"),
    pytest.param(2, 1, 1, 3, (0,), (0,), (2, 2), (2, 3), id="teacher-with-registers"),
    pytest.param(2, 2, 2, 4, (0, 1), (0, 3), (1, 3), (3, 1), id="two-kept-not-square"),
    pytest.param(2, 2, 0, 1, (), (), (2, 2), (3, 2), id="student-without-class-token"),
]


def _side(heads, prefix, grid, seed):
    tokens = prefix + grid[0] * grid[1]
    return 1.5 * randn(2, heads, tokens, 3, seed=seed), 1.5 * randn(2, heads, tokens, 3, seed=seed + 1)


def _fast(q_s, k_s, q_t, k_t, rows, distance, pair):
    _, _, prefix_s, prefix_t, keep_s, keep_t, grid_s, grid_t = pair
    logs = []
    for q, k, keep, prefix, grid in ((q_s, k_s, keep_s, prefix_s, grid_s), (q_t, k_t, keep_t, prefix_t, grid_t)):
        log_p = a.mean_heads(a.attention_rows(q, k, 0.7, rows=rows))
        log_p = a.align_columns(log_p, keep, prefix, grid, grid_s)
        logs.append(a.align_rows(log_p, keep, prefix, grid, grid_s) if rows == "all" else log_p)
    return a.row_divergence(logs[0], logs[1], distance)


def _slow(q_s, k_s, q_t, k_t, rows, distance, pair):
    _, _, prefix_s, prefix_t, keep_s, keep_t, grid_s, grid_t = pair
    maps = []
    for q, k, keep, prefix, grid in ((q_s, k_s, keep_s, prefix_s, grid_s), (q_t, k_t, keep_t, prefix_t, grid_t)):
        p = slow.mean_heads(slow.attention(q, k, 0.7))
        if rows == "cls":
            p = p[:, :, :1]
        p = slow.align_columns(p, keep, prefix, grid, grid_s)
        maps.append(slow.align_rows(p, keep, prefix, grid, grid_s) if rows == "all" else p)
    return slow.row_divergence(*maps, distance)


def test_doctests():
    assert doctest.testmod(a).failed == 0


@pytest.mark.parametrize("distance", ["kl", "mse"])
@pytest.mark.parametrize("rows", ["cls", "all"])
@pytest.mark.parametrize("pair", [p.values for p in PAIRS], ids=[p.id for p in PAIRS])
def test_the_full_path_agrees_with_the_reference(pair, rows, distance):
    tensors = (*_side(pair[0], pair[2], pair[6], 1), *_side(pair[1], pair[3], pair[7], 3))
    assert_agree(lambda *x: _fast(*x, rows, distance, pair), lambda *x: _slow(*x, rows, distance, pair), *tensors)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 3, 5, 7), (2, 1, 1, 7), (5, 7)])
@pytest.mark.parametrize("rows", ["cls", "all"])
def test_attention_rows_agree_with_the_reference_under_any_bias(rows, shape):
    first = 1 if rows == "cls" else 5
    assert_agree(
        lambda q, k, b: a.attention_rows(q, k, 0.5, b, rows).exp(),
        lambda q, k, b: slow.attention(q, k, 0.5, b)[:, :, :first],
        randn(2, 3, 5, 4),
        randn(2, 3, 7, 4, seed=1),
        randn(*shape, seed=2),
    )


def test_attention_rows_are_those_of_the_models_own_kernel():
    q, k, value = randn(2, 3, 6, 4), randn(2, 3, 6, 4, seed=1), torch.eye(6).double().expand(2, 3, 6, 6)
    kernel = torch.nn.functional.scaled_dot_product_attention(q, k, value, scale=0.3)
    torch.testing.assert_close(a.attention_rows(q, k, 0.3, rows="all").exp(), kernel)


def test_a_mask_of_minus_infinity_excludes_without_nan():
    bias = torch.zeros(6).double()
    bias[2] = -math.inf
    q = randn(1, 2, 6, 4).requires_grad_()
    log_p = a.attention_rows(q, randn(1, 2, 6, 4, seed=1), 1.0, bias, "all")
    assert (log_p.exp()[..., 2] == 0).all()
    value = a.row_divergence(log_p, a.attention_rows(randn(1, 2, 6, 4, seed=2), q.detach(), 1.0, bias, "all"))
    (gradient,) = torch.autograd.grad(value.sum(), q)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all() and gradient.abs().max() > 0


@pytest.mark.parametrize("pair", [p.values for p in PAIRS], ids=[p.id for p in PAIRS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_sum_to_one_after_alignment(pair, dtype):
    _, heads, _, prefix, keep_s, keep, grid_s, grid = pair
    query, key = (x.to(dtype) for x in _side(heads, prefix, grid, 3))
    log_p = a.align_columns(a.attention_rows(query, key, 2.0, rows="all"), keep, prefix, grid, grid_s)
    aligned = a.align_rows(log_p, keep, prefix, grid, grid_s).exp()
    tokens = len(keep_s) + grid_s[0] * grid_s[1]
    assert aligned.shape == (2, heads, tokens, tokens) and aligned.dtype == dtype
    torch.testing.assert_close(aligned.sum(-1), torch.ones(2, heads, tokens, dtype=dtype))


@pytest.mark.parametrize("rows", ["cls", "all"])
@pytest.mark.parametrize("distance", ["kl", "mse"])
def test_is_zero_at_equality_with_identity_pairing(rows, distance):
    query, key = _side(2, 3, (2, 2), 1)
    pair = (2, 2, 3, 3, (0, 2), (0, 2), (2, 2), (2, 2))
    assert (_fast(query, key, query, key, rows, distance, pair) == 0).all()
    assert (_fast(query, key, 1.3 * query, key, rows, distance, pair) > 1e-4).all()


def test_a_row_spent_on_dropped_columns_is_not_lost():
    """In float32 all but e^-200 of the row is on a register; what is left must still be compared."""
    logits = torch.tensor([0.0, 200.0, math.log(2.0), math.log(1.0)])
    kept = a.align_columns(torch.log_softmax(logits, 0), (0,), 2, (1, 2), (1, 2))
    torch.testing.assert_close(kept.exp(), torch.tensor([0.25, 0.5, 0.25]))
    assert torch.isfinite(a.align_columns(torch.log_softmax(logits, 0), (0,), 2, (1, 2), (1, 3))).all()


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_sharp_attention_stays_finite(rows):
    """Scores of 1e4, an underflowed teacher on another grid: value and gradient."""
    q_s, k_s = (100 * x.float() for x in _side(2, 1, (2, 2), 1))
    q_t, k_t = (100 * x.float() for x in _side(2, 1, (3, 3), 3))
    q_s.requires_grad_(), q_t.requires_grad_()
    pair = (2, 2, 1, 1, (0,), (0,), (2, 2), (3, 3))
    value = _fast(q_s, k_s, q_t, k_t, rows, "kl", pair)
    gradients = torch.autograd.grad(value.sum(), (q_s, q_t))
    assert torch.isfinite(value).all() and all(torch.isfinite(g).all() for g in gradients)


def test_permuting_the_images_permutes_the_result():
    tensors, order = (*_side(2, 1, (2, 2), 1), *_side(3, 2, (3, 3), 3)), torch.tensor([1, 0])
    pair = (2, 3, 1, 2, (0,), (0,), (2, 2), (3, 3))
    value = _fast(*tensors, "all", "kl", pair)
    torch.testing.assert_close(_fast(*(x[order] for x in tensors), "all", "kl", pair), value[order])


def _bytes_made(tokens, rows):
    """Sizes of all results of operations, forward and backward, of a student of this many tokens."""
    query, key = (torch.randn(1, 2, tokens, 8, requires_grad=True) for _ in range(2))
    bias, side = torch.zeros(1, 2, tokens, tokens), math.isqrt(tokens - 1)
    with Sizes() as sizes:
        logs = [a.mean_heads(a.attention_rows(q, key, 0.3, bias, rows)) for q in (query, query.detach() + 1)]
        aligned = a.align_columns(logs[1], (0,), 1, (side, side), (side, side))
        a.row_divergence(logs[0], aligned).sum().backward()
    own = [n for n in sizes.made if n != bias.untyped_storage().nbytes()]  # views of the model's own bias
    return max(own), sum(own)


def test_the_class_row_builds_nothing_of_size_n_by_n():
    assert _bytes_made(257, "all")[0] >= 257 * 257 * 4, "this test would not see an N x N tensor"
    few, many = _bytes_made(257, "cls"), _bytes_made(1025, "cls")
    for one, other in zip(few, many, strict=True):
        assert other / one < 1.02 * 1025 / 257
    assert many[0] < 1025 * 1025


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 12])
def test_relation_heads_agree_with_the_reference(heads):
    assert_agree(lambda x: a.relation_heads(x, heads), lambda x: slow.relation_heads(x, heads), randn(2, 3, 5, 4))


def test_the_default_number_of_relation_heads_divides_both_widths():
    for heads, width_s, width_t in (
        (3, 192, 384),
        (2, 128, 192),
        (6, 384, 768),
        (12, 768, 1024),
        (5, 7, 11),
        (1, 4, 6),
    ):
        found = a.default_relation_heads(heads, width_s, width_t)
        valid = [n for n in range(1, heads + 1) if width_s % n == 0 and width_t % n == 0]
        assert found == max(valid)
    with pytest.raises(
        ValueError, match=r"5 relation heads do not divide the width 12 and 8; expected one of \[1, 2, 4\]"
    ):
        a.check_relation_heads(5, 12, 8)
    with pytest.raises(ValueError, match=r"5 relation heads .* width 12; expected one of \[1, 2, 3, 4, 6, 12\]"):
        a.relation_heads(randn(1, 3, 5, 4), 5)
    with pytest.raises(ValueError, match="0 relation heads"):
        a.relation_heads(randn(1, 3, 5, 4), 0)


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("pair", [p.values for p in PAIRS], ids=[p.id for p in PAIRS])
def test_relation_agrees_with_the_reference(pair, heads):
    _, _, prefix_s, prefix_t, keep_s, keep_t, grid_s, grid_t = pair
    x_s, x_t = randn(2, 2, prefix_s + math.prod(grid_s), 3), randn(2, 3, prefix_t + math.prod(grid_t), 4, seed=1)

    def fast(x_s, x_t):
        x_s = resample.align_tokens(x_s, keep_s, prefix_s, grid_s, grid_s)
        return a.relation(x_s, resample.align_tokens(x_t, keep_t, prefix_t, grid_t, grid_s), heads)

    layout = (keep_s, keep_t, prefix_s, prefix_t, grid_s, grid_t)
    assert_agree(fast, lambda x_s, x_t: slow.relation(x_s, x_t, heads, *layout), x_s, x_t)


def test_relation_is_zero_at_equality_whatever_the_heads():
    x = randn(2, 2, 5, 6)
    for heads in (1, 3, 4):
        assert (a.relation(x, x, heads) == 0).all()
    # The same concatenated values under other head counts are the same relations.
    assert (a.relation(x, a.relation_heads(x, 4), 3) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_computed_in_float32_also_under_autocast(dtype):
    query, key = (x.to(dtype) for x in _side(2, 1, (3, 3), 1))
    with torch.autocast("cpu", torch.bfloat16):
        log_p = a.attention_rows(query, key, 0.7, rows="all")
        aligned = a.align_rows(a.align_columns(log_p, (0,), 1, (3, 3), (2, 2)), (0,), 1, (3, 3), (2, 2))
        value = a.relation(query, key, 3)
    exact = a.attention_rows(query.double(), key.double(), 0.7, rows="all")
    assert log_p.dtype == aligned.dtype == value.dtype == torch.float32
    torch.testing.assert_close(log_p.double(), exact, rtol=1e-5, atol=1e-5)
    there = a.align_rows(a.align_columns(exact, (0,), 1, (3, 3), (2, 2)), (0,), 1, (3, 3), (2, 2))
    torch.testing.assert_close(aligned.double(), there, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value.double(), a.relation(query.double(), key.double(), 3), rtol=1e-4, atol=1e-5)


def test_refusals_say_what_was_found_and_expected():
    x = randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="rows is 'class'; expected 'cls' or 'all'"):
        a.attention_rows(x, x, 1.0, rows="class")
    with pytest.raises(ValueError, match="bias is boolean"):
        a.attention_rows(x, x, 1.0, torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="distance is 'l2'; expected 'kl' or 'mse'"):
        a.row_divergence(x, x, "l2")
    with pytest.raises(ValueError, match=r"\(1, 2, 5, 4\) and \(1, 1, 5, 4\) cannot be compared"):
        a.row_divergence(x, x[:, :1])
    with pytest.raises(ValueError, match="5 tokens are not 2 prefix tokens and a grid of 2 x 2 patches"):
        a.align_rows(x, (0, 1), 2, (2, 2), (2, 2))
    with pytest.raises(ValueError, match="4 tokens are not 1 prefix tokens"):
        a.align_columns(x, (0,), 1, (2, 2), (2, 2))
