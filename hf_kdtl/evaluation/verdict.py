"""May it ship? What is lost, what is gained and what nobody looked at, from the section `evaluation` alone.

No thresholds: what is good enough depends on the use, and is the reader's to say.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from hf_kdtl.evaluation.text import aligned, percent, plain

Model = dict[str, Any]
REFERENCES = ("teacher", "baseline")


def of_role(evaluation: dict[str, Any], role: str) -> dict[str, Model]:
    """{name: model} of the students, the teacher or the baseline."""
    return {name: model for name, model in evaluation["models"].items() if model["role"] == role}


def class_accuracies(model: Model) -> dict[str, tuple[float, int]]:
    """{class: (accuracy, images)} of the classes that have images."""
    counts = {name: sum(row.values()) for name, row in model["confusion"].items()}
    return {name: (row.get(name, 0) / counts[name], counts[name]) for name, row in model["confusion"].items() if row}


def overconfidence(model: Model) -> float:
    """Mean confidence minus accuracy, in [-1, 1]: above 0 the model claims more than it holds."""
    return _mean_of_bins(model, "confidence") - _mean_of_bins(model, "accuracy")


def _mean_of_bins(model: Model, key: str) -> float:
    bins = [one for one in model["reliability"] if one["images"]]
    return sum(one["images"] * one[key] for one in bins) / sum(one["images"] for one in bins)


def kept(model: Model) -> dict[str, list[float]]:
    """{degradation: share of the clean accuracy that is left at each severity}; empty where none was measured."""
    degraded = model.get("degraded", {})
    clean = degraded.get("clean")
    return {name: [v / clean for v in values] for name, values in degraded.items() if name != "clean"} if clean else {}


def first_screen(evaluation: dict[str, Any], device: str) -> list[str]:
    """The lines that answer whether it may ship: table, sentences, what was not measured."""
    students = of_role(evaluation, "student")
    lines = [verdict_table(evaluation), "", _how_to_read(evaluation, device), ""]
    for name, model in students.items():
        lines += [f"### {plain(name)}: what is lost and gained", ""]
        lines += [f"- {sentence}" for sentence in sentences(evaluation, model)] + [""]
    return [*lines, "### Not measured", "", *(f"- {one}" for one in not_measured(evaluation, device)), ""]


# ---- The table ----


def verdict_table(evaluation: dict[str, Any]) -> str:
    """A column for each model, a row for each question; rows that no model answers are left out."""
    models = evaluation["models"]
    cells: dict[str, Callable[[str, Model], str]] = {
        "accuracy [95% interval]": lambda name, model: _accuracy(evaluation, name, model),
        "worst class": lambda name, model: _worst_class(model),
        "calibration error (ECE)": lambda name, model: _calibration(evaluation, name, model),
        "worst degradation": lambda name, model: _worst_degradation(evaluation, model),
        "accuracy kept, mean of all degradations": lambda name, model: percent(_kept_mean(model)),
        "right in the baseline, wrong here": lambda name, model: _score(evaluation, name, model, "negative_flip_rate"),
        "same answer as the teacher": lambda name, model: _score(evaluation, name, model, "agreement"),
    }
    cells |= {what: _cost_cell(evaluation, *cost) for what, cost in COSTS.items()}
    rows = [[what, *(cell(name, model) for name, model in models.items())] for what, cell in cells.items()]
    return aligned([["", *map(plain, models)], *(row for row in rows if set(row[1:]) != {"-"})])


COSTS: dict[str, tuple[Callable[[Model], float], str]] = {
    "parameters (million)": (lambda model: model["parameters"] / 1e6, ".2f"),
    "file (MB)": (lambda model: model["file_bytes"] / 1e6, ".1f"),
    "peak memory (MB)": (lambda model: model["peak_memory_bytes"] / 1e6, ",.0f"),
    "operations an image (GFLOP)": (lambda model: model["flops"] / 1e9, ".3g"),
    "images/s": (lambda model: model["images_per_second"], ",.0f"),
    "milliseconds of one image": (lambda model: model["latency_ms"]["1"]["median"], ".1f"),
}


def scores_of(evaluation: dict[str, Any], name: str) -> dict[str, float | None]:
    """A model's metrics on the split that was evaluated."""
    return evaluation["models"][name]["runs"][name][evaluation["split"]]


def _score(evaluation: dict[str, Any], name: str, model: Model, metric: str) -> str:
    return percent(scores_of(evaluation, name).get(metric))


def _accuracy(evaluation: dict[str, Any], name: str, model: Model) -> str:
    interval = model["accuracy_interval"]
    bounds = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return percent(scores_of(evaluation, name)["accuracy"]) + bounds


def _worst_class(model: Model) -> str:
    name, (value, _) = min(class_accuracies(model).items(), key=lambda item: item[1])
    return f"{plain(name)} {percent(value)}"


def _calibration(evaluation: dict[str, Any], name: str, model: Model) -> str:
    return f"{percent(scores_of(evaluation, name)['ece'])}, {_over(model)}"


def _over(model: Model) -> str:
    return "over-confident" if overconfidence(model) > 0 else "under-confident"


def _worst_degradation(evaluation: dict[str, Any], model: Model) -> str:
    found = worst_degradation(evaluation, model)
    return f"{found[0]} {found[1]}: {percent(found[2])}" if found else "-"


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


def _kept_mean(model: Model) -> float | None:
    rows = kept(model).values()
    return fmean(value for row in rows for value in row) if rows else None


