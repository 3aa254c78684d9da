"""What a student loses and gains, in sentences, and what was not measured.

Which accuracy is sufficient depends on the use: a threshold is the reader's (--max_drop).
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from hf_kdtl.data.degradations import SEVERITIES
from hf_kdtl.evaluation.records import Difference, EvaluatedModel, Evaluation
from hf_kdtl.reports.evaluation_values import (
    calibration_text,
    class_accuracies,
    interval_verdict,
    mean_accuracy,
    mean_confidence,
    models_with_role,
    references,
    relative_robustness,
    robustness_text,
    worst_degradation,
)
from hf_kdtl.utils.text import escape_markdown, percent


def sentences(evaluation: Evaluation, model: EvaluatedModel) -> list[str]:
    """A student's results in sentences, against the teacher and the baseline where present."""
    models = references(evaluation)
    lines = [_against(role, model.differences[role]) for role in models]
    if "baseline" in models:
        lines.append(_flips(model.differences["baseline"]))
    lines += [_classes(role, model, other) for role, other in models.items()]
    lines.append(_few_images(model))
    lines.append(_confidence(model, models))
    if relative_robustness(model):
        lines.append(_under_degradation(evaluation, model))
        lines += [_relative_to(role, model, other) for role, other in models.items()]
    return lines


def _against(role: str, found: Difference) -> str:
    points = f"**Accuracy against the {role}**: {100 * found.mean:+.1f} points"
    counts = f"{found.only_a:,} images only this model classifies correctly, {found.only_b:,} only the {role}"
    if found.interval is None:
        return f"{points} ({counts})."
    low, high = (100 * bound for bound in found.interval)
    return f"{points}, 95% interval {low:+.1f} to {high:+.1f}: {interval_verdict(found)} ({counts})."


def _flips(found: Difference) -> str:
    broken, fixed, total = found.only_b, found.only_a, found.number
    return (
        f"**Replacing the baseline** would break {percent(broken / total)} of all images ({broken:,} that are correct "
        f"today) and fix {percent(fixed / total)} ({fixed:,})."
    )


def _classes(role: str, model: EvaluatedModel, other: EvaluatedModel) -> str:
    mine, its = class_accuracies(model), class_accuracies(other)
    change = sorted((mine[name][0] - its[name][0], name) for name in mine)
    (low, worst), (high, best) = change[0], change[-1]
    lost = sum(value < 0 for value, _ in change)
    if not low and not high:
        return f"**Classes against the {role}**: the accuracy of none of {len(change)} differs."
    return (
        f"**Classes against the {role}**: {lost} of {len(change)} lose accuracy. From {escape_markdown(worst)}, "
        f"{100 * low:+.1f} points ({percent(its[worst][0])} to {percent(mine[worst][0])}), to "
        f"{escape_markdown(best)}, {100 * high:+.1f} points."
    )


def _few_images(model: EvaluatedModel) -> str:
    counts = [number for _, number in class_accuracies(model).values()]
    number = f"{min(counts):,} to {max(counts):,}" if min(counts) < max(counts) else f"{min(counts):,}"
    half = 1.96 * 0.5 / min(counts) ** 0.5
    empty = len(model.confusion) - len(counts)
    missing = f"{empty} of {len(model.confusion)} classes have no image here. " if empty else ""
    return (
        f"**Precision of the class accuracies**: {missing}A class has {number} images; an "
        f"accuracy on {min(counts):,} images has an error of up to ±{100 * half:.0f} points, and the lowest of many "
        "classes looks lower than it is."
    )


def _confidence(model: EvaluatedModel, models: dict[str, EvaluatedModel]) -> str:
    others = "".join(f"; the {role}: {confidence_text(other)}" for role, other in models.items())
    return f"**Confidence**: {confidence_text(model)}: {calibration_text(model)}{others}."


def confidence_text(model: EvaluatedModel) -> str:
    """Mean confidence and accuracy."""
    return f"mean confidence {percent(mean_confidence(model))}, accuracy {percent(mean_accuracy(model))}"


def _under_degradation(evaluation: Evaluation, model: EvaluatedModel) -> str:
    found = worst_degradation(evaluation, model)
    assert found is not None
    name, severity, value = found
    return (
        f"**Degraded images**: mean accuracy {robustness_text(model)}. Lowest under {escape_markdown(name)} at "
        "severity "
        f"{severity}: {percent(value)}, from {percent(model.clean_accuracy)}."
    )


def _relative_to(role: str, model: EvaluatedModel, other: EvaluatedModel) -> str:
    """Where the accuracy relative to clean images, mean over severities, is furthest below another model's."""
    mine, its = ({name: fmean(row) for name, row in relative_robustness(one).items()} for one in (model, other))
    if not its:
        return f"**Degraded images against the {role}**: not compared, its accuracy on clean images is 0."
    name = min(mine, key=lambda key: mine[key] - its[key])
    worse = "the student keeps least" if mine[name] < its[name] else "the student keeps no less under any; closest"
    return (
        f"**Degraded images against the {role}** (mean accuracy {robustness_text(other)}): relative to it, {worse} "
        "under "
        f"{escape_markdown(name)}: {percent(mine[name])} of its own clean accuracy, the {role} {percent(its[name])}."
    )


def _forms(evaluation: Evaluation) -> str:
    measured = {form for forms in (evaluation.speed.latency_ms if evaluation.speed else {}).values() for form in forms}
    missing = [form for form in ("compiled", "onnx", "bf16") if form not in measured]
    return f"; forms that were not timed ({', '.join(missing)}: --speed all)" if missing else ""


def not_measured(evaluation: Evaluation, device: str) -> list[str]:
    """What this evaluation does not show."""
    lines = []
    for role, what in (
        ("teacher", "what distillation costs"),
        ("baseline", "what replacing today's model would break"),
    ):
        if not models_with_role(evaluation, role):
            lines.append(f"No --{role} was given, so {what} is not known.")
    if evaluation.degraded is None:
        lines.append("No degraded images (--degradations quick).")
    else:
        without: dict[str, list[Any]] = {
            "Degradations": evaluation.degradations_left_out,
            "Severities": sorted(set(SEVERITIES) - set(evaluation.degraded.severities)),
        }
        lines += [f"{what} left out: {', '.join(map(str, names))}." for what, names in without.items() if names]
    for student, found in evaluation.fidelity.items():
        lines += [
            f"{escape_markdown(student)}, {what.replace('_', ' ')}: {escape_markdown(why)}"
            for what, why in found.reasons.items()
        ]
    if evaluation.max_drop is None:
        lines.append("Which accuracy is sufficient: with --max_drop the report says pass or fail.")
    return [
        *lines,
        "Images from another distribution: other cameras, places, seasons, classes that the data does not have. These "
        f"{evaluation.split} images are of one source.",
        "Variation between training runs: this is one trained model of each kind. `hf-kdtl compare` compares methods "
        "over seeds.",
        f"Time and memory on hardware other than {device}; other batch sizes{_forms(evaluation)}.",
    ]
