"""Parts and correlations of the class outputs of a student and a teacher: DKD and DIST.

Logits of shape (B, K), K >= 2, in any floating dtype. Half precisions are computed in float32, float64 stays float64.
Nothing is detached here: whoever calls decides where gradients go.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kdtl.functional.divergences import kl, labelled, log_probabilities
from hf_kdtl.functional.features import cosine_distance


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The two parts of KL(p_T || p_S), p = softmax(z / tau), y the label: (TCKD, NCKD), each (B,), nats, >= 0.

    TCKD = KL((p_T[y], 1 - p_T[y]) || (p_S[y], 1 - p_S[y])): how sure of the target.
    NCKD = KL(q_T || q_S), q = p over the classes other than y, renormalised: what the rest looks like.
    KL(p_T || p_S) = TCKD + (1 - p_T[y]) NCKD. Both are taken from logits (1 - p as a logsumexp over the other classes,
    q as a softmax without the target's column), so they are finite at logits of +-1e4. With K = 2 NCKD is 0.

    Args:
        student, teacher: (B, K) logits.
        labels: (B,) class indices. An unlabelled image (-100) gives 0 in both, with gradient 0.
        temperature: tau > 0.

    Cost: O(B K).

    Raises:
        ValueError: for labels that are not class indices, or K < 2.

    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", arXiv 2203.08679 [paper: the authors' code].

    >>> one, other = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.5, 0.1, 0.4]]).log()
    >>> decoupled(one, other, torch.tensor([0]))  # .2 ln(.2 / .5) + .8 ln(.8 / .5)
    (tensor([0.]), tensor([0.1927]))
    """
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} name no single target class, and "
            "decoupled_kd splits the classes into the target and the rest; expected class indices (B,). Switch mixup, "
            "CutMix and other soft labels off, or use logit_kd, which needs no labels."
        )
    if student.shape[-1] < 2:
        raise ValueError(f"{student.shape[-1]} class has no target and rest; expected logits of at least 2 classes.")
    known = labelled(labels)
    target = torch.where(known, labels, 0)[:, None]
    (binary_s, rest_s), (binary_t, rest_t) = (_split(z, target, temperature) for z in (student, teacher))
    return torch.where(known, kl(binary_t, binary_s), 0.0), torch.where(known, kl(rest_t, rest_s), 0.0)


def pearson_distance(log_x: Tensor, log_y: Tensor) -> Tensor:
    """1 - corr(x, y) over the last axis, from the logarithms of positive x and y, (..., N) -> (...), in [0, 2].

    The correlation ignores the scale of x and y, so each is divided by its largest entry in logarithms, before the
    exponential: a class whose probabilities are all 1e-50 is compared as well as any other.
    A constant x or y (its entries differ by at most 8 roundings) has no correlation: 0, as for correlation 1, where
    both are constant; 1, as for correlation 0, where only one is; both with gradient 0.

    >>> one, other = torch.tensor([1.0, 2.0, 3.0]).log(), torch.tensor([2.0, 6.0, 4.0]).log()
    >>> pearson_distance(one, other)  # correlation 1/2
    tensor(0.5000)
    """
    return cosine_distance(_centred(log_x), _centred(log_y))


def correlations(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """1 - Pearson correlation of p_S and p_T, p = softmax(z / tau): over classes (B,), over images (K,), in [0, 2].

    The first belongs to an image; the second, for each class over the images, is a statistic of this batch. Constant
    rows and columns as in `pearson_distance`: with one image the second is 0.

    Cost: O(B K).

    Source: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", arXiv 2205.10536 [paper]. The authors'
    code adds 1e-8 to the product of the norms; we add nothing, so rare classes count in full.

    >>> one, other = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log(), torch.tensor([[0.6, 0.4], [0.1, 0.9]]).log()
    >>> images, classes = correlations(one, other)
    >>> images, classes.abs().round(decimals=4)  # the second image is reversed; both classes move the same way
    (tensor([0., 2.]), tensor([0., 0.]))
    """
    log_s, log_t = log_probabilities(student, temperature), log_probabilities(teacher, temperature)
    return pearson_distance(log_s, log_t), pearson_distance(log_s.T, log_t.T)


def _split(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log (p[y], 1 - p[y]), (B, 2), and log of the renormalised rest, (B, K - 1). `target` is (B, 1)."""
    log_p = log_probabilities(logits, temperature)
    others = torch.arange(log_p.shape[-1] - 1, device=log_p.device).expand(len(log_p), -1)
    rest = log_p.gather(1, others + (others >= target))  # every column but the target's
    binary = torch.cat([log_p.gather(1, target), rest.logsumexp(1, keepdim=True)], dim=1)
    return F.log_softmax(binary, dim=1), F.log_softmax(rest, dim=1)


def _centred(log_x: Tensor) -> Tensor:
    """x - mean x, of x scaled to a largest entry of 1; exactly 0 where x is constant."""
    x = (log_x - log_x.detach().amax(-1, keepdim=True)).exp()
    constant = 1 - x.detach().amin(-1, keepdim=True) <= 8 * torch.finfo(x.dtype).eps
    return torch.where(constant, 0.0, x - x.mean(-1, keepdim=True))
