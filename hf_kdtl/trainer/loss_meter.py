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
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, sums: dict[str, Tensor], counted: dict[str, Tensor]) -> None:
        """Add one micro-batch: each term's sum, and the number of images it counted."""
        for key, total in sums.items():
            total, count = total.float(), counted[key].to(total.device)
            before = self._sums.get(key)
            self._sums[key] = (total, count) if before is None else (before[0] + total, before[1] + count)

    def flush(self, weights: dict[str, float], gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """{key: mean, key_share: its fraction of the (absolute, weighted) total}; the sums are then empty."""
        if not self._sums:
            return {}
        keys = list(self._sums)
        sums = torch.stack([torch.stack([total, count.float()]) for total, count in self._sums.values()])
        pairs = gather(sums[None]).sum(0).tolist()
        self._sums.clear()
        means = {key: total / max(count, 1.0) for key, (total, count) in zip(keys, pairs, strict=True)}
        weighted = {key: abs(weights[key] * mean) for key, mean in means.items()}
        total = sum(weighted.values()) or 1.0
        return means | {f"{key}_share": value / total for key, value in weighted.items()}
