"""The section `models` of results.json as typed records: what a run's models are and where they came from."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_kdtl.evaluation.json_records import Record


@dataclass(frozen=True)
class Origin(Record):
    """Where a model was loaded from; unknown values are None. `name` is a Hub name or the last part of a folder's."""

    name: str | None = None
    hub: bool = False
    revision: str | None = None
    license: str | None = field(default=None, metadata={"key": "licence"})
    fingerprint: str | None = None  # the hash of the weights


@dataclass(frozen=True)
class Start(Origin):
    """What a student was initialized from: how is pretrained, cut (of its teacher; `kept` in words) or random."""

    how: str | None = None
    layers: int | None = None
    kept: str | None = None


@dataclass(frozen=True)
class ModelFacts(Origin):
    """A teacher or a student. `start`, `merged` and `adapters` are of students, `is_student` of a self-teacher."""

    architecture: str | None = None
    num_labels: int | None = None
    multi_label: bool = False
    parameters: int | None = None
    image_size: list[int] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)
    merged: bool = False
    start: Start = field(default_factory=Start)
    is_student: bool = field(default=False, metadata={"key": "self"})

    @property
    def saved_as_adapter(self) -> bool:
        """Whether adapters alone are saved, and not a full model."""
        return bool(self.adapters) and not self.merged


@dataclass(frozen=True)
class Models(Record):
    """The section `models`; `pairing` is {objectives: the table of the layers that they pair}. Several teachers stand
    by name in `teachers`, one is `teacher`."""

    student: ModelFacts = field(default_factory=ModelFacts)
    teacher: ModelFacts | None = None
    pairing: dict[str, str] = field(default_factory=dict)
    teachers: dict[str, ModelFacts] = field(default_factory=dict)

    @property
    def all_teachers(self) -> list[ModelFacts]:
        """The teacher, or all of several."""
        return [self.teacher] if self.teacher is not None else list(self.teachers.values())
