"""How far a layer of the student is from its teacher: distributions of attention and of derivatives, and their JSD.

A derivative's energy is how strongly the output energy of a block,

    e = sum_n mean_d h_n^2        over all its tokens n and channels d,

answers to the block's own parameters or to the pixels. Energies of any scale become distributions, over patches or
over images, so that models of other widths and parameter counts compare. Everything from the distribution on is
float64: the JSD of two equal models is then 0, not the rounding noise of float32 entropies, which is of eps' order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap

from hf_kdtl.functional.derivatives import Replaced, transformable
from hf_kdtl.functional.resample import Grid, precise, redistribute

Parameters = dict[str, Tensor]
Block = Callable[..., Tensor]
"""(parameters, *inputs) -> the block's output, (B, N, D) or (B, D, gh, gw); no image may see another."""

# Numbers of per-image gradients held at once, whatever the batch: 128 MB in float32.
_HELD = 2**25


def distribution(energy: Tensor) -> Tensor:
    """p = E / sum E over the last axis, (..., n) energies >= 0 -> (..., n), float64, sums to 1.

    Energies that are all 0 have no distribution: nan, which the caller counts.

    >>> distribution(torch.tensor([1.0, 3.0]))
    tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    energy = energy.double()
    energy = energy / energy.amax(-1, keepdim=True)  # so that a sum of large energies does not overflow
    return energy / energy.sum(-1, keepdim=True)


def discrepancy(p_student: Tensor, p_teacher: Tensor) -> Tensor:
    """JSD = H((p_S + p_T) / 2) - H(p_S) / 2 - H(p_T) / 2, (..., n) -> (...), in [0, ln 2] nats, float64.

    H is the entropy in nats, 0 log 0 = 0. Symmetric; 0 exactly where both are equal, ln 2 where they share no support.

    Cost: O(n).

    Raises:
        ValueError: for distributions of other lengths.

    Source: Kokane et al. 2024, arXiv 2407.04871 [review].

    >>> discrepancy(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))  # ln(4/3) 3/4 + ln 4 / 4 - ln 2 / 2
    tensor(0.2158, dtype=torch.float64)
    """
    if p_student.shape[-1] != p_teacher.shape[-1]:
        raise ValueError(
            f"distributions over {p_student.shape[-1]} and {p_teacher.shape[-1]} places cannot be compared; bring the "
            "teacher's energies to the student's grid (resample.redistribute) first."
        )
    p, q = p_student.double(), p_teacher.double()
    entropy = [torch.special.entr(x).sum(-1) for x in ((p + q) / 2, p, q)]
    return (entropy[0] - (entropy[1] + entropy[2]) / 2).clamp(0, math.log(2))


def output_energy(hidden: Tensor) -> Tensor:
    """e = sum_n mean_d h_n^2 per image: tokens (B, N, D) or a map (B, D, gh, gw) -> (B,), >= 0, at least float32.

    >>> output_energy(torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]))  # 12.5 + 2
    tensor([14.5000])
    """
    return precise(hidden).square().mean(-1 if hidden.ndim == 3 else 1).flatten(1).sum(1)


def parameter_gradient_energy(block: Block, parameters: Parameters, inputs: tuple[Tensor, ...]) -> Tensor:
    """||d e / d theta||^2 per image, by all the block's parameters, its input held fixed: (B,), >= 0.

    Args:
        block: (parameters, *inputs) -> output.
        parameters: theta, by name.
        inputs: tensors (B, ...), one row an image.

    Cost: one forward and backward of the block; memory for 2^25 numbers of per-image gradients, or one image's where
    the block is larger.

    Raises:
        what the block raises under torch.func.vmap: data-dependent control flow, or an operation without a rule.

    Source: arXiv 2407.04871, "Jacobian [...] of the output activations w.r.t. the network parameters" [paper: the
    abstract]; that it is this energy, per image, is [ours].
    """

    def energy(theta: Parameters, *image: Tensor) -> Tensor:
        return output_energy(block(theta, *(x.unsqueeze(0) for x in image))).sum()

    def squared(*image: Tensor) -> Tensor:
        return torch.stack([g.square().sum() for g in grad(energy)(held, *image).values()]).sum()

    held = {name: p.detach() for name, p in parameters.items()}
    size = sum(p.numel() for p in held.values())
    with transformable():  # the fused attention kernels have no rule under vmap
        return vmap(squared, chunk_size=max(1, _HELD // max(size, 1)))(*(x.detach() for x in inputs))


def parameter_curvature(block: Block, parameters: Parameters, inputs: tuple[Tensor, ...], v: Parameters) -> Tensor:
    """|v' (d^2 e / d theta^2) v| per image, along one direction v of the parameters: (B,), >= 0.

    The second derivative of e(theta + t v), forward over forward: no gradient of any image is held. Layer norms are
    composed for it, whose own forward mode cannot be differentiated again.

    Args:
        v: the direction, by name, in the parameters' shapes; Rademacher for an estimate of the curvature.
        the rest: as in `parameter_gradient_energy`.

    Cost: one forward of the block that carries four numbers for each.

    Source: as above [ours].
    """

    def energy(theta: Parameters) -> Tensor:
        return output_energy(block(theta, *(x.detach() for x in inputs)))

    held = {name: p.detach() for name, p in parameters.items()}
    with torch.no_grad(), transformable(), Replaced(_TWICE):
        along = jvp(lambda theta: jvp(energy, (theta,), (v,))[1], (held,), (v,))
    return along[1].abs()


def input_gradient_energy(energy: Tensor, pixel_values: Tensor, grid: Grid) -> Tensor:
    """sum over the channels and pixels of a patch of (d e / d x)^2, (B,) and (B, C, h, w) -> (B, P), >= 0.

    A patch is a cell of `grid`; a pixel that two share is shared by area. The graph stays for further calls.

    Cost: one backward through the model.

    Source: arXiv 2407.04871 in a published summary [review].
    """
    (gradient,) = torch.autograd.grad(energy.sum(), pixel_values, retain_graph=True)
    return patch_energy(gradient, grid)


def input_curvature_energies(
    energies: Callable[[Tensor], Sequence[Tensor]], pixel_values: Tensor, grids: Sequence[Grid], v: Tensor
) -> list[Tensor]:
    """sum over a patch of (H v)^2 with H = d^2 e / d x^2, for each of several e: [(B, P), ...], >= 0.

    H v is the gradient of the derivative of e along v. For Rademacher v, E (H v)_i^2 = sum_j H_ij^2: energies of the
    rows of H, not its diagonal.

    Args:
        energies: (B, C, h, w) pixels -> [(B,), ...].
        pixel_values: x, which requires a gradient.
        grids: of each energy.
        v: (B, C, h, w), a direction for each image.

    Cost: one forward that carries two numbers for each, and one backward through it for each energy.

    Source: [ours].
    """
    with transformable():
        along = jvp(lambda x: tuple(energies(x)), (pixel_values,), (v,))
        return [input_gradient_energy(slope, pixel_values, grid) for slope, grid in zip(along[1], grids, strict=True)]


def patch_energy(pixels: Tensor, grid: Grid) -> Tensor:
    """sum over the channels and pixels of each cell of x^2, (B, C, h, w) -> (B, rows x columns), float64.

    >>> patch_energy(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), (1, 2))
    tensor([[ 5., 25.]], dtype=torch.float64)
    """
    size = (pixels.shape[-2], pixels.shape[-1])
    return redistribute(pixels.detach().double().square().sum(1).flatten(1), size, grid)


def _silu(input, inplace=False):
    return input * torch.sigmoid(input)


def _batch_norm(input, mean, variance, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if not training:
        return F.batch_norm(input, mean, variance, weight, bias, training, momentum, eps)
    axes = [axis for axis in range(input.ndim) if axis != 1]
    centred = input - input.mean(axes, keepdim=True)
    result = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    shape = (1, -1, *[1] * (input.ndim - 2))
    result = result if weight is None else result * weight.reshape(shape)
    return result if bias is None else result + bias.reshape(shape)


_TWICE: dict[Callable, Callable] = {F.silu: _silu, F.batch_norm: _batch_norm}
"""Inside forward over forward: what torch 2.13 has no rule for there, or a wrong one.

SiLU's backward has no forward mode. Batch norm in train mode is silently wrong by a third (BiT standardises its
weights by it; layers in train mode do not come here, blocks are measured in eval mode).
"""
