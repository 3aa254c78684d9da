"""Attention of a student against a teacher's, from queries and keys, whatever their heads, tokens and grids.

Attention is handled as log-probabilities (B, H, R, N), R query rows by N key columns, so that no row is lost to
underflow: dropping columns and renormalising is then an exact log-softmax over those kept. Half precisions are
computed in float32, float64 stays float64. Nothing is detached here: whoever calls decides where gradients go.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kdtl.functional.divergences import kl
from hf_kdtl.functional.resample import Grid, align_tokens, check_tokens, matmul, precise, redistribute


def attention_rows(
    query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None, rows: Literal["cls", "all"] = "cls"
) -> Tensor:
    """log softmax_k(scale <q, k> + bias), (B, H, R, Nk), the logarithm of the attention of each query row.

    Args:
        query: (B, H, Nq, d).
        key: (B, H, Nk, d).
        scale: what the model multiplies the scores by, usually 1 / sqrt(d).
        bias: added to the scores, broadcastable to (B, H, Nq, Nk): relative positions, masks (-inf is read as a very
            negative number, so that no nan arises). None for none.
        rows: "cls" the first query alone, R = 1: nothing of size Nq x Nk exists, forward or backward. That the first
            token is the class token is for the caller to know. "all": R = Nq.

    Cost: O(B H R Nk d), and B H R Nk numbers kept for the backward pass.

    Raises:
        ValueError: for unknown rows, or a boolean bias.

    >>> query, key = torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [2.0]]]])
    >>> attention_rows(query, key, math.log(3) / 2).exp()  # 3^0 : 3^1
    tensor([[[[0.2500, 0.7500]]]])
    """
    if rows not in ("cls", "all"):
        raise ValueError(f"rows is {rows!r}; expected 'cls' or 'all'.")
    if bias is not None and bias.dtype == torch.bool:
        raise ValueError("bias is boolean; expected numbers to add to the scores: 0 where attended, -inf where not.")
    if rows == "cls":
        query = query[:, :, :1]
        bias = bias[..., :1, :] if bias is not None else None
    # Models give strided views of (B, N, H, d), on which batched products take 2 to 3 times as long as after a copy.
    scores = matmul(precise(query) * scale, key.contiguous().transpose(-2, -1))
    if bias is not None:
        scores = scores + bias.to(scores.dtype).clamp(min=torch.finfo(scores.dtype).min / 4)
    return F.log_softmax(scores, dim=-1)


def mean_heads(log_p: Tensor) -> Tensor:
    """The logarithm of the attention's mean over the heads, (B, H, R, N) -> (B, 1, R, N).

    >>> mean_heads(torch.tensor([[[[0.2, 0.8]], [[0.6, 0.4]]]]).log()).exp()
    tensor([[[[0.4000, 0.6000]]]])
    """
    return log_p.logsumexp(1, keepdim=True) - math.log(log_p.shape[1])


def align_columns(log_p: Tensor, keep: Sequence[int], prefix: int, grid_from: Grid, grid_to: Grid) -> Tensor:
    """Key columns of one model for another: (..., prefix + P_from) -> (..., len(keep) + P_to).

    Prefix columns that the other model lacks are dropped and the row is renormalised over what is left (exactly, in
    logarithms: a row may spend all but 1e-30 on registers); then each patch's attention is shared out by area over
    the new grid. Kept columns come first, in the order of `keep`.

    Args:
        log_p: (..., N) log-probabilities over the columns.
        keep: prefix columns to keep, by index.
        prefix: number of prefix columns.
        grid_from, grid_to: (rows, columns) of the patches, now and wanted.

    Raises:
        ValueError: when the columns are not prefix + grid, or `keep` is not among the prefix.

    >>> align_columns(torch.tensor([0.5, 0.2, 0.1, 0.2]).log(), (0,), 2, (1, 2), (1, 1)).exp()  # .5 : .1 + .2
    tensor([0.6250, 0.3750])
    """
    check_tokens(log_p.shape[-1], keep, prefix, grid_from)
    kept = precise(log_p)
    if tuple(keep) != tuple(range(prefix)):
        kept = torch.cat([*(kept[..., i : i + 1] for i in keep), kept[..., prefix:]], dim=-1)
        kept = F.log_softmax(kept, dim=-1)
    if tuple(grid_from) == tuple(grid_to):
        return kept
    p = kept.exp()
    return _log(torch.cat([p[..., : len(keep)], redistribute(p[..., len(keep) :], grid_from, grid_to)], dim=-1))


def align_rows(log_p: Tensor, keep: Sequence[int], prefix: int, grid_from: Grid, grid_to: Grid) -> Tensor:
    """Query rows of one model for another: (..., prefix + P_from, N) -> (..., len(keep) + P_to, N).

    Prefix rows are kept by index, patch rows averaged by area: convex combinations, so that each still sums to 1.
    Arguments as in `align_columns`. For the class row alone (`rows="cls"`) there is nothing to align.

    Raises:
        ValueError: when the rows are not prefix + grid, or `keep` is not among the prefix.

    >>> align_rows(torch.tensor([[0.5, 0.5], [0.1, 0.9], [0.3, 0.7]]).log(), (0,), 1, (1, 2), (1, 1)).exp()
    tensor([[0.5000, 0.5000],
            [0.2000, 0.8000]])
    """
    if tuple(grid_from) != tuple(grid_to):
        return _log(align_tokens(log_p.exp(), keep, prefix, grid_from, grid_to))
    if tuple(keep) != tuple(range(prefix)):
        return align_tokens(log_p, keep, prefix, grid_from, grid_to)
    check_tokens(log_p.shape[-2], keep, prefix, grid_from)
    return precise(log_p)


def row_divergence(log_student: Tensor, log_teacher: Tensor, distance: Literal["kl", "mse"] = "kl") -> Tensor:
    """How far apart the attention rows are, mean over rows and heads, (B, H, R, N) log-probabilities -> (B,), >= 0.

    Args:
        log_student, log_teacher: of one shape.
        distance: "kl" KL(A_T || A_S) of each row, in nats; "mse" the mean over the columns of (A_S - A_T)^2, at most
            2 / N, so its weight must be of the order of N to be felt.

    Raises:
        ValueError: for an unknown distance, or shapes that differ.

    >>> one, other = torch.tensor([[[[0.25, 0.75]]]]).log(), torch.tensor([[[[0.5, 0.5]]]]).log()
    >>> row_divergence(one, other)  # ln(2 / sqrt 3)
    tensor([0.1438])
    >>> row_divergence(one, other, "mse")
    tensor([0.0625])
    """
    if distance not in ("kl", "mse"):
        raise ValueError(f"distance is {distance!r}; expected 'kl' or 'mse'.")
    if log_student.shape != log_teacher.shape:
        raise ValueError(
            f"attentions of shape {tuple(log_student.shape)} and {tuple(log_teacher.shape)} cannot be compared; "
            "bring heads (mean_heads, relation_heads), columns and rows (align_columns, align_rows) together first."
        )
    if distance == "kl":
        return kl(log_teacher, log_student).mean((-2, -1))
    return (log_student.exp() - log_teacher.exp()).square().mean((-3, -2, -1))


def relation_heads(x: Tensor, heads: int) -> Tensor:
    """Queries, keys or values in another number of heads: (B, H, N, d) -> (B, heads, N, H d / heads).

    The heads are concatenated and split again, so models of any head counts get a common one (MiniLMv2).

    Raises:
        ValueError: when `heads` does not divide the width H d, with those that do.

    >>> relation_heads(torch.arange(4.0).reshape(1, 2, 1, 2), 1)
    tensor([[[[0., 1., 2., 3.]]]])
    """
    width = x.shape[1] * x.shape[3]
    check_relation_heads(heads, width, width)
    if heads == x.shape[1]:
        return x
    return x.transpose(1, 2).flatten(2).unflatten(2, (heads, width // heads)).transpose(1, 2)


def default_relation_heads(student_heads: int, student_width: int, teacher_width: int) -> int:
    """The largest number of heads, not above the student's, that divides both widths.

    >>> default_relation_heads(3, 192, 128)  # 3 does not divide 128
    2
    """
    return max(n for n in _common_divisors(student_width, teacher_width) if n <= max(student_heads, 1))


def check_relation_heads(heads: int, student_width: int, teacher_width: int) -> None:
    """Raises ValueError unless `heads` divides both widths, naming the numbers that do."""
    valid = _common_divisors(student_width, teacher_width)
    if heads not in valid:
        widths = f"{student_width}" if student_width == teacher_width else f"{student_width} and {teacher_width}"
        raise ValueError(f"{heads} relation heads do not divide the width {widths}; expected one of {valid}.")


def relation(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """MiniLMv2's relation loss for queries, or keys, or values: KL between token-by-token relations, (B,), nats, >= 0.

    Per relation head, A = softmax_rows(X X' / sqrt d) with d the head's own width; the mean over heads and rows of
    KL(A_T || A_S).

    Args:
        student: (B, H_S, N, d_S) one of query, key, value.
        teacher: (B, H_T, N, d_T) the same of the teacher, at the student's tokens: `resample.align_tokens` first.
        heads: number of relation heads; must divide both widths.

    Cost: O(B N^2 (D_S + D_T)), and B heads N^2 numbers kept for the backward pass.

    Raises:
        ValueError: when `heads` does not divide a width (the valid ones are named), or the tokens differ.

    Source: Wang et al. 2021, "MiniLMv2", arXiv 2012.15828 [paper: the abstract; review: heads and row means]. Bringing
    the teacher's tokens to another grid is ours.

    >>> x = torch.tensor([[[[0.0], [1.0]]]])
    >>> relation(x, 0 * x, 1)  # teacher rows (1/2, 1/2); the student's 2nd is softmax(0, 1)
    tensor([0.0601])
    """
    check_relation_heads(heads, student.shape[1] * student.shape[3], teacher.shape[1] * teacher.shape[3])
    logs = []
    for x in (relation_heads(x, heads) for x in (student, teacher)):
        logs.append(attention_rows(x, x, x.shape[-1] ** -0.5, rows="all"))
    return row_divergence(logs[0], logs[1])


def _common_divisors(one: int, other: int) -> list[int]:
    common = math.gcd(one, other)
    return [n for n in range(1, common + 1) if common % n == 0]


def _log(p: Tensor) -> Tensor:
    # A probability that underflowed to 0 would be -inf, and nan in a divergence.
    return p.clamp(min=torch.finfo(p.dtype).tiny).log()
