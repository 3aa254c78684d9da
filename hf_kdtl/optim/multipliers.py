"""The rule: from how far each layer is from its teacher to how fast it learns. Plain numbers, no tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

from hf_kdtl.optim.options import RateOptions

logger = logging.get_logger(__name__)


class Rates:
    """Multipliers of the blocks' learning rates, and the rule that moves them.

    For pairs j with discrepancies D_j (nats):

        q_j = (D_j + eps) / (mean_k D_k + eps)
        s_j <- mu s_j + (1 - mu) q_j            s_j = 1 at the start; blocks between pairs interpolate s in depth
        multiplier_l = clip(a s_l, r_min, r_max)

    with the scalar a for which the mean over the blocks, weighted by their trainable parameters, is 1. So bounds and
    mean hold together, and no gain can come from a larger total rate. (With Adam the mean step is fixed by this, not
    its square.) Embeddings take the first block's multiplier, the final norm the last's, head and objectives 1.

    Where modes differ: "llrd" has s_l = decay^(L - 1 - l), scaled to the same mean 1 and not bounded; with `normalize`
    false it is BEiT's own schedule: decay^(L - l), embeddings decay^(L + 1), head and final norm 1.
    "frozen" takes s = q at its one measurement. "permuted" gives each block the s of another, the same one for the
    entire run. "loss_weight" leaves every rate at 1: its multipliers are in `loss_weights`.

    A discrepancy that is nan or infinite leaves that pair's s as it is; it is warned of once and counted.

    Args:
        options: as `RateOptions`.
        sizes: trainable parameters of each block; a frozen block has 0.
        matched: the student blocks that are paired, rising.
        seed: of the shuffle of "permuted".

    Raises:
        ValueError: when no block is trainable, or a discrepancy would be compared with nothing (fewer than 2 pairs).

    Source: Kokane et al. 2024, arXiv 2407.04871: rates per layer from the teacher/student difference [paper: the
    abstract], JSD and momentum [review]; the rule above is [ours].
    """

    def __init__(self, options: RateOptions, sizes: Sequence[int], matched: Sequence[int] = (), seed: int = 0):
        if not sum(sizes):
            raise ValueError(
                "layer_rates: no block of the student is trainable, so there is no rate to set; unfreeze some, or "
                "leave layer_rates out."
            )
        if options.measured and len(matched) < 2:
            raise ValueError(
                f"layer_rates: mode {options.mode!r} compares pairs of layers and has {len(matched)}; expected two or "
                "more trainable blocks with a partner: layers='uniform', or pairs such as [[0, 1], [1, 3]]."
            )
        self.options, self.sizes, self.matched = options, list(sizes), list(matched)
        depth = len(sizes)
        self.ratios = [1.0] * len(matched)
        self.measured = 0
        self.skipped = 0
        self._shuffle = _derangement(depth, seed) if options.mode == "permuted" else list(range(depth))
        self.multipliers = [1.0] * depth
        if options.mode == "llrd":
            powers = [options.decay ** (depth - 1 - i) for i in range(depth)]
            mean = weighted_mean(powers, self.sizes) if options.normalize else 1 / options.decay
            self.multipliers = [power / mean for power in powers]

    def update(self, discrepancies: Sequence[float]) -> None:
        """Take in one measurement: D_j of every pair, in the order of `matched`."""
        known = [d for d in discrepancies if math.isfinite(d)]
        if lost := len(discrepancies) - len(known):
            logger.warning_once(
                "layer_rates: a discrepancy is not finite; that layer keeps its rate. This warning appears once; "
                "the log counts them as lr_discrepancies_skipped."
            )
            self.skipped += lost
        mean = sum(known) / len(known) if known else math.nan
        momentum = 0.0 if self.options.mode == "frozen" else self.options.momentum
        for j, d in enumerate(discrepancies):
            if math.isfinite(d):
                q = (d + self.options.eps) / (mean + self.options.eps)
                self.ratios[j] += (1 - momentum) * (q - self.ratios[j])  # this way round, 1 stays exactly 1
        self.measured += 1
        every = interpolate(self.ratios, self.matched, len(self.sizes))
        shuffled = [every[i] for i in self._shuffle]
        self.multipliers = bounded(shuffled, self.sizes, self.options.r_min, self.options.r_max)

    @property
    def loss_weights(self) -> list[float] | None:
        """Weight of a pair's loss, by student block, of mode "loss_weight"; otherwise None."""
        return list(self.multipliers) if self.options.mode == "loss_weight" else None

    def of_layer(self, layer: int | str) -> float:
        """The multiplier of a param group's `layer`."""
        if self.options.mode == "loss_weight" or layer in ("head", "objectives"):
            return 1.0
        if self.options.mode == "llrd" and not self.options.normalize and isinstance(layer, str):
            return 1.0 if layer == "norm" else self.options.decay ** (len(self.sizes) + 1)
        index = {"embeddings": 0, "norm": -1}[layer] if isinstance(layer, str) else layer
        return self.multipliers[index]

    def state_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "matched": self.matched,
            "ratios": self.ratios,
            "multipliers": self.multipliers,
            "shuffle": self._shuffle,
            "measured": self.measured,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. Raises ValueError when it is of other layers."""
        if state["matched"] != self.matched or len(state["multipliers"]) != len(self.sizes):
            raise ValueError(
                f"layer_rates: the state is of {len(state['multipliers'])} blocks with pairs at {state['matched']}, "
                f"and this run has {len(self.sizes)} with pairs at {self.matched}. Resume with the same student and "
                "layers, or start a new run."
            )
        self.ratios, self.multipliers = list(state["ratios"]), list(state["multipliers"])
        self._shuffle = list(state["shuffle"])
        self.measured, self.skipped = state["measured"], state["skipped"]


def interpolate(values: Sequence[float], at: Sequence[int], depth: int) -> list[float]:
    """Values at some depths, for every depth: linear between two, the nearest one outside.

    >>> interpolate([1.0, 3.0], [1, 3], 5)
    [1.0, 1.0, 2.0, 3.0, 3.0]
    """
    found = []
    for layer in range(depth):
        below = max((j for j, known in enumerate(at) if known <= layer), default=0)
        above = min((j for j, known in enumerate(at) if known >= layer), default=len(at) - 1)
        part = (layer - at[below]) / (at[above] - at[below]) if at[above] > at[below] else 0.0
        found.append(values[below] + part * (values[above] - values[below]))
    return found


def bounded(ratios: Sequence[float], sizes: Sequence[int], r_min: float, r_max: float) -> list[float]:
    """clip(a s, r_min, r_max) with the a for which the mean weighted by `sizes` is 1 (within 1e-9).

    The mean rises with a from r_min < 1 to r_max > 1, so bisection finds it.

    >>> [round(m, 3) for m in bounded([0.5, 1.5], [1, 1], 0.25, 4.0)]
    [0.5, 1.5]
    >>> [round(m, 3) for m in bounded([1.0, 100.0], [1, 9], 0.25, 4.0)]  # .1 x .25 + .9 x 1.083
    [0.25, 1.083]
    """
    low, high = math.log(r_min / max(ratios)), math.log(r_max / min(ratios))
    multipliers: list[float] = []
    for _ in range(200):
        middle = (low + high) / 2
        multipliers = [min(max(math.exp(middle) * s, r_min), r_max) for s in ratios]
        if weighted_mean(multipliers, sizes) < 1:
            low = middle
        else:
            high = middle
    return multipliers


def weighted_mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """sum_l n_l v_l / sum_l n_l."""
    return math.fsum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)


def _derangement(depth: int, seed: int) -> list[int]:
    """A shuffle that leaves nothing in its place: a control that kept some would control less."""
    order, draw = list(range(depth)), random.Random(f"layer_rates/{seed}")
    while depth > 1 and any(i == j for i, j in enumerate(order)):
        draw.shuffle(order)
    return order
