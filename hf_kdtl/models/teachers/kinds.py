"""What `Teacher.from_pretrained` opens that is no live vision model: a line for each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_kdtl.models.teachers.store.manifest import is_store


def other_kind(path: str | Path, options: dict[str, Any]) -> Any:
    """A `StoredTeacher` of a folder that `hf-kdtl cache` wrote; a `TextHeadTeacher` where the options name classes or
    templates; else None."""
    # Both open Teachers themselves, so they cannot be imported above.
    if is_store(path):
        from hf_kdtl.models.teachers.stored import StoredTeacher

        return StoredTeacher(path)
    if {"class_names", "templates"} & options.keys():
        from hf_kdtl.models.teachers.text_head import TextHeadTeacher

        return TextHeadTeacher.from_pretrained(path, **options)
    return None
