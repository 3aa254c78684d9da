"""The teachers of a command: opened from folders and Hub names, with class names where their classes are texts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from hf_kdtl.data import ImageData
from hf_kdtl.models import Teacher
from hf_kdtl.models.labels import MULTI_LABEL, is_multi_label, match_labels
from hf_kdtl.models.teachers.resolve import TRUST, open_config
from hf_kdtl.models.teachers.sharded import sharded_options
from hf_kdtl.models.teachers.text_head import TextHeadTeacher, has_text_tower
from hf_kdtl.utils.options import check_known

DTYPES = ("auto", "bfloat16", "float16", "float32")


def open_teachers(
    paths: Mapping[str, str],
    compared: Collection[str],
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    in_parts: bool = False,
    **loading: Any,
) -> dict[str, Teacher]:
    """{name: teacher}. One of images and texts gets a text head where class names or templates are given, or where its
    class outputs are compared; its class names are then those of the data (`name_classes`).

    Args:
        paths: {name: folder or Hub name}.
        compared: names of those whose class outputs an objective compares.
        in_parts: whether under FSDP2 each process reads its own part alone, of those without a text head. Every
            process then runs such a teacher as often as the others.
        loading: options of from_pretrained, of all of them.

    Raises:
        ValueError: for class names or templates that no teacher takes; and as `Teacher.from_pretrained`.
    """
    given = class_names is not None or templates is not None
    texts = {n for n, path in paths.items() if has_text_tower(open_config(path, role="the teacher"))}
    if given and not texts:
        raise ValueError(
            "--class_names and --templates are texts, for a teacher of images and texts such as "
            f"openai/clip-vit-base-patch32; found {', '.join(paths.values()) or 'no teacher'}. Leave them out."
        )
    chosen = {name for name in texts if given or name in compared}
    return {
        name: TextHeadTeacher.from_pretrained(path, class_names=class_names, templates=templates, **loading)
        if name in chosen
        else Teacher.from_pretrained(path, **loading, **(sharded_options(path) if in_parts else {}))
        for name, path in paths.items()
    }


def loading_options(dtype: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """How a teacher is loaded: its dtype, and options that transformers' from_pretrained takes.

    Raises:
        ValueError: for an unknown dtype, and for options that are others' business.
    """
    if dtype is not None:
        check_known("teacher_dtype", dtype, DTYPES)
    if wrong := sorted({"dtype", "torch_dtype", "class_names", "templates", TRUST} & given.keys()):
        raise ValueError(
            f"teacher_options holds {wrong[0]!r}; the dtype is --teacher_dtype, texts are --class_names and "
            "--templates, and code in a model's folder is run from Python alone."
        )
    return given | ({} if dtype is None else {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)})


def name_classes(teachers: Mapping[str, Teacher], data: ImageData) -> None:
    """Give those whose classes are texts, and that have none, the names of the data's classes."""
    for teacher in teachers.values():
        if isinstance(teacher, TextHeadTeacher) and not teacher.named:
            teacher.name_classes(data.label_names)
        if isinstance(teacher, TextHeadTeacher) and data.multi_label:
            teacher.classifier().config.problem_type = MULTI_LABEL  # its sigmoid is taken


def scorable(student: Any, teacher: Teacher) -> bool:
    """Whether a teacher answers in the student's classes, by a head that was trained."""
    if teacher.new_head or is_multi_label(student) != is_multi_label(teacher.classifier()):
        return False
    try:
        match_labels(student.config, teacher.provenance())
    except ValueError:
        return False
    return True
