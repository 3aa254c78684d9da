"""Where the teacher's signals come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_kdtl.models.teachers.self_teacher import SelfTeacher
from hf_kdtl.models.teachers.several import SeveralTeachers, check_names
from hf_kdtl.models.teachers.source import SignalSource
from hf_kdtl.models.teachers.teacher import Teacher


def as_source(teacher: Any) -> SignalSource:
    """The source of signals for whatever a user may name: a source, a model, a path, "self", or a
    mapping of names to these.

    Raises:
        TypeError: for anything else.
        ValueError: for a mapping with a name that cannot be one.
    """
    if isinstance(teacher, Mapping):
        check_names(teacher)  # before any is read
        return SeveralTeachers({name: as_source(one) for name, one in teacher.items()})
    if isinstance(teacher, str) and teacher == "self":
        return SelfTeacher()
    if isinstance(teacher, str | Path):
        return Teacher.from_pretrained(teacher)
    return Teacher(teacher) if not hasattr(teacher, "capture") else teacher


__all__ = ["SelfTeacher", "SeveralTeachers", "SignalSource", "Teacher", "as_source", "check_names"]
