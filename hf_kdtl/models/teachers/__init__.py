"""Where the teacher's signals come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_kdtl.models.teachers.self_teacher import SelfTeacher
from hf_kdtl.models.teachers.teacher import Teacher


def as_source(teacher: Any) -> Teacher:
    """The source of signals for whatever a user may name: a source, a model, a path, or "self"."""
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, str) and teacher == "self":
        return SelfTeacher()
    if isinstance(teacher, str | Path):
        return Teacher.from_pretrained(teacher)
    return Teacher(teacher)


__all__ = ["SelfTeacher", "Teacher", "as_source"]
