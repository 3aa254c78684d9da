"""The figures of a card: which ones results.json has, and their tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hf_kdtl.evaluation.records import EvaluatedModel, Evaluation, StudentEvaluation
from hf_kdtl.evaluation.records import Results as TypedResults
from hf_kdtl.evaluation.scoring import accuracy_interval
from hf_kdtl.hub.markdown import Markdown
from hf_kdtl.reports.evaluation_findings import confidence_text, sentences
from hf_kdtl.reports.evaluation_sections import degraded_table, fidelity_note
from hf_kdtl.reports.evaluation_summary import verdict_table
from hf_kdtl.reports.evaluation_values import calibration_text, models_with_role, scores_of
from hf_kdtl.reports.run_report import ARMS, SPLITS, note, table
from hf_kdtl.reports.score_tables import scores_note, scores_table
from hf_kdtl.utils.redaction import local_name
from hf_kdtl.utils.text import escape_markdown, percent

Results = dict[str, Any]
ARM = "distilled"
"""How results.json calls the runs of the student that is published."""
NOT = "not measured."
SIMILARITY = "Similarity to the teacher inside"


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


def student_evaluation(results: Results) -> StudentEvaluation | None:
    """What hf-kdtl evaluate measured of the student; None where it was not run."""
    section = results.get("student_evaluation")
    return None if section is None else StudentEvaluation.of(section, "student_evaluation")


def evaluated_student(found: StudentEvaluation) -> EvaluatedModel:
    """The student among the models of its evaluation."""
    return next(iter(models_with_role(found.evaluation, "student").values()))


def student_seed(results: Results) -> str | None:
    """The seed of the student that is published: the best on validation, or where that is not recorded, the first."""
    evaluation = results.get("evaluation", {})
    runs, seed = evaluation.get("models", {}).get(ARM, {}).get("runs", {}), str(evaluation.get("student_seed"))
    return seed if seed in runs else next(iter(runs), None)


def split_scores(results: Results) -> tuple[str, dict[str, float]]:
    """(split, the student's metrics on it), test where it was measured; ("", {}) where nothing was."""
    runs = results.get("evaluation", {}).get("models", {}).get(ARM, {}).get("runs", {})
    shown: dict[str, Any] = runs.get(student_seed(results), {})
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
    measured = student_evaluation(results)
    found: dict[str, Any] = {"measured": _measured(results), "degraded": None, "lost": [], "by_seed": None,
                             "by_seed_note": None} | _figures(results)  # fmt: skip
    runs = _test_runs(results)
    if any(len(scores) > 1 for arm in runs.values() for scores in arm):
        found |= {"by_seed": Markdown(scores_table(runs)), "by_seed_note": Markdown(scores_note(runs))}
    if measured is not None:
        found["lost"] = [Markdown(line) for line in sentences(measured.evaluation, evaluated_student(measured))]
        if measured.evaluation.degraded is not None:
            found["degraded"] = Markdown(degraded_table(measured.evaluation))
    return found


def _test_runs(results: Results) -> dict[str, list[dict[str, float]]]:
    models = results.get("evaluation", {}).get("models", {})
    runs = {ARMS.get(arm, arm): [run["test"] for run in model["runs"].values() if "test" in run]
            for arm, model in models.items()}  # fmt: skip
    return {arm: found for arm, found in runs.items() if found}


def _figures(results: Results) -> dict[str, Markdown]:
    if (measured := student_evaluation(results)) is not None:
        evaluation = measured.evaluation
        notes = [f"On {evaluation.images:,} {evaluation.split} images.", *_baseline(results, evaluation)]
        notes.append(f"Images/s and memory: batch size {evaluation.batch_size}, {escape_markdown(measured.device)}.")
        return {"figures": Markdown(verdict_table(evaluation)), "figures_note": Markdown(" ".join(notes))}
    typed = TypedResults.of({name: results[name] for name in ("run", "evaluation") if name in results})
    if typed.evaluation.models and all(_tabled(model) for model in typed.evaluation.models.values()):
        return {"figures": Markdown(table(typed.evaluation)), "figures_note": Markdown(note(typed))}
    split, found = split_scores(results)
    if not found:
        return {"figures": Markdown("Not measured."), "figures_note": Markdown("")}
    chosen = ", by which settings may have been chosen" if split == "validation" else ""
    table_of_one = Markdown(scores_table({"student": [found]}))
    return {"figures": table_of_one, "figures_note": Markdown(f"On the {split} split{chosen}.")}


def _tabled(model: EvaluatedModel) -> bool:
    """Whether the report's table has a row for it."""
    accuracies = [run.get(split, {}).get("accuracy") for run in model.runs.values() for split in SPLITS]
    return None not in (model.parameters, model.images_per_second, *accuracies)


def _baseline(results: Results, evaluation: Evaluation) -> list[str]:
    """What the evaluation's baseline is: known by its scores where it is the student alone."""
    if (its := evaluation.models.get("baseline")) is None:
        return []
    nll = next(iter(its.runs.values()))["test"].get("nll")
    runs = results.get("evaluation", {}).get("models", {}).get("alone", {}).get("runs", {})
    alone = {seed: run["test"].get("nll") for seed, run in runs.items() if "test" in run}
    if nll is None or None in alone.values():
        return []  # the scores do not tell
    for seed, value in alone.items():
        if math.isclose(value, nll, rel_tol=1e-4):
            return [f"The baseline is the same student trained without the teacher, seed {escape_markdown(seed)}."]
    return ["The baseline is another model, which this student would replace."]


def _measured(results: Results) -> dict[str, str]:
    """A line for each of the four things that a card has to report; what was not measured says so."""
    measured = student_evaluation(results)
    if measured is None:
        ece = split_scores(results)[1].get("ece")
        known = {} if ece is None else {"Calibration": f"expected calibration error {percent(ece)}."}
        return dict.fromkeys((SIMILARITY, "Calibration", "Degraded images", "Cost"), NOT) | known
    student, evaluation = evaluated_student(measured), measured.evaluation
    fidelity = next(iter(evaluation.fidelity.values()), None)
    ece = scores_of(evaluation, next(iter(models_with_role(evaluation, "student")))).get("ece")
    return {
        SIMILARITY: Markdown(fidelity_note(fidelity)) if fidelity else NOT,
        "Calibration": f"expected calibration error {percent(ece)}; {confidence_text(student)}: "
        f"{calibration_text(student)}.",
        "Degraded images": _degraded(evaluation),
        "Cost": _cost(student),
    }


def _degraded(evaluation: Evaluation) -> str:
    if (degraded := evaluation.degraded) is None:
        return NOT
    severities = ", ".join(map(str, degraded.severities))
    return f"accuracy on {degraded.images:,} of the images, mean over the severities {severities}, in the table below."


def _cost(student: EvaluatedModel) -> str:
    single = student.latency_ms.get("1")
    if student.flops is None or student.file_bytes is None or single is None:
        return NOT
    return (
        f"{student.flops / 1e9:.3g} GFLOP and {single.median:.1f} ms for one image "
        f"({student.device}, {student.dtype}), a file of {student.file_bytes / 1e6:.1f} MB."
    )
