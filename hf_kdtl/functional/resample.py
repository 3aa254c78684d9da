"""From one patch grid to another by shared area, and from one model's tokens to another's.

A grid (rows, columns) cuts the same unit square into equal cells, row by row. Two kinds of quantity live on it:
amounts (energies, attention columns), whose sum must stay, and values (features, attention rows), whose mean must
stay. Both are products of one small matrix per axis, so nothing of size P_from x P_to is built, and any two grids
fit: square or not, finer or coarser. Half precisions are computed in float32, also inside autocast; float64 stays.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Grid = tuple[int, int]


def precise(x: Tensor) -> Tensor:
    """The same numbers in at least float32."""
    return x if x.dtype == torch.float64 else x.float()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in at least float32. Autocast would otherwise round both to half precision."""
    dtype = torch.promote_types(precise(a).dtype, precise(b).dtype)
    a, b = a.to(dtype), b.to(dtype)
    if not torch.is_autocast_enabled(a.device.type):
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def overlap(source: int, target: int, like: Tensor | None = None) -> Tensor:
    """The fraction of each source cell that lies in each target cell, (target, source), in [0, 1].

    Both cut the same unit length into equal cells. Columns sum to 1, rows to source / target. From integers, so that
    cells which only touch share exactly 0.

    Args:
        source, target: numbers of cells, at least 1.
        like: a tensor whose device and dtype (at least float32) to take; by default float32 on the CPU.

    Raises:
        ValueError: when a number of cells is below 1.

    >>> overlap(2, 3)  # a half holds one third and half of the middle one
    tensor([[0.6667, 0.0000],
            [0.3333, 0.3333],
            [0.0000, 0.6667]])
    """
    if source < 1 or target < 1:
        raise ValueError(f"a grid axis of {source} cells cannot become one of {target}; expected at least 1 of each.")
    device = None if like is None else like.device
    dtype = torch.float64 if like is not None and like.dtype == torch.float64 else torch.float32
    # In units of 1 / (source * target): source cell s is [s * target, (s + 1) * target), target cell t likewise.
    s = torch.arange(source, device=device) * target
    t = torch.arange(target, device=device)[:, None] * source
    shared = torch.minimum(s + target, t + source) - torch.maximum(s, t)
    return shared.clamp(min=0).to(dtype) / target


def redistribute(energy: Tensor, grid_from: Grid, grid_to: Grid) -> Tensor:
    """Amounts on another grid: each cell's amount is shared out by area. (..., P_from) -> (..., P_to).

    Keeps the sum over the cells, and the sign. Differentiable; O(P_from sqrt(P_to)) multiplications.

    Raises:
        ValueError: when P_from is not rows times columns of `grid_from`.

    >>> redistribute(torch.tensor([1.0, 2.0, 3.0]), (1, 3), (1, 2))  # the middle cell is halved
    tensor([2., 4.])
    """
    _check_patches(energy.shape[-1], grid_from)
    if tuple(grid_from) == tuple(grid_to):
        return precise(energy)
    rows, columns = (overlap(a, b, energy) for a, b in zip(grid_from, grid_to, strict=True))
    cells = energy.unflatten(-1, tuple(grid_from))
    return matmul(matmul(rows, cells), columns.T).flatten(-2)


def average(features: Tensor, grid_from: Grid, grid_to: Grid) -> Tensor:
    """Values on another grid: the mean over the area of the new cell. (..., P_from, D) -> (..., P_to, D).

    Every result is a convex combination of the given rows: a constant stays, and with integer ratios this is average
    pooling down and repetition up. Differentiable.

    Raises:
        ValueError: when P_from is not rows times columns of `grid_from`.

    >>> average(torch.tensor([[1.0], [2.0], [6.0]]), (1, 3), (1, 2)).T  # (1 + 2 / 2) / 1.5 and (2 / 2 + 6) / 1.5
    tensor([[1.3333, 4.6667]])
    """
    _check_patches(features.shape[-2], grid_from)
    if tuple(grid_from) == tuple(grid_to):
        return precise(features)
    # A share of the new cell rather than of the old one: rows that sum to 1.
    rows, columns = (overlap(a, b, features) * (b / a) for a, b in zip(grid_from, grid_to, strict=True))
    cells = features.unflatten(-2, tuple(grid_from))
    cells = matmul(rows, cells.flatten(-2)).unflatten(-1, (grid_from[1], features.shape[-1]))
    return matmul(columns, cells).flatten(-3, -2)


def align_tokens(features: Tensor, keep: Sequence[int], prefix: int, grid_from: Grid, grid_to: Grid) -> Tensor:
    """Tokens of one model for another: (..., prefix + P_from, D) -> (..., len(keep) + P_to, D).

    Args:
        features: tokens, the prefix (class, distillation, registers) first, then the patches row by row.
        keep: which prefix tokens to keep, in the order wanted; the others are dropped.
        prefix: number of prefix tokens.
        grid_from, grid_to: patches are averaged by area from one to the other.

    Raises:
        ValueError: when the tokens are not prefix + grid, or `keep` names a token that is not a prefix token.

    >>> align_tokens(torch.tensor([[9.0], [8.0], [1.0], [3.0]]), (0,), 2, (1, 2), (1, 1)).T
    tensor([[9., 2.]])
    """
    check_tokens(features.shape[-2], keep, prefix, grid_from)
    kept = [precise(features[..., i : i + 1, :]) for i in keep]
    return torch.cat([*kept, average(features[..., prefix:, :], grid_from, grid_to)], dim=-2)


def check_tokens(tokens: int, keep: Sequence[int], prefix: int, grid: Grid) -> None:
    """Raises ValueError unless there are prefix + rows x columns tokens and `keep` names different prefix tokens."""
    if tokens != prefix + grid[0] * grid[1]:
        raise ValueError(
            f"{tokens} tokens are not {prefix} prefix tokens and a grid of {grid[0]} x {grid[1]} patches "
            f"({prefix + grid[0] * grid[1]} in all); give the prefix and grid of the model that made them."
        )
    if len(set(keep)) != len(keep) or not all(0 <= i < prefix for i in keep):
        raise ValueError(f"keep is {tuple(keep)}; expected different indices from 0 to below {prefix}, the prefix.")


def _check_patches(patches: int, grid: Grid) -> None:
    if patches != grid[0] * grid[1]:
        raise ValueError(
            f"{patches} patches do not lie on a grid of {grid[0]} x {grid[1]} = {grid[0] * grid[1]}; drop the prefix "
            "tokens first, and give the grid as (rows, columns)."
        )
