"""The sizes that fit a budget: depth, heads and MLP, cut as evenly as they can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_kdtl.models.cutting.families import Sizes, cut_config, family_of
from hf_kdtl.models.cutting.plan import on_meta
from hf_kdtl.models.cutting.request import kept_blocks
from hf_kdtl.models.forward.classifier import blank_pixels
from hf_kdtl.models.measure import flops, latency, parameters

_STEPS = 20  # shares of the depths of a model in stages, and of an mlp_ratio, that are tried
_TURNS = 7  # halvings of the arithmetic, to meet a latency
_NEAR = 1.0 / 64


@dataclass(frozen=True)
class Budget:
    """What the student may cost: `kind` "flops", "parameters" or "latency_ms", and how much; up to 1 it is a share."""

    kind: str
    value: float


def solve(model: Any, full: Sizes, fixed: Sizes, free: set[str], budget: Budget) -> tuple[Sizes, Any]:
    """The sizes within the budget, and (latency alone) the milliseconds of teacher and student.

    Of all depths, head counts and MLP sizes that fit, those whose most reduced one is reduced least; of equals the
    largest. Cost is counted without memory (torch's "meta" device). It is linear in each of depth, heads and MLP, so
    that eight counts give all of them (four for each depths of a model in stages); the chosen sizes are counted again.
    Latency is measured on the model's device, with zeros for weights, for arithmetic that is halved until it fits.

    Args:
        full: the teacher's sizes.
        fixed: the student's, as far as they were asked for.
        free: which of depths, heads and mlp may be chosen.

    Raises:
        ValueError: for a budget that cannot be met, with the nearest that can.
    """
    if not isinstance(budget.value, int | float) or isinstance(budget.value, bool) or not budget.value > 0:
        raise ValueError(f"found {budget.kind}={budget.value!r}; type a number above 0, up to 1 a share.")
    search = _Search(model, full, fixed, free)
    if budget.kind != "latency_ms":
        share = budget.value if budget.value <= 1 else budget.value / search.cost(full, budget.kind)
        return search.within(budget.kind, share, budget), None
    return _by_latency(search, budget)


class _Search:
    def __init__(self, model: Any, full: Sizes, fixed: Sizes, free: set[str]):
        self.model, self.full, self.fixed = model, full, fixed
        self.family = family_of(model.config)
        self.pixels = blank_pixels(model, default=224)[:1]
        self._known: dict[tuple[Sizes, str], int] = {}
        family = self.family
        self.depths = list(_depth_choices(full)) if "depths" in free else [fixed.depths]
        cut_heads = "heads" in free and family is not None and family.heads == "any"
        self.heads = list(range(1, full.heads + 1)) if cut_heads else [fixed.heads]
        self.mlps = self._mlp_choices() if "mlp" in free and family is not None and family.mlp else [fixed.mlp]

    def _mlp_choices(self) -> list[float]:
        full, family = self.full.mlp, self.family
        assert family is not None
        if family.mlp == "mlp_ratio" and not family.whole_ratio:
            return [full * n / _STEPS for n in range(1, _STEPS + 1)]
        step = 1 if family.whole_ratio else max(1, int(full) // 384)
        return sorted({*range(step, int(full) + 1, step), full})

    def cost(self, sizes: Sizes, kind: str) -> int:
        if (sizes, kind) not in self._known:
            model = on_meta(self.model, self.config(sizes))
            found = parameters(model) if kind == "parameters" else flops(model, self.pixels.to("meta"))
            self._known[sizes, kind] = found
        return self._known[sizes, kind]

    def config(self, sizes: Sizes) -> Any:
        alternate = self.family is not None and self.family.alternate
        return cut_config(self.model.config, sizes, kept_blocks(self.full, sizes, alternate, None))

    def within(self, kind: str, share: float, budget: Budget) -> Sizes:
        limit = share * self.cost(self.full, kind)
        fitting = sorted(self._fitting(kind, limit * (1 + 1e-9)), key=self._balance, reverse=True)
        for sizes in fitting:  # measured: the interpolation rounds where the family rounds its sizes
            if self.cost(sizes, kind) <= limit * (1 + 1e-9):
                return sizes
        least = replace(self.fixed, depths=min(self.depths, key=sum), heads=self.heads[0], mlp=self.mlps[0])
        lowest, full = self.cost(least, kind), self.cost(self.full, kind)
        raise ValueError(
            f"{budget.kind}={budget.value!r} cannot be met: the smallest student of this {type(self.model).__name__}"
            f" with what may be cut has {lowest / full:.3g} of its {kind}. The nearest that can be met is "
            f"{kind}={_rounded_up(lowest / full)} ({lowest:,})."
        )

    def _fitting(self, kind: str, limit: float) -> Iterator[Sizes]:
        """For each depth and head count the largest MLP that fits."""
        first, last = self.heads[0], self.heads[-1]
        least, most = self.mlps[0], self.mlps[-1]
        for depths in self.depths:
            at = self._corners(depths, kind)
            for heads in self.heads:
                a = _part(heads, first, last)
                low, high = ((1 - a) * at[first, mlp] + a * at[last, mlp] for mlp in (least, most))
                for mlp in reversed(self.mlps):
                    b = _part(mlp, least, most)
                    if (1 - b) * low + b * high <= limit:
                        yield replace(self.fixed, depths=depths, heads=heads, mlp=mlp)
                        break

    def _corners(self, depths: tuple[int, ...], kind: str) -> dict[tuple[int, float], float]:
        """The cost of the fewest and the most heads, and of the smallest and the largest MLP, at this depth.

        Blocks of one width cost the same, so that two depths give those in between.
        """
        ends = self.depths[0], self.depths[-1]
        if len(depths) == 1 and depths not in ends:
            low, high = (self._corners(end, kind) for end in ends)
            c = _part(depths[0], ends[0][0], ends[1][0])
            return {key: (1 - c) * low[key] + c * high[key] for key in low}
        corners = [(x, y) for x in {self.heads[0], self.heads[-1]} for y in {self.mlps[0], self.mlps[-1]}]
        return {(x, y): self.cost(replace(self.fixed, depths=depths, heads=x, mlp=y), kind) for x, y in corners}

    def _balance(self, sizes: Sizes) -> tuple[float, float]:
        shares = [sum(sizes.depths) / sum(self.full.depths)]
        for name, choices in (("heads", self.heads), ("mlp", self.mlps)):
            if len(choices) > 1:
                shares.append(getattr(sizes, name) / getattr(self.full, name))
        return round(min(shares), 9), sum(shares)


def _part(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 1.0


def _depth_choices(full: Sizes) -> Iterator[tuple[int, ...]]:
    if len(full.depths) == 1:
        yield from ((n,) for n in range(1, full.depths[0] + 1))
        return
    yield from {tuple(max(1, round(n / _STEPS * depth)) for depth in full.depths) for n in range(1, _STEPS + 1)}


def _by_latency(search: _Search, budget: Budget) -> tuple[Sizes, tuple[float, float]]:
    """By halving the arithmetic between the least and all of it."""
    everything = Budget("flops", 1.0)
    measure = _clock(search)
    whole = measure(search.full)
    lowest, best = _lowest_share(search), None
    bounds = [lowest, 1.0]
    if (fastest := measure(search.within("flops", lowest, everything))) > budget.value:
        raise ValueError(
            f"latency_ms={budget.value!r} cannot be met: the smallest student takes {fastest:.3g} ms for one image "
            f"here, the teacher {whole:.3g}. The nearest that can be met is latency_ms={fastest:.3g}."
        )
    share = 1.0
    for _ in range(_TURNS):
        sizes = search.within("flops", share, everything)
        taken = measure(sizes)
        if taken <= budget.value:
            bounds[0], best = share, (sizes, (whole, taken))
        else:
            bounds[1] = share
        if bounds[1] - bounds[0] < _NEAR or bounds[0] == 1.0:
            break
        share = sum(bounds) / 2
    return best or (search.within("flops", lowest, everything), (whole, fastest))


def _lowest_share(search: _Search) -> float:
    least = replace(search.fixed, depths=min(search.depths, key=sum), heads=search.heads[0], mlp=search.mlps[0])
    return search.cost(least, "flops") / search.cost(search.full, "flops")


def _clock(search: _Search) -> Callable[[Sizes], float]:
    """Milliseconds of one image, of a model of given sizes with zeros for weights."""
    device, dtype = search.model.device, search.model.dtype

    def measure(sizes: Sizes) -> float:
        model = on_meta(search.model, search.config(sizes)).to_empty(device=device).to(dtype)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.zero_()
        return latency({"student": (model, search.pixels.to(device, dtype))}, repeats=9)["student"]["median"]

    return measure


def _rounded_up(share: float) -> float:
    """The share with three digits, not below it."""
    return (int(share * 1000) + 1) / 1000
