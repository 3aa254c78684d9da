"""The figures of a card: which ones results.json has, and their tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hf_kdtl.evaluation.scoring import accuracy_interval
from hf_kdtl.hub.markdown import Markdown
from hf_kdtl.reports.evaluation_findings import sentences
from hf_kdtl.reports.evaluation_sections import degraded_table, fidelity_note
from hf_kdtl.reports.evaluation_summary import verdict_table
from hf_kdtl.reports.evaluation_values import calibration_text, mean_of_bins, models_with_role, scores_of
from hf_kdtl.reports.run_report import ARMS, SPLITS, note, table
from hf_kdtl.reports.score_tables import scores_note, scores_table
from hf_kdtl.utils.redaction import local_name
from hf_kdtl.utils.text import escape_markdown, percent

Results = dict[str, Any]
ARM = "distilled"
"""How results.json calls the runs of the student that is published."""
NOT = "not measured."


def models_of(results: Results) -> dict[str, Any]:
    """The section `models`; of a run that has none, what its other sections say of student and teacher."""
    if "models" in results:
        return results["models"]
    found, settings = results.get("evaluation", {}).get("models", {}), results.get("run", {}).get("settings", {})
    models = {"student": {"parameters": found.get(ARM, {}).get("parameters")}}
    if "teacher" in found or "teacher" in results.get("pairing", {}) or settings.get("teacher"):
        name = source_name({"source": settings.get("teacher")})
        models["teacher"] = {"name": name, "parameters": found.get("teacher", {}).get("parameters")}
    return models


def saved_adapters(results: Results) -> bool:
    """Whether adapters alone are published, and not a whole model."""
    student = models_of(results).get("student", {})
    return bool(student.get("adapters")) and not student.get("merged")


def source_name(data: dict[str, Any]) -> str | None:
    """The data by name: as on the Hub, or the last part of a path."""
    if not (source := data.get("source")):
        return None
    return source if data.get("hub") else local_name(source)


def judged_student(results: Results) -> dict[str, Any] | None:
    """What hf-kdtl evaluate found of the student; None where it was not run."""
    evaluation = results.get("judged", {}).get("evaluation")
    return None if evaluation is None else next(iter(models_with_role(evaluation, "student").values()))


def first_seed(results: Results) -> str | None:
    """The seed of the student that is published."""
    return next(iter(results.get("evaluation", {}).get("models", {}).get(ARM, {}).get("runs", {})), None)


def split_scores(results: Results) -> tuple[str, dict[str, float]]:
    """(split, the student's metrics on it), test where it was measured; ("", {}) where nothing was."""
    runs = results.get("evaluation", {}).get("models", {}).get(ARM, {}).get("runs", {})
    shown: dict[str, Any] = next(iter(runs.values()), {})
    for split in reversed(SPLITS):
        if found := {name: value for name, value in shown.get(split, {}).items() if value is not None}:
            return split, found
    return "", {}


def shown_scores(results: Results) -> dict[str, Any]:
    """What the card says of the student's accuracy."""
    split, found = split_scores(results)
    shown: dict[str, Any] = {"split": split, "all": found, "value": found.get("accuracy"), "accuracy": None}
    if shown["value"] is None:
        return shown | {"split": ""}
    images = results.get("data", {}).get("sizes", {}).get(split)
    shown |= {"accuracy": percent(shown["value"]), "images": f"{images:,}" if images else "an unknown number of"}
    shown["interval"] = _interval(shown["value"], images)
    if "agreement" in found:
        shown["agreement"] = percent(found["agreement"])
    return shown


def _interval(accuracy: float, images: int | None) -> str:
    bounds = accuracy_interval(np.arange(images) < round(accuracy * images)) if images else None
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %" if bounds else "not measured"


def teacher_scores(results: Results) -> dict[str, float] | None:
    """The teacher's metrics on the split that the student's are shown of."""
    runs = results.get("evaluation", {}).get("models", {}).get("teacher", {}).get("runs", {})
    found: dict[str, Any] = next(iter(runs.values()), {})
    return found.get(split_scores(results)[0])


def measured_section(results: Results) -> dict[str, Any]:
    """The template's values from `figures` to `lost`."""
    student, evaluation = judged_student(results), results.get("judged", {}).get("evaluation")
    found: dict[str, Any] = {"measured": _measured(results), "degraded": None, "lost": [], "by_seed": None,
                             "by_seed_note": None} | _figures(results)  # fmt: skip
    runs = _test_runs(results)
    if any(len(scores) > 1 for arm in runs.values() for scores in arm):
        found |= {"by_seed": Markdown(scores_table(runs)), "by_seed_note": Markdown(scores_note(runs))}
    if student is not None:
        found["lost"] = [Markdown(line) for line in sentences(evaluation, student)]
        if "degraded" in evaluation:
            found["degraded"] = Markdown(degraded_table(evaluation))
    return found


def _test_runs(results: Results) -> dict[str, list[dict[str, float]]]:
    models = results.get("evaluation", {}).get("models", {})
    runs = {ARMS.get(arm, arm): [run["test"] for run in model["runs"].values() if "test" in run]
            for arm, model in models.items()}  # fmt: skip
    return {arm: found for arm, found in runs.items() if found}


def _figures(results: Results) -> dict[str, Markdown]:
    judged = results.get("judged")
    if judged is not None:
        evaluation = judged["evaluation"]
        said = [f"On {evaluation['images']:,} {evaluation['split']} images.", *_baseline(results)]
        said.append(
            f"Images/s and memory: batch size {evaluation['batch_size']}, {escape_markdown(judged['device'])}."
        )
        return {"figures": Markdown(verdict_table(evaluation)), "figures_note": Markdown(" ".join(said))}
    models = results.get("evaluation", {}).get("models", {})
    if models and all(_tabled(model) for model in models.values()):
        return {"figures": Markdown(table(results)), "figures_note": Markdown(note(results))}
    split, found = split_scores(results)
    if not found:
        return {"figures": Markdown("Not measured."), "figures_note": Markdown("")}
    chosen = ", by which settings may have been chosen" if split == "validation" else ""
    table_of_one = Markdown(scores_table({"student": [found]}))
    return {"figures": table_of_one, "figures_note": Markdown(f"On the {split} split{chosen}.")}


def _tabled(model: dict[str, Any]) -> bool:
    """Whether the report's table has a row for it."""
    known = [model.get(what) for what in ("parameters", "images_per_second")]
    known += [run.get(split, {}).get("accuracy") for run in model["runs"].values() for split in SPLITS]
    return None not in known


def _baseline(results: Results) -> list[str]:
    """What the evaluation's baseline is: known by its scores where it is the student alone."""
    its = results["judged"]["evaluation"]["models"].get("baseline")
    if its is None:
        return []
    nll = next(iter(its["runs"].values()))["test"].get("nll")
    runs = results.get("evaluation", {}).get("models", {}).get("alone", {}).get("runs", {})
    alone = {seed: run["test"].get("nll") for seed, run in runs.items() if "test" in run}
    if None in (nll, *alone.values()):
        return []  # not to be told apart
    for seed, value in alone.items():
        if math.isclose(value, nll, rel_tol=1e-4):
            return [f"The baseline is the same student trained without the teacher, seed {escape_markdown(seed)}."]
    return ["The baseline is another model, which this student would replace."]


def _measured(results: Results) -> dict[str, str]:
    """A line for each of the four things that a card has to tell; what was not measured says so."""
    student, evaluation = judged_student(results), results.get("judged", {}).get("evaluation", {})
    if student is None:
        ece = split_scores(results)[1].get("ece")
        known = {} if ece is None else {"Calibration": f"expected calibration error {percent(ece)}."}
        return dict.fromkeys(("Likeness inside", "Calibration", "Degraded images", "Cost"), NOT) | known
    fidelity = next(iter(evaluation.get("fidelity", {}).values()), None)
    name = next(iter(models_with_role(evaluation, "student")))
    ece = scores_of(evaluation, name).get("ece")
    claimed, held = (percent(mean_of_bins(student, key)) for key in ("confidence", "accuracy"))
    degraded = evaluation.get("degraded")
    single = student["latency_ms"]["1"]["median"] if "latency_ms" in student else None
    return {
        "Likeness inside": Markdown(fidelity_note(fidelity)) if fidelity else NOT,
        "Calibration": f"expected calibration error {percent(ece)}; it claims {claimed} in the mean and is right in "
        f"{held}: {calibration_text(student)}.",
        "Degraded images": f"accuracy on {degraded['images']:,} of the images, mean over the severities "
        f"{', '.join(map(str, degraded['severities']))}, in the table below."
        if degraded
        else NOT,
        "Cost": NOT
        if single is None
        else f"{student['flops'] / 1e9:.3g} GFLOP and {single:.1f} ms for one image "
        f"({student['device']}, {student['dtype']}), a file of {student['file_bytes'] / 1e6:.1f} MB.",
    }
