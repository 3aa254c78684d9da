"""The rule: discrepancies to multipliers, against exact arithmetic, at its bounds and in its modes."""

import doctest
import json
import math
import random
from itertools import pairwise

import pytest

from hf_kdtl.optim import multipliers as fast
from hf_kdtl.optim.multipliers import Rates, bounded, interpolate, weighted_mean
from hf_kdtl.optim.options import RateOptions
from tests.reference import rates as slow


def made(sizes=(1, 1, 1, 1), matched=(0, 1, 2, 3), seed=0, **options):
    return Rates(RateOptions.of({"mode": "discrepancy", **options}), sizes, matched, seed)


def test_doctests():
    assert doctest.testmod(fast).failed == 0


def test_by_hand_after_three_measurements():
    """Two blocks, mu = .5, eps = .01: q = (.11, .31)/.21, (.02, .02)/.02, (.41, .01)/.21."""
    rates = made((1, 1), (0, 1), momentum=0.5, eps=0.01)
    for d in ([0.1, 0.3], [0.01, 0.01], [0.4, 0.0]):
        rates.update(d)
    one = (((1 + 0.11 / 0.21) / 2 + 1) / 2 + 0.41 / 0.21) / 2
    two = (((1 + 0.31 / 0.21) / 2 + 1) / 2 + 0.01 / 0.21) / 2
    assert rates.ratios == pytest.approx([one, two], abs=1e-12)
    assert one == pytest.approx(1.416666667) and two == pytest.approx(0.583333333)
    assert rates.multipliers == pytest.approx([one, two], abs=1e-9), "their mean is 1 as it is: a = 1"


def test_against_the_reference():
    draw = random.Random(0)
    for _ in range(30):
        depth = draw.randint(2, 12)
        sizes = [draw.randint(1, 10**6) for _ in range(depth)]
        given = [[draw.expovariate(20) for _ in range(depth)] for _ in range(3)]
        rates = made(sizes, range(depth), momentum=draw.choice([0.0, 0.5, 0.9]))
        for d in given:
            rates.update(d)
        s = slow.ratios(given, rates.options.momentum)
        assert rates.ratios == pytest.approx(s, rel=1e-12)
        assert rates.multipliers == pytest.approx(slow.multipliers(s, sizes), abs=1e-9)


@pytest.mark.parametrize("noise", [0.0, 1e-16, 1e-12])
def test_equal_models_give_one(noise):
    rates = made()
    for i in range(50):
        rates.update([noise * ((i + j) % 3) for j in range(4)])
    assert rates.multipliers == pytest.approx([1.0] * 4, abs=1e-5)
    if not noise:
        assert rates.ratios == [1.0] * 4


def test_bounds_and_mean_hold_together():
    draw = random.Random(1)
    cases = []
    for _ in range(200):
        cases.append(([draw.lognormvariate(0, 4) for _ in range(9)], [draw.randint(1, 10**7) for _ in range(9)]))
    cases += [([1000.0, 1.0, 1.0], [1, 10**7, 10**7]), ([1e-9, 1.0, 1.0], [10**7, 1, 1]), ([1e6, 1e-6], [1, 1])]
    cases += [([1e3, 1.0], [10**9, 1]), ([5.0, 1.0, 1.0], [0, 3, 3])]
    for s, sizes in cases:
        found = bounded(s, sizes, 0.25, 4.0)
        assert all(0.25 <= m <= 4.0 for m in found)
        assert weighted_mean(found, sizes) == pytest.approx(1, abs=1e-9)
        order = sorted(range(len(s)), key=s.__getitem__)
        assert all(found[a] <= found[b] for a, b in pairwise(order)), "further away, faster"


def test_interpolation_in_depth():
    assert interpolate([2.0, 4.0], [1, 5], 7) == [2, 2, 2.5, 3, 3.5, 4, 4]
    assert interpolate([3.0, 1.0, 2.0], [0, 1, 2], 3) == [3, 1, 2]
    rates = made([1] * 5, (1, 3), momentum=0.0)
    rates.update([1.0, 3.0])
    assert rates.multipliers == pytest.approx([0.5, 0.5, 1.0, 1.5, 1.5], abs=1e-6)
    assert [rates.of_layer(x) for x in ("embeddings", 0, 4, "norm", "head", "objectives")] == [
        rates.multipliers[0], rates.multipliers[0], rates.multipliers[4], rates.multipliers[4], 1.0, 1.0
    ]  # fmt: skip


