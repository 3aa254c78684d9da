"""Values that the report's text and figures derive from the records of an evaluation."""

from __future__ import annotations

from statistics import fmean

from hf_kdtl.evaluation.records import Data, Difference, EvaluatedModel, Evaluation, Scores
from hf_kdtl.evaluation.scoring import calibration_interval
from hf_kdtl.utils.text import percent

REFERENCES = ("teacher", "baseline")


def models_with_role(evaluation: Evaluation, role: str) -> dict[str, EvaluatedModel]:
    """{name: model} of the students, the teacher or the baseline."""
    return {name: model for name, model in evaluation.models.items() if model.role == role}


def references(evaluation: Evaluation) -> dict[str, EvaluatedModel]:
    """{"teacher": model, "baseline": model}, where present."""
    return {role: found for role in REFERENCES for found in models_with_role(evaluation, role).values()}


def scores_of(evaluation: Evaluation, name: str) -> Scores:
    """A model's metrics on the split that was evaluated."""
    return evaluation.models[name].runs[name][evaluation.split]


def class_accuracies(model: EvaluatedModel) -> dict[str, tuple[float, int]]:
    """{class: (accuracy, images)} of the classes that have images. Raises LookupError where none was counted."""
    if not any(model.confusion.values()):
        raise LookupError("a model has no 'confusion', the images by true and predicted class")
    counts = {name: sum(row.values()) for name, row in model.confusion.items()}
    return {name: (row.get(name, 0) / counts[name], counts[name]) for name, row in model.confusion.items() if row}


# ---- Calibration ----


def mean_confidence(model: EvaluatedModel) -> float:
    """Mean over the images of the probability of the predicted class."""
    return _mean_of_bins(model, "confidence")


def mean_accuracy(model: EvaluatedModel) -> float:
    """Accuracy over the same images."""
    return _mean_of_bins(model, "accuracy")


def overconfidence(model: EvaluatedModel) -> float:
    """Mean confidence minus accuracy, in [-1, 1]."""
    return mean_confidence(model) - mean_accuracy(model)


def _mean_of_bins(model: EvaluatedModel, key: str) -> float:
    bins = [one for one in model.reliability if one.images]
    return sum(one.images * getattr(one, key) for one in bins) / sum(one.images for one in bins)


def calibration_bias(model: EvaluatedModel) -> str | None:
    """Over- or under-confident, only where the bootstrap interval of confidence minus accuracy excludes 0."""
    low, high = calibration_interval(model.reliability) or (0.0, 0.0)
    return "over-confident" if low > 0 else "under-confident" if high < 0 else None


def calibration_text(model: EvaluatedModel) -> str:
    """The bias in words, also where none was shown."""
    return calibration_bias(model) or "no over- or under-confidence shown"


# ---- Degraded images ----


def relative_robustness(model: EvaluatedModel) -> dict[str, list[float]]:
    """{degradation: accuracy relative to the clean accuracy, at each severity}; empty where none was measured."""
    clean = model.clean_accuracy
    return {name: [v / clean for v in values] for name, values in model.by_degradation.items()} if clean else {}


def worst_degradation(evaluation: Evaluation, model: EvaluatedModel) -> tuple[str, int, float] | None:
    """(name, severity, accuracy) of the lowest accuracy."""
    if evaluation.degraded is None or not model.by_degradation:
        return None
    values = {
        (name, severity): value
        for name, row in model.by_degradation.items()
        for severity, value in zip(evaluation.degraded.severities, row, strict=True)
    }
    (name, severity), value = min(values.items(), key=lambda item: item[1])
    return name, severity, value


def degraded_mean(model: EvaluatedModel) -> float | None:
    """Accuracy, mean over degradations and severities."""
    rows = model.by_degradation.values()
    return fmean(value for row in rows for value in row) if rows else None


def robustness_text(model: EvaluatedModel) -> str:
    """Mean accuracy over degradations and severities, and as a share of the clean accuracy."""
    mean, shares = percent(degraded_mean(model)), relative_robustness(model).values()
    return f"{mean} ({percent(fmean(v for row in shares for v in row))} of clean)" if shares else mean


def bounds(found: Difference) -> tuple[float, float]:
    """A difference's interval. Where nothing spreads there is none: by the rule of three up to 3/n of all images may
    be otherwise where none of n is."""
    reach = 3 / max(found.number, 1)
    return found.interval or (max(found.mean - reach, -1.0), min(found.mean + reach, 1.0))


def interval_verdict(found: Difference) -> str:
    """What a difference's interval shows."""
    low, high = bounds(found)
    return "worse" if high < 0 else "better" if low > 0 else "no difference shown"


# ---- Images ----


def trained_on(data: Data) -> dict[str, int]:
    """{kind of training image: number}; of a run that also learned from images without labels both kinds."""
    kinds = {kind: data.unlabelled[f"{kind}_images"] for kind in ("labelled", "unlabelled") if data.unlabelled}
    return kinds or ({"": data.sizes["train"]} if "train" in data.sizes else {})


def sizes_text(data: Data) -> str:
    """The number of images of each split."""
    train = {f"{kind} train".strip(): number for kind, number in trained_on(data).items()}
    sizes = train | {name: number for name, number in data.sizes.items() if name != "train"}
    return ", ".join(f"{number:,} {name}" for name, number in sizes.items())
