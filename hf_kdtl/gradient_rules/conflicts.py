"""A log of the two gradients: how often, how far and in which layers they conflict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from hf_kdtl.functional.surgery import Conflict, Products, total


class _Step(NamedTuple):
    """What is kept of one optimizer step."""

    conflict: Conflict
    total: Products
    layers: dict[str, Products]


class ConflictLog:
    """Collects optimizer steps, and returns their means when it is time to log.

    `history` has an entry for each `log`, plain data for JSON: {"step", "cosine": {layer: mean}, "conflicting":
    {layer: share of the steps in which <g, d> < 0}, "all_layers": the same two of all layers as one vector, "removed":
    mean share of the transfer gradient's length, "task_step": <g, step> as last measured}. A value is None where there
    was nothing to measure (a layer without one of the two gradients), or where it is not finite.

    Args:
        layers: the layer of each parameter.
    """

    def __init__(self, layers: Sequence[str]):
        self._layers: dict[str, list[int]] = {}
        for i, layer in enumerate(layers):
            self._layers.setdefault(layer, []).append(i)
        self.history: list[dict[str, Any]] = []
        self.task_step: float | None = None
        """<g, step> as last measured; None when that was before the last `log`."""
        self._steps: list[_Step] = []

    def add(self, conflict: Conflict, products: Sequence[Products]) -> None:
        """One optimizer step. Cost: none on the device."""
        # As in the rules: a tensor without a task gradient does not count.
        counted = [p if p.task != 0 else Products(0.0, 0.0, 0.0) for p in products]
        layers = {layer: total([counted[i] for i in places]) for layer, places in self._layers.items()}
        self._steps.append(_Step(conflict, total(counted), layers))

    def log(self, step: int) -> dict[str, float]:
        """Means over the optimizer steps since the last call, for Trainer's log. Empty where there were none.

        gradient_rule/cosine of the two gradients; /conflicting: the share of tensors with <g, d> < 0; /removed: the
        share of the transfer gradient's length that the rule takes out; /task_step: <g, step> as last measured,
        positive where the optimizer's step lowers the task's loss to first order.

        Args:
            step: optimizer steps made. Entries of this step or later, of a run that was restarted, are dropped.
        """
        if not self._steps:
            return {}
        figures = {name: fmean(getattr(s.conflict, name) for s in self._steps) for name in Conflict._fields}
        layers = {layer: _over_steps([s.layers[layer] for s in self._steps]) for layer in self._layers}
        cosine, share = _over_steps([s.total for s in self._steps])
        entry = {
            "step": step,
            "cosine": {layer: cosine for layer, (cosine, _) in layers.items()},
            "conflicting": {layer: share for layer, (_, share) in layers.items()},
            "all_layers": {"cosine": cosine, "conflicting": share},
            "removed": _finite(figures["removed"]),
            "task_step": _finite(self.task_step),
        }
        self.history = [e for e in self.history if e["step"] < step] + [entry]
        if self.task_step is not None:
            figures["task_step"] = self.task_step
        self._steps, self.task_step = [], None
        return {f"gradient_rule/{name}": value for name, value in figures.items()}


def _over_steps(products: Sequence[Products]) -> tuple[float | None, float | None]:
    """Mean cosine, and the share with <g, d> < 0, over the steps that have both gradients; None without any."""
    both = [p for p in products if p.task != 0 and p.transfer != 0]
    if not both:
        return None, None
    return _finite(fmean(p.cosine for p in both)), fmean(p.both < 0 for p in both)


def _finite(value: float | None) -> float | None:
    # JSON has no nan.
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
