"""Where the teacher's signals come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_kdtl.models.teachers.own_pixels import CHOICES, OwnPixels
from hf_kdtl.models.teachers.self_teacher import SelfTeacher
from hf_kdtl.models.teachers.several import SeveralTeachers, check_names
from hf_kdtl.models.teachers.sharded import sharded_options
from hf_kdtl.models.teachers.source import SignalSource
from hf_kdtl.models.teachers.stored import StoredTeacher, open_store
from hf_kdtl.models.teachers.teacher import OPENERS, Teacher
from hf_kdtl.models.teachers.text_head import open_text_head
from hf_kdtl.utils.options import check_known

OPENERS[:] = [open_store, open_text_head]  # a line for each kind that `Teacher.from_pretrained` opens


def as_source(teacher: Any) -> SignalSource:
    """The source of signals for whatever a user may name: a source, a model, a path (also of a store),
    "self", or a mapping of names to these. Under FSDP2 each process reads its own part of what a path holds.

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
        return Teacher.from_pretrained(teacher, **sharded_options(teacher))
    return Teacher(teacher) if not hasattr(teacher, "capture") else teacher


def shown(source: SignalSource, pixels: str) -> SignalSource:
    """The source, which sees the student's pixels ("shared") or the files at its own size ("own").

    Raises:
        ValueError: for another word, or a source that cannot.
    """
    check_known("teacher_pixels", pixels, CHOICES)
    if isinstance(source, StoredTeacher) and pixels == "own" and not source.own:
        raise ValueError(
            f"teacher_pixels is 'own' and the store {source.name} is of the student's pixels. Set teacher_pixels: "
            "shared, or write another store: hf-kdtl cache --teacher_pixels own --output <another folder>."
        )
    return source if pixels == "shared" or isinstance(source, OwnPixels | StoredTeacher) else OwnPixels(source)


__all__ = [
    "OwnPixels",
    "SelfTeacher",
    "SeveralTeachers",
    "SignalSource",
    "StoredTeacher",
    "Teacher",
    "as_source",
    "check_names",
    "shown",
]
