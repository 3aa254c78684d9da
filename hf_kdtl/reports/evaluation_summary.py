"""Can it be deployed? The first screen of an evaluation's report, from the section `evaluation` alone."""

from __future__ import annotations

from collections.abc import Callable

from hf_kdtl.evaluation.records import EvaluatedModel, Evaluation, Speed
from hf_kdtl.reports.evaluation_findings import not_measured, sentences
from hf_kdtl.reports.evaluation_values import (
    bounds,
    calibration_bias,
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

Value = Callable[[EvaluatedModel], float | None]


def first_screen(evaluation: Evaluation, device: str) -> list[str]:
    """The summary: one sentence, a table, what is lost and gained, what was not measured."""
    students = models_with_role(evaluation, "student")
    answers = verdicts(evaluation)
    lines = [line for answer in answers.values() for line in (answer, "")]
    lines += [line for name, model in students.items() for line in (in_short(evaluation, name, model), "")]
    lines += [verdict_table(evaluation), "", _how_to_read(evaluation, device), ""]
    if evaluation.speed is not None:
        lines += ["### Speed", "", speed_table(evaluation.speed), "", _speed_note(evaluation.speed, device), ""]
    for name, model in students.items():
        lines += [f"### {escape_markdown(name)}: what is lost and gained", ""]
        lines += [f"- {sentence}" for sentence in sentences(evaluation, model)] + [""]
    return [*lines, "### Not measured", "", *(f"- {one}" for one in not_measured(evaluation, device)), ""]


def in_short(evaluation: Evaluation, name: str, model: EvaluatedModel) -> str:
    """One sentence: accuracy, accuracy on degraded images and cost, next to the teacher and the baseline."""
    parts = [f"{escape_markdown(name)} has accuracy {percent(scores_of(evaluation, name)['accuracy'])}"]
    for role in references(evaluation):
        found = model.differences[role]
        parts.append(f"{100 * found.mean:+.1f} points against the {role} ({interval_verdict(found)})")
    if relative_robustness(model):
        parts.append(f"{percent(degraded_mean(model))} on degraded images")
    for role, its in references(evaluation).items():
        ratios = [f"{ratio} x the {what}" for what, value in RATIOS.items() if (ratio := _ratio(value, model, its))]
        if ratios:
            parts.append(f"at {' and '.join(ratios)} of the {role}")
    return f"**Summary:** {', '.join(parts)}."


def verdicts(evaluation: Evaluation) -> dict[str, str]:
    """{student: pass or fail in a sentence}; empty without a `max_drop`."""
    allowed = evaluation.max_drop
    role = next(iter(references(evaluation)), None)
    if allowed is None or role is None:
        return {}
    found = {}
    for name, model in models_with_role(evaluation, "student").items():
        difference = model.differences[role]
        low, high = bounds(difference)
        how = f"no spread over {difference.number:,} images: by the rule of three"
        how = how if difference.interval is None else "95% interval"
        points = f"{100 * difference.mean:+.1f} points against the {role}, {how} {100 * low:+.1f} to "
        points += f"{100 * high:+.1f}; a drop of {allowed:g} is allowed"
        if 100 * low >= -allowed:
            answer, why = "pass", ""
        elif 100 * high < -allowed:
            answer, why = "fail", ""
        else:
            answer, why = "fail", " (not shown either way: the interval reaches beyond it; more test images narrow it)"
        found[name] = f"**Verdict: {answer}.** {escape_markdown(name)}: {points}{why}."
    return found


def passed(verdict: str) -> bool:
    """Whether one of `verdicts` is a pass."""
    return verdict.startswith("**Verdict: pass")


# ---- Speed ----


def speed_table(speed: Speed) -> str:
    """Median milliseconds of a batch of 1 and of N images: a row for each model in each form."""
    sizes = list(dict.fromkeys(("1", str(speed.batch_size))))
    header = ["", *(f"batch {size}: ms" for size in sizes), f"images/s at batch {speed.batch_size}"]
    rows = []
    for name, forms in speed.latency_ms.items():
        for form, taken in forms.items():
            times = [f"{taken[size]:.1f}" if size in taken else "-" for size in sizes]
            last = taken.get(sizes[-1])
            fast = f"{1000 * speed.batch_size / last:,.0f}" if last else "-"
            rows.append([f"{escape_markdown(name)}, {FORMS.get(form, form)}", *times, fast])
    return markdown_table([header, *rows])


FORMS = {"eager": "eager (float32)", "compiled": "compiled", "bf16": "bfloat16", "onnx": "ONNX", "int8": "ONNX, int8"}


def _speed_note(speed: Speed, device: str) -> str:
    missing = " ".join(f"No {escape_markdown(key)}: {escape_markdown(why)}." for key, why in speed.reasons.items())
    return (
        "Median of a forward pass; all rows were timed in turns, so that a busy machine slows them alike. On "
        f"{device}. {missing}".strip()
    )


# ---- The table ----


def verdict_table(evaluation: Evaluation) -> str:
    """A column for each model, a row for each question; rows without any value are left out."""
    models = evaluation.models
    cells: dict[str, Callable[[str, EvaluatedModel], str]] = {
        "accuracy [95% interval]": lambda name, model: _accuracy(evaluation, name, model),
        "worst class": lambda name, model: _worst_class(model),
        "calibration error (ECE)": lambda name, model: _calibration(evaluation, name, model),
        "worst degradation": lambda name, model: _worst_degradation(evaluation, model),
        "degraded images, mean accuracy": lambda name, model: robustness_text(model),
        "correct in the baseline, wrong here": lambda name, model: _score(evaluation, name, "negative_flip_rate"),
        "same prediction as the teacher": lambda name, model: _score(evaluation, name, "agreement"),
    }
    cells |= {what: _cost_cell(evaluation, *cost) for what, cost in COSTS.items()}
    rows = [[what, *(cell(name, model) for name, model in models.items())] for what, cell in cells.items()]
    return markdown_table([["", *map(escape_markdown, models)], *(row for row in rows if set(row[1:]) != {"-"})])


def _single(model: EvaluatedModel) -> float | None:
    return model.latency_ms["1"].median if "1" in model.latency_ms else None


RATIOS: dict[str, Value] = {"FLOPs": lambda model: model.flops, "latency of one image": _single}
COSTS: dict[str, tuple[Value, float, str]] = {
    "parameters (million)": (lambda model: model.parameters, 1e6, ".2f"),
    "file (MB)": (lambda model: model.file_bytes, 1e6, ".1f"),
    "peak memory (MB)": (lambda model: model.peak_memory_bytes, 1e6, ",.0f"),
    "FLOPs per image (G)": (lambda model: model.flops, 1e9, ".3g"),
    "images/s": (lambda model: model.images_per_second, 1, ",.0f"),
    "latency of one image (ms)": (_single, 1, ".1f"),
}


def _ratio(value: Value, model: EvaluatedModel, other: EvaluatedModel) -> str | None:
    mine, its = value(model), value(other)
    return None if mine is None or not its else f"{mine / its:.2f}"


def _score(evaluation: Evaluation, name: str, metric: str) -> str:
    return percent(scores_of(evaluation, name).get(metric))


def _accuracy(evaluation: Evaluation, name: str, model: EvaluatedModel) -> str:
    interval = model.accuracy_interval
    bounds = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return percent(scores_of(evaluation, name)["accuracy"]) + bounds


def _worst_class(model: EvaluatedModel) -> str:
    name, (value, _) = min(class_accuracies(model).items(), key=lambda item: item[1])
    return f"{escape_markdown(name)} {percent(value)}"


def _calibration(evaluation: Evaluation, name: str, model: EvaluatedModel) -> str:
    bias = calibration_bias(model)
    return _score(evaluation, name, "ece") + (f", {bias}" if bias else "")


def _worst_degradation(evaluation: Evaluation, model: EvaluatedModel) -> str:
    found = worst_degradation(evaluation, model)
    return f"{escape_markdown(found[0])} {found[1]}: {percent(found[2])}" if found else "-"


def _cost_cell(evaluation: Evaluation, value: Value, scale: float, form: str) -> Callable[[str, EvaluatedModel], str]:
    """The value, and its ratio to that of the teacher (without one: of the baseline)."""
    base = next(iter(references(evaluation).values()), None)

    def cell(name: str, model: EvaluatedModel) -> str:
        if (mine := value(model)) is None:
            return "-"
        ratio = None if base is None or model is base else _ratio(value, model, base)
        return f"{mine / scale:{form}}" + (f" ({ratio} x)" if ratio else "")

    return cell


def _how_to_read(evaluation: Evaluation, device: str) -> str:
    of = next(iter(references(evaluation)), None)
    parts = [f"{evaluation.images:,} {evaluation.split} images; the interval is a bootstrap over these images."]
    if evaluation.degraded is not None:
        parts.append(f"Degraded: {evaluation.degraded.images:,} of them.")
    parts.append(f"Memory and images/s at batch size {evaluation.batch_size}, times on {device}.")
    if of is not None:
        parts.append(f"In parentheses: relative to the {of}.")
    return " ".join(parts)
