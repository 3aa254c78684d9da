"""Metrics as modules of `evaluate` that are here, and need not be fetched from the Hub.

They take logits, not classes. Probabilities are their softmax in float64, at temperature 1; of several equal logits
the first counts as the largest. An image of label -100 is left out of every metric that takes labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import evaluate
import numpy as np
from transformers.utils import logging

from hf_kdtl.evaluation import citations
from hf_kdtl.evaluation.multi_label import MAP, SEVERAL, MacroF1, MicroF1
from hf_kdtl.evaluation.streaming import StreamingMetric, exact_sum

logger = logging.get_logger(__name__)

BINS = 15


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    from scipy.special import log_softmax

    return log_softmax(logits, axis=1)


class Accuracy(StreamingMetric):
    """Share of the labelled images whose largest logit is that of their class, in [0, 1].

    >>> Accuracy().compute(predictions=[[2.0, 1.0], [0.0, 3.0], [5.0, 0.0]], references=[0, 0, -100])
    {'accuracy': 0.5}
    """

    citation_text = citations.SKLEARN

    def sums(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        from sklearn.metrics import accuracy_score

        return {"sum": int(accuracy_score(labels, logits.argmax(1), normalize=False))}


class Top5(StreamingMetric):
    """Share of the labelled images whose class has one of the five largest logits, in [0, 1].

    Of equal logits the first ones count as the larger (scikit-learn takes the last ones).

    Raises:
        ValueError: for fewer than 5 classes, in addition to what all metrics refuse.
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
        return {"sum": exact_sum(-_log_softmax(logits)[np.arange(len(labels)), labels])}


class Brier(StreamingMetric):
    """Brier score, mean over labelled images of sum_k (p_k - [k = y])^2, in [0, 2].

    The sum over the classes and not half of it, as some print for two classes.
    """

    citation_text = citations.BRIER

    def sums(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        off = np.exp(_log_softmax(logits))
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
        right, confidence = logits.argmax(1) == labels, np.exp(_log_softmax(logits).max(1))
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
        from sklearn.metrics import confusion_matrix

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
        log_p, log_q = _log_softmax(teacher), _log_softmax(student)
        return {"sum": exact_sum((np.exp(log_p) * (log_p - log_q)).sum(1))}


class AgreementTeacherWrong(StreamingMetric):
    """Of the labelled images that the teacher gets wrong, the share that the student takes for the same class.

    In [0, 1]: how far the student copies mistakes; nan where the teacher makes none. The teacher's logits are the
    references, in the student's class order; `labels` are passed as well.
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


@dataclass(frozen=True)
class MetricRecord:
    """What results, tables, reports and cards need to know of a metric.

    Args:
        metric: the class; its first docstring paragraph is the long description.
        inputs: {argument of `compute`: what it is of an image: "logits" (of the evaluated model), "labels" (one an
            image) or "multi_labels", "teacher" or "baseline" (logits of those models)}. A run has the metric where it
            has all of these.
        higher_is_better: None where neither direction is better.
        unit: "%" for a share, which is stored in [0, 1] and printed in percent; "nats"; "" for a plain number; None
            for a metric that is not one number and has no row in a table.
        description: what a reader of a table has to know beyond the name; "" for nothing.
        minimum_classes: with fewer the metric is left out.
    """

    metric: type[StreamingMetric]
    inputs: Mapping[str, str]
    higher_is_better: bool | None
    unit: str | None
    description: str = ""
    minimum_classes: int = 2

    def compute(self, available: Mapping[str, Any]) -> Any:
        """The value, from {"logits": ..., "labels": ..., ...}."""
        metric = self.metric()
        found = metric.compute(**{name: available[kind] for name, kind in self.inputs.items()})
        return None if found is None else found[metric.name]


_OWN = {"predictions": "logits", "references": "labels"}
_PAIR = {"predictions": "logits", "references": "teacher"}
_REPLACED = {"predictions": "logits", "labels": "labels", "baseline": "baseline"}
RECORDS: dict[str, MetricRecord] = {
    "accuracy": MetricRecord(Accuracy, _OWN, True, "%"),
    "top5": MetricRecord(Top5, _OWN, True, "%", minimum_classes=6),
    "mean_class_accuracy": MetricRecord(MeanClassAccuracy, _OWN, True, "%", "every class has the same weight"),
    "nll": MetricRecord(NLL, _OWN, False, "nats", "negative log-likelihood of the labels"),
    "brier": MetricRecord(Brier, _OWN, False, "", "squared error of the probabilities, in [0, 2]"),
    "ece": MetricRecord(ECE, _OWN, False, "%", "expected calibration error, 15 bins"),
    "confusion": MetricRecord(Confusion, _OWN, None, None),
    "agreement": MetricRecord(Agreement, _PAIR, True, "%", "same prediction as the teacher, right or wrong"),
    "teacher_kl": MetricRecord(TeacherKL, _PAIR, False, "nats", "KL divergence from the teacher's probabilities"),
    "agreement_teacher_wrong": MetricRecord(
        AgreementTeacherWrong, _PAIR | {"labels": "labels"}, None, "%", "share of the teacher's errors that are copied"
    ),
    "negative_flip_rate": MetricRecord(NegativeFlipRate, _REPLACED, False, "%", "correct in the baseline, wrong here"),
    "map": MetricRecord(MAP, SEVERAL, True, "%", "mean average precision over the classes", 1),
    "micro_f1": MetricRecord(MicroF1, SEVERAL, True, "%", "F1 of all answers together, at probability 0.5", 1),
    "macro_f1": MetricRecord(MacroF1, SEVERAL, True, "%", "mean over the classes of their F1", 1),
}
"""A new metric is its class and one line here."""

METRICS: dict[str, type[evaluate.Metric]] = {name: record.metric for name, record in RECORDS.items()}


def paired_scores(logits: Any, labels: Any, teacher: Any = None, baseline: Any = None) -> dict[str, float]:
    """Every metric of RECORDS that is one number and whose inputs are given.

    From logits (n, K) and labels (n,) alone: accuracy, top5 (only of more than 5 classes), mean_class_accuracy, nll,
    brier and ece; from labels (n, K) of several labels an image map, micro_f1 and macro_f1.

    `teacher` and `baseline` are logits (n, K) of other models on the same images, in the same class order.
    """
    given = {"logits": logits, "labels": labels, "teacher": teacher, "baseline": baseline}
    given = {"logits": logits, "multi_labels": labels} if np.ndim(labels) == 2 else given
    available = {kind: value for kind, value in given.items() if value is not None}
    classes = np.shape(logits)[-1]
    return {
        name: record.compute(available)
        for name, record in RECORDS.items()
        if record.unit is not None and classes >= record.minimum_classes and {*record.inputs.values()} <= {*available}
    }


def compute_metrics(prediction: Any) -> dict[str, float]:
    """`paired_scores` for Trainer's `compute_metrics`. Of several outputs (DeiT has two heads) the first is used.
    Raises ValueError for labels that are distributions."""
    outputs, labels = prediction.predictions, prediction.label_ids
    if isinstance(labels, list):  # eval_do_concat_batches=False
        outputs, labels = np.concatenate([_first(batch) for batch in outputs]), np.concatenate(labels)
    if np.ndim(labels) == 2 and not np.isin(labels, (0, 1, -100)).all():
        raise ValueError("labels are distributions, and these metrics go by classes: evaluate on class indices.")
    return paired_scores(_first(outputs), labels)


def _first(outputs: Any) -> Any:
    return outputs[0] if isinstance(outputs, tuple | list) else outputs
