"""What a student loses and gains, in sentences, and what nobody looked at.

No thresholds: what is good enough depends on the use, and is the reader's to say.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from hf_kdtl.data.degradations import SEVERITIES
from hf_kdtl.reports.evaluation_values import (
    Model,
    calibration_text,
    class_accuracies,
    interval_verdict,
    mean_of_bins,
    models_with_role,
    references,
    relative_robustness,
    robustness_text,
    worst_degradation,
)
from hf_kdtl.utils.text import escape_markdown, percent


def sentences(evaluation: dict[str, Any], model: Model) -> list[str]:
    """A student in plain words, against the teacher and the baseline where they are."""
    models = references(evaluation)
    lines = [_against(role, model["differences"][role]) for role in models]
    if "baseline" in models:
        lines.append(_flips(model["differences"]["baseline"]))
    lines += [_classes(role, model, other) for role, other in models.items()]
    lines.append(_few_images(model))
    lines.append(_confidence(model, models))
    if relative_robustness(model):
        lines.append(_under_degradation(evaluation, model))
        lines += [_behind(evaluation, role, model, other) for role, other in models.items()]
    return lines


def _against(role: str, found: dict[str, Any]) -> str:
    points, interval = 100 * found["mean"], found["interval"]
    counts = f"{found['only_a']:,} images only this model gets right, {found['only_b']:,} only the {role}"
    if interval is None:
        return f"**Accuracy against the {role}**: {points:+.1f} points ({counts})."
    low, high = (100 * bound for bound in interval)
    return (
        f"**Accuracy against the {role}**: {points:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}: "
        f"{interval_verdict(found)} ({counts})."
    )


def _flips(found: dict[str, Any]) -> str:
    broken, mended, total = found["only_b"], found["only_a"], found["number"]
    return (
        f"**In place of the baseline** it would break {percent(broken / total)} of all images ({broken:,} that are "
        f"right today) and mend {percent(mended / total)} ({mended:,})."
    )


def _classes(role: str, model: Model, other: Model) -> str:
    mine, its = class_accuracies(model), class_accuracies(other)
    change = sorted((mine[name][0] - its[name][0], name) for name in mine)
    (low, worst), (high, best) = change[0], change[-1]
    lost = sum(value < 0 for value, _ in change)
    return (
        f"**Classes against the {role}**: {lost} of {len(change)} lose. From {escape_markdown(worst)}, "
        f"{100 * low:+.1f} points ({percent(its[worst][0])} to {percent(mine[worst][0])}), to "
        f"{escape_markdown(best)}, {100 * high:+.1f} points."
    )


def _few_images(model: Model) -> str:
    counts = [number for _, number in class_accuracies(model).values()]
    half = 1.96 * 0.5 / min(counts) ** 0.5
    empty = len(model["confusion"]) - len(counts)
    missing = f"{empty} of {len(model['confusion'])} classes have no image here. " if empty else ""
    return (
        f"**What the classes' numbers are worth**: {missing}A class has {min(counts):,} to {max(counts):,} images; an "
        f"accuracy on {min(counts):,} is known to about ±{100 * half:.0f} points at worst, and the worst of many "
        "classes looks worse than it is."
    )


def _confidence(model: Model, models: dict[str, Model]) -> str:
    others = "".join(f"; the {role} {_claim(other)}" for role, other in models.items())
    return f"**Confidence**: it {_claim(model)}, so it is {calibration_text(model)}{others}."


def _claim(model: Model) -> str:
    claimed, held = (percent(mean_of_bins(model, key)) for key in ("confidence", "accuracy"))
    return f"claims {claimed} in the mean and is right in {held}"


def _under_degradation(evaluation: dict[str, Any], model: Model) -> str:
    found = worst_degradation(evaluation, model)
    assert found is not None
    name, severity, value = found
    clean = model["degraded"]["clean"]
    return (
        f"**Degraded images**: it is right in {robustness_text(model)} in the mean. Worst under {name} at severity "
        f"{severity}: {percent(clean)} falls to {percent(value)}."
    )


def _behind(evaluation: dict[str, Any], role: str, model: Model, other: Model) -> str:
    """Where the accuracy that is left, mean over severities, lies furthest below another model's."""
    mine, its = ({name: fmean(row) for name, row in relative_robustness(one).items()} for one in (model, other))
    if not its:
        return f"**Degraded images against the {role}**: not compared, it is never right."
    name = min(mine, key=lambda key: mine[key] - its[key])
    verb = "keeps least" if mine[name] < its[name] else "keeps no less under any; closest"
    return (
        f"**Degraded images against the {role}**, which is right in {robustness_text(other)}: in comparison it {verb} "
        f"under {name}, {percent(mine[name])} of its own accuracy, the {role} {percent(its[name])}."
    )


def not_measured(evaluation: dict[str, Any], device: str) -> list[str]:
    """What this evaluation cannot say."""
    lines = []
    for role, what in (("teacher", "what distilling costs"), ("baseline", "what a change from today's model breaks")):
        if not models_with_role(evaluation, role):
            lines.append(f"No --{role} was given, so {what} is not known.")
    if (degraded := evaluation.get("degraded")) is None:
        lines.append("No degraded images (--degradations all).")
    else:
        without = {
            "Degradations": evaluation["degradations_left_out"],
            "Severities": sorted(set(SEVERITIES) - set(degraded["severities"])),
        }
        lines += [f"{what} left out: {', '.join(map(str, names))}." for what, names in without.items() if names]
    for student, found in evaluation.get("fidelity", {}).items():
        lines += [
            f"{escape_markdown(student)}, {what.replace('_', ' ')}: {escape_markdown(why)}"
            for what, why in found["reasons"].items()
        ]
    return [
        *lines,
        "Images from elsewhere: other cameras, places, seasons, classes that the data does not have. The test images "
        "come from where the training images came from.",
        "Whether another training run would come out the same: this is one trained model of each. "
        "hf-kdtl compare compares ways of training over seeds.",
        f"Time and memory elsewhere than on {device}; other batch sizes, exported or compiled models.",
        "What is good enough. There is no threshold in this report.",
    ]
