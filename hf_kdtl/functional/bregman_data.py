"""The rows that a Bregman representation is fitted to, read pass by pass, and what two passes tell of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from hf_kdtl.functional.links import Link, checked, pieces

Rows = Tensor | Iterable[Tensor]

RANK = 1e-6  # of the largest singular value


class Data:
    """The rows, read as often as needed, and what two passes tell of them: mean, baseline, rank and start."""

    def __init__(self, y: Rows, link: Link):
        if isinstance(y, Iterator):
            raise ValueError(
                "y is an iterator, which can be read once; give a list of batches, a DataLoader or a tensor."
            )
        self.y, self.link, self.rows, self.width = y, link, 0, 0
        count, total, first, varies = 0, torch.zeros(()), None, False
        for part in self.parts(1):
            count, total = count + len(part), part.sum(0) + total.to(part)
            first = part[0] if first is None else first
            varies = varies or bool((part != first).any())
        if not count:
            raise ValueError("y has no rows; expected outputs of the layer, (n, d).")
        if not varies:
            raise ValueError(f"all {count} rows of y are equal; there is nothing to represent beyond the mean.")
        self.rows = count
        self.mean = link.inverse(total / count)
        edge = (~self.mean.isfinite()).nonzero().flatten().tolist()
        if edge:
            raise ValueError(
                f"column {edge[0]} is the same extreme value in every row ({len(edge)} such columns); its mean has no "
                f"pre-activation under {link.name!r}. Drop the column, of the student's target too."
            )
        baseline, outer = 0.0, self.mean.new_zeros(self.width, self.width)
        inner = outer.clone()
        for part in self.parts(1):
            centred = part - total / count
            outer += centred.T @ centred
            # For a rank any large pre-activation will do where an output is saturated: a step off the edge.
            before = link.inverse(torch.lerp(part, total / count, 1e-9)) - self.mean
            inner += before.T @ before
            baseline += link.divergence(self.mean, part).sum().item()
        self.baseline = baseline / count
        self._outer = outer
        values = torch.linalg.eigvalsh(inner)
        self.rank = min(int((values > values[-1] * RANK**2).sum()), count, self._full())

    def _full(self) -> int:
        return self.width - 1 if self.link.coupled else self.width

    def start(self, k: int) -> Tensor:
        """(d, k): the principal components of the outputs, in the metric of the Hessian at the mean."""
        slope = self.link.slope(self.mean)
        scale = slope.clamp(min=1e-8 * slope.max()).sqrt()  # a class that never comes would be blown up
        vectors = torch.linalg.eigh(self._outer / scale / scale[:, None]).eigenvectors
        return vectors[:, -k:].flip(1) / scale[:, None]

    def parts(self, k: int) -> Iterator[Tensor]:
        """The rows in float64, checked, in pieces that leave room for k^2 numbers each."""
        seen = 0
        for batch in [self.y] if isinstance(self.y, Tensor) else self.y:
            batch = checked(batch, self.link, self.width)
            self.width, seen = batch.shape[1], seen + len(batch)
            yield from pieces(batch, k) if len(batch) else ()
        if self.rows and seen != self.rows:
            raise RuntimeError(
                f"this pass gave {seen} rows and the first one {self.rows}; y must give the same rows every time."
            )
