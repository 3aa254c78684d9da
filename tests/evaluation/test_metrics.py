import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from hf_kdtl.evaluation import METRICS, compute_metrics

LOGITS = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 5.0], [9.0, 0.0, 0.0]])
LABELS = np.array([0, 2, 2, -100])


@pytest.mark.parametrize("name", list(METRICS))
def test_every_metric_is_a_module_of_evaluate(name):
    metric = METRICS[name]()
    assert isinstance(metric, evaluate.Metric)
    assert metric.citation.startswith("@") and set(metric.features) == {"predictions", "references"}


def test_accuracy_by_hand():
    assert METRICS["accuracy"]().compute(predictions=LOGITS, references=LABELS) == {"accuracy": 2 / 3}


def test_accuracy_by_batches():
    metric = METRICS["accuracy"]()
    for rows in (slice(0, 2), slice(2, 4)):
        metric.add_batch(predictions=LOGITS[rows], references=LABELS[rows])
    assert metric.compute() == {"accuracy": 2 / 3}


def test_as_trainer_calls_it():
    assert compute_metrics(EvalPrediction(LOGITS, LABELS)) == {"accuracy": 2 / 3}
    assert compute_metrics(EvalPrediction((LOGITS, LOGITS[:, ::-1]), LABELS)) == {"accuracy": 2 / 3}


def test_no_label_at_all():
    with pytest.raises(ValueError, match="none of the 4 images has a label"):
        compute_metrics(EvalPrediction(LOGITS, np.full(4, -100)))
