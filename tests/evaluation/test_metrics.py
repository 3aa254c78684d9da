"""Metrics: by hand, against slow references and scikit-learn; exact sums; what is refused."""

import doctest
import math
import re
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import evaluate
import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from transformers import EvalPrediction

from hf_kdtl.evaluation import METRICS, compute_metrics, metrics, multi_label, streaming
from hf_kdtl.evaluation.metrics import RECORDS, MetricRecord, paired_scores
from hf_kdtl.evaluation.records import Results
from hf_kdtl.evaluation.results import SCHEMA
from hf_kdtl.evaluation.scoring import reliability
from hf_kdtl.hub.card_tables import measured_section
from hf_kdtl.reports.run_report import markdown
from hf_kdtl.reports.score_tables import heading
from tests.reference import metrics as slow

LOGITS = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 1.0, 5.0], [9.0, 0.0, 0.0]])
LABELS = np.array([0, 2, 2, -100])
NAMES = list(METRICS)
THIRD, TWO_THIRDS = math.log(1), math.log(2)  # logits of the probabilities 1/3 and 2/3


def some(name, images=60, classes=7, seed=0, unlabelled=True):
    """Inputs of a metric: rounded logits, so that there are ties, and labels of which some are -100."""
    draw = np.random.default_rng(seed)

    def one(kind):
        if kind == "logits":
            return draw.normal(size=(images, classes), scale=2).round(1)
        if kind == "multi_labels":
            several = draw.integers(0, 2, (images, classes))
            several[draw.random(several.shape) < 0.1] = -100
            return np.where(draw.random((images, 1)) < 0.2, -100, several) if unlabelled else several
        labels = draw.integers(0, classes, images)
        return np.where(draw.random(images) < 0.2, -100, labels) if unlabelled else labels

    return {key: one(kind) for key, kind in METRICS[name].inputs.items()}


def test_every_metric_has_a_record_that_fits_its_class():
    assert {name: record.metric for name, record in RECORDS.items()} == METRICS
    for name, record in RECORDS.items():
        kinds = {argument: what if what.endswith("labels") else "logits" for argument, what in record.inputs.items()}
        assert kinds == METRICS[name].inputs


def value(name, **given):
    return METRICS[name]().compute(**given)[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_is_a_module_of_evaluate(name):
    metric = METRICS[name]()
    assert isinstance(metric, evaluate.Metric) and metric.name == name
    assert metric.citation.startswith("@") and set(metric.features) == set(METRICS[name].inputs)
    assert 20 < len(metric.description) < 200 and metric.description.endswith((".", ").", "K)."))
    assert "predictions: logits (n, K)" in metric.inputs_description


def test_the_inputs_that_others_rely_on():
    two = ["predictions", "references"]
    named = {"agreement_teacher_wrong": [*two, "labels"], "negative_flip_rate": ["predictions", "labels", "baseline"]}
    assert {name: list(kind.inputs) for name, kind in METRICS.items()} == {name: two for name in NAMES} | named


def test_doctests():
    for module in (metrics, multi_label, streaming):
        found = doctest.testmod(module)
        assert found.attempted > 0 and found.failed == 0


@pytest.mark.parametrize("classes", [5, 12])
@pytest.mark.parametrize("name", NAMES)
def test_against_the_slow_reference(name, classes):
    given = some(name, classes=classes)
    expected = getattr(slow, name)(*(array.tolist() for array in given.values()))
    np.testing.assert_allclose(value(name, **given), expected, rtol=1e-12, atol=1e-15)


def test_against_scikit_learn():
    logits = np.random.default_rng(1).normal(size=(200, 9))
    labels = np.random.default_rng(2).integers(0, 9, 200)
    p, every = torch.tensor(logits).softmax(1).numpy(), np.arange(9)
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(labels, p.argmax(1)),
        "top5": sklearn_metrics.top_k_accuracy_score(labels, logits, k=5, labels=every),
        "mean_class_accuracy": sklearn_metrics.balanced_accuracy_score(labels, p.argmax(1)),
        "nll": sklearn_metrics.log_loss(labels, p, labels=every),
        "brier": ((p - np.eye(9)[labels]) ** 2).sum(1).mean(),
    }
    found = paired_scores(logits, labels)
    assert found == pytest.approx(expected | {"ece": found["ece"]}, rel=1e-12)
    assert value("confusion", predictions=logits, references=labels).tolist() == (
        sklearn_metrics.confusion_matrix(labels, p.argmax(1), labels=every).tolist()
    )


