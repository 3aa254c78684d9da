"""Metrics as modules of `evaluate` that are here, and need not be fetched from the Hub."""

from __future__ import annotations

from typing import Any

import evaluate
import numpy as np
from datasets import Features, Sequence, Value
from sklearn.metrics import accuracy_score

_SKLEARN = """@article{pedregosa2011scikit,
  title={Scikit-learn: Machine Learning in {P}ython},
  author={Pedregosa, F. and Varoquaux, G. and Gramfort, A. and Michel, V. and Thirion, B. and Grisel, O. and others},
  journal={Journal of Machine Learning Research},
  volume={12},
  pages={2825--2830},
  year={2011}
}"""

_INPUTS = """
Args:
    predictions: logits (n, K).
    references: labels (n,); an image of label -100 is left out.
"""


class Accuracy(evaluate.Metric):
    """Share of the labelled images whose largest logit is that of their class, in [0, 1].

    >>> Accuracy().compute(predictions=[[2.0, 1.0], [0.0, 3.0], [5.0, 0.0]], references=[0, 0, -100])
    {'accuracy': 0.5}
    """

    def __init__(self, *args: Any, **kwargs: Any):
        # In memory unless several processes share their parts by file, which is what `evaluate` has its cache for.
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of the labelled images whose largest logit is that of their class.",
            citation=_SKLEARN,
            inputs_description=_INPUTS,
            features=Features({"predictions": Sequence(Value("float32")), "references": Value("int64")}),
            reference_urls=["https://scikit-learn.org/stable/modules/generated/sklearn.metrics.accuracy_score.html"],
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        logits, labels = labelled(predictions, references)
        return {"accuracy": float(accuracy_score(labels, logits.argmax(1)))}


METRICS: dict[str, type[evaluate.Metric]] = {"accuracy": Accuracy}


def labelled(predictions: Any, references: Any) -> tuple[np.ndarray, np.ndarray]:
    """(logits, labels) of the images that have a label.

    Raises:
        ValueError: when none has.
    """
    logits, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references)
    keep = labels != -100
    if not keep.any():
        raise ValueError(f"none of the {len(labels)} images has a label (all are -100); expected at least one.")
    return logits[keep], labels[keep]


def scores(logits: Any, labels: Any) -> dict[str, float]:
    """The metrics that every run reports, from logits (n, K) and labels (n,)."""
    return METRICS["accuracy"]().compute(predictions=logits, references=labels)


def compute_metrics(prediction: Any) -> dict[str, float]:
    """`scores` for Trainer's `compute_metrics`. Of several outputs (DeiT with two heads) the first is the logits."""
    outputs = prediction.predictions
    return scores(outputs[0] if isinstance(outputs, tuple | list) else outputs, prediction.label_ids)
