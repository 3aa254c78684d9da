"""What to say when training has ended and something is off, each with what to type next."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from hf_kdtl.evaluation.records import Results

FALLING = 0.05  # part by which the last quarter's loss is below the quarter's before
RISING = 0.01  # accuracy gained in the last quarter
FAR = 0.10  # accuracy below the teacher's
FEW = 30  # validation images: an accuracy of 50 % on fewer has an error of 18 points and more


def still_learning(log: Sequence[dict[str, Any]]) -> bool:
    """Whether a run ended too early: in its last quarter the training loss still fell, and validation accuracy, where
    it was measured, still rose. The loss alone also falls while a student learns its training images by heart."""
    losses = [entry["loss"] for entry in log if "loss" in entry]
    if len(losses) < 8:
        return False
    quarter = len(losses) // 4
    last, before = fmean(losses[-quarter:]), fmean(losses[-2 * quarter : -quarter])
    scores = [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry]
    cut = max(1, len(scores) - max(1, len(scores) // 4))
    rises = len(scores) < 2 or max(scores[cut:]) - max(scores[:cut]) > RISING
    return last < before * (1 - FALLING) and rises


def chance(labels: Sequence[int]) -> float:
    """Accuracy of the answer that is always the largest class, and two standard errors more."""
    known = np.asarray(labels)
    known = known[known >= 0]
    share = np.bincount(known).max() / len(known)
    return float(share + 2 * np.sqrt(share * (1 - share) / len(known)))


def warnings(
    curves: dict[str, list[dict[str, Any]]],
    teacher: float | None,
    student: float | None,
    guessing: float,
    steps: int,
    images: int,
) -> list[str]:
    """Sentences for the terminal; none where all is well.

    Args:
        curves: Trainer's log of each run.
        teacher, student: accuracy on validation; None where there is none.
        guessing: `chance` of validation.
        steps: of a run.
        images: of validation, with a label.
    """
    found = []
    if images < FEW:
        found.append(
            f"Validation has {images} labelled images: too few to tell a model from chance, or the best checkpoint "
            "from another. Add images, or type a larger --validation_fraction."
        )
    elif teacher is not None and teacher <= guessing:
        found.append(
            f"The teacher is at chance: {teacher:.1%} of {images:,} validation images, and always answering the "
            f"largest class may give {guessing:.1%}. A student cannot learn from it. Look at its classes and its "
            "image processor, or train one: hf-kdtl train-teacher."
        )
    if early := [name for name, log in curves.items() if still_learning(log)]:
        found.append(
            f"The loss still falls at the end ({', '.join(early)}): train longer. Type --max_steps "
            f"{2 * steps} --overwrite_output_dir true."
        )
    far = teacher is not None and student is not None and teacher > guessing and teacher - student > FAR
    if far and images >= FEW:
        found.append(
            f"The student is far below its teacher: {student:.1%} and {teacher:.1%} on validation. "
            + ("Train longer first." if early else "Type --student_flops with a larger share, --student with "
               "pre-trained weights, or more steps (--max_steps).")
        )  # fmt: skip
    return found


def of_run(results: Results, labels: Sequence[int], steps: int) -> list[str]:
    """`warnings` of a finished command.

    Args:
        labels: of validation.
        steps: of a run.
    """
    accuracy: dict[str, float] = {}
    for name, model in results.evaluation.models.items():
        found = [run["validation"].get("accuracy") for run in model.runs.values() if "validation" in run]
        if known := [value for value in found if value is not None]:
            accuracy[name] = fmean(known)
    images = sum(label >= 0 for label in labels)
    return warnings(results.curves, accuracy.get("teacher"), accuracy.get("distilled"), chance(labels), steps, images)
