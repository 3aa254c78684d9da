"""How far a student is from the model it started from, in weights and in channels; and how small its features get.

Half precisions are computed in float32, float64 stays float64. Nothing is detached here: whoever calls decides where
gradients go.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_kdtl.functional.resample import precise

# torch's norm on a CPU adds one number after the other: over 16 million float32 it is off by 1.4e-3, over these 4e-7.
_PART = 2**16


class _HalfSquaredDistance(torch.autograd.Function):
    """Keeps references to its inputs and nothing else; autograd itself would keep every difference."""

    @staticmethod
    def forward(ctx: Any, then: list[Tensor], *now: Tensor) -> Tensor:
        ctx.save_for_backward(*now)
        ctx.then = then
        differences = torch._foreach_sub(now, then)
        parts = [part for d in differences for part in (d.flatten().split(_PART) if d.numel() > _PART else (d,))]
        norms = torch._foreach_norm(parts, 2, dtype=torch.promote_types(now[0].dtype, torch.float32))
        return 0.5 * torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        pulls = torch._foreach_sub(ctx.saved_tensors, ctx.then)
        torch._foreach_mul_(pulls, gradients[0])
        return None, *pulls


def l2_sp(now: Sequence[Tensor], then: Sequence[Tensor]) -> Tensor:
    """1/2 sum_i ||w_i - w0_i||^2 over all tensors, a scalar, >= 0.

    The gradient is its closed form w - w0, worked out in the backward pass, so that nothing of the size of the weights
    is kept from one pass to the other. `then` gets none. A second derivative is right too.

    Args:
        now: tensors w, of any shapes.
        then: tensors w0 of the same shapes.

    Cost: two passes over the weights, and as much memory as they take for a moment in each.

    Raises:
        ValueError: for no tensors, or lists that do not go together.

    Source: Li, Grandvalet, Davoine 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
    arXiv 1802.01483.

    >>> l2_sp([torch.tensor([1.0, 3.0]), torch.tensor([5.0])], [torch.tensor([0.0, 1.0]), torch.tensor([5.0])])
    tensor(2.5000)
    """
    shapes = [t.shape for t in now], [t.shape for t in then]
    if not now or shapes[0] != shapes[1]:
        odd = next((f"{tuple(a)} and {tuple(b)}" for a, b in zip(*shapes, strict=False) if a != b), "tensors")
        raise ValueError(
            f"{len(now)} and {len(then)} tensors ({odd}) cannot be compared; expected at least one, and the same "
            "shapes in the same order."
        )
    return _HalfSquaredDistance.apply([t.detach() for t in then], *now)


def smallest_singular(features: Tensor, k: int = 1) -> Tensor:
    """sum_{i <= k} sigma_{-i}^2, the k smallest squared singular values of the features (B, D), a scalar, >= 0.

    Computed in float32 at least, also under autocast. The gradient, 2 sigma u v' of each, is finite where values
    repeat (any of the equal directions is taken) and 0 where they are 0.

    Args:
        features: (B, D).
        k: how many, 1 <= k < min(B, D).

    Cost: one singular value decomposition, O(B D min(B, D)).

    Raises:
        ValueError: for a k out of range.

    Source: Chen et al. 2019, "Catastrophic Forgetting Meets Negative Transfer: Batch Spectral Shrinkage for Safe
    Transfer Learning", NeurIPS.

    >>> smallest_singular(torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    tensor(4.)
    """
    images, width = features.shape
    if not 1 <= k < min(images, width):
        raise ValueError(
            f"k is {k} and the features are {images} images x {width} channels, which have {min(images, width)} "
            "singular values; expected at least 1 and fewer than all of them. Use a smaller k or larger batches "
            "(dataloader_drop_last=True leaves out a last batch that is too small)."
        )
    with torch.autocast(features.device.type, enabled=False):
        return torch.linalg.svdvals(precise(features))[-k:].square().sum()


def channel_distance(student: Tensor, start: Tensor, weights: Tensor) -> Tensor:
    """sum_c w_c mean_n (h_S - h_0)_{n,c}^2, (B, N, D) and (B, N, D) -> (B,), >= 0.

    Args:
        student, start: (B, N, D) tokens.
        weights: (D,), >= 0, of sum 1.

    Cost: O(B N D).

    Source: [ours], after the authors' code of DELTA, whose value is D / 2 times this, summed over images and layers.

    >>> weights = torch.tensor([0.75, 0.25])
    >>> channel_distance(torch.tensor([[[1.0, 2.0], [3.0, 2.0]]]), torch.zeros(1, 2, 2), weights)  # .75 * 5 + .25 * 4
    tensor([4.7500])
    """
    squared = (precise(student) - precise(start)).square().mean(1)
    return (squared * weights.to(squared)).sum(-1)


def channel_importance(hidden: Tensor, gradient: Tensor) -> Tensor:
    """softmax_c((r_c - mean r) / (5 std r)), (B, N, D) twice -> (D,) of sum 1: how much the loss needs each channel.

    r_c = -sum_{b,n} (dL/dh)_{b,n,c} h_{b,n,c}: by how much L rises, to first order, when channel c is set to 0. A
    loss increase is about 1/D of the loss and less, so that its own softmax would be uniform whatever the model;
    hence it is standardised over the channels first.

    Args:
        hidden: (B, N, D) tokens h.
        gradient: (B, N, D), of the loss L by h.

    Cost: O(B N D), for all channels at once; leaving them out one at a time would cost D forwards.

    Raises:
        ValueError: where the loss does not depend on the channels, or on all alike.

    Source: the standardised softmax at temperature 5 is DELTA's, Li et al. 2019, arXiv 1901.09229 [paper: the authors'
    code]; the first order in place of leaving channels out is [ours].

    >>> h, g = torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[[0.0, 0.0, -1.0]]])
    >>> channel_importance(h, g)  # r = (0, 0, 4), standardised (-.707, -.707, 1.414)
    tensor([0.2834, 0.2834, 0.4332])
    """
    return importance_of_rises(channel_rises(hidden, gradient))


def channel_rises(hidden: Tensor, gradient: Tensor) -> Tensor:
    """r_c of `channel_importance`, (D,), of these images: those of several batches add up."""
    return -(precise(hidden) * precise(gradient)).sum((0, 1))


def importance_of_rises(rise: Tensor) -> Tensor:
    """softmax_c((r_c - mean r) / (5 std r)), (D,) -> (D,) of sum 1; raises as `channel_importance`."""
    spread = rise.std(correction=0)
    if not spread > 0:
        raise ValueError(
            f"setting any of the {len(rise)} channels to 0 changes the loss by the same {rise[0].item():.3g}, so none "
            "is more important than another; expected features that the classifier reads."
        )
    return torch.softmax((rise - rise.mean()) / (5 * spread), 0)