def test_several_labels_against_scikit_learn():
    given = some("map", images=80, classes=4, unlabelled=False)
    logits, labels = given["predictions"], np.where(given["references"] == -100, 0, given["references"])
    found = paired_scores(logits, labels)
    expected = {
        "map": sklearn_metrics.average_precision_score(labels, logits, average="macro"),
        "micro_f1": sklearn_metrics.f1_score(labels, logits > 0, average="micro"),
        "macro_f1": sklearn_metrics.f1_score(labels, logits > 0, average="macro"),
    }
    assert found == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="references hold 2; expected 1, 0, or -100"):
        METRICS["map"]().compute(predictions=[[1.0, 2.0]], references=[[2, 0]])


# ---- By hand ----


def test_accuracy_by_hand():
    assert METRICS["accuracy"]().compute(predictions=LOGITS, references=LABELS) == {"accuracy": 2 / 3}


def test_top5_by_hand_and_its_ties():
    falling = np.arange(6.0)[::-1]  # class 0 first, class 5 last
    assert value("top5", predictions=[falling, falling], references=[4, 5]) == 0.5
    # All logits equal: the first five classes are the largest five.
    assert [value("top5", predictions=[[0.0] * 6], references=[y]) for y in range(6)] == [1, 1, 1, 1, 1, 0]


def test_the_first_of_equal_logits_is_the_largest():
    tie = [[1.0, 1.0, 0.0]]
    for name in ("accuracy", "mean_class_accuracy"):
        assert [value(name, predictions=tie, references=[y]) for y in (0, 1)] == [1.0, 0.0]
    assert value("agreement", predictions=tie, references=[[2.0, 1.0, 0.0]]) == 1.0
    assert value("confusion", predictions=tie, references=[1])[1].tolist() == [1, 0, 0]


def test_probabilities_by_hand():
    logits = [[THIRD, TWO_THIRDS], [THIRD, TWO_THIRDS]]  # p = 1/3, 2/3
    assert value("nll", predictions=logits, references=[1, 0]) == pytest.approx((math.log(3) + math.log(1.5)) / 2)
    assert value("brier", predictions=logits, references=[1, 0]) == pytest.approx((2 / 9 + 8 / 9) / 2)
    # Both images in the bin of 2/3, half of them right.
    assert value("ece", predictions=logits, references=[1, 0]) == pytest.approx(2 / 3 - 1 / 2)
    assert value("teacher_kl", predictions=[[0.0, 0.0]], references=logits[:1]) == pytest.approx(
        math.log(2) + math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3
    )
    assert value("teacher_kl", predictions=logits, references=logits) == 0.0


def test_brier_at_its_ends():
    sure = [[1e4, 0.0]]
    assert [value("brier", predictions=sure, references=[y]) for y in (0, 1)] == [0.0, 2.0]
    assert value("nll", predictions=sure, references=[1]) == 1e4


def test_bins_of_the_calibration_error():
    # Confidence 1 (twice right, once wrong), 1/2 (wrong), 1/5 of five classes by five equal logits (right).
    logits = [[99.0, 0, 0, 0, 0]] * 3 + [[50.0, 50.0, 0, 0, 0], [0.0] * 5]
    labels = [0, 0, 1, 1, 0]
    table = reliability(logits, labels)
    assert len(table) == 15 and (table[0]["from"], table[14]["to"]) == (0.0, 1.0)
    assert {b: bin["images"] for b, bin in enumerate(table) if bin["images"]} == {2: 1, 7: 1, 14: 3}
    assert table[14] == {"from": 14 / 15, "to": 1.0, "images": 3, "confidence": 1.0, "accuracy": 2 / 3}
    assert table[3]["confidence"] is table[3]["accuracy"] is None
    assert table[2]["confidence"] == pytest.approx(0.2) and table[2]["to"] == 3 / 15  # on the edge: the bin below
    expected = (3 * (1 - 2 / 3) + 0.5 + 0.8) / 5
    assert value("ece", predictions=logits, references=labels) == pytest.approx(expected)


