"""Training a student that will be int8: its linear and convolution layers compute with rounded numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_kdtl.models.adapters import adapted


def round_activation(x: Tensor) -> Tensor:
    """The values of x on 256 levels over its range, and 0 among them; gradient 1 (straight-through).

    scale = (max(x, 0) - min(x, 0)) / 255, z = round(-min(x, 0) / scale),
    y = scale (clamp(round(x / scale) + z, 0, 255) - z): what uint8 holds.
    Written with differentiable operations, so that derivatives of any order exist.

    >>> round_activation(torch.tensor([-1.0, 0.0, 1.55]))  # steps of 0.01
    tensor([-1.0000,  0.0000,  1.5500])
    """
    with torch.no_grad():
        exact = _at_least_float32(x)
        low, high = exact.amin().clamp(max=0), exact.amax().clamp(min=0)
        scale = ((high - low) / 255).clamp(min=torch.finfo(exact.dtype).tiny)
        zero = torch.round(-low / scale)
        rounded = (torch.clamp(torch.round(exact / scale) + zero, 0, 255) - zero) * scale
    return x + (rounded.to(x.dtype) - x).detach()


def round_weight(weight: Tensor) -> Tensor:
    """The weights (out, ...) on 255 levels, symmetric about 0, a scale for each output; gradient 1.

    >>> round_weight(torch.tensor([[1.27, 0.006, 0.0]]))
    tensor([[1.2700, 0.0100, 0.0000]])
    """
    with torch.no_grad():
        exact = _at_least_float32(weight)
        scale = exact.flatten(1).abs().amax(1) / 127
        scale = scale.clamp(min=torch.finfo(exact.dtype).tiny).view(-1, *[1] * (weight.ndim - 1))
        rounded = torch.clamp(torch.round(exact / scale), -127, 127) * scale
    return weight + (rounded.to(weight.dtype) - weight).detach()


def _at_least_float32(x: Tensor) -> Tensor:
    """In bfloat16 a scale is off by up to half a level at the ends of the range."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RoundedLinear(nn.Linear):
    """A linear layer whose input and weights are rounded as an int8 file rounds them."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(round_activation(input), round_weight(self.weight), self.bias)


class RoundedConv2d(nn.Conv2d):
    """A convolution whose input and weights are rounded as an int8 file rounds them."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(round_activation(input), round_weight(self.weight), self.bias)


_ROUNDED = {nn.Linear: RoundedLinear, nn.Conv2d: RoundedConv2d}


def round_layers(model: nn.Module) -> int:
    """Let the linear and convolution layers of a model compute with numbers rounded to 8 bits; returns how many.

    Only how they compute changes: parameters, names and what is saved stay, so the saved student is the plain model in
    float32, whose weights have learned to be rounded. The range of an activation is that of the batch at hand, so
    nothing has to be kept, and the values of an image depend a little on the others of its batch: under accumulation
    and on several processes each part of a batch has ranges of its own, as statistics of BatchNorm have. [ours, after
    Jacob et al. 2018, arXiv 1712.05877, who keep running ranges]

    Raises:
        ValueError: for a model with adapters, or one without such layers.
    """
    if adapted(model):
        raise ValueError("quantize rounds the student's own layers, and adapters replace them; leave one of them out.")
    found = 0
    for module in model.modules():
        if (kind := _ROUNDED.get(type(module))) is not None:
            module.__class__ = kind
        found += isinstance(module, tuple(_ROUNDED.values()))
    if not found:
        raise ValueError(f"quantize: {type(model).__name__} has no linear or convolution layers to round.")
    return found


def plain_layers(model: nn.Module) -> None:
    """What `round_layers` changed, taken back: a student that was trained so computes in full again."""
    plain = {rounded: kind for kind, rounded in _ROUNDED.items()}
    for module in model.modules():
        module.__class__ = plain.get(type(module), type(module))
