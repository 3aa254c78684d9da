"""Several passes over the same images: what is shifted between them, and the random state they share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hf_kdtl.functional.random import Draws


class Direction(NamedTuple):
    """A forward at x + step u, with u drawn for each image: N(0, 1) or +-1 in every pixel.

    Equal directions are one pass, whoever asks: a finite difference of step s and noise of deviation s share it.
    """

    kind: Literal["normal", "rademacher"]
    step: float
    probe: int = 0

    def draw(self, draws: Draws, like: Tensor) -> Tensor:
        """u, with the shape of `like` (B, C, h, w)."""
        shape = tuple(like.shape[1:])
        if self.kind == "normal":
            return draws.normal(shape, f"direction-{self.probe}", like)
        return draws.rademacher(shape, f"probe-{self.probe}", like)


class Sketch(NamedTuple):
    """A random projection of an input gradient: of the class output that is the teacher's largest, in `rows` numbers.

    p = R (sigma * g) / sqrt(rows), see `hf_kdtl.functional.sketch`.
    """

    rows: int
    of: str = "logit"

    def __str__(self) -> str:
        return f"{self.of}-{self.rows}"

    @classmethod
    def named(cls, name: str) -> Sketch:
        """The sketch whose text this is."""
        of, rows = name.split("-")
        return cls(int(rows), of)


class RNGState:
    """The random state a forward began with, so that another pass sees the same dropout and drop-path masks.

    With other masks a finite difference grows as 1 / step. The stream goes on where it was after each replay, so the
    number of passes changes nothing else.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def replay(self) -> Iterator[None]:
        with torch.random.fork_rng([self.device] if self.cuda is not None else []):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


def input_leaf(pixel_values: Tensor, differentiated: bool) -> Tensor:
    """A leaf to differentiate by.

    Raises:
        ValueError: for integers, which have no derivative.
    """
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values are {pixel_values.dtype}; derivatives need floating-point pixels. Normalise them with the "
            "image processor (do_rescale=True), or cast them in the dataset's transform."
        )
    return pixel_values.detach().requires_grad_(differentiated)
