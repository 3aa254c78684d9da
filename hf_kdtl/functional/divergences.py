"""Divergences between the class outputs of a student and a teacher, one value per image, in nats.

Every function takes logits of shape (B, K), K >= 2, in any floating dtype. Half precisions are computed in float32,
float64 stays float64. Nothing is detached here: whoever calls decides where gradients go.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(z / tau), (B, K) -> (B, K), at least float32.

    Log-probabilities, not probabilities, because log(0) of an underflowed softmax is where naive code turns nan.
    """
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return F.log_softmax(precise / temperature, dim=-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_k p_k (log p_k - log q_k), (B, K) log-probabilities -> (B,), in [0, inf) nats.

    >>> kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())  # ln(2 / sqrt 3)
    tensor([0.1438])
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """JSD_beta = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; (B,), in [0, ln 2] nats."""
    weights = torch.log(log_p.new_tensor([beta, 1 - beta]))
    log_m = torch.logaddexp(log_p + weights[0], log_q + weights[1])
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def standardize(logits: Tensor) -> Tensor:
    """(z - mean z) / std z over the classes of an image (population std, 1/K), (B, K) -> (B, K).

    A constant row has no direction: it becomes 0, with gradient 0.
    """
    precise = logits if logits.dtype == torch.float64 else logits.float()
    centred = precise - precise.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    constant = variance == 0
    return torch.where(constant, 0.0, centred * torch.rsqrt(torch.where(constant, 1.0, variance)))


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-sum_k t_k log softmax(z)_k, (B, K) logits -> (B,), in [0, inf) nats.

    `labels`: class indices (B,), or target distributions (B, K). An unlabelled image (index -100, or a row of -100)
    counts 0, in value and gradient. With `label_smoothing` e the target is (1 - e) t + e / K.
    """
    precise = logits if logits.dtype == torch.float64 else logits.float()
    if labels.ndim == 1:
        return F.cross_entropy(precise, labels, reduction="none", label_smoothing=label_smoothing)
    known = labelled(labels)
    targets = torch.where(known[:, None], labels, 0.0).to(precise.dtype)
    losses = F.cross_entropy(precise, targets, reduction="none", label_smoothing=label_smoothing)
    return torch.where(known, losses, 0.0)


def labelled(labels: Tensor) -> Tensor:
    """Which images carry a label, (B,) bool: index not -100, or a row of (B, K) that is not all -100."""
    return labels != -100 if labels.ndim == 1 else (labels != -100).any(-1)