def test_fidelity_by_hand():
    labels = [0, 0, 1, 2, -100]
    teacher = np.eye(3)[[0, 1, 2, 0, 0]]  # right once, wrong on images 1, 2, 3
    student = np.eye(3)[[1, 1, 2, 1, 0]]  # copies 1 and 2
    both = {"predictions": student, "references": teacher}
    assert value("agreement", **both) == 3 / 5
    assert value("agreement_teacher_wrong", **both, labels=labels) == 2 / 3
    assert math.isnan(value("agreement_teacher_wrong", **both, labels=[0, 1, 2, 0, 0]))
    flips = {"predictions": student, "baseline": teacher}
    assert value("negative_flip_rate", **flips, labels=labels) == 1 / 4
    assert value("negative_flip_rate", predictions=teacher, baseline=student, labels=labels) == 0.0


def test_a_class_without_images_is_left_out_and_reported(caplog):
    # Class 0 right, class 2 right once of two, class 1 unseen: mean of 1 and 1/2.
    assert value("mean_class_accuracy", predictions=LOGITS, references=LABELS) == 0.75
    assert "1 of 3 classes have no image; the mean is over the others" in caplog.text


def test_a_calibrated_sampler_is_calibrated_within_sampling_error():
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(20_000, 10), scale=2)
    p = torch.tensor(logits).softmax(1)
    labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(0))[:, 0].numpy()
    confidence, bins = p.max(1).values.numpy(), np.ceil(p.max(1).values.numpy() * 15).astype(int)
    # Right or wrong is a coin of probability c: the mean of |sum (right - c)| / n over a bin is sqrt(2 v / pi) / n,
    # v = sum c (1 - c), and its variance v (1 - 2 / pi) / n^2.
    variances = [(c * (1 - c)).sum() for b in range(16) if len(c := confidence[bins == b])]
    expected = sum(math.sqrt(2 * v / math.pi) for v in variances) / len(labels)
    sd = math.sqrt(sum(v * (1 - 2 / math.pi) for v in variances)) / len(labels)
    assert 0 < sd < expected < 0.01
    assert abs(value("ece", predictions=logits, references=labels) - expected) < 3 * sd
    # Twice as sharp is not calibrated.
    assert value("ece", predictions=2 * logits, references=labels) > expected + 20 * sd


# ---- Streaming, processes ----


@pytest.mark.parametrize("name", NAMES)
def test_the_same_to_the_last_bit_however_it_is_shared_out(name, monkeypatch):
    given = some(name, images=1003, classes=33, seed=3)
    given = {key: array + 1 / 3 if METRICS[name].inputs[key] == "logits" else array for key, array in given.items()}
    entire = value(name, **given)
    order = np.random.default_rng(0).permutation(1003)
    two_processes = [order[0::2], order[1::2]]
    monkeypatch.setattr(streaming, "CHUNK", 33 * 10)
    metric = METRICS[name]()
    for share in two_processes:
        for rows in np.split(share, [1, 2, 9, 100, 101, 400]):
            metric.add_batch(**{key: np.asfortranarray(array[rows]) for key, array in given.items()})
    assert len(metric) == 1003
    np.testing.assert_array_equal(metric.compute()[name], entire)


@pytest.mark.parametrize("name", ["nll", "brier", "teacher_kl"])
def test_the_layout_in_memory_makes_no_difference(name):
    for seed in range(20):  # one image each: over many the last bit is lost in the mean
        given = some(name, images=1, classes=1000, seed=seed, unlabelled=False)
        given = {key: np.repeat(array, 2, 0) for key, array in given.items()}
        assert value(name, **{key: np.asfortranarray(array) for key, array in given.items()}) == value(name, **given)


