"""Several labels an image: each class is a question of its own, answered by the sigmoid of its logit.

Labels are (B, K): 1 the class is there, 0 it is not, -100 not known; a row of -100 is an unlabelled image. Values are
per image, a mean over its classes, in nats. Half precisions are computed in float32, float64 stays float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kdtl.functional.divergences import tempered
from hf_kdtl.functional.resample import precise


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """mean over the known classes of -[y log p + (1 - y) log(1 - p)], p = sigmoid(z), (B, K) -> (B,), in [0, inf).

    An image without any known class counts 0, in value and gradient.

    >>> binary_cross_entropy(torch.zeros(2, 3), torch.tensor([[1.0, 0.0, -100.0], [-100.0, -100.0, -100.0]]))
    tensor([0.6931, 0.0000])
    """
    exact = precise(logits)
    known = labels != -100
    targets = torch.where(known, labels, 0).to(exact.dtype)
    losses = F.binary_cross_entropy_with_logits(exact, targets, reduction="none")
    return torch.where(known, losses, 0.0).sum(-1) / known.sum(-1).clamp(min=1)


def bernoulli_log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log of (p, 1 - p), p = sigmoid(z / tau), of each class, (B, K) -> (B, K, 2), at least float32.

    A last axis of two, so that divergences of distributions are those of each class: mean(-1) of what they give.

    >>> bernoulli_log_probabilities(torch.zeros(1, 1)).exp()
    tensor([[[0.5000, 0.5000]]])
    """
    exact = tempered(logits, temperature)
    return torch.stack([F.logsigmoid(exact), F.logsigmoid(-exact)], dim=-1)


def check_multi_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that are not (B, K) of 0, 1, -100, or probabilities in between.

    Cost: it reads the values, so on an accelerator it waits for the device.

    Raises:
        ValueError: saying what the labels look like, and what to do about it.

    >>> check_multi_labels(torch.tensor([0, 2]), 3)
    Traceback (most recent call last):
    ValueError: the labels have the shape (2,), and the student has several labels an image (problem_type \
'multi_label_classification'): expected (B, 3) with 1 where the class is there, 0 where it is not, -100 where nobody \
knows. For one class an image set problem_type to 'single_label_classification'.
    """
    if labels.ndim != 2 or labels.shape[1] != classes:
        raise ValueError(
            f"the labels have the shape {tuple(labels.shape)}, and the student has several labels an image "
            f"(problem_type 'multi_label_classification'): expected (B, {classes}) with 1 where the class is there, 0 "
            "where it is not, -100 where nobody knows. For one class an image set problem_type to "
            "'single_label_classification'."
        )
    wrong = labels[~(((labels >= 0) & (labels <= 1)) | (labels == -100))]
    if wrong.numel():
        raise ValueError(
            f"the labels hold {float(wrong[0]):.4g}; expected 1 where the class is there, 0 where it is not, -100 "
            "where nobody knows."
        )
