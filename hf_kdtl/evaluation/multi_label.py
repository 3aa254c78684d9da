"""Metrics of models with several labels an image: labels (n, K) of 1, 0 and -100 (not known)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from transformers.utils import logging

from hf_kdtl.evaluation import citations
from hf_kdtl.evaluation.streaming import StreamingMetric

logger = logging.get_logger(__name__)
SEVERAL = {"predictions": "logits", "references": "multi_labels"}


class MAP(StreamingMetric):
    """Mean over the classes of the average precision, in [0, 1]: how well its logit ranks the images that have it.

    AP = sum_n (R_n - R_(n-1)) P_n over the thresholds, as scikit-learn's average_precision_score. Images where a class
    is not known (-100) do not count for it. A class that no image has, has no AP: it is left out, with a warning.

    Cost: unlike the other metrics it keeps every logit.

    >>> MAP().compute(predictions=[[2.0, -1.0], [1.0, 3.0]], references=[[1, 0], [0, 1]])
    {'map': 1.0}
    """

    inputs: ClassVar = SEVERAL
    citation_text = citations.SKLEARN

    def sums(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        return {"logits": logits.tolist(), "labels": labels.tolist()}  # lists, of which a sum is the longer list

    def value(self, sums: dict[str, Any], count: int) -> float:
        from sklearn.metrics import average_precision_score

        found, logits, labels = [], np.array(sums["logits"]), np.array(sums["labels"])
        for scores, own in zip(logits.T, labels.T, strict=True):
            if (own == 1).any():
                found.append(average_precision_score(own[own != -100], scores[own != -100]))
        return _mean("map", found, logits.shape[1])


class MicroF1(StreamingMetric):
    """2 TP / (2 TP + FP + FN) over all known answers of all classes, in [0, 1]; a class is there where p > 0.5.

    0 where there is nothing to find and nothing was found.
    """

    inputs: ClassVar = SEVERAL
    citation_text = citations.SKLEARN

    def sums(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """True positives, and false answers of either kind, by class."""
        right = labels == 1
        return {"right": ((logits > 0) & right).sum(0), "wrong": ((labels != -100) & ((logits > 0) != right)).sum(0)}

    def value(self, sums: dict[str, Any], count: int) -> float:
        right, wrong = sums["right"].sum(), sums["wrong"].sum()
        return float(2 * right / (2 * right + wrong)) if right + wrong else 0.0


class MacroF1(MicroF1):
    """Mean over the classes of 2 TP / (2 TP + FP + FN), in [0, 1]; a class is there where p > 0.5.

    A class that no image has and that was never answered is left out of the mean, with a warning.
    """

    def value(self, sums: dict[str, Any], count: int) -> float:
        right, wrong = sums["right"], sums["wrong"]
        seen = right + wrong > 0
        return _mean("macro_f1", list(2 * right[seen] / (2 * right[seen] + wrong[seen])), len(right))


def _mean(name: str, found: list[Any], classes: int) -> float:
    if len(found) < classes:
        logger.warning_once(f"{name}: {classes - len(found)} of {classes} classes are in no image; the mean is over "
                            "the others.")  # fmt: skip
    return float(np.mean(found)) if found else 0.0
