"""The student of a run before training: opened, made from a config, or cut out of its teacher."""

from __future__ import annotations

from typing import Any

from hf_kdtl.commands.common import adapters, builders
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common.cutting import cut_student
from hf_kdtl.commands.common.distill_options import DistillOptions
from hf_kdtl.data import ImageData
from hf_kdtl.models import Teacher
from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.models.teachers.text_head import TextHeadTeacher


def new_student(options: DistillOptions, teacher: Teacher | None, data: ImageData, notes: list[str]) -> Any:
    """The student before training; after `set_seed` with the same seed always the same weights."""
    student = builders.answering(plain_student(options, teacher, data, notes), data)
    return student if options.adapter is None else adapters.with_adapter(student, options.adapter)


def check_one_student(options: DistillOptions) -> None:
    """Raises ValueError unless the student is named in exactly one way."""
    given = [name for name in ("student", "student_config") if getattr(options, name) is not None]
    if len(given) + bool(options.cut_flags) != 1:
        raise ValueError(
            f"found {' and '.join([*given, *options.cut_flags]) or 'no student'}; expected one of --student <folder "
            "or Hub name>, --student_config '{\"model_type\": ...}' and --student_layers <number of the teacher's "
            "blocks> (or another --student_... that cuts)."
        )


def plain_student(options: DistillOptions, teacher: Teacher | None, data: ImageData, notes: list[str]) -> Any:
    """The student without adapters."""
    names = data.label_names
    check_one_student(options)
    if options.student is not None:
        return builders.pretrained(options.student, names, notes)
    if options.student_config is not None:
        return builders.from_config(cli.mapping("student_config", options.student_config), names, "student_config")
    flag = options.cut_flags[0]
    if len(options.teacher_paths) > 1:
        raise ValueError(
            f"--{flag} cuts the student out of the teacher, and there are several. Cut it first: hf-kdtl cut "
            "--teacher <one of them> --output_dir <folder>; then type --student <folder>."
        )
    if teacher is None:
        raise ValueError(f"--{flag} cuts the student out of the teacher, and there is none; type --teacher.")
    if isinstance(teacher, TextHeadTeacher):
        raise ValueError(
            f"--{flag} cuts a trained classifier, and the teacher's classes are texts. Type --student <folder "
            "or Hub name> or --student_config '{\"model_type\": ...}'."
        )
    assert options.cut is not None
    return builders.named(cut_student(teacher, options.cut, data).float(), names)


def student_processor(options: DistillOptions, teacher: Teacher | None, student: Any, notes: list[str]) -> Any:
    """The student's image processor: its own, its teacher's where it was cut out of it, or one from its config."""
    if options.student is not None:
        return builders.processor_of(options.student, student, notes)
    if options.cut_flags and teacher is not None and teacher.processing_class is not None:
        return teacher.processing_class
    return builders.new_processor(student.config, options.image_size)


def student_start(options: DistillOptions, student: Any, kept: str | None = None) -> dict[str, Any]:
    """How the student was made, for the section `models` of results.json; `kept` of the teacher, in words."""
    if options.student is not None:
        return {"how": "pretrained"}
    return (
        {"how": "random"}
        if options.student_config is not None
        else {"how": "cut", "layers": len(find_blocks(student)), "kept": kept}
    )
