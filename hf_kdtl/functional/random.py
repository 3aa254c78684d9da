"""Random draws that belong to an image, not to a process: the same however the effective batch is split."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """Independent random numbers for each image of a micro-batch.

    The numbers of image i come from a generator seeded by (seed, step, positions[i], purpose). The position is that
    of the image in the effective batch of the optimizer step, over all micro-batches and processes, so 8 x 1, 2 x 4
    and 2 processes draw the same numbers; a shared stream would give every rank the same directions.

    `purpose` names the use. Two objectives that give the same purpose share their draws; different ones do not.

    Args:
        seed: the run's seed.
        step: optimizer step, from 0.
        positions: (B,) position of each image in the effective batch; for draws that belong to a view of an image,
            whatever the step, (view, row).
        include_all: every image takes part, whatever the fraction, as in evaluation.
    """

    seed: int
    step: int
    positions: tuple[Any, ...]
    include_all: bool = False
    _drawn: dict = field(default_factory=dict, repr=False, compare=False)

    def normal(self, shape: tuple[int, ...], purpose: str, like: Tensor) -> Tensor:
        """N(0, 1), (B, *shape), with the dtype and device of `like`."""
        return self._stack(purpose, like, lambda g: torch.randn(shape, generator=g), shape)

    def uniform(self, shape: tuple[int, ...], purpose: str, like: Tensor) -> Tensor:
        """U[0, 1), (B, *shape), with the dtype and device of `like`."""
        return self._stack(purpose, like, lambda g: torch.rand(shape, generator=g), shape)

    def rademacher(self, shape: tuple[int, ...], purpose: str, like: Tensor) -> Tensor:
        """-1 or 1 with equal probability, (B, *shape), with the dtype and device of `like`."""
        return self._stack(purpose, like, lambda g: torch.randint(0, 2, shape, generator=g) * 2.0 - 1.0, shape)

    def permuted(self, order: Tensor) -> Draws:
        """The draws of the same images in another order."""
        return Draws(self.seed, self.step, tuple(self.positions[i] for i in order.tolist()), self.include_all)

    def _stack(self, purpose, like, draw, shape=()) -> Tensor:
        key = purpose, shape, like.device, like.dtype
        if key not in self._drawn:  # teacher and student, and both signs of a step, ask for the same
            # Drawn on the CPU: CUDA's generator gives other numbers, and a run must not change with its device.
            rows = [draw(self._generator(purpose, position)) for position in self.positions]
            self._drawn[key] = torch.stack(rows).to(device=like.device, dtype=like.dtype)
        return self._drawn[key]

    def _generator(self, purpose: str, position: Any) -> torch.Generator:
        return generator_of(f"{self.seed}/{self.step}/{position}/{purpose}")


def generator_of(text: str) -> torch.Generator:
    """A generator that a text seeds.

    torch's CPU generator reads the low 32 bits of a seed and no more, so those must be well mixed: of a checksum they
    are not, and an eighth of the images would share a direction.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def select_images(draws: Draws, fraction: float, like: Tensor) -> Tensor:
    """(B,) booleans: which images take part when each does with probability `fraction`, by its own draw.

    One draw an image, whoever asks, so that the images of a smaller fraction are among those of a larger one.
    """
    # In float32, whatever the pixels: rounded to half precision some draws would be 1.
    uniform = draws.uniform((), "fraction", like.new_zeros((), dtype=torch.float32))
    return (uniform < fraction) | draws.include_all
