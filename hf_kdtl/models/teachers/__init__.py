"""Where the teacher's signals come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_kdtl.models.teachers.self_teacher import SelfTeacher
from hf_kdtl.models.teachers.source import SignalSource
from hf_kdtl.models.teachers.teacher import Teacher


def as_source(teacher: Any) -> SignalSource:
    """The source of signals for whatever a user may name: a source, a model, a path, or "self".

    Raises:
        TypeError: for anything else.
    """
    if isinstance(teacher, str) and teacher == "self":
        return SelfTeacher()
    if isinstance(teacher, str | Path):
        return Teacher.from_pretrained(teacher)
    return Teacher(teacher) if not hasattr(teacher, "capture") else teacher


__all__ = ["SelfTeacher", "SignalSource", "Teacher", "as_source"]
