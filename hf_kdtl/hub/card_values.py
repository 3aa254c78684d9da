"""What a card says, read out of results.json: the values of templates/student.md.

A value that results.json does not have is None or empty; the template says so or leaves its line out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

from hf_kdtl.evaluation.records import Comparison, History
from hf_kdtl.evaluation.statistics import mean_and_std
from hf_kdtl.hub.card_citations import citations
from hf_kdtl.hub.card_tables import (
    ARM,
    evaluated_student,
    measured_section,
    models_of,
    shown_scores,
    source_name,
    student_evaluation,
    student_seed,
    teacher_scores,
)
from hf_kdtl.hub.markdown import Markdown, fenced, inline, table
from hf_kdtl.reports.evaluation_values import (
    calibration_bias,
    class_accuracies,
    degraded_mean,
    overconfidence,
    worst_degradation,
)
from hf_kdtl.reports.run_report import conflict_note, first_with_history, rates_note
from hf_kdtl.utils.redaction import without_paths
from hf_kdtl.utils.text import percent

Results = dict[str, Any]
# Of a run, and not of what it trains: a reader has other folders.
_OWN = ("overwrite_output_dir", "resume_from_checkpoint", "disable_tqdm", "dataloader_num_workers", "push_to_hub",
        "hub_model_id", "hub_strategy", "hub_private_repo", "save_total_limit", "accelerator_config", "logging_dir",
        "run_name", "do_eval")  # fmt: skip


def facts(results: Results, title: str, licence: str, usage: Markdown) -> dict[str, Any]:
    """Every value of the template."""
    models = models_of(results)
    taught = models.get("teacher")
    return {
        "title": title,
        "licence": Markdown(licence),
        "usage": usage,
        "classes": _classes(results),
        "student": _student(models.get("student", {}), taught),
        "teacher": None if taught is None else _teacher(taught, models.get("student", {})),
        "data": _data(results.get("data", {})),
        "notes": [without_paths(note) for note in _notes(results)],
        "scores": shown_scores(results),
        "seeds": _seeds(results),
        "far": _far(results),
        "helped": _helped(results),
        "cannot": _cannot(results),
        "objectives": _objectives(results.get("objectives", [])),
        "pairing": {users: fenced(pairs) for users, pairs in models.get("pairing", {}).items()},
        "layer_rates": _layer_rates(results),
        "gradient_rule": _gradient_rule(results),
        "limits": list(_limits(results)),
        "citations": fenced("\n\n".join(found), "bibtex") if (found := citations(results)) else None,
        **_again(results),
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
    names = [inline(name, 40) for name in results.get("data", {}).get("classes", [])]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return {"count": len(names) or "unknown", "shown": Markdown(", ".join(names[:most]) + rest)}


def _student(model: dict[str, Any], teacher: dict[str, Any] | None) -> dict[str, Any]:
    adapters = model.get("adapters")
    return {
        "architecture": model.get("architecture", "A model of unrecorded architecture"),
        "size": millions(model.get("parameters")),
        "parameters": _count(model.get("parameters")),
        "image": " x ".join(map(str, model["image_size"])) if model.get("image_size") else None,
        "adapters": ", ".join(f"{name}: {kind}" for name, kind in adapters.items()) if adapters else None,
        "kept": "merged into its weights" if model.get("merged") else "saved alone",
        "start": _start(model.get("start", {}), teacher or {}),
    }


def _start(start: dict[str, Any], teacher: dict[str, Any]) -> Markdown:
    how, name = start.get("how"), inline(start.get("name") or "a model without a name")
    if how == "cut":
        return Markdown(
            f"as {start.get('layers', 'some')} of the blocks of {inline(teacher.get('name') or 'its teacher')}"
        )
    if how == "random":
        return Markdown("with random weights")
    return Markdown(f"as {name}{_where(start)}" if how == "pretrained" else "as weights whose source was not recorded")


def _teacher(model: dict[str, Any], student: dict[str, Any]) -> dict[str, Any]:
    mine, its = student.get("parameters"), model.get("parameters")
    return {
        "name": without_paths(model.get("name") or "a model without a name")
        + (", which is the student with its adapters off" if model.get("self") else ""),
        "where": Markdown(_where(model)),
        "architecture": model.get("architecture", "of unrecorded architecture"),
        "parameters": _count(model.get("parameters")),
        "ratio": f"{mine / its:.2f}" if mine and its else "an unknown number of",
        "licence": model.get("licence") or "not known",
    }


def _where(model: dict[str, Any]) -> str:
    """Of a model: on the Hub at which revision, or which local weights."""
    if model.get("hub"):
        return f" (revision {inline(model['revision'])})" if model.get("revision") else " (revision not recorded)"
    hashed = f", hash of its weights {inline(model['fingerprint'])}" if model.get("fingerprint") else ""
    return f" (a local folder{hashed})" if model.get("name") else ""


def _count(number: int | None) -> str:
    return "an unknown number of" if number is None else f"{number:,}"


def _data(data: dict[str, Any]) -> dict[str, Any]:
    sizes = data.get("sizes", {})
    return {
        "source": source_name(data),
        "train": f"{sizes['train']:,}" if "train" in sizes else None,
        "sizes": ", ".join(f"{number:,} {split}" for split, number in sizes.items()),
        "augmentation": ", ".join(f"{key} {value}" for key, value in (data.get("augmentation") or {}).items()),
    }


def _notes(results: Results) -> list[str]:
    return [*results.get("data", {}).get("notes", []), *results.get("pairing", {}).get("notes", [])]


# ---- How good ----


def _seeds(results: Results) -> dict[str, Any]:
    runs = results.get("evaluation", {}).get("models", {}).get(ARM, {}).get("runs", {})
    found = [run["test"].get("accuracy") for run in runs.values() if "test" in run]
    values = [value for value in found if value is not None]
    if len(values) < 2:
        return {"number": len(values)}
    mean, sd = mean_and_std(values)
    return {
        "number": len(values),
        "spread": f"{100 * mean:.1f} ± {100 * sd:.1f} %",  # type: ignore[operator]
        "shown": student_seed(results),
        "chosen": results["evaluation"].get("student_seed") is not None,
    }


def _far(results: Results) -> dict[str, Any]:
    mine, its = shown_scores(results), teacher_scores(results)
    found = {"points": None, "interval": None, "teacher": None, "agreement": mine.get("agreement")}
    if mine["accuracy"] is None or its is None or its.get("accuracy") is None:
        return found
    found |= {"points": f"{100 * (mine['value'] - its['accuracy']):+.1f}", "teacher": percent(its["accuracy"])}
    if (measured := student_evaluation(results)) is None:
        return found
    difference = evaluated_student(measured).differences.get("teacher")
    if difference is not None and difference.interval is not None:
        low, high = difference.interval
        found["interval"] = f"{100 * low:+.1f} to {100 * high:+.1f}"
    return found


def arms_difference(results: Results) -> Comparison | None:
    """Test accuracy of the distilled student minus that of the student alone; None where only one was trained."""
    entries = [Comparison.of(entry, "comparison") for entry in results.get("comparison", [])]
    wanted = ("distilled", "alone", "accuracy", "test")
    return next((one for one in entries if (one.a, one.b, one.metric, one.split) == wanted), None)


def _helped(results: Results) -> str | None:
    found = arms_difference(results)
    if found is None:
        return None
    than = f"{100 * found.mean:+.1f} points against the same student trained without it"
    if found.low is None or found.high is None:
        return f"Not known: {than}, {found.note}. Another seed may turn it round."
    low, high = 100 * found.low, 100 * found.high
    verdict = "Yes" if low > 0 else "No, it did harm" if high < 0 else "No difference shown"
    holds = "; the interval holds 0" if low <= 0 <= high else ""
    return f"{verdict}: {than} ({found.note}: {low:+.1f} to {high:+.1f}{holds})."


def _cannot(results: Results) -> Markdown:
    classes, size = _classes(results), models_of(results).get("student", {}).get("image_size")
    told = [
        f"it names one of its {classes['count']} classes whatever it is shown, and never says that it does not know"
    ]
    if size:
        told.append(f"it sees {' x '.join(map(str, size))} pixels, whatever the size of the image")
    if (measured := student_evaluation(results)) is not None:
        model, evaluation = evaluated_student(measured), measured.evaluation
        name, (accuracy, _) = min(class_accuracies(model).items(), key=lambda item: item[1])
        told.append(f"its worst class is {inline(name, 40)} ({percent(accuracy)})")
        if (worst := worst_degradation(evaluation, model)) is not None:
            told.append(
                f"on degraded images its mean accuracy is {percent(degraded_mean(model))}, the lowest "
                f"{percent(worst[2])} under {inline(worst[0])} at severity {worst[1]}"
            )
        if calibration_bias(model) is not None:
            over = 100 * overconfidence(model)
            told.append(f"its confidence is {abs(over):.1f} points too {'high' if over > 0 else 'low'} on average")
    else:
        told.append("classes one by one, confidence and degraded images were not measured")
    return Markdown(f"{'; '.join(told)}.")


# ---- How it was made ----


def _objectives(entries: list[dict[str, Any]]) -> Markdown:
    if not entries:
        return Markdown("Not recorded.")
    rows: list[list[Any]] = [["name", "weight", "options"]]
    for entry in entries:
        options = {key: value for key, value in entry.items() if key not in ("name", "weight")}
        shown = ", ".join(f"{key} {value}" for key, value in options.items()) or "defaults"
        rows.append([entry["name"], entry.get("weight", 1.0), shown])
    return table(rows)


def _first_history(results: Results, section: str) -> tuple[str, History] | None:
    runs = results.get(section, {})
    return first_with_history({name: History.of(value, f"{section}.{name}") for name, value in runs.items()})


def _layer_rates(results: Results) -> str:
    if (shown := _first_history(results, "layer_rates")) is not None:
        return rates_note(*shown)
    asked = results.get("run", {}).get("settings", {}).get("layer_rates")
    return f"{asked}; nothing was measured." if asked else "one rate for all layers."


def _gradient_rule(results: Results) -> str:
    if (shown := _first_history(results, "gradient_rule")) is not None:
        return conflict_note(*shown)
    asked = results.get("run", {}).get("settings", {}).get("gradient_rule")
    return f"{asked}." if asked else "none: the gradients of all objectives are added."


def _again(results: Results) -> dict[str, Any]:
    run = results.get("run", {})
    settings = {name: _short(value) for name, value in run.get("settings", {}).items() if name not in _OWN}
    config = settings | ({"objectives": results["objectives"]} if results.get("objectives") else {})
    by = (
        f"`hf-kdtl {run['recipe'].replace('_', '-')} --config this.yaml`"
        if run.get("recipe")
        else "DistillationTrainer"
    )
    made = [f"{name} {version}" for name, version in run.get("versions", {}).items()]
    processes = run.get("processes", 1)
    return {
        "again": Markdown(f"The settings of the run, for {by}, with your own folders for data and models:"),
        "config": fenced(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), "yaml"),
        "made_with": f"Trained with {', '.join(made) or 'versions that were not recorded'}, on {processes} "
        f"process{'es' if processes > 1 else ''}, {run.get('device', 'a device that was not recorded')}.",
    }


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return without_paths(value) if isinstance(value, str) else value


# ---- Limits ----


def _limits(results: Results) -> Iterable[str]:
    data, measured = results.get("data", {}), student_evaluation(results)
    classes, sizes = data.get("classes", []), data.get("sizes", {})
    if classes and "train" in sizes:
        yield f"It learned from {sizes['train']:,} images, {sizes['train'] / len(classes):,.0f} a class in the mean."
    if (number := _seeds(results)["number"]) == 1:
        yield "One training run: how far another seed would be from it is not known."
    elif not number:
        yield "No accuracy on test images was measured."
    yield (
        "The test images come from where the training images came from. Other cameras, places and seasons, and groups "
        "of people or things that the data does not tell apart, were not measured."
    )
    yield "Images made to mislead it (adversarial ones) and images of none of its classes were not measured."
    if measured is None:
        yield "Not measured: its classes one by one, degraded images, what moves it, memory and time of one image."
        return
    evaluation = measured.evaluation
    if evaluation.degraded is None:
        yield "Degraded images were not measured."
    elif evaluation.degradations_left_out:
        yield f"Degradations that were not measured: {', '.join(evaluation.degradations_left_out)}."
    for found in evaluation.fidelity.values():
        for what, why in found.reasons.items():
            yield without_paths(f"Not measured, {what.replace('_', ' ')}: {why}")
    yield "Times hold for the device that they were measured on, and for what else it had to do."