def _cost_cell(evaluation: dict[str, Any], value: Callable[[Model], float], form: str) -> Callable[[str, Model], str]:
    """The value, and how many times that of the teacher (without one: of the baseline) it is."""
    base = next((model for role in REFERENCES for model in of_role(evaluation, role).values()), None)

    def cell(name: str, model: Model) -> str:
        ratio = "" if base is None or model is base else f" ({value(model) / value(base):.2f} x)"
        return f"{value(model):{form}}{ratio}"

    return cell


def _how_to_read(evaluation: dict[str, Any], device: str) -> str:
    of = next((role for role in REFERENCES if of_role(evaluation, role)), None)
    split, size = evaluation["split"], evaluation["batch_size"]
    parts = [f"On {evaluation['images']:,} {split} images; the interval is the bootstrap over these images."]
    if (found := evaluation.get("degraded")) is not None:
        parts.append(f"Degraded: {found['images']:,} of them.")
    parts.append(f"Memory and images/s at batch size {size}, times on {device}.")
    if of is not None:
        parts.append(f"In brackets: times the {of}'s.")
    return " ".join(parts)


# ---- The sentences ----


def sentences(evaluation: dict[str, Any], model: Model) -> list[str]:
    """A student in plain words, against the teacher and the baseline where they are."""
    models = {role: found for role in REFERENCES for found in of_role(evaluation, role).values()}
    lines = [_against(role, model["differences"][role]) for role in models]
    if "baseline" in models:
        lines.append(_flips(model["differences"]["baseline"]))
    lines += [_classes(role, model, other) for role, other in models.items()]
    lines.append(_few_images(model))
    lines.append(_confidence(model, models))
    if kept(model):
        lines.append(_under_degradation(evaluation, model))
        lines += [_behind(evaluation, role, model, other) for role, other in models.items()]
    return lines


def _against(role: str, found: dict[str, Any]) -> str:
    points, interval = 100 * found["mean"], found["interval"]
    counts = f"{found['only_a']:,} images only this model gets right, {found['only_b']:,} only the {role}"
    if interval is None:
        return f"**Accuracy against the {role}**: {points:+.1f} points ({counts})."
    low, high = (100 * bound for bound in interval)
    shown = "lost" if high < 0 else "gained" if low > 0 else "no difference was shown"
    return (
        f"**Accuracy against the {role}**: {points:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}: {shown} "
        f"({counts})."
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
        f"**Classes against the {role}**: {lost} of {len(change)} lose. From {plain(worst)}, {100 * low:+.1f} points "
        f"({percent(its[worst][0])} to {percent(mine[worst][0])}), to {plain(best)}, {100 * high:+.1f} points."
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
    return f"**Confidence**: it {_claim(model)}, so it is {_over(model)}{others}."


def _claim(model: Model) -> str:
    claimed, held = (percent(_mean_of_bins(model, key)) for key in ("confidence", "accuracy"))
    return f"claims {claimed} in the mean and is right in {held}"


def _under_degradation(evaluation: dict[str, Any], model: Model) -> str:
    found = worst_degradation(evaluation, model)
    assert found is not None
    name, severity, value = found
    clean = model["degraded"]["clean"]
    return (
        f"**Degraded images**: of its accuracy {percent(_kept_mean(model))} is left in the mean. Worst under "
        f"{name} at severity {severity}: {percent(clean)} falls to {percent(value)}."
    )


def _behind(evaluation: dict[str, Any], role: str, model: Model, other: Model) -> str:
    """Where the accuracy that is left, mean over severities, lies furthest below another model's."""
    mine, its = ({name: fmean(row) for name, row in kept(one).items()} for one in (model, other))
    if not its:
        return f"**Degraded images against the {role}**: not compared, it is never right."
    name = min(mine, key=lambda key: mine[key] - its[key])
    verb = "keeps least" if mine[name] < its[name] else "keeps no less under any; closest"
    return (
        f"**Degraded images against the {role}**: {percent(_kept_mean(model))} left here, "
        f"{percent(_kept_mean(other))} there. In comparison it {verb} under {name}: {percent(mine[name])} of its own "
        f"accuracy, the {role} {percent(its[name])}."
    )


# ---- What nobody looked at ----


def not_measured(evaluation: dict[str, Any], device: str) -> list[str]:
    """What this evaluation cannot say."""
    lines = []
    for role, what in (("teacher", "what distilling costs"), ("baseline", "what a change from today's model breaks")):
        if not of_role(evaluation, role):
            lines.append(f"No --{role} was given, so {what} is not known.")
    degraded = evaluation.get("degraded")
    left_out = evaluation["degradations_left_out"]
    if degraded is None:
        lines.append("No degraded images (--degradations all).")
    elif left_out:
        lines.append(f"Degradations left out: {', '.join(left_out)}.")
    for student, found in evaluation.get("fidelity", {}).items():
        lines += [f"{plain(student)}, {what}: {plain(why)}" for what, why in found["reasons"].items()]
    return [
        *lines,
        "Images from elsewhere: other cameras, places, seasons, classes that the data does not have. The test images "
        "come from where the training images came from.",
        "Whether another training run would come out the same: this is one trained model of each. "
        "recipes/compare_runs.py compares ways of training over seeds.",
        f"Time and memory elsewhere than on {device}; other batch sizes, exported or compiled models.",
        "What is good enough. There is no threshold in this report.",
    ]
