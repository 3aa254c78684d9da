"""Distances between the embeddings and patch tokens of a student and a teacher, one value per image.

Half precisions are computed in float32, float64 stays float64. Nothing is detached here: whoever calls decides where
gradients go.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kdtl.functional.features import cosine_distance, unit
from hf_kdtl.functional.resample import matmul, precise

Standardize = Literal["isotropic", "channel", "none"]
COSINE_SHARE = 0.9


class Moments(NamedTuple):
    """Sums over vectors (n, D): their number, their sum (D,), and the sum of squared distances from `center` (D,)."""

    number: int
    total: Tensor
    squares: Tensor
    center: Tensor


def moments(x: Tensor, before: Moments | None = None) -> Moments:
    """The moments of vectors (..., D) and of those before, in float64.

    Squares are taken from the mean of the first batch, so that vectors far from 0 lose no digits.
    """
    x = x.detach().reshape(-1, x.shape[-1]).double()
    center = x.mean(0) if before is None else before.center
    apart = x - center
    found = Moments(len(x), apart.sum(0), apart.square().sum(0), center)
    if before is None:
        return found
    return Moments(found.number + before.number, found.total + before.total, found.squares + before.squares, center)


def mean_and_scale(found: Moments, standardize: Standardize) -> tuple[Tensor, Tensor]:
    """(mu, scale), each (D,), of x -> (x - mu) / scale, in float64.

    isotropic: one scale for all channels, the root of the mean variance of the channels, which is the mean eigenvalue
    of the covariance. channel: each channel's own standard deviation (1 for a constant one). none: 0 and 1.

    Raises:
        ValueError: for vectors that are all the same.

    >>> mean_and_scale(moments(torch.tensor([[0.0, 0.0], [2.0, 4.0]])), "channel")
    (tensor([1., 2.], dtype=torch.float64), tensor([1., 2.], dtype=torch.float64))
    """
    shift = found.total / found.number
    variance = (found.squares / found.number - shift.square()).clamp(min=0)
    if standardize == "none":
        return torch.zeros_like(shift), torch.ones_like(shift)
    if not variance.any():
        raise ValueError("they are the same for all images of the sample, so there is nothing to learn from them.")
    mean = found.center + shift
    if standardize == "channel":
        return mean, torch.where(variance > 0, variance, 1.0).sqrt()
    return mean, variance.mean().sqrt().expand_as(variance).clone()


def token_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """.9 (1 - cos) + .1 mean_channels smooth_l1, mean over the tokens, (B, P, D) twice -> (B,), >= 0.

    Source: the weights are AM-RADIO's, arXiv 2312.06709; smooth-L1 with beta 1.

    >>> token_distance(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]))  # .9 * 1 + .1 * .5
    tensor([0.9500])
    """
    s, t = precise(student), precise(teacher)
    rough = F.smooth_l1_loss(s, t, reduction="none").mean(-1)
    return (COSINE_SHARE * cosine_distance(s, t) + (1 - COSINE_SHARE) * rough).mean(-1)


def similarity_divergence(
    student: Tensor, teacher: Tensor, bank: Tensor, temperature: float, left_out: Tensor | None = None
) -> Tensor:
    """KL of the soft-maxed similarities to a bank, teacher's || student's, (B, D) twice and (n, D) -> (B,), in nats.

    Args:
        student, teacher: embeddings; brought to length 1, as the entries of the bank are.
        temperature: the cosines are divided by it.
        left_out: (B, n) booleans, the entries that do not count for an image.

    Cost: O(B n D).

    >>> e = torch.eye(2)
    >>> similarity_divergence(e[:1], e[:1], e, 0.07)
    tensor([0.])
    """
    entries = unit(precise(bank)).T
    log_s, log_t = (
        _log_softmax(matmul(unit(precise(x)), entries) / temperature, left_out) for x in (student, teacher)
    )
    return _divergence(log_s, log_t, left_out)


def local_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL of the soft-maxed similarities of each token to the other tokens of its image, (B, P, D) and (B, P, D') ->
    (B,), mean over the tokens.

    Widths may differ: each side is compared with itself. A token's similarity to itself does not count.

    Cost: O(B P^2 (D + D')).

    Raises:
        ValueError: for fewer than two tokens, or numbers that differ.
    """
    number = student.shape[-2]
    if number < 2 or teacher.shape[-2] != number:
        raise ValueError(f"{number} and {teacher.shape[-2]} tokens: expected the same number, at least 2.")
    self_ = torch.eye(number, dtype=torch.bool, device=student.device)
    units = (unit(precise(x)) for x in (student, teacher))
    log_s, log_t = (_log_softmax(matmul(u, u.transpose(-1, -2)) / temperature, self_) for u in units)
    return _divergence(log_s, log_t, self_).mean(-1)


def _log_softmax(scores: Tensor, left_out: Tensor | None) -> Tensor:
    return (scores if left_out is None else scores.masked_fill(left_out, -torch.inf)).log_softmax(-1)


def _divergence(log_s: Tensor, log_t: Tensor, left_out: Tensor | None) -> Tensor:
    gap = log_t - log_s
    if left_out is not None:
        gap = gap.masked_fill(left_out, 0.0)  # -inf - -inf
    return (log_t.exp() * gap).sum(-1)
