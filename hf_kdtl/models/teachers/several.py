"""Several teachers of one student, by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.teachers.source import Batch, SignalSource, SourceInfo


class SeveralTeachers(SignalSource):
    """Teachers by name, each of which answers the objectives that say `teacher: <name>`.

    A student learns from all of them at once: features of one, class outputs of another, or class outputs of two that
    are added with their weights. Each sees its own pixels, has its own pairs of layers and its own order of classes,
    and runs once a step, however many objectives read it. Classes are matched by name for those alone whose class
    outputs an objective compares; the others may have any. A teacher of another scale has terms of another scale:
    weigh them, or take objectives that standardize.

    Args:
        teachers: {name: source}. A name is a word; "teacher", "student" and "start" mean something else.

    Cost: the memory of all teachers, and one forward of each in a step.

    Raises:
        ValueError: for no teacher, or a name that cannot be one.

    Example:
        >>> config = DistillationConfig("out", objectives=[
        ...     {"name": "logit_kd", "teacher": "a"}, {"name": "hidden_states", "teacher": "b"}])  # doctest: +SKIP
        >>> trainer = DistillationTrainer(student, config, teacher={"a": "runs/a/model", "b": "facebook/dinov2-base"},
        ...                               train_dataset=images, processing_class=processor)  # doctest: +SKIP
    """

    def __init__(self, teachers: Mapping[str, SignalSource]):
        check_names(teachers)
        self.teachers = dict(teachers)

    @property
    def notes(self) -> list[str]:  # type: ignore[override]
        """Those of each teacher, with its name."""
        return [f"teacher {name!r}: {note}" for name, one in self.teachers.items() for note in one.notes]

    @property
    def needs_index(self) -> bool:  # type: ignore[override]
        return any(one.needs_index for one in self.teachers.values())

    @property
    def answers_without_index(self) -> bool:  # type: ignore[override]
        return all(one.answers_without_index for one in self.teachers.values() if one.needs_index)

    def match(self, student: nn.Module, processing_class: Any, compare_classes: bool | Collection[str]) -> None:
        """As each teacher's.

        Args:
            compare_classes: for all of them, or the names of those whose class outputs are compared.
        """
        for name, one in self.teachers.items():
            compared = compare_classes if isinstance(compare_classes, bool) else name in compare_classes
            try:
                one.match(student, processing_class, compared)
            except ValueError as error:
                raise ValueError(f"teacher {name!r}: {error}") from error

    def capture(self, pixel_values: Tensor, needs: Needs, batch: Batch | None = None) -> Capture:
        """Of no single model: the trainer asks the `members`."""
        raise ValueError(f"several teachers answer one by one; ask one of the members {list(self.teachers)}.")

    def members(self) -> dict[str, SignalSource]:
        return dict(self.teachers)

    def modules(self) -> list[nn.Module]:
        return [module for one in self.teachers.values() for module in one.modules()]

    def to(self, device: torch.device) -> SeveralTeachers:
        for one in self.teachers.values():
            one.to(device)
        return self

    def provenance(self) -> SourceInfo:
        """Of no single model: ask the `members`."""
        return SourceInfo(f"{len(self.teachers)} teachers")

    @property
    def fingerprint(self) -> str:
        return ", ".join(one.fingerprint for one in self.teachers.values())


def check_names(teachers: Mapping[str, Any]) -> None:
    """Raises ValueError for names that `teacher:` of an objective could not mean."""
    if not teachers:
        raise ValueError('teacher is an empty mapping; expected {"a": <path>, "b": <path>}, or one teacher.')
    for name in teachers:
        if not isinstance(name, str) or not name.isidentifier() or name in ("teacher", "student", "start"):
            raise ValueError(
                f"a teacher is called {name!r}; expected a word of letters, digits and _ that is not teacher, student "
                'or start, such as {"a": <path>, "b": <path>}.'
            )
