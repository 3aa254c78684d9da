"""What a representation's directions do, and how much they explain: one picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_kdtl.functional.bregman import Representation
from hf_kdtl.functional.links import checked, coefficients, pieces

DIRECTIONS = 4  # that are shown one by one


def explained_by(fit: Representation, y: Tensor) -> list[float]:
    """The share of the divergence of rows y (n, d) that the first 1, 2, ... k directions take away, in [0, 1].

    With the best coefficients for the directions that are left. A fit of fewer directions would explain more, but
    with the identity, where each is the best of its number.

    Cost: k encodings of y.
    """
    m = fit.mean
    y = checked(y, fit.link, len(m)).to(m.device)
    base, shares = fit.link.divergence(m, y).mean(), []
    for j in range(1, fit.directions.shape[1] + 1):
        v = fit.directions[:, :j]
        c = torch.cat([coefficients(fit.link, v, m, part) for part in pieces(y, j)])
        shares.append(1 - (fit.link.divergence(c @ v.T + m, y).mean() / base).item())
    return shares


def extremes(c: Tensor, owners: Sequence[int], count: int = 6) -> list[tuple[list[int], list[int]]]:
    """For each of the first directions, whose coefficients are the smallest and whose the largest.

    Args:
        c: (n, k).
        owners: of each row, such as the image that a token is of; each is named once.
        count: how many at each end.
    """
    found = []
    for column in c.T[:DIRECTIONS]:
        order = [owners[i] for i in column.argsort().tolist()]
        found.append((list(dict.fromkeys(order))[:count], list(dict.fromkeys(reversed(order)))[:count][::-1]))
    return found
