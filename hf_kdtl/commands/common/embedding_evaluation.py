"""Students without a head on labelled images that they were not trained on. For hf-kdtl evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_kdtl.commands.common import builders
from hf_kdtl.commands.common.candidates import some_of, student_names
from hf_kdtl.commands.common.embedding_scores import Sides, check_labels, picture, scores
from hf_kdtl.data.loading import ImageData
from hf_kdtl.models import Teacher
from hf_kdtl.models.fingerprint import fingerprint
from hf_kdtl.models.teachers.backbone import open_vision_model

UNUSED = {"max_drop": "accuracy", "degradations": "accuracy", "severities": "accuracy", "templates": "classes"}
"""Settings of hf-kdtl evaluate that ask for what a student without a head does not have."""


@dataclass
class EmbeddingCandidate:
    """A model to be judged by its embeddings; of a teacher `model` is a `Teacher`."""

    name: str
    role: str
    path: str
    model: Any
    processor: Any

    @property
    def network(self) -> Any:
        """The module."""
        return self.model.model if self.role == "teacher" else self.model


def check(options: Any, typed: set[str], data: ImageData) -> None:
    """Raises ValueError for settings that ask for what a student without a head does not have."""
    check_labels(data)
    for name in sorted(UNUSED.keys() & typed):
        raise ValueError(
            f"{name} is about {UNUSED[name]}, and a student in {', '.join(options.models)} has no head: it is judged "
            f"by kNN, a linear probe, recall, agreement and CKA. Leave {name} out, or give every student a head: "
            "hf-kdtl train-teacher --model <student> --dataset <labelled images>."
        )
    if options.split != "test":
        raise ValueError(
            f"split is {options.split!r}, and the linear probe of a student without a head is chosen on validation; "
            "leave split out: it is judged on test."
        )


def open_candidates(
    students: Sequence[str], references: dict[str, str | None], notes: list[str]
) -> list[EmbeddingCandidate]:
    """The students, the teacher and the baseline, with and without a head, each with its own image processor."""
    names = student_names(students)
    found = [_open("student", name, path, notes) for name, path in zip(names, students, strict=True)]
    return found + [_open(role, role, path, notes) for role, path in references.items() if path is not None]


def _open(role: str, name: str, path: str, notes: list[str]) -> EmbeddingCandidate:
    if role == "teacher":
        teacher = Teacher.from_pretrained(path)
        notes += teacher.notes
        processor = teacher.processing_class or builders.processor_of(path, teacher.classifier(), notes)
        return EmbeddingCandidate(name, role, path, teacher, processor)
    opened = open_vision_model(path, role=name)
    notes += opened.notes
    return EmbeddingCandidate(name, role, path, opened.model.eval(), builders.processor_of(path, opened.model, notes))


def section(candidates: list[EmbeddingCandidate], data: ImageData, number: int, config: Any) -> dict[str, Any]:
    """The section `embedding` of results.json: all scores on test, likeness to the teacher on `number` of its
    images. Writes the picture of patches."""
    for one in candidates:
        one.network.to(config.device)
    sides: Sides = {one.name: (one.model, one.processor) for one in candidates}
    images = some_of(data.test, number)
    value = scores(sides, images, data, config.per_device_eval_batch_size)
    for one in candidates:
        known = {"role": one.role, "path": one.path, "fingerprint": fingerprint(one.network)}
        value["models"][one.name] |= known
    missing = picture(Path(str(config.output_dir)), sides, images)
    return value | {"split": "test", "picture": missing or None}
