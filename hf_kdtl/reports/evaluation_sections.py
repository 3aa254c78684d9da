"""The sections of an evaluation's report below its first screen: scores, confidence, degraded images, classes, CKA.

Figures are numbered by student where there are several: classes.png, or classes-1.png, classes-2.png, ...
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from hf_kdtl.evaluation.records import EvaluatedModel, Evaluation, Fidelity
from hf_kdtl.reports.evaluation_values import models_with_role, references, scores_of
from hf_kdtl.reports.figures.calibration import reliability_figure
from hf_kdtl.reports.figures.cka import cka_figure
from hf_kdtl.reports.figures.classes import classes_figure
from hf_kdtl.reports.figures.confusion import confusion_figure
from hf_kdtl.reports.figures.degraded import degradations_figure
from hf_kdtl.reports.score_tables import scores_note, scores_table
from hf_kdtl.utils.text import escape_markdown, markdown_table, percent

RELIABILITY, DEGRADED = "reliability.png", "degradations.png"
FIGURES = ("reliability", "degradations", "classes", "confusion", "cka", "disagreement")


def figure_name(evaluation: Evaluation, student: str, what: str) -> str:
    """The file of a student's figure of one of FIGURES."""
    students = list(models_with_role(evaluation, "student"))
    return f"{what}.png" if len(students) == 1 else f"{what}-{students.index(student) + 1}.png"


def sections(evaluation: Evaluation, folder: Path) -> list[str]:
    """Draw the figures into `folder`; return the lines that show them, with what there is to know about each."""
    models = evaluation.models
    reliability_figure(models, folder / RELIABILITY)
    scores = {name: [scores_of(evaluation, name)] for name in models}
    lines = ["## All scores", "", scores_table(scores), "", scores_note(scores), ""]
    lines += [*_shown("Confidence", RELIABILITY, "accuracy by confidence"), RELIABILITY_NOTE, ""]
    if evaluation.degraded is not None:
        degradations_figure(models, evaluation.degraded.severities, folder / DEGRADED)
        lines += _shown("Degraded images", DEGRADED, "accuracy against severity")
        lines += [_degraded_note(evaluation), "", degraded_table(evaluation), ""]
    for student in models_with_role(evaluation, "student"):
        lines += _of_student(evaluation, student, folder)
    return lines


def _of_student(evaluation: Evaluation, student: str, folder: Path) -> list[str]:
    others, model, lines = references(evaluation), evaluation.models[student], []
    if others:
        file, role = figure_name(evaluation, student, "classes"), next(iter(others))
        which = classes_figure(model, others, folder / file)
        title = f"Classes: {escape_markdown(student)}"
        lines += [*_shown(title, file, "change of each class's accuracy"), which, ""]
        file = figure_name(evaluation, student, "confusion")
        which = confusion_figure(model, others[role], role, folder / file)
        lines += [*_shown(None, file, "change of the confusion matrix"), f"{CONFUSION_NOTE} {which}".strip(), ""]
    if (found := evaluation.fidelity.get(student)) is not None:
        lines += [f"## Similarity to the teacher: {escape_markdown(student)}", "", fidelity_note(found), ""]
        if found.cka is not None:
            file = figure_name(evaluation, student, "cka")
            cka_figure(found.cka.matrix, folder / file)
            lines += [*_shown(None, file, "CKA of the blocks"), CKA_NOTE, ""]
    if (caption := evaluation.disagreement.get(student)) is not None:
        file = figure_name(evaluation, student, "disagreement")
        lines += [*_shown(f"Largest disagreements: {escape_markdown(student)}", file, "images"), caption, ""]
    return lines


def _shown(title: str | None, file: str, what: str) -> list[str]:
    return [*([f"## {title}", ""] if title else []), f"![{what}]({file})", ""]


RELIABILITY_NOTE = (
    "Images are grouped into 15 bins by the probability of the predicted class. A bar that ends on the dashed line: "
    "accuracy equals confidence; below it: the model is over-confident. Bins with few images (lower panels) say "
    "little."
)
CONFUSION_NOTE = (
    "A row is a true class, a column a predicted class, a number the change in points. Red is worse than the other "
    "model: fewer correct (on the diagonal), or more of this error (off the diagonal). Blue is better."
)
CKA_NOTE = (
    "How similar the features of two blocks are (mean over the patch tokens): 1 is equal up to rotation and scale, 0 "
    "is "
    "unrelated. A bright diagonal: the student's blocks compute what the teacher's do in the same order. Neither is "
    "better in itself."
)


def _degraded_note(evaluation: Evaluation) -> str:
    degraded = evaluation.degraded
    assert degraded is not None
    number, total = degraded.images, evaluation.images
    which = f"{evaluation.split} images"
    which = f"All {total:,} {which}" if number == total else f"{number:,} of the {total:,} {which} (drawn with seed 0)"
    return (
        f"{which}, the same pixels for every model: degraded at a shorter side of at most "
        f"{degraded.side} px, then passed to each model's own image processor. An accuracy on {number:,} images has "
        f"an error of up to ±{100 * 0.98 / number**0.5:.1f} points. The severities: docs/degradations.md."
    )


def degraded_table(evaluation: Evaluation) -> str:
    """Accuracy of each model under each degradation, mean over severities, and relative to the clean accuracy."""
    models = evaluation.models
    names = next((list(model.by_degradation) for model in models.values() if model.by_degradation), [])
    rows = [["mean over severities", *map(escape_markdown, models)]]
    rows.append(["`clean`", *(percent(model.clean_accuracy) for model in models.values())])
    rows += [[f"`{name}`", *(_relative(model, name) for model in models.values())] for name in names]
    return markdown_table(rows)


def _relative(model: EvaluatedModel, name: str) -> str:
    if name not in model.by_degradation:
        return "-"
    mean, clean = fmean(model.by_degradation[name]), model.clean_accuracy
    return f"{percent(mean)} ({percent(mean / clean)} of clean)" if clean else percent(mean)


def fidelity_note(found: Fidelity) -> str:
    """Jacobian cosine and attention agreement in words, and why what is missing is missing."""
    lines = [f"{found.images:,} images; the teacher gets the student's pixels, resized to its own input size."]
    if found.jacobian_cosine is not None:
        lines.append(
            "Cosine between the input gradients of the two models, for the teacher's predicted class: mean "
            f"{found.jacobian_cosine:.2f} (1: sensitive to the same pixels, 0: unrelated)."
        )
    if found.attention_agreement is not None:
        lines.append(
            f"Agreement of the class tokens' attention: {found.attention_agreement.mean:.2f}, mean over paired blocks "
            "(1: "
            "the same places)."
        )
    lines += [f"No {what.replace('_', ' ')}: {escape_markdown(why)}" for what, why in found.reasons.items()]
    return " ".join(lines)
