"""Grids: shared areas are exact, sums and means are kept, and the fast paths equal the cell-by-cell reference."""

import doctest

import pytest
import torch

from hf_kdtl.functional import resample as r
from tests.functional.agree import assert_agree, randn
from tests.reference import features as slow

GRIDS = [
    ((4, 4), (4, 4)),
    ((4, 4), (2, 2)),
    ((3, 3), (2, 2)),
    ((2, 2), (3, 3)),
    ((2, 3), (3, 2)),
    ((5, 2), (3, 4)),
    ((1, 1), (2, 3)),
    ((4, 3), (1, 1)),
]
SIZES = [(1, 1), (1, 5), (5, 1), (2, 4), (4, 2), (3, 7), (7, 3), (14, 16)]


def test_doctests():
    assert doctest.testmod(r).failed == 0


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_overlap_gives_every_source_cell_away_once(source, target):
    shares = r.overlap(source, target, like=randn(1))
    assert shares.shape == (target, source) and shares.dtype == torch.float64
    assert (shares >= 0).all() and (shares <= 1).all()
    torch.testing.assert_close(shares.sum(0), torch.ones(source).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(
        shares.sum(1), torch.full((target,), source / target, dtype=torch.float64), rtol=1e-14, atol=0
    )
    for t in range(target):
        for s in range(source):
            expected = slow.shared_area(s, t, (1, source), (1, target)) * source
            assert abs(shares[t, s].item() - float(expected)) < 1e-15
            assert (shares[t, s] == 0) == (expected == 0), "cells that only touch share nothing"


def test_overlap_of_equal_sizes_is_the_identity():
    assert torch.equal(r.overlap(7, 7), torch.eye(7))


@pytest.mark.parametrize(("grid_from", "grid_to"), GRIDS)
def test_both_agree_with_the_reference(grid_from, grid_to):
    energy, features = randn(2, grid_from[0] * grid_from[1]), randn(2, grid_from[0] * grid_from[1], 3, seed=1)

    def reference(function, x):
        return torch.stack([function(image, grid_from, grid_to) for image in x])

    assert_agree(lambda x: r.redistribute(x, grid_from, grid_to), lambda x: reference(slow.redistribute, x), energy)
    assert_agree(lambda x: r.average(x, grid_from, grid_to), lambda x: reference(slow.average, x), features)


@pytest.mark.parametrize(("grid_from", "grid_to"), GRIDS)
def test_amounts_keep_their_sum_and_values_their_mean(grid_from, grid_to):
    x = randn(2, 3, grid_from[0] * grid_from[1])
    there = r.redistribute(x, grid_from, grid_to)
    assert there.shape == (2, 3, grid_to[0] * grid_to[1])
    torch.testing.assert_close(there.sum(-1), x.sum(-1), rtol=0, atol=1e-13)
    means = r.average(x[..., None], grid_from, grid_to)[..., 0]
    torch.testing.assert_close(means.mean(-1), x.mean(-1), rtol=0, atol=1e-13)
    assert (means <= x.amax(-1, keepdim=True) + 1e-12).all() and (means >= x.amin(-1, keepdim=True) - 1e-12).all()
    constant = r.average(torch.full((1, x.shape[-1], 2), 3.0).double(), grid_from, grid_to)
    torch.testing.assert_close(constant, torch.full_like(constant, 3.0), rtol=0, atol=1e-14)


def test_integer_ratios_are_average_pooling_and_repetition():
    x = randn(1, 4 * 6, 5)
    image = x.transpose(1, 2).reshape(1, 5, 4, 6)
    pooled = torch.nn.functional.avg_pool2d(image, (2, 3)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(r.average(x, (4, 6), (2, 2)), pooled)
    repeated = image.repeat_interleave(3, 2).repeat_interleave(2, 3).flatten(2).transpose(1, 2)
    torch.testing.assert_close(r.average(x, (4, 6), (12, 12)), repeated)


@pytest.mark.parametrize("keep", [(), (0,), (2, 0)])
def test_aligned_tokens_keep_the_prefix_asked_for(keep):
    x = randn(2, 3 + 6, 4)

    def reference(x):
        return torch.stack([slow.align_tokens(image, keep, 3, (2, 3), (2, 2)) for image in x])

    assert_agree(lambda x: r.align_tokens(x, keep, 3, (2, 3), (2, 2)), reference, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_computed_in_float32_also_under_autocast(dtype):
    x = randn(2, 12, 4).to(dtype)
    exact = r.average(x.double(), (3, 4), (2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        got = r.average(x, (3, 4), (2, 5))
        shared = r.redistribute(x[..., 0], (3, 4), (2, 5))
    assert got.dtype == shared.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        shared.double(), r.redistribute(x[..., 0].double(), (3, 4), (2, 5)), rtol=1e-5, atol=1e-6
    )


def test_refusals_say_what_was_found_and_expected():
    with pytest.raises(ValueError, match=r"17 patches do not lie on a grid of 4 x 4 = 16"):
        r.redistribute(randn(17), (4, 4), (2, 2))
    with pytest.raises(ValueError, match=r"17 patches do not lie"):
        r.average(randn(17, 2), (4, 4), (4, 4))
    with pytest.raises(
        ValueError, match=r"18 tokens are not 1 prefix tokens and a grid of 4 x 4 patches \(17 in all\)"
    ):
        r.align_tokens(randn(18, 2), (0,), 1, (4, 4), (4, 4))
    for keep in ((1,), (-1,), (0, 0)):
        with pytest.raises(ValueError, match="expected different indices from 0 to below 1"):
            r.align_tokens(randn(17, 2), keep, 1, (4, 4), (4, 4))
    with pytest.raises(ValueError, match="0 cells"):
        r.overlap(0, 3)