def test_llrd_and_uniform():
    assert Rates(RateOptions.of({"mode": "uniform"}), [3, 4]).multipliers == [1.0, 1.0]
    assert Rates(RateOptions.of(None), [3, 4]).multipliers == [1.0, 1.0]
    found = Rates(RateOptions.of({"mode": "llrd", "decay": 0.5}), [1, 2, 3]).multipliers
    assert found == pytest.approx([x / (0.25 + 1 + 3) * 6 for x in (0.25, 0.5, 1.0)])
    assert weighted_mean(found, [1, 2, 3]) == pytest.approx(1, abs=1e-12)


def test_llrd_without_the_mean_is_beits_schedule():
    """get_num_layer_for_vit and LayerDecayValueAssigner of BEiT: ids 0 (embeddings), l + 1 (block l), L + 1 (head)."""
    rates = Rates(RateOptions.of({"mode": "llrd", "decay": 0.5, "normalize": False}), [1, 2, 3])
    beit = [0.5 ** (4 - layer_id) for layer_id in range(5)]
    assert [rates.of_layer(layer) for layer in ("embeddings", 0, 1, 2, "head")] == pytest.approx(beit)
    assert rates.of_layer("norm") == rates.of_layer("objectives") == 1.0


def test_permuted_gives_every_block_anothers():
    plain, shuffled = made(momentum=0.0), made(mode="permuted", momentum=0.0)
    for rates in (plain, shuffled):
        rates.update([0.1, 0.2, 0.3, 0.4])
    assert sorted(plain.multipliers) == pytest.approx(sorted(shuffled.multipliers))
    assert all(a != b for a, b in zip(plain.multipliers, shuffled.multipliers, strict=True))
    first = list(shuffled.multipliers)
    shuffled.update([0.1, 0.2, 0.3, 0.4])
    assert shuffled.multipliers == pytest.approx(first, rel=1e-12), "the same shuffle for all of the run"
    orders = {tuple(made(mode="permuted", seed=seed)._shuffle) for seed in range(8)}
    assert len(orders) > 1
    uneven = made((1, 5, 50, 500), mode="permuted")
    uneven.update([0.1, 0.2, 0.3, 0.4])
    assert weighted_mean(uneven.multipliers, uneven.sizes) == pytest.approx(1, abs=1e-9)


def test_frozen_takes_its_one_measurement_unsmoothed():
    rates = made((1, 1), (0, 1), mode="frozen")
    rates.update([0.1, 0.3])
    assert rates.multipliers == pytest.approx([0.5, 1.5], abs=1e-4)


def test_loss_weight_leaves_the_rates():
    rates = made((1, 1), (0, 1), mode="loss_weight", momentum=0.0)
    rates.update([0.1, 0.3])
    assert [rates.of_layer(i) for i in (0, 1, "embeddings", "norm", "head")] == [1.0] * 5
    assert rates.loss_weights == pytest.approx([0.5, 1.5], abs=1e-4)
    assert made().loss_weights is None


def test_a_nan_keeps_its_rate_is_warned_once_and_counted(monkeypatch):
    warned = []
    monkeypatch.setattr(fast.logger, "warning_once", warned.append)
    rates, other = made(momentum=0.0), made((1, 1, 1), (0, 1, 2), momentum=0.0)
    rates.update([math.nan, 0.1, 0.2, 0.3])
    other.update([0.1, 0.2, 0.3])
    assert rates.ratios == [1.0, *other.ratios], "the mean is over the others"
    rates.update([math.nan, math.inf, 0.2, 0.2])
    assert rates.ratios == [1.0, other.ratios[0], 1.0, 1.0] and rates.skipped == 3
    before = list(rates.multipliers)
    rates.update([math.nan] * 4)
    assert rates.multipliers == before and rates.skipped == 7
    assert len(set(warned)) == 1, "one text, which warning_once says once"


