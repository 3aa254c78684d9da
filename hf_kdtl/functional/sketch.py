"""Random projections of gradients: a few numbers in place of one for each pixel, whose distances are unbiased."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hf_kdtl.functional.random import Draws, generator_of
from hf_kdtl.functional.resample import precise


@lru_cache(maxsize=4)
def projection(rows: int, width: int, seed: int) -> Tensor:
    """R, (rows, width) of random signs, fixed by the seed; float32 on the CPU."""
    generator = generator_of(f"{seed}/sketch/{rows}/{width}")
    return torch.randint(0, 2, (rows, width), generator=generator, dtype=torch.int8).float() * 2 - 1


def signs(draws: Draws, like: Tensor) -> Tensor:
    """sigma, (B, n) of random signs for each image, with the dtype and device of `like` (B, ...)."""
    return draws.rademacher((like[0].numel() if len(like) else 0,), "sketch", like)


def sketch(g: Tensor, matrix: Tensor, signs: Tensor, by_image: bool = False) -> Tensor:
    """p = R (sigma * g) / sqrt(r), (B, ...) -> (B, r).

    E ||p - q||^2 = ||g - h||^2 over the signs, with a relative standard deviation of sqrt(2 / r). The signs of each
    image are essential: with R alone a student can move its gradient in the null space of R, where no sketch sees it.
    For an orthogonal R with r = n times 1 / sqrt(r) taken out, the distance is exact.

    Args:
        g: gradients.
        matrix: R, (r, n), of `projection`.
        signs: sigma, (B, n), of `signs`.
        by_image: one product an image, so that its bits do not depend on the batch.

    Cost: B r n products.

    >>> g, matrix = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    >>> sketch(g, matrix, torch.tensor([[1.0, -1.0]])).square().sum()  # ||g||^2: these rows are orthogonal
    tensor(25.)
    """
    signed = precise(g).flatten(1) * signs
    matrix = matrix.to(signed)
    with torch.autocast(signed.device.type, enabled=False):
        p = torch.stack([matrix @ v for v in signed]) if by_image and len(signed) else signed @ matrix.T
    return p / len(matrix) ** 0.5
