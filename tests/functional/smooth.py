"""Small smooth nets in float64, whose derivatives of any order exist and are cheap to compute exactly."""

from types import SimpleNamespace

import torch
from torch import nn

SHAPE = (2, 2, 2)
INPUTS = 8


class Smooth(nn.Module):
    """(B, 2, 2, 2) -> logits (B, K): a layer norm and two tanh layers."""

    def __init__(self, classes=3, seed=0, width=10, norm=True):
        super().__init__()
        self.first, self.norm = nn.Linear(INPUTS, width), nn.LayerNorm(width) if norm else nn.Identity()
        self.second, self.classifier = nn.Linear(width, width), nn.Linear(width, classes)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.double().parameters():
            size = 1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.3
            parameter.data = size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if norm:
            self.norm.weight.data += 1.0

    def logits(self, x):
        hidden = torch.tanh(self.norm(self.first(x.flatten(1))))
        return self.classifier(torch.tanh(self.second(hidden)))

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.logits(pixel_values))


class Quadratic(nn.Module):
    """o_k(x) = 1/2 x' A_k x + b_k' x, A_k symmetric: g = A_k x + b_k, H = A_k."""

    def __init__(self, classes=3, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(classes, INPUTS, INPUTS, generator=generator, dtype=torch.float64)
        self.a = nn.Parameter(a + a.transpose(1, 2))
        self.b = nn.Parameter(torch.randn(classes, INPUTS, generator=generator, dtype=torch.float64))

    def logits(self, x):
        x = x.flatten(1)
        a = 0.5 * (self.a + self.a.transpose(1, 2))
        return 0.5 * torch.einsum("bi,kij,bj->bk", x, a, x) + x @ self.b.T

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.logits(pixel_values))


def images(number=4, seed=0):
    """(number, 2, 2, 2), the same at every call."""
    generator = torch.Generator().manual_seed(seed + 100)
    return torch.randn(number, *SHAPE, generator=generator, dtype=torch.float64)


def slope(sizes, errors):
    """Of log(error) over log(size), by least squares."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (sizes, errors))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
