"""What is read out of the section `evaluation` of results.json, for the report's text and pictures."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from hf_kdtl.utils.text import percent

Model = dict[str, Any]
REFERENCES = ("teacher", "baseline")


def models_with_role(evaluation: dict[str, Any], role: str) -> dict[str, Model]:
    """{name: model} of the students, the teacher or the baseline."""
    return {name: model for name, model in evaluation["models"].items() if model["role"] == role}


def class_accuracies(model: Model) -> dict[str, tuple[float, int]]:
    """{class: (accuracy, images)} of the classes that have images."""
    counts = {name: sum(row.values()) for name, row in model["confusion"].items()}
    return {name: (row.get(name, 0) / counts[name], counts[name]) for name, row in model["confusion"].items() if row}


def overconfidence(model: Model) -> float:
    """Mean confidence minus accuracy, in [-1, 1]: above 0 the model claims more than it holds."""
    return mean_of_bins(model, "confidence") - mean_of_bins(model, "accuracy")


def mean_of_bins(model: Model, key: str) -> float:
    """`confidence` or `accuracy`, mean over the images."""
    bins = [one for one in model["reliability"] if one["images"]]
    return sum(one["images"] * one[key] for one in bins) / sum(one["images"] for one in bins)


def relative_robustness(model: Model) -> dict[str, list[float]]:
    """{degradation: share of the clean accuracy that is left at each severity}; empty where none was measured."""
    degraded = model.get("degraded", {})
    clean = degraded.get("clean")
    return {name: [v / clean for v in values] for name, values in degraded.items() if name != "clean"} if clean else {}


def scores_of(evaluation: dict[str, Any], name: str) -> dict[str, float | None]:
    """A model's metrics on the split that was evaluated."""
    return evaluation["models"][name]["runs"][name][evaluation["split"]]


def calibration_text(model: Model) -> str:
    """Which way its confidence is off."""
    return "over-confident" if overconfidence(model) > 0 else "under-confident"


def worst_degradation(evaluation: dict[str, Any], model: Model) -> tuple[str, int, float] | None:
    """(name, severity, accuracy) where a model is least often right."""
    values = {
        (name, severity): value
        for name, row in model.get("degraded", {}).items()
        if name != "clean"
        for severity, value in zip(evaluation["degraded"]["severities"], row, strict=True)
    }
    if not values:
        return None
    (name, severity), value = min(values.items(), key=lambda item: item[1])
    return name, severity, value


def degraded_mean(model: Model) -> float | None:
    """Accuracy, mean over degradations and severities."""
    rows = [row for name, row in model.get("degraded", {}).items() if name != "clean"]
    return fmean(value for row in rows for value in row) if rows else None


def robustness_text(model: Model) -> str:
    """Mean accuracy over degradations and severities, and the share of the clean accuracy that this is."""
    mean, shares = percent(degraded_mean(model)), relative_robustness(model).values()
    return f"{mean} ({percent(fmean(v for row in shares for v in row))} left)" if shares else mean


def references(evaluation: dict[str, Any]) -> dict[str, Model]:
    """{"teacher": model, "baseline": model}, those that there are."""
    return {role: found for role in REFERENCES for found in models_with_role(evaluation, role).values()}


def interval_verdict(found: dict[str, Any]) -> str:
    """What a difference's interval shows."""
    low, high = found["interval"] or [found["mean"]] * 2
    return "lost" if high < 0 else "gained" if low > 0 else "no difference was shown"