def test_one_by_one_and_started_again():
    metric = METRICS["accuracy"]()
    for logits, label in zip(LOGITS, LABELS, strict=True):
        metric.add(prediction=logits, reference=label)
    metric.add_batch(predictions=torch.tensor(LOGITS, dtype=torch.bfloat16).requires_grad_(), references=LABELS)
    assert metric.compute() == {"accuracy": 4 / 6}
    assert metric.compute(predictions=LOGITS[:1].tolist(), references=[1]) == {"accuracy": 0.0}


def one_of_two(rank, given):
    """The metrics of one of two processes, which get every other ten images."""
    found = {}
    for name in ("accuracy", "nll", "ece"):
        metric = METRICS[name](num_process=2, process_id=rank, experiment_id=name, cache_dir="cache", timeout=30)
        for start in (10 * rank, 20 + 10 * rank):
            metric.add_batch(**{key: array[start : start + 10] for key, array in given.items()})
        found[name] = metric.compute()
    return found


def test_two_processes_of_evaluate_equal_one_exactly():
    given = some("nll", images=40)
    with ProcessPoolExecutor(1, get_context("fork")) as other:
        others = other.submit(one_of_two, 1, given)
        found = one_of_two(0, given)
        assert list(others.result().values()) == [None] * 3
    assert found == {name: {name: value(name, **given)} for name in found}
    metric = METRICS["accuracy"]()  # what process 0 does with the parts does not stay
    assert metric._compute(**given) == metric._compute(**given) and len(metric) == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "map"])  # which ranks all images at the end
def test_images_are_forgotten(name):
    given = some(name, images=20_000, classes=20, unlabelled=False)
    metric = METRICS[name]()
    metric.add_batch(**given)
    tracemalloc.start()
    for _ in range(5):
        metric.add_batch(**given)  # each batch holds 3 MB or more
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(metric) == 120_000 and grown < 100_000


def test_large_batches_are_looked_at_in_pieces():
    given = some("brier", images=100_000, classes=50, unlabelled=False)
    metric = METRICS["brier"]()
    tracemalloc.start()
    metric.add_batch(**given)  # 40 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


# ---- For Trainer ----


def test_as_trainer_calls_it():
    found = compute_metrics(EvalPrediction(LOGITS, LABELS))
    assert list(found) == ["accuracy", "mean_class_accuracy", "nll", "brier", "ece"]
    assert found["accuracy"] == 2 / 3 and all(type(number) is float for number in found.values())
    assert found == {name: value(name, predictions=LOGITS, references=LABELS) for name in found}
    assert compute_metrics(EvalPrediction((LOGITS, LOGITS[:, ::-1]), LABELS)) == found


def test_top5_is_reported_of_more_than_five_classes():
    assert "top5" not in paired_scores(**dict(zip(("logits", "labels"), some("nll", classes=5).values(), strict=True)))
    assert "top5" in paired_scores(**dict(zip(("logits", "labels"), some("nll", classes=6).values(), strict=True)))


# ---- Bad input ----


def test_no_label_at_all():
    with pytest.raises(ValueError, match="none of the 4 images has a label"):
        compute_metrics(EvalPrediction(LOGITS, np.full(4, -100)))


def test_batches_that_are_not_joined_give_the_same():
    rows = [slice(0, 2), slice(2, 4)]
    apart = EvalPrediction([(LOGITS[part], LOGITS[part]) for part in rows], [LABELS[part] for part in rows])
    assert compute_metrics(apart) == compute_metrics(EvalPrediction(LOGITS, LABELS))
    apart = EvalPrediction([LOGITS[part] for part in rows], [LABELS[part] for part in rows])
    assert compute_metrics(apart) == compute_metrics(EvalPrediction(LOGITS, LABELS))