def test_the_state_goes_on_bitwise_through_json():
    draw = random.Random(2)
    given = [[draw.expovariate(20) for _ in range(4)] for _ in range(6)]
    for mode in ("discrepancy", "permuted"):
        full, first, second = (made((1, 20, 300, 7), mode=mode, seed=seed) for seed in (0, 0, 5))
        for d in given:
            full.update(d)
        for d in given[:3]:
            first.update(d)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.multipliers == first.multipliers
        for d in given[3:]:
            second.update(d)
        assert second.multipliers == full.multipliers and second.state_dict() == full.state_dict()
    with pytest.raises(ValueError, match=r"the state is of 4 blocks .* this run has 2"):
        made((1, 1), (0, 1)).load_state_dict(full.state_dict())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "discrepency"}, "unknown mode of layer_rates: 'discrepency'. Did you mean 'discrepancy'"),
        ({"mode": "x"}, "Valid: discrepancy, llrd, uniform"),
        ({"source": "atention"}, "Did you mean 'attention'"),
        ({"source": None}, "unknown source of layer_rates: None"),
        ({"moment": 0.9}, "unknown key of layer_rates: 'moment'. Did you mean 'momentum'"),
        ({"source": "jacobian", "wrt": "weights"}, "unknown wrt of layer_rates: 'weights'"),
        ({"map": "cls"}, "unknown map of layer_rates: 'cls'"),
        ({"r_min": 4.0, "r_max": 0.25}, r"\[r_min, r_max\] is \[4.0, 0.25\]; expected 0 < r_min < 1 < r_max"),
        ({"r_min": 0}, "expected 0 < r_min < 1 < r_max"),
        ({"r_min": 1.5}, "expected 0 < r_min < 1 < r_max"),
        ({"r_max": math.inf}, "expected 0 < r_min < 1 < r_max"),
        ({"every": 0}, "every is 0; expected a whole number of at least 1"),
        ({"every": True}, "every is True"),
        ({"momentum": 1.0}, r"momentum is 1.0; expected a number in \[0, 1\)"),
        ({"eps": 0.0}, "eps is 0.0; expected a number above 0"),
        ({"mode": "llrd", "decay": 1.5}, r"decay is 1.5; expected a number in \(0, 1\]"),
        ({"source": "hessian", "probes": 0}, "probes is 0"),
        ({"source": "attention", "wrt": "inputs"}, "wrt has no effect with mode 'discrepancy' and source 'attention'"),
        ({"source": "jacobian", "probes": 2}, "probes has no effect"),
        ({"mode": "uniform", "source": "attention"}, "source has no effect with mode 'uniform'; leave it out"),
        ({"mode": "llrd", "normalize": 1}, "normalize is 1; expected true or false"),
        ({"normalize": False}, "normalize has no effect with mode 'discrepancy'"),
        ({"decay": 0.5}, "decay has no effect with mode 'discrepancy'"),
        ({"mode": "frozen", "every": 3}, "every has no effect with mode 'frozen'"),
        ("discrepancy", "is 'discrepancy'; expected a mapping"),
    ],
)  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message) as refused:
        RateOptions.of(options)
    assert "layer_rates" in str(refused.value)


def test_cadence_by_source():
    assert [RateOptions.of({"source": s}).interval for s in ("attention", "jacobian", "hessian")] == [20, 150, 200]
    assert RateOptions.of({"source": "hessian", "every": 7}).interval == 7


def test_nothing_to_compare_or_to_move():
    with pytest.raises(ValueError, match="compares pairs of layers and has 1; expected two or more"):
        made((1, 1), (1,))
    with pytest.raises(ValueError, match="no block of the student is trainable"):
        made((0, 0), (0, 1))


def test_options_are_checked_however_they_are_made():
    with pytest.raises(ValueError, match="r_min"):
        RateOptions(r_min=5.0, r_max=2.0)
    with pytest.raises(ValueError, match="momentum has no effect with mode 'frozen'"):
        RateOptions.of({"mode": "frozen", "momentum": 0.5})
    assert RateOptions.of({"mode": "uniform", "blocks": ["a", "b"]}).blocks == ["a", "b"]
    with pytest.raises(ValueError, match="blocks has no effect with mode 'discrepancy'"):
        RateOptions.of({"blocks": ["a", "b"]})
