"""The sections of an evaluation's report below its first screen: scores, confidence, degraded images, classes, CKA.

Pictures are named by student where there are several: classes.png, or classes-1.png, classes-2.png, ...
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from hf_kdtl.reports.evaluation_values import models_with_role, references, scores_of
from hf_kdtl.reports.figures.calibration import reliability_figure
from hf_kdtl.reports.figures.cka import cka_figure
from hf_kdtl.reports.figures.classes import classes_figure
from hf_kdtl.reports.figures.confusion import confusion_figure
from hf_kdtl.reports.figures.degraded import degradations_figure
from hf_kdtl.reports.score_tables import scores_note, scores_table
from hf_kdtl.utils.text import escape_markdown, markdown_table, percent

RELIABILITY, DEGRADED = "reliability.png", "degradations.png"
PICTURES = ("reliability", "degradations", "classes", "confusion", "cka", "disagreement")


def picture_name(evaluation: dict[str, Any], student: str, what: str) -> str:
    """The file of a student's picture of one of PICTURES."""
    students = list(models_with_role(evaluation, "student"))
    return f"{what}.png" if len(students) == 1 else f"{what}-{students.index(student) + 1}.png"


def sections(evaluation: dict[str, Any], folder: Path) -> list[str]:
    """Draw the pictures into `folder`; return the lines that show them, with what there is to know about each."""
    models = evaluation["models"]
    reliability_figure(models, folder / RELIABILITY)
    scores = {name: [scores_of(evaluation, name)] for name in models}
    lines = ["## All scores", "", scores_table(scores), "", scores_note(scores), ""]
    lines += [*_shown("Confidence", RELIABILITY, "accuracy by confidence"), RELIABILITY_NOTE, ""]
    if (degraded := evaluation.get("degraded")) is not None:
        degradations_figure(models, degraded["severities"], folder / DEGRADED)
        lines += _shown("Degraded images", DEGRADED, "accuracy against severity")
        lines += [_degraded_note(evaluation), "", degraded_table(evaluation), ""]
    for student in models_with_role(evaluation, "student"):
        lines += _of_student(evaluation, student, folder)
    return lines


def _of_student(evaluation: dict[str, Any], student: str, folder: Path) -> list[str]:
    others, model, lines = references(evaluation), evaluation["models"][student], []
    if others:
        file, role = picture_name(evaluation, student, "classes"), next(iter(others))
        which = classes_figure(model, others, folder / file)
        lines += [*_shown(f"Classes: {escape_markdown(student)}", file, "gain and loss of each class"), which, ""]
        file = picture_name(evaluation, student, "confusion")
        which = confusion_figure(model, others[role], role, folder / file)
        lines += [*_shown(None, file, "difference of the confusions"), f"{CONFUSION_NOTE} {which}".strip(), ""]
    if (found := evaluation.get("fidelity", {}).get(student)) is not None:
        lines += [f"## Like the teacher inside? {escape_markdown(student)}", "", fidelity_note(found), ""]
        if found["cka"] is not None:
            file = picture_name(evaluation, student, "cka")
            cka_figure(found["cka"]["matrix"], folder / file)
            lines += [*_shown(None, file, "CKA of the blocks"), CKA_NOTE, ""]
    if (caption := evaluation.get("disagreement", {}).get(student)) is not None:
        file = picture_name(evaluation, student, "disagreement")
        lines += [*_shown(f"Where they disagree most: {escape_markdown(student)}", file, "images"), caption, ""]
    return lines


def _shown(title: str | None, file: str, what: str) -> list[str]:
    return [*([f"## {title}", ""] if title else []), f"![{what}]({file})", ""]


RELIABILITY_NOTE = (
    "Images are sorted into 15 bins by the probability that the model gives its answer. Where a bar ends on the "
    "dashed line, the model is right as often as it claims; below, it claims too much. A bin with few "
    "images (lower panels) says little."
)
CONFUSION_NOTE = (
    "A row is a true class, a number the change in points. Red is worse than the other model: less often right (on "
    "the diagonal), or a mistake that is made more often (beside it). Blue is better."
)
CKA_NOTE = (
    "How alike the features of two blocks are (mean over the patch tokens): 1 is the same up to rotation and scale, 0 "
    "unrelated. A bright diagonal means that the student took the teacher's way, a dark one that it found its own; "
    "neither is better in itself."
)


def _degraded_note(evaluation: dict[str, Any]) -> str:
    degraded = evaluation["degraded"]
    number, total = degraded["images"], evaluation["images"]
    which = f"all {total:,}" if number == total else f"{number:,} of the {total:,} (drawn once, with seed 0)"
    return (
        f"On {which} {evaluation['split']} images, the same pixels for every model: degraded at a shorter side of at "
        f"most {degraded['side']} px, then handed to each model's own image processor. An accuracy on {number:,} "
        f"images is known to about ±{100 * 0.98 / number**0.5:.1f} points. What the severities are: "
        "docs/degradations.md."
    )


def degraded_table(evaluation: dict[str, Any]) -> str:
    """Accuracy of each model under each degradation, mean over severities, and the share that is left of the clean."""
    models = {name: model["degraded"] for name, model in evaluation["models"].items()}
    names = ["clean", *(name for name in next(iter(models.values())) if name != "clean")]
    rows = [["mean over severities", *map(escape_markdown, models)]]
    for name in names:
        rows.append([f"`{name}`", *(_left(found, name) for found in models.values())])
    return markdown_table(rows)


def _left(found: dict[str, Any], name: str) -> str:
    clean = found["clean"]
    if name == "clean":
        return percent(clean)
    mean = fmean(found[name])
    return f"{percent(mean)} ({percent(mean / clean)} left)" if clean else percent(mean)


def fidelity_note(found: dict[str, Any]) -> str:
    """Jacobian cosine and attention agreement in words, and why what is missing is missing."""
    lines = [f"On {found['images']:,} images; the teacher is shown the student's pixels, resized to its own size."]
    if (cosine := found["jacobian_cosine"]) is not None:
        lines.append(
            f"Do the same pixels move both? The cosine of the gradients of the likeliest class is {cosine:.2f} in the "
            "mean (1: the same pixels, 0: unrelated)."
        )
    if (agreement := found["attention_agreement"]) is not None:
        lines.append(
            f"Do they look at the same places? Agreement of the class tokens' attention {agreement['mean']:.2f} in "
            "the mean over paired blocks (1: the same places)."
        )
    lines += [f"No {what.replace('_', ' ')}: {escape_markdown(why)}" for what, why in found["reasons"].items()]
    return " ".join(lines)
