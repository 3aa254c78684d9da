"""May it ship? The first screen of an evaluation's report, from the section `evaluation` alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_kdtl.reports.evaluation_findings import not_measured, sentences
from hf_kdtl.reports.evaluation_values import (
    Model,
    calibration_text,
    class_accuracies,
    degraded_mean,
    interval_verdict,
    models_with_role,
    references,
    relative_robustness,
    robustness_text,
    scores_of,
    worst_degradation,
)
from hf_kdtl.utils.text import escape_markdown, markdown_table, percent


def first_screen(evaluation: dict[str, Any], device: str) -> list[str]:
    """The lines that answer whether it may ship: table, sentences, what was not measured."""
    students = models_with_role(evaluation, "student")
    lines = [line for name, model in students.items() for line in (in_short(evaluation, name, model), "")]
    lines += [verdict_table(evaluation), "", _how_to_read(evaluation, device), ""]
    for name, model in students.items():
        lines += [f"### {escape_markdown(name)}: what is lost and gained", ""]
        lines += [f"- {sentence}" for sentence in sentences(evaluation, model)] + [""]
    return [*lines, "### Not measured", "", *(f"- {one}" for one in not_measured(evaluation, device)), ""]


def in_short(evaluation: dict[str, Any], name: str, model: Model) -> str:
    """One sentence: accuracy, accuracy on degraded images and cost, beside the teacher and the baseline."""
    told = [f"{escape_markdown(name)} is right in {percent(scores_of(evaluation, name)['accuracy'])} of the images"]
    for role in references(evaluation):
        found = model["differences"][role]
        told.append(f"{100 * found['mean']:+.1f} points against the {role} ({interval_verdict(found)})")
    if relative_robustness(model):
        told.append(f"on degraded ones in {percent(degraded_mean(model))}")
    for role, its in references(evaluation).items():
        ratios = [f"{value(model) / value(its):.2f} x the {what}" for what, value in RATIOS.items()]
        told.append(f"at {' and '.join(ratios)} of the {role}")
    return f"**In short:** {', '.join(told)}."


# ---- The table ----


def verdict_table(evaluation: dict[str, Any]) -> str:
    """A column for each model, a row for each question; rows that no model answers are left out."""
    models = evaluation["models"]
    cells: dict[str, Callable[[str, Model], str]] = {
        "accuracy [95% interval]": lambda name, model: _accuracy(evaluation, name, model),
        "worst class": lambda name, model: _worst_class(model),
        "calibration error (ECE)": lambda name, model: _calibration(evaluation, name, model),
        "worst degradation": lambda name, model: _worst_degradation(evaluation, model),
        "degraded images, mean accuracy": lambda name, model: robustness_text(model),
        "right in the baseline, wrong here": lambda name, model: _score(evaluation, name, model, "negative_flip_rate"),
        "same answer as the teacher": lambda name, model: _score(evaluation, name, model, "agreement"),
    }
    cells |= {what: _cost_cell(evaluation, *cost) for what, cost in COSTS.items()}
    rows = [[what, *(cell(name, model) for name, model in models.items())] for what, cell in cells.items()]
    return markdown_table([["", *map(escape_markdown, models)], *(row for row in rows if set(row[1:]) != {"-"})])


RATIOS: dict[str, Callable[[Model], float]] = {
    "operations": lambda model: model["flops"],
    "time for one image": lambda model: model["latency_ms"]["1"]["median"],
}
COSTS: dict[str, tuple[Callable[[Model], float], str]] = {
    "parameters (million)": (lambda model: model["parameters"] / 1e6, ".2f"),
    "file (MB)": (lambda model: model["file_bytes"] / 1e6, ".1f"),
    "peak memory (MB)": (lambda model: model["peak_memory_bytes"] / 1e6, ",.0f"),
    "operations an image (GFLOP)": (lambda model: model["flops"] / 1e9, ".3g"),
    "images/s": (lambda model: model["images_per_second"], ",.0f"),
    "milliseconds of one image": (lambda model: model["latency_ms"]["1"]["median"], ".1f"),
}


def _score(evaluation: dict[str, Any], name: str, model: Model, metric: str) -> str:
    return percent(scores_of(evaluation, name).get(metric))


def _accuracy(evaluation: dict[str, Any], name: str, model: Model) -> str:
    interval = model["accuracy_interval"]
    bounds = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return percent(scores_of(evaluation, name)["accuracy"]) + bounds


def _worst_class(model: Model) -> str:
    name, (value, _) = min(class_accuracies(model).items(), key=lambda item: item[1])
    return f"{escape_markdown(name)} {percent(value)}"


def _calibration(evaluation: dict[str, Any], name: str, model: Model) -> str:
    return f"{percent(scores_of(evaluation, name)['ece'])}, {calibration_text(model)}"


def _worst_degradation(evaluation: dict[str, Any], model: Model) -> str:
    found = worst_degradation(evaluation, model)
    return f"{found[0]} {found[1]}: {percent(found[2])}" if found else "-"


def _cost_cell(evaluation: dict[str, Any], value: Callable[[Model], float], form: str) -> Callable[[str, Model], str]:
    """The value, and how many times that of the teacher (without one: of the baseline) it is."""
    base = next(iter(references(evaluation).values()), None)

    def cell(name: str, model: Model) -> str:
        ratio = "" if base is None or model is base else f" ({value(model) / value(base):.2f} x)"
        return f"{value(model):{form}}{ratio}"

    return cell


def _how_to_read(evaluation: dict[str, Any], device: str) -> str:
    of = next(iter(references(evaluation)), None)
    split, size = evaluation["split"], evaluation["batch_size"]
    parts = [f"On {evaluation['images']:,} {split} images; the interval is the bootstrap over these images."]
    if (found := evaluation.get("degraded")) is not None:
        parts.append(f"Degraded: {found['images']:,} of them.")
    parts.append(f"Memory and images/s at batch size {size}, times on {device}.")
    if of is not None:
        parts.append(f"In brackets: times the {of}'s.")
    return " ".join(parts)
