"""Distances between the features of a student and a teacher, one value per image.

Half precisions are computed in float32, float64 stays float64. Nothing is detached here: whoever calls decides where
gradients go.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kdtl.functional.resample import Grid, precise, redistribute

Normalize = Literal["both", "teacher", "none"]
Distance = Literal["mse", "smooth_l1", "cosine"]
Mode = Literal["code", "paper"]


def unit(x: Tensor) -> Tensor:
    """x / ||x|| over the last axis, (..., D) -> (..., D). A zero vector has no direction: it stays 0, with gradient 0.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    # Brought to a largest entry of 1 first, so that squares neither underflow nor overflow. The scale divides out, so
    # it may be held constant in the gradient.
    scale = x.detach().abs().amax(-1, keepdim=True)
    zero = scale < torch.finfo(x.dtype).tiny
    scaled = torch.where(zero, 0.0, x / torch.where(zero, 1.0, scale))
    return scaled * torch.rsqrt(torch.where(zero, 1.0, scaled.square().sum(-1, keepdim=True)))


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    """1 - cos(x, y) over the last axis, (..., D) -> (...), in [0, 2].

    Computed as half the squared distance of the unit vectors, which is exactly 0 at equality and never negative.
    Zero vectors: 0 where both are, 1 where only one is, both with gradient 0.

    >>> cosine_distance(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]))  # 1 - 3 / 5
    tensor(0.4000)
    """
    u, v = unit(precise(x)), unit(precise(y))
    one_is_zero = (u == 0).all(-1) ^ (v == 0).all(-1)
    return torch.where(one_is_zero, 1.0, 0.5 * (u - v).square().sum(-1))


def energy(features: Tensor) -> Tensor:
    """mean_d h_d^2 of every patch, (B, P, D) -> (B, P), >= 0.

    >>> energy(torch.tensor([[[3.0, 4.0]]]))
    tensor([[12.5000]])
    """
    return precise(features).square().mean(-1)


def attention_transfer(
    student: Tensor, teacher: Tensor, grid_student: Grid, grid_teacher: Grid, mode: Mode = "code"
) -> Tensor:
    """How far apart student and teacher are in where their features are strong, (B,).

    Q_n = mean_d h_{n,d}^2 per patch n, q = Q / ||Q||. The teacher's Q is brought to the student's grid (sums kept)
    before it is normalised, so widths and grids may differ.

    Args:
        student: (B, P_S, D_S) patch tokens, or a feature map flattened row by row; no prefix tokens.
        teacher: (B, P_T, D_T).
        grid_student, grid_teacher: (rows, columns) of the patches.
        mode: "code" the mean over the patches of (q_S - q_T)^2, in [0, 2 / P_S]; "paper" the norm ||q_S - q_T||, in
            [0, sqrt 2]. The norm has no gradient at equality: there it is taken as 0.

    An image whose features are all 0 has q = 0.

    Cost: O(B (P_S D_S + P_T D_T)).

    Raises:
        ValueError: for an unknown mode, or patches that do not lie on their grid.

    Source: Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", arXiv 1612.03928 [paper: the authors'
    code, which bounds ||Q||^2 below by 1e-12 where we only guard against 0]. The paper weighs the norm by beta / 2.
    The change of grid is ours.

    >>> one, other = torch.tensor([[[3.0], [4.0]]]).sqrt(), torch.tensor([[[4.0], [3.0]]]).sqrt()
    >>> attention_transfer(one, other, (1, 2), (1, 2))  # q = (.6, .8) and (.8, .6)
    tensor([0.0400])
    """
    _check("mode", mode, ("code", "paper"))
    q_s = unit(redistribute(energy(student), grid_student, grid_student))
    q_t = unit(redistribute(energy(teacher), grid_teacher, grid_student))
    squared = (q_s - q_t).square()
    if mode == "code":
        return squared.mean(-1)
    total = squared.sum(-1)
    return torch.where(total == 0, 0.0, torch.where(total == 0, 1.0, total).sqrt())


def feature_distance(
    student: Tensor, teacher: Tensor, normalize: Normalize = "both", distance: Distance = "mse"
) -> Tensor:
    """Distance of token features of one width, mean over the tokens, (B, N, D) and (B, N, D) -> (B,), >= 0.

    Args:
        student: (B, N, D), already brought to the teacher's width.
        teacher: (B, N, D), already brought to the student's tokens (`resample.align_tokens`).
        normalize: what is layer-normed first, without weight and bias (eps 1e-6): "both", the "teacher" alone (0 where
            the student gives the normed feature, not where it equals the teacher), or "none".
        distance: "mse" mean over channels of (s - t)^2; "smooth_l1" the same with |d| - 1/2 where |d| > 1, d^2 / 2
            elsewhere; "cosine" 1 - cos over the channels of a token, in [0, 2].

    With both normed, mse is about 2 (1 - correlation) of a token's channels: in [0, 4].

    Cost: O(B N D).

    Raises:
        ValueError: for an unknown option, or shapes that differ.

    Source: [ours].

    >>> one, other = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[4.0, 2.0]]])
    >>> feature_distance(one, other)  # (-1, 1) against (1, -1)
    tensor([4.0000])
    >>> feature_distance(one, other, normalize="none")  # (9 + 1) / 2
    tensor([5.])
    """
    _check("normalize", normalize, ("both", "teacher", "none"))
    _check("distance", distance, ("mse", "smooth_l1", "cosine"))
    if student.shape != teacher.shape:
        raise ValueError(
            f"features of shape {tuple(student.shape)} and {tuple(teacher.shape)} cannot be compared; project the "
            "student to the teacher's width and bring the teacher to the student's tokens (align_tokens) first."
        )
    s, t = precise(student), precise(teacher)
    if normalize == "both":
        s = F.layer_norm(s, s.shape[-1:], eps=1e-6)
    if normalize != "none":
        t = F.layer_norm(t, t.shape[-1:], eps=1e-6)
    if distance == "cosine":
        return cosine_distance(s, t).mean(-1)
    pointwise = F.mse_loss if distance == "mse" else F.smooth_l1_loss
    return pointwise(s, t, reduction="none").mean((-2, -1))


def _check(option: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{option} is {value!r}; expected {' or '.join(map(repr, valid))}.")
