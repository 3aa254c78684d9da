"""Means of the objectives between two lines of the log."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class TermMeter:
    """Sums each objective over its images, on the device, until the log is written.

    Not the last micro-batch: the mean over all images that a term counted since the last log, on all ranks.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, sums: dict[str, Tensor], counted: dict[str, Tensor]) -> None:
        """Add one micro-batch: each term's sum, and the number of images it counted."""
        for key, total in sums.items():
            pair = torch.stack([total.float(), counted[key].to(total.device).float()])
            self._sums[key] = self._sums[key] + pair if key in self._sums else pair

    def flush(self, weights: dict[str, float], gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """{key: mean, key_share: its fraction of the (absolute, weighted) total}; the sums are then empty."""
        if not self._sums:
            return {}
        keys = list(self._sums)
        pairs = gather(torch.stack([self._sums[key] for key in keys])[None]).sum(0).tolist()
        self._sums.clear()
        means = {key: total / max(count, 1.0) for key, (total, count) in zip(keys, pairs, strict=True)}
        weighted = {key: abs(weights[key] * mean) for key, mean in means.items()}
        total = sum(weighted.values()) or 1.0
        return means | {f"{key}_share": value / total for key, value in weighted.items()}
