"""Which column of the teacher's logits is which class of the student: by name, never by position alone."""

from __future__ import annotations

import re
from typing import Any


def class_names(config: Any) -> list[str] | None:
    """Names by class index, or None where they are transformers' defaults (LABEL_0, LABEL_1, ...)."""
    if config.id2label is None:  # PVT's config leaves it so
        return None
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def match_labels(student: Any, teacher: Any) -> tuple[list[int] | None, str]:
    """Columns of the teacher's logits in the student's class order, from the two model configs.

    Returns:
        (order, note): order is None where the columns already agree, else order[k] is the teacher's column for the
        student's class k; the note says in a sentence what was matched and how.

    Raises:
        ValueError: when the classes differ, showing what only one side has.
    """
    names_s, names_t = class_names(student), class_names(teacher)
    if names_s is None or names_t is None:
        who = "the student" if names_s is None else "the teacher"
        unnamed = "student and teacher have" if names_s is None and names_t is None else f"{who} has"
        if student.num_labels != teacher.num_labels:
            raise ValueError(
                f"the student has {student.num_labels} classes and the teacher {teacher.num_labels}, and {unnamed} no "
                "class names. Give the student the teacher's classes (id2label=teacher.config.id2label), or use "
                "objectives that compare no class outputs."
            )
        return None, f"labels matched by position: {unnamed} no class names."
    for who, names in (("student", names_s), ("teacher", names_t)):
        if repeated := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"the {who}'s classes {_few(repeated)} occur more than once; class names must be unique.")
    if set(names_s) != set(names_t):
        raise ValueError(
            f"student and teacher have different classes. Only the student: {_few(set(names_s) - set(names_t))}. Only "
            f"the teacher: {_few(set(names_t) - set(names_s))}. Use a teacher trained on these classes, rename its "
            "config.id2label, or use objectives that compare no class outputs."
        )
    if names_s == names_t:
        return None, "labels match by name, in the same order."
    order = [names_t.index(name) for name in names_s]
    return order, "labels match by name in another order: the teacher's logits are re-ordered to the student's."


def _few(names: set[str] | list[str], most: int = 10) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return (", ".join(map(repr, shown[:most])) or "none") + more
