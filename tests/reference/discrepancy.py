"""Discrepancies the slow, obvious way, in float64: image by image, patch by patch, derivatives by plain autograd."""

import math

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.reference import features


def distribution(energies):
    total = sum(energies)
    return [e / total for e in energies]


def jsd(p, q):
    """H((p + q) / 2) - H(p) / 2 - H(q) / 2, term by term."""
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return _entropy(m) - (_entropy(p) + _entropy(q)) / 2


def _entropy(p):
    values = [float(torch.as_tensor(v).detach()) for v in p]
    return -sum(v * math.log(v) for v in values if v > 0)


def energy(hidden):
    """sum_n mean_d h_n^2 of one image: tokens (N, D) or a map (D, gh, gw)."""
    tokens = hidden if hidden.ndim == 2 else hidden.flatten(1).T
    return sum(sum(v * v for v in token) / len(token) for token in tokens)


def attention(student, teacher, prefix_s, prefix_t, grid_s, grid_t):
    """Mean over the images of the JSD of mean_d h^2 per patch; hidden states (B, N, D)."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        maps = []
        for tokens, prefix, grid in ((s, prefix_s, grid_s), (t, prefix_t, grid_t)):
            patches = torch.stack([sum(v * v for v in token) / len(token) for token in tokens[prefix:]])
            maps.append(distribution(features.redistribute(patches, grid, grid_s)))
        values.append(jsd(*maps))
    return sum(values) / len(values)


def parameter_energies(block, inputs, direction=None):
    """For each image: ||d e / d theta||^2, or |v' H v| along a direction; `block` is a module of its input alone."""
    found = []
    parameters = dict(block.named_parameters())
    for image in inputs:
        with sdpa_kernel(SDPBackend.MATH):
            output = block(image[None])
            output = output[0] if isinstance(output, tuple) else output
            grads = torch.autograd.grad(output_energy(output), list(parameters.values()), create_graph=True)
            if direction is None:
                found.append(sum((g * g).sum().item() for g in grads))
                continue
            along = sum((g * direction[n]).sum() for n, g in zip(parameters, grads, strict=True))
            second = torch.autograd.grad(along, list(parameters.values()), allow_unused=True)
        pairs = zip(parameters, second, strict=True)
        found.append(abs(sum((h * direction[n]).sum().item() for n, h in pairs if h is not None)))
    return found


def output_energy(hidden):
    return hidden.square().mean(-1 if hidden.ndim == 3 else 1).sum()


def patch_sums(pixels, grid):
    """(C, h, w) -> sum of squares of each cell, for grids that divide the image."""
    rows, columns = pixels.shape[1] // grid[0], pixels.shape[2] // grid[1]
    cells = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            cell = pixels[:, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            cells.append(sum(v * v for v in cell.flatten()))
    return cells
