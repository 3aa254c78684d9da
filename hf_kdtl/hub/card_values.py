"""What a card says, read out of results.json: the values of templates/student.md.

A value that results.json does not have is None or empty; the template says so or leaves its line out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hf_kdtl.evaluation.model_records import ModelFacts, Origin, Start
from hf_kdtl.evaluation.records import HEADLINES, Data, Results, headline
from hf_kdtl.evaluation.statistics import mean_and_std
from hf_kdtl.hub.card_tables import (
    ARM,
    evaluated_student,
    is_headless,
    is_of_several,
    measured_section,
    models_of,
    runs_of,
    shown_scores,
    source_name,
    split_scores,
    teacher_scores,
)
from hf_kdtl.hub.card_training import training_section
from hf_kdtl.hub.markdown import Markdown, inline
from hf_kdtl.reports.evaluation_values import (
    calibration_bias,
    class_accuracies,
    degraded_mean,
    overconfidence,
    sizes_text,
    trained_on,
    worst_degradation,
)
from hf_kdtl.utils.redaction import without_paths
from hf_kdtl.utils.text import percent


def facts(results: Results, title: str, license: str, usage: Markdown) -> dict[str, Any]:
    """Every value of the template."""
    models = models_of(results)
    return {
        "title": title,
        "license": Markdown(license),
        "usage": usage,
        "classes": _classes(results),
        "student": _student(models.student, models.teacher, results),
        "teachers": [
            _teacher(model, models.student) | {"called": called}
            for model, called in zip(models.all_teachers, models.teachers or [None], strict=False)
        ],
        "teachers_accuracy": _teachers_accuracy(results),
        "data": _data(results.data),
        "notes": [without_paths(note) for note in (*results.data.notes, *(results.pairing.get("notes") or []))],
        "scores": shown_scores(results),
        "seeds": _seeds(results),
        "difference": _difference(results),
        "effect": _effect(results),
        "cannot": _cannot(results),
        "limits": list(_limits(results)),
        **training_section(results),
        **measured_section(results),
    }


# ---- What it is ----


def millions(number: int | None) -> str:
    """A number of parameters in few figures.

    >>> millions(1_508_170), millions(2410)
    ('1.51 million', '2,410')
    """
    if number is None:
        return "an unknown number of"
    return f"{number:,}" if number < 100_000 else f"{number / 1e6:.2f} million"


def _classes(results: Results, most: int = 12) -> dict[str, Any]:
    names = [inline(name, 40) for name in results.data.classes]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    count = len(names) or models_of(results).student.num_labels or "an unknown number of"
    return {"count": count, "shown": Markdown(", ".join(names[:most]) + rest or "unnamed")}


def _student(model: ModelFacts, teacher: ModelFacts | None, results: Results) -> dict[str, Any]:
    stages = len(next(iter(results.stages.values()), []))
    return {
        "architecture": model.architecture or "A model of unrecorded architecture",
        "size": millions(model.parameters),
        "parameters": _count(model.parameters),
        "image": _image_size(model),
        "adapters": ", ".join(f"{name}: {kind}" for name, kind in model.adapters.items()) or None,
        "kept": "merged into its weights" if model.merged else "saved alone",
        "start": Markdown(
            f"{_start(model.start, teacher)}{f', cut in {stages} stages and trained after each' if stages else ''}"
        ),
    }


def _image_size(model: ModelFacts) -> str | None:
    return " x ".join(map(str, model.image_size)) or None


def _start(start: Start, teacher: ModelFacts | None) -> Markdown:
    if start.how == "cut":
        whose = inline((teacher and teacher.name) or "its teacher")
        if start.kept:
            return Markdown(f"from what was kept of {whose}: {inline(start.kept)}")
        return Markdown(f"from {start.layers or 'some'} of the blocks of {whose}")
    if start.how == "random":
        return Markdown("at random")
    name = inline(start.name or "a model without a name")
    return Markdown(f"from {name}{_where(start)}" if start.how else "from weights whose source was not recorded")


def _teacher(model: ModelFacts, student: ModelFacts) -> dict[str, Any]:
    mine, its = student.parameters, model.parameters
    return {
        "name": without_paths(model.name or "a model without a name")
        + (" (the student with its adapters off)" if model.is_student else ""),
        "where": Markdown(_where(model)),
        "architecture": model.architecture or "of unrecorded architecture",
        "parameters": _count(its),
        "ratio": f"{mine / its:.2f}" if mine and its else "an unknown number of",
        "license": model.license or "not known",
    }


def _teachers_accuracy(results: Results) -> str:
    """Of several teachers, each one's on the split that the student's accuracy is shown of."""
    names = models_of(results).teachers
    found = {name: teacher_scores(results, f"teacher {name}").get(results.evaluation.headline) for name in names}
    shown = [f"{without_paths(name)} {'not measured' if a is None else percent(a)}" for name, a in found.items()]
    return ", ".join(shown)


def _where(model: Origin) -> str:
    """Of a model: on the Hub at which revision, or which local weights."""
    if model.hub:
        return f" (revision {inline(model.revision)})" if model.revision else " (revision not recorded)"
    hashed = f", hash of its weights {inline(model.fingerprint)}" if model.fingerprint else ""
    return f" (a local folder{hashed})" if model.name else ""


def _count(number: int | None) -> str:
    return "an unknown number of" if number is None else f"{number:,}"


def _data(data: Data) -> dict[str, Any]:
    return {
        "source": source_name(data),
        "train": _train(data),
        "sizes": sizes_text(data),
        "augmentation": ", ".join(f"{key} {value}" for key, value in data.augmentation.items()),
    }


def _train(data: Data) -> str | None:
    return " and ".join(f"{number:,} {kind}".strip() for kind, number in trained_on(data).items()) or None


# ---- How accurate ----


def _seeds(results: Results) -> dict[str, Any]:
    found = [run["test"].get(headline(run["test"])) for run in runs_of(results, ARM).values() if "test" in run]
    values = [value for value in found if value is not None]
    if len(values) < 2:
        return {"number": len(values)}
    mean, sd = mean_and_std(values)
    return {
        "number": len(values),
        "spread": f"{100 * mean:.1f} ± {100 * sd:.1f} %",  # type: ignore[operator]
        "shown": results.evaluation.student_run,
        "chosen": results.evaluation.student_seed is not None,
    }


def _difference(results: Results) -> dict[str, Any]:
    mine = shown_scores(results)
    its = teacher_scores(results).get(mine["metric"])
    found = {"points": None, "interval": None, "teacher": None, "agreement": mine.get("agreement")}
    if mine["accuracy"] is None or its is None:
        return found
    found |= {"points": f"{100 * (mine['value'] - its):+.1f}", "teacher": percent(its)}
    if (measured := results.student_evaluation) is None:
        return found
    difference = evaluated_student(measured.evaluation).differences.get("teacher")
    if difference is not None and difference.interval is not None:
        low, high = difference.interval
        found["interval"] = f"{100 * low:+.1f} to {100 * high:+.1f}"
    return found


def _effect(results: Results) -> str | None:
    """Test accuracy of the distilled student minus that of the student alone; None where only one was trained."""
    metric = results.evaluation.headline
    wanted = ("distilled", "alone", metric, "test")
    found = next((one for one in results.comparison if (one.a, one.b, one.metric, one.split) == wanted), None)
    if found is None:
        return None
    than = f"{100 * found.mean:+.1f} points of {HEADLINES[metric]} against the same student trained without"
    than += " them" if len(models_of(results).teachers) > 1 else " it"
    than += " on the labelled images alone" if results.data.unlabelled else ""
    if found.low is None or found.high is None:
        return f"{than}; {found.note}, so another seed may reverse it."
    low, high = 100 * found.low, 100 * found.high
    verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown: the interval contains 0"
    return f"{than} ({found.note}: {low:+.1f} to {high:+.1f}; {verdict})."


def _cannot(results: Results) -> Markdown:
    classes, size = _classes(results), _image_size(models_of(results).student)
    lines = [f"it always predicts one of its {classes['count']} classes, also for images of none of them"]
    if is_of_several(results):
        lines = [f"it answers for each of its {classes['count']} classes apart, and for nothing else"]
    if size:
        lines.append(f"images are resized to {size} pixels")
    if (measured := results.student_evaluation) is not None:
        evaluation, model = measured.evaluation, evaluated_student(measured.evaluation)
        name, (accuracy, _) = min(class_accuracies(model).items(), key=lambda item: item[1])
        lines.append(f"its worst class is {inline(name, 40)} (accuracy {percent(accuracy)})")
        if (worst := worst_degradation(evaluation, model)) is not None:
            lines.append(
                f"on degraded images its mean accuracy is {percent(degraded_mean(model))}, the lowest "
                f"{percent(worst[2])} under {inline(worst[0])} at severity {worst[1]}"
            )
        if calibration_bias(model) is not None:
            over = 100 * overconfidence(model)
            lines.append(f"its confidence is {abs(over):.1f} points too {'high' if over > 0 else 'low'} on average")
    else:
        lines.append("accuracy by class, calibration and degraded images were not measured")
    return Markdown(f"{'; '.join(lines)}.")


# ---- Limits ----


def _per_class(images: dict[str, int], classes: int) -> str:
    kind, number = next(iter(images.items()))  # those with labels
    return f", {number / classes:,.0f} {kind and kind + ' ones '}per class on average"


_OTHERS = (
    "Other cameras, places and seasons, and groups of people or things that the data does not distinguish, were not "
    "evaluated."
)


def _limits_of_features(results: Results) -> Iterable[str]:
    found = results.extra.get("embedding", {}).get("models", {}).get("student", {})
    if train := _train(results.data):
        yield f"Trained on {train} images, without labels."
    if found:
        yield "One training run was measured: the variation between seeds was not."
    held = "kNN, linear probe and recall hold for classes as those of the labelled images that they were measured on."
    yield held if "knn" in found else "Nothing was measured on labelled images."
    yield _OTHERS
    yield "Not measured: degraded images, adversarial images, input sensitivity, memory and latency."


def _limits(results: Results) -> Iterable[str]:
    if is_headless(results):
        yield from _limits_of_features(results)
        return
    classes, images = results.data.classes, trained_on(results.data)
    if classes and images:
        share = "" if is_of_several(results) else _per_class(images, len(classes))
        yield f"Trained on {_train(results.data)} images{share}."
    if (number := _seeds(results)["number"]) == 1:
        yield "One training run: the variation between seeds was not measured."
    elif not number:
        yield "No accuracy on test images was measured."
    kind = "labelled " if "labelled" in images else ""
    same = f"The test images have the same source as the {kind}training images. "
    yield f"{same if split_scores(results)[0] == 'test' else ''}{_OTHERS}"
    yield "Adversarial images and images of none of its classes were not evaluated."
    if results.student_evaluation is None:
        yield "Not measured: accuracy by class, degraded images, input sensitivity, memory and latency."
        return
    evaluation = results.student_evaluation.evaluation
    if evaluation.degraded is None:
        yield "Degraded images were not evaluated."
    elif evaluation.degradations_left_out:
        yield f"Degradations that were not evaluated: {', '.join(evaluation.degradations_left_out)}."
    for found in evaluation.fidelity.values():
        for what, why in found.reasons.items():
            yield without_paths(f"Not measured, {what.replace('_', ' ')}: {why}")
    yield "Latency and throughput hold for the device on which they were measured, and its other load."
