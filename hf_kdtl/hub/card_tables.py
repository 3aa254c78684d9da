"""The figures of a card: which ones results.json has, and their tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hf_kdtl.evaluation.model_records import ModelFacts, Models
from hf_kdtl.evaluation.records import Data, EvaluatedModel, Evaluation, Results, Scores, headline
from hf_kdtl.evaluation.scoring import accuracy_interval
from hf_kdtl.hub.markdown import Markdown
from hf_kdtl.models.forward.embedding import HEADLESS
from hf_kdtl.reports.embedding import embedding_sentence
from hf_kdtl.reports.evaluation_findings import confidence_text, sentences
from hf_kdtl.reports.evaluation_sections import degraded_table, fidelity_note
from hf_kdtl.reports.evaluation_summary import verdict_table
from hf_kdtl.reports.evaluation_values import calibration_text, models_with_role, scores_of
from hf_kdtl.reports.export_section import export_sentence
from hf_kdtl.reports.run_report import SPLITS, arm_names, note, table
from hf_kdtl.reports.score_tables import scores_note, scores_table
from hf_kdtl.utils.redaction import local_name
from hf_kdtl.utils.text import escape_markdown, percent

ARM = "distilled"
"""What results.json calls the runs of the student that is published."""
NOT = "not measured."
SIMILARITY = "Similarity to the teacher inside"


def models_of(results: Results) -> Models:
    """The section `models`; of a run that has none, what its other sections say of student and teacher."""
    if results.models is not None:
        return results.models
    trained, teacher = results.evaluation.models, results.run.settings.get("teacher")
    if isinstance(teacher, dict):
        several = {name: ModelFacts(name=local_name(str(path))) for name, path in teacher.items()}
        return Models(student=ModelFacts(parameters=_parameters(trained, ARM)), teachers=several)
    found = None
    if "teacher" in trained or "teacher" in results.pairing or teacher:
        found = ModelFacts(name=local_name(teacher) if teacher else None, parameters=_parameters(trained, "teacher"))
    return Models(student=ModelFacts(parameters=_parameters(trained, ARM)), teacher=found)


def is_headless(results: Results) -> bool:
    """Whether the student has no classifier."""
    return models_of(results).student.architecture in HEADLESS


def is_of_several(results: Results) -> bool:
    """Whether the student gives an image several labels."""
    return models_of(results).student.multi_label or results.evaluation.headline == "map"


def _parameters(models: dict[str, EvaluatedModel], name: str) -> int | None:
    return models[name].parameters if name in models else None


def source_name(data: Data) -> str | None:
    """The data by name: as on the Hub, or the last part of a path."""
    return data.source if data.hub or not data.source else local_name(data.source)


def evaluated_student(evaluation: Evaluation) -> EvaluatedModel:
    """The student among the models of its evaluation."""
    return next(iter(models_with_role(evaluation, "student").values()))


def runs_of(results: Results, name: str) -> dict[str, dict[str, Scores]]:
    """{seed: {split: scores}} of the teacher, or of a way of training the student."""
    models = results.evaluation.models
    return models[name].runs if name in models else {}


def split_scores(results: Results) -> tuple[str, dict[str, float]]:
    """(split, the student's metrics on it), test where it was measured; ("", {}) where nothing was."""
    shown = runs_of(results, ARM).get(results.evaluation.student_run or "", {})
    for split in reversed(SPLITS):
        if found := {name: value for name, value in shown.get(split, {}).items() if value is not None}:
            return split, found
    return "", {}


def shown_scores(results: Results) -> dict[str, Any]:
    """What the card says of the student's accuracy."""
    split, found = split_scores(results)
    name = headline(found)
    shown: dict[str, Any] = {"split": split, "all": found, "value": found.get(name), "accuracy": None, "metric": name}
    shown["word"] = {"accuracy": "Accuracy", "map": "Mean average precision"}[name]
    if shown["value"] is None:
        return shown | {"split": ""}
    images = results.data.sizes.get(split)
    shown |= {"accuracy": percent(shown["value"]), "images": f"{images:,}" if images else "an unknown number of"}
    shown["interval"] = _interval(shown["value"], images) if name == "accuracy" else None
    if "agreement" in found:
        shown["agreement"] = percent(found["agreement"])
    return shown


def _interval(accuracy: float, images: int | None) -> str:
    if not images:
        return "95% interval not measured"
    right = round(accuracy * images)
    if (bounds := accuracy_interval(np.arange(images) < right)) is None:
        return f"no interval over images: {'all' if right else 'none'} of them are right"
    return f"95% interval {100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %, over images"


def teacher_scores(results: Results, name: str = "teacher") -> Scores:
    """A teacher's metrics on the split that the student's are shown of; empty where there are none."""
    run: dict[str, Scores] = next(iter(runs_of(results, name).values()), {})
    return run.get(split_scores(results)[0], {})


def measured_section(results: Results) -> dict[str, Any]:
    """The template's values from `figures` to `lost`."""
    measured = results.student_evaluation
    found: dict[str, Any] = {"measured": _measured(results), "degraded": None, "lost": [], "by_seed": None,
                             "by_seed_note": None} | _figures(results)  # fmt: skip
    runs = _test_runs(results)
    if any(len(scores) > 1 for arm in runs.values() for scores in arm):
        found |= {"by_seed": Markdown(scores_table(runs)), "by_seed_note": Markdown(scores_note(runs))}
    if results.export is not None:
        found["measured"] |= {"Exported as ONNX": Markdown(export_sentence(results.export))}
    if measured is not None:
        found["lost"] = [
            Markdown(line) for line in sentences(measured.evaluation, evaluated_student(measured.evaluation))
        ]
        if measured.evaluation.degraded is not None:
            found["degraded"] = Markdown(degraded_table(measured.evaluation))
    return found


def _test_runs(results: Results) -> dict[str, list[Scores]]:
    names = arm_names(results.evaluation)
    runs = {names[arm]: [run["test"] for run in model.runs.values() if "test" in run]
            for arm, model in results.evaluation.models.items()}  # fmt: skip
    return {arm: found for arm, found in runs.items() if found}


def _figures(results: Results) -> dict[str, Markdown]:
    if (measured := results.student_evaluation) is not None:
        evaluation = measured.evaluation
        notes = [f"On {evaluation.images:,} {evaluation.split} images.", *_baseline(results, evaluation)]
        notes.append(f"Images/s and memory: batch size {evaluation.batch_size}, {escape_markdown(measured.device)}.")
        return {"figures": Markdown(verdict_table(evaluation)), "figures_note": Markdown(" ".join(notes))}
    models = results.evaluation.models
    if models and all(_tabled(model) for model in models.values()):
        return {"figures": Markdown(table(results.evaluation)), "figures_note": Markdown(note(results))}
    split, found = split_scores(results)
    if not found:
        return {"figures": Markdown("Not measured."), "figures_note": Markdown("")}
    chosen = ", by which settings may have been chosen" if split == "validation" else ""
    table_of_one = Markdown(scores_table({"student": [found]}))
    return {"figures": table_of_one, "figures_note": Markdown(f"On the {split} split{chosen}.")}


def _tabled(model: EvaluatedModel) -> bool:
    """Whether the report's table has a row for it."""
    accuracies = [run.get(split, {}).get(model.headline) for run in model.runs.values() for split in SPLITS]
    return None not in (model.parameters, model.images_per_second, *accuracies)


def _baseline(results: Results, evaluation: Evaluation) -> list[str]:
    """What the evaluation's baseline is: known by its scores where it is the student alone."""
    if (its := evaluation.models.get("baseline")) is None:
        return []
    nll = next(iter(its.runs.values()))["test"].get("nll")
    alone = {seed: run["test"].get("nll") for seed, run in runs_of(results, "alone").items() if "test" in run}
    if nll is None or None in alone.values():
        return []  # the scores do not show which
    for seed, value in alone.items():
        if value is not None and math.isclose(value, nll, rel_tol=1e-4):
            return [f"The baseline is the same student trained without the teacher, seed {escape_markdown(seed)}."]
    return ["The baseline is another model, which this student would replace."]


def _measured(results: Results) -> dict[str, str]:
    """A line for each of the four things that a card has to report; what was not measured says so."""
    measured = results.student_evaluation
    if is_headless(results):
        known = {"Calibration": "it has no classifier."}
        if inside := embedding_sentence(results, ("agreement", "cka")):
            known[SIMILARITY] = inside
        return dict.fromkeys((SIMILARITY, "Calibration", "Degraded images", "Cost"), NOT) | known
    if measured is None:
        ece = split_scores(results)[1].get("ece")
        known = {} if ece is None else {"Calibration": f"expected calibration error {percent(ece)}."}
        return dict.fromkeys((SIMILARITY, "Calibration", "Degraded images", "Cost"), NOT) | known
    evaluation, student = measured.evaluation, evaluated_student(measured.evaluation)
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
