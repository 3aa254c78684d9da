"""Metrics as modules of `evaluate` that are here, and need not be fetched from the Hub.

They take logits, not classes. Probabilities are their softmax in float64, at temperature 1; of several equal logits
the first counts as the largest. An image of label -100 is left out of every metric that takes labels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import evaluate
import numpy as np
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, confusion_matrix
from transformers.utils import logging

from hf_kdtl.evaluation import citations
from hf_kdtl.evaluation.streaming import StreamingMetric, exact_sum

logger = logging.get_logger(__name__)

BINS = 15


class Accuracy(StreamingMetric):
    """Share of the labelled images whose largest logit is that of their class, in [0, 1].

    >>> Accuracy().compute(predictions=[[2.0, 1.0], [0.0, 3.0], [5.0, 0.0]], references=[0, 0, -100])
    {'accuracy': 0.5}
    """

    citation_text = citations.SKLEARN

    def sums(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        return {"sum": int(accuracy_score(labels, logits.argmax(1), normalize=False))}


class Top5(StreamingMetric):
    """Share of the labelled images whose class has one of the five largest logits, in [0, 1].

    Of equal logits the first ones count as the larger (scikit-learn takes the last ones).

    Raises:
        ValueError: for fewer than 5 classes, beside what all metrics refuse.
    """

    citation_text = citations.SKLEARN

    def sums(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        if (classes := logits.shape[1]) < 5:
            raise ValueError(f"top5: found {classes} classes, expected 5 or more; use accuracy.")
        own = logits[np.arange(len(labels)), labels][:, None]
        before = (logits > own) | ((logits == own) & (np.arange(classes) < labels[:, None]))
        return {"sum": int((before.sum(1) < 5).sum())}


class MeanClassAccuracy(StreamingMetric):
    """Mean over the classes of the accuracy on the images of that class, in [0, 1] (balanced accuracy).

    A class without images has no accuracy: it is left out of the mean, and a warning says how many are.
    """

    citation_text = citations.SKLEARN

    def sums(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        right, classes = logits.argmax(1) == labels, logits.shape[1]
        return {
            "right": np.bincount(labels[right], minlength=classes),
            "images": np.bincount(labels, minlength=classes),
        }

    def value(self, sums: dict[str, Any], count: int) -> float:
        seen = sums["images"] > 0
        if not seen.all():
            missing = f"{(~seen).sum()} of {len(seen)} classes have no image"
            logger.warning_once(f"mean_class_accuracy: {missing}; the mean is over the others.")
        return float((sums["right"][seen] / sums["images"][seen]).mean())


class NLL(StreamingMetric):
    """Negative log-likelihood of the labels, mean over labelled images of -log p_y, in [0, inf) nats.

    The cross-entropy without label smoothing, whatever the run was trained by.
    """

    citation_text = citations.SKLEARN

    def sums(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        return {"sum": exact_sum(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels])}


class Brier(StreamingMetric):
    """Brier score, mean over labelled images of sum_k (p_k - [k = y])^2, in [0, 2].

    The sum over the classes and not half of it, as some print for two classes.
    """

    citation_text = citations.BRIER

    def sums(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        off = np.exp(log_softmax(logits, axis=1))
        off[np.arange(len(labels)), labels] -= 1
        return {"sum": exact_sum((off**2).sum(1))}


class ECE(StreamingMetric):
    """Expected calibration error of the largest probability, sum_b (n_b / n) |accuracy_b - confidence_b|, in [0, 1].

    An image's confidence is max_k p_k. 15 bins of equal width: bin b = 0 .. 14 holds the confidences in
    (b / 15, (b + 1) / 15]: closed above, so that 1 is in the last one; 0 would be in the first. accuracy_b and
    confidence_b are means over the n_b images of bin b; an empty bin counts nothing. Also a perfectly calibrated model
    has a positive value on a finite number of images: compare models on the same images only.
    """

    citation_text = citations.ECE

    def sums(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        right, confidence = logits.argmax(1) == labels, np.exp(log_softmax(logits, axis=1).max(1))
        bins = np.searchsorted(np.arange(1, BINS) / BINS, confidence, side="left")
        return {
            "images": np.bincount(bins, minlength=BINS),
            "right": np.bincount(bins[right], minlength=BINS),
            "confidence": np.array([exact_sum(confidence[bins == b]) for b in range(BINS)], dtype=object),
        }

    def value(self, sums: dict[str, Any], count: int) -> float:
        return float(sum(abs(int(r) - c) for r, c in zip(sums["right"], sums["confidence"], strict=True)) / count)


class Confusion(StreamingMetric):
    """Number of labelled images of class i (row) whose largest logit is that of class j (column), (K, K)."""

    citation_text = citations.SKLEARN

    def sums(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        return {"images": confusion_matrix(labels, logits.argmax(1), labels=np.arange(logits.shape[1]))}

    def value(self, sums: dict[str, Any], count: int) -> np.ndarray:
        return sums["images"]


class Agreement(StreamingMetric):
    """Share of the images on which student and teacher have the same largest logit, in [0, 1].

    The teacher's logits are the references, in the student's class order.
    """

    inputs: ClassVar = {"predictions": "logits", "references": "logits"}
    citation_text = citations.FIDELITY

    def sums(self, student: np.ndarray, teacher: np.ndarray) -> dict[str, Any]:
        return {"sum": int((student.argmax(1) == teacher.argmax(1)).sum())}


class TeacherKL(StreamingMetric):
    """Mean over images of KL(p_T || p_S) = sum_k p_T,k (log p_T,k - log p_S,k), in [0, inf) nats.

    The direction of `logit_kd`, at temperature 1. The teacher's logits are the references, in the student's class
    order.
    """

    inputs: ClassVar = {"predictions": "logits", "references": "logits"}
    citation_text = citations.FIDELITY

    def sums(self, student: np.ndarray, teacher: np.ndarray) -> dict[str, Any]:
        log_p, log_q = log_softmax(teacher, axis=1), log_softmax(student, axis=1)
        return {"sum": exact_sum((np.exp(log_p) * (log_p - log_q)).sum(1))}


class AgreementTeacherWrong(StreamingMetric):
    """Of the labelled images that the teacher gets wrong, the share that the student takes for the same class.

    In [0, 1]: how far the student copies mistakes; nan where the teacher makes none. The teacher's logits are the
    references, in the student's class order; `labels` are given beside.
    """

    inputs: ClassVar = {"predictions": "logits", "references": "logits", "labels": "labels"}
    citation_text = citations.FIDELITY

    def sums(self, student: np.ndarray, teacher: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        wrong, same = teacher.argmax(1) != labels, student.argmax(1) == teacher.argmax(1)
        return {"wrong": int(wrong.sum()), "same": int((wrong & same).sum())}

    def value(self, sums: dict[str, Any], count: int) -> float:
        return sums["same"] / sums["wrong"] if sums["wrong"] else float("nan")


class NegativeFlipRate(StreamingMetric):
    """Share of the labelled images that the baseline gets right and this model gets wrong, in [0, 1].

    Of all labelled images, not of those that the baseline gets right. `baseline` are the logits of the model that this
    one would replace.
    """

    inputs: ClassVar = {"predictions": "logits", "labels": "labels", "baseline": "logits"}
    citation_text = citations.NEGATIVE_FLIPS

    def sums(self, logits: np.ndarray, labels: np.ndarray, baseline: np.ndarray) -> dict[str, Any]:
        return {"sum": int(((baseline.argmax(1) == labels) & (logits.argmax(1) != labels)).sum())}


METRICS: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "top5": Top5,
    "mean_class_accuracy": MeanClassAccuracy,
    "nll": NLL,
    "brier": Brier,
    "ece": ECE,
    "confusion": Confusion,
    "agreement": Agreement,
    "teacher_kl": TeacherKL,
    "agreement_teacher_wrong": AgreementTeacherWrong,
    "negative_flip_rate": NegativeFlipRate,
}


def scores(logits: Any, labels: Any) -> dict[str, float]:
    """The metrics that every run reports, from logits (n, K) and labels (n,).

    accuracy, top5 (only of more than 5 classes), mean_class_accuracy, nll, brier and ece.
    """
    names = ["accuracy", *["top5"] * (np.shape(logits)[-1] > 5), "mean_class_accuracy", "nll", "brier", "ece"]
    return {
        key: value
        for name in names
        for key, value in METRICS[name]().compute(predictions=logits, references=labels).items()
    }


def reliability(logits: Any, labels: Any) -> list[dict[str, Any]]:
    """What `ece` is made of, for a reliability diagram: one entry a bin, from the lowest confidence to the highest.

    Returns:
        {"from", "to", "images", "confidence", "accuracy"}; the last two are means over the bin's images, None where
        there are none.
    """
    metric = ECE()
    metric.add_batch(predictions=logits, references=labels)
    sums = metric.total
    return [
        {"from": b / BINS, "to": (b + 1) / BINS, "images": int(n)}
        | {"confidence": float(c / int(n)) if n else None, "accuracy": int(r) / int(n) if n else None}
        for b, (n, c, r) in enumerate(zip(sums["images"], sums["confidence"], sums["right"], strict=True))
    ]


def compute_metrics(prediction: Any) -> dict[str, float]:
    """`scores` for Trainer's `compute_metrics`. Of several outputs (DeiT with two heads) the first is the logits."""
    outputs = prediction.predictions
    return scores(outputs[0] if isinstance(outputs, tuple | list) else outputs, prediction.label_ids)
