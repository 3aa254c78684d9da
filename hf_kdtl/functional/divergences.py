"""Divergences between the class outputs of a student and a teacher, one value per image, in nats.

Every function takes logits of shape (B, K), K >= 2, in any floating dtype. Half precisions are computed in float32,
float64 stays float64. Nothing is detached here: whoever calls decides where gradients go.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kdtl.functional.resample import precise


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """z / tau in at least float32; at temperatures of 32 and more in float64, where the device has it.

    A divergence of such is of the order 1 / tau^2, of which float32 would round away a thousandth at tau = 100, and
    all at 10,000.
    """
    z = precise(logits)
    return (z.double() if temperature >= 32 and z.device.type != "mps" else z) / temperature


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(z / tau), (B, K) -> (B, K), at least float32; see `tempered`.

    Log-probabilities, not probabilities, because log(0) of an underflowed softmax is where naive code turns nan.
    """
    return F.log_softmax(tempered(logits, temperature), dim=-1)


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
    exact = precise(logits)
    centred = exact - exact.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    constant = variance == 0
    return torch.where(constant, 0.0, centred * torch.rsqrt(torch.where(constant, 1.0, variance)))


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-sum_k t_k log softmax(z)_k, (B, K) logits -> (B,), in [0, inf) nats.

    `labels`: class indices (B,), or target distributions (B, K). An unlabelled image (index -100, or a row of -100)
    counts 0, in value and gradient. With `label_smoothing` e the target is (1 - e) t + e / K.

    Raises:
        ValueError: for labels of another shape or type. Their values are checked by `check_labels`.
    """
    if problem := _form_problem(labels, logits.shape[-1]):
        raise ValueError(problem)
    exact = precise(logits)
    if labels.ndim == 1:
        return F.cross_entropy(exact, labels, reduction="none", label_smoothing=label_smoothing)
    known = labelled(labels)
    targets = torch.where(known[:, None], labels, 0.0).to(exact.dtype)
    losses = F.cross_entropy(exact, targets, reduction="none", label_smoothing=label_smoothing)
    return torch.where(known, losses, 0.0)


def labelled(labels: Tensor) -> Tensor:
    """Which images carry a label, (B,) bool: index not -100, or a row of (B, K) that is not all -100."""
    return labels != -100 if labels.ndim == 1 else (labels != -100).any(-1)


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that are neither class indices (B,) nor distributions (B, K); -100 is an unlabelled image.

    Cost: it reads the values, so on an accelerator it waits for the device.

    Raises:
        ValueError: saying what the labels look like, and what to do about it.

    >>> check_labels(torch.tensor([1, 3]), 3)
    Traceback (most recent call last):
    ValueError: the labels go from 1 to 3 and there are 3 classes; expected indices from 0 to 2, and -100 for an \
unlabelled image. If they count from 1, subtract 1.
    """
    problem = _form_problem(labels, classes)
    if not problem and labels.numel():
        problem = _index_problem(labels, classes) if labels.ndim == 1 else _row_problem(labels)
    if problem:
        raise ValueError(problem)


def _form_problem(labels: Tensor, classes: int) -> str:
    shape = tuple(labels.shape)
    if labels.ndim == 1 and (labels.is_floating_point() or labels.is_complex()):
        return (
            f"the labels are {labels.dtype} of shape {shape}; expected class indices as int64 (a column of floats: "
            f"int(label)), or distributions of shape ({len(labels)}, {classes})."
        )
    if labels.ndim == 1 or (labels.ndim == 2 and shape[1] == classes):
        return ""
    more = " Drop the second axis: label[0], or labels.squeeze(1)." if labels.ndim == 2 and shape[1] == 1 else ""
    return (
        f"the labels have the shape {shape} and there are {classes} classes; expected class indices (B,), or "
        f"distributions (B, {classes}).{more}"
    )


def _index_problem(labels: Tensor, classes: int) -> str:
    low, high = (int(v) for v in labels.aminmax())
    if low < 0:
        known = labels[labels != -100]
        low, high = (int(v) for v in known.aminmax()) if known.numel() else (0, 0)
    if low >= 0 and high < classes:
        return ""
    hint = " If they count from 1, subtract 1." if low >= 1 and high == classes else ""
    return (
        f"the labels go from {low} to {high} and there are {classes} classes; expected indices from 0 to "
        f"{classes - 1}, and -100 for an unlabelled image.{hint}"
    )


def _row_problem(labels: Tensor) -> str:
    rows = labels[labelled(labels)].double()
    sums = rows.sum(-1)
    # Half precisions round a sum of many classes by more.
    tolerance = 1e-3 if labels.dtype in (torch.float32, torch.float64) else 2e-2
    wrong = ~((rows >= 0).all(-1) & ((sums - 1).abs() <= tolerance))
    if not wrong.any():
        return ""
    row = rows[wrong][0]
    if bool(((row == 0) | (row == 1)).all()):
        cure = (
            "For several classes an image set student.config.problem_type = 'multi_label_classification'. A row of an "
            "unlabelled image is all -100."
        )
    elif bool((row >= 0).all()) and abs(float(row.sum()) - 100) < 1:
        cure = "These are percentages: divide them by 100."
    else:
        cure = "Scores become a distribution by softmax; for independent probabilities of each class set "
        cure += "student.config.problem_type = 'multi_label_classification'."
    return (
        f"{int(wrong.sum())} of {len(labels)} rows of labels are no distributions over the classes: one sums to "
        f"{float(row.sum()):.4g}, from {float(row.min()):.4g} to {float(row.max()):.4g}; expected numbers from 0 that "
        f"sum to 1. {cure}"
    )