def test_distributions_as_labels_are_named():
    with pytest.raises(ValueError, match="labels are distributions, and these metrics go by classes"):
        compute_metrics(EvalPrediction(LOGITS, np.full(LOGITS.shape, 1 / LOGITS.shape[1])))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("accuracy", {"references": [0, 3, 2, 0]}, "references hold 3; expected whole numbers from 0 to 2, or -100"),
        ("nll", {"references": [0, -1, 2, 0]}, "references hold -1; expected"),
        ("nll", {"references": [0, 0.5, 2, 0]}, "references hold 0.5; expected"),
        ("accuracy", {"references": [0, 1]}, "found 4 predictions and 2 references; expected one of each"),
        ("accuracy", {"references": np.eye(4)}, r"references are float64 of shape \(4, 4\); expected labels"),
        ("accuracy", {"references": ["cat"] * 4}, "references are <U3 of shape"),
        ("accuracy", {"predictions": LABELS}, r"predictions are int64 of shape \(4,\); expected logits \(n, K\)"),
        ("accuracy", {"predictions": [[1.0], [1.0, 2.0]]}, "rows of different lengths"),
        ("accuracy", {"predictions": np.zeros((4, 1))}, "have 1 classes; expected at least 2"),
        ("brier", {"predictions": np.full((4, 3), np.nan)}, "the predictions of 4 images in a batch are not finite"),
        ("accuracy", {"predictions": [[0.0, np.inf]] * 4}, "not finite"),
        ("top5", {}, "top5: found 3 classes, expected 5 or more"),
        ("accuracy", {"baseline": LOGITS}, "found baseline, predictions, references; expected exactly predictions"),
        ("accuracy", {"references": None}, "found predictions; expected exactly predictions, references"),
    ],
)
def test_what_is_refused(name, given, message):
    metric = METRICS[name]()
    with pytest.raises(ValueError, match=message):
        metric.compute(**{"predictions": LOGITS, "references": LABELS} | given)
    with pytest.raises(ValueError, match=f"{name}: nothing was added; expected predictions, references"):
        metric.compute()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_logits_that_overflow():
    with pytest.raises(ValueError, match="further apart than floats reach"):
        value("nll", predictions=[[1e308, -1e308]], references=[1])


def test_teacher_and_student_of_other_classes():
    with pytest.raises(ValueError, match="agreement: references have 2 classes; expected 3, as in the others"):
        value("agreement", predictions=LOGITS, references=LOGITS[:, :2])


def test_what_is_refused_adds_nothing():
    metric = METRICS["nll"]()
    metric.add_batch(predictions=LOGITS, references=LABELS)
    for bad in ({"references": [0, 1, 2, 3]}, {"predictions": np.pad(LOGITS, ((0, 0), (0, 1)))}):
        with pytest.raises(ValueError, match="expected"):
            metric.compute(**{"predictions": LOGITS, "references": LABELS} | bad)
    assert metric.compute() == METRICS["nll"]().compute(predictions=LOGITS, references=LABELS)


# ---- A metric of one's own ----


class Sharpness(streaming.StreamingMetric):
    """Mean over images of the largest logit minus the mean logit."""

    def sums(self, logits, labels):
        return {"sum": streaming.exact_sum(logits.max(1) - logits.mean(1))}


def test_a_new_metric_is_a_class_and_a_record(monkeypatch):
    """It is in the results, in the report's table and in the card's."""
    inputs = {"predictions": "logits", "references": "labels"}
    record = MetricRecord(Sharpness, inputs, None, "logits", "how far the largest logit is from the mean")
    monkeypatch.setitem(metrics.RECORDS, "sharpness", record)
    found = paired_scores(LOGITS, LABELS)
    assert found["sharpness"] == pytest.approx((1 + 5 / 3 + 3) / 3)

    model = {"parameters": 1, "images_per_second": 2.0, "runs": {"1": {"validation": found, "test": found}}}
    results = Results.of({"schema": SCHEMA, "evaluation": {"models": {"distilled": model}, "batch_size": 4}})
    report, card = markdown(results), measured_section(results)
    for text in (report, card["by_seed"]):
        assert re.search(r"\| `sharpness` +\| +1\.8889 \|", text)
    for text in (report, card["by_seed_note"]):
        assert "`sharpness` (logits): how far the largest logit is from the mean." in text
    assert "### sharpness" not in report and heading("sharpness") == "sharpness (logits)"
