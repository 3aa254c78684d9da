"""Grids and feature distances the slow, obvious way: cell by cell, image by image, token by token."""

from fractions import Fraction

import torch


def shared_area(cell_from, cell_to, grid_from, grid_to):
    """Area shared by two rectangles of the unit square, exactly. Cells are counted row by row."""
    area = Fraction(1)
    for place_from, place_to, n_from, n_to in zip(
        divmod(cell_from, grid_from[1]), divmod(cell_to, grid_to[1]), grid_from, grid_to, strict=True
    ):
        left = max(Fraction(place_from, n_from), Fraction(place_to, n_to))
        right = min(Fraction(place_from + 1, n_from), Fraction(place_to + 1, n_to))
        area *= max(right - left, Fraction(0))
    return area


def redistribute(energy, grid_from, grid_to):
    """(P_from,) -> (P_to,): each cell gives the share of its area."""
    cells_from, cells_to = grid_from[0] * grid_from[1], grid_to[0] * grid_to[1]
    result = []
    for t in range(cells_to):
        shares = [float(shared_area(s, t, grid_from, grid_to) * cells_from) for s in range(cells_from)]
        result.append(sum(share * energy[s] for s, share in enumerate(shares)))
    return torch.stack(result)


def average(features, grid_from, grid_to):
    """(P_from, D) -> (P_to, D): the mean over the area of each new cell."""
    cells_from, cells_to = grid_from[0] * grid_from[1], grid_to[0] * grid_to[1]
    result = []
    for t in range(cells_to):
        shares = [float(shared_area(s, t, grid_from, grid_to) * cells_to) for s in range(cells_from)]
        result.append(sum(share * features[s] for s, share in enumerate(shares)))
    return torch.stack(result)


def align_tokens(features, keep, prefix, grid_from, grid_to):
    """(prefix + P_from, D) -> (len(keep) + P_to, D)."""
    return torch.stack([*(features[i] for i in keep), *average(features[prefix:], grid_from, grid_to)])


def attention_transfer(student, teacher, grid_student, grid_teacher, mode="code"):
    values = []
    for h_s, h_t in zip(student, teacher, strict=True):
        maps = []
        for h, grid in ((h_s, grid_student), (h_t, grid_teacher)):
            energy = torch.stack([(patch * patch).sum() / len(patch) for patch in h])
            energy = redistribute(energy, grid, grid_student)
            length = sum(e * e for e in energy) ** 0.5
            maps.append([e / length for e in energy])
        squared = sum((a - b) ** 2 for a, b in zip(*maps, strict=True))
        values.append(squared / len(maps[0]) if mode == "code" else squared**0.5)
    return torch.stack(values)


def feature_distance(student, teacher, normalize="both", distance="mse"):
    values = []
    for s_image, t_image in zip(student, teacher, strict=True):
        tokens = []
        for s, t in zip(s_image, t_image, strict=True):
            s = _normed(s) if normalize == "both" else s
            t = t if normalize == "none" else _normed(t)
            if distance == "cosine":
                tokens.append(1 - (s * t).sum() / ((s * s).sum() * (t * t).sum()) ** 0.5)
            elif distance == "mse":
                tokens.append(((s - t) ** 2).sum() / len(s))
            else:
                tokens.append(sum(_huber(d) for d in s - t) / len(s))
        values.append(sum(tokens) / len(tokens))
    return torch.stack(values)


def _normed(x):
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    return (x - mean) / (variance + 1e-6) ** 0.5


def _huber(d):
    return 0.5 * d * d if d.abs() < 1 else d.abs() - 0.5
