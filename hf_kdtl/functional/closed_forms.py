"""Layers of vision transformers whose derivatives are written out, where torch's are dear or, silently, wrong.

| layer | used | torch 2.13 |
| --- | --- | --- |
| convolution that cuts patches | for any derivative | its gradient by the pixels costs 5 matrix products on a CPU |
| hard-sigmoid, composed | from the second, and in forward mode | has none |
| GELU | from the second | the derivative of its backward is ten elementwise passes |
| layer norm, composed | for the third | is wrong |
| layer norm with its slope | in forward mode | has a wrong gradient |
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


class _Gelu(torch.autograd.Function):
    """The k-th derivative of GELU at x. Its own derivative is the next one.

    `known` holds the derivatives computed so far, for all nodes made from one x: however often passes go through a
    graph, each is computed once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int, known: dict[int, Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.k, ctx.known = k, known
        if k == 0:
            return F.gelu(x)
        if k not in known:
            known[k] = gelu_derivative(x, k)
        return known[k].detach()  # autograd marks what is returned, and this one is used again

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        (x,) = ctx.saved_tensors
        return grad * _Gelu.apply(x, ctx.k + 1, ctx.known), None, None


def gelu_derivative(x: Tensor, k: int) -> Tensor:
    """d^k/dx^k of x Phi(x), Phi the normal distribution and phi its density, with the shape of x.

    k = 1: Phi + x phi. From 2: phi P_k with P_2 = 2 - x^2 and P_(k+1) = P_k' - x P_k. Half precision is computed in
    float32 and rounded.

    >>> gelu_derivative(torch.zeros(1, dtype=torch.float64), 2)  # 2 / sqrt(2 pi)
    tensor([0.7979], dtype=torch.float64)
    """
    if k == 1:
        return torch.ops.aten.gelu_backward(torch.ones((), dtype=x.dtype, device=x.device).expand_as(x), x)
    exact = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    powers = [2.0, 0.0, -1.0]  # of P_2, ascending
    for _ in range(k - 2):
        slopes = [*(i * c for i, c in enumerate(powers) if i), 0.0, 0.0]
        powers = [a - b for a, b in zip(slopes, [0.0, *powers], strict=True)]
    # In the fewest passes: P_k / sqrt(2 pi) as a polynomial of h = -x^2 / 2 (odd k: times x), then times exp(h).
    half = exact.square().mul_(-0.5)
    *lower, highest = (c * (-2) ** i / math.sqrt(2 * math.pi) for i, c in enumerate(powers[k % 2 :: 2]))
    value = (half * highest).add_(lower.pop())
    for c in reversed(lower):
        value.mul_(half).add_(c)
    if k % 2:
        value.mul_(exact)
    return value.mul_(half.exp_()).to(x.dtype)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """F.gelu. Not inside a transform of torch.func."""
    if approximate != "none":
        return F.gelu(input, approximate=approximate)
    return _Gelu.apply(input, 0, {})


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """F.hardsigmoid from an operation whose second derivative torch has."""
    return F.relu6(input + 3) / 6


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """F.layer_norm from elementary operations."""
    normal, _ = _standardised(_full(input), normalized_shape, eps)
    return _affine(normal, weight, bias)


def layer_norm_with_slope(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """F.layer_norm of an input that carries a slope s in forward mode, weight and bias carrying none.

    The slope of n = (x - mean) r is (s - mean s - n mean(s n)) r.
    """
    value, slope = forward_ad.unpack_dual(input)
    if slope is None:
        return layer_norm(input, normalized_shape, weight, bias, eps)
    normal, scale = _standardised(_full(value), normalized_shape, eps)
    slope, axes = _full(slope), tuple(range(-len(normalized_shape), 0))
    along = normal * (slope * normal).mean(axes, keepdim=True)
    moved = (slope - slope.mean(axes, keepdim=True) - along) * scale
    return forward_ad.make_dual(_affine(normal, weight, bias), _affine(moved, weight, None))


def _full(x: Tensor) -> Tensor:
    # Autocast runs layer_norm in float32 (on CUDA), and would not run these operations so.
    return x.float() if torch.is_autocast_enabled(x.device.type) else x


def _standardised(x: Tensor, shape, eps: float) -> tuple[Tensor, Tensor]:
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    return centred * scale, scale


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """torch.conv2d; where it cuts an image into patches that do not overlap, as the matrix product that it is.

    Only of the image itself (up to 4 channels): a block that is recomputed must find the operation of the first time.
    """
    size = tuple(weight.shape[2:])
    image = input.ndim == 4 and input.shape[1] <= 4 and groups == 1
    if not image or (stride, padding, dilation) != (size, (0, 0), (1, 1)):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    rows, columns = (n // p for n, p in zip(input.shape[2:], size, strict=True))
    covered = input[:, :, : rows * size[0], : columns * size[1]]  # a convolution ignores the rest, too
    patches = covered.unflatten(3, (columns, size[1])).unflatten(2, (rows, size[0])).permute(0, 2, 4, 1, 3, 5)
    return F.linear(patches.flatten(3), weight.flatten(1), bias).permute(0, 3, 1, 2)
