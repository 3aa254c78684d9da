"""A live teacher that is shown the images at its own size, in place of the student's pixels resized."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.forward.geometry import ModelGeometry
from hf_kdtl.models.teachers.processor_files import processor_differences
from hf_kdtl.models.teachers.source import Batch, SignalSource, SourceFacts, SourceInfo
from hf_kdtl.models.teachers.teacher import Teacher
from hf_kdtl.utils.wrapped import holders

CHOICES = ("shared", "own")
_MAKE = "ImageDataset(..., teacher_processor=<the teacher's image processor>)"


class OwnPixels(SignalSource):
    """What a teacher gives for `batch["teacher_pixel_values"]`: the crop, flip and colors of the student's pixels,
    rendered from the file at the teacher's size.

    Args:
        teacher: a live one, with its image processor.

    Cost: a second resize of each image where the data is read (the file is decoded once).

    Raises:
        ValueError: for a teacher that is not a live one, or has no image processor.
    """

    needs_index = True  # the items that carry rows also carry the teacher's pixels
    answers_without_index = True  # it is by the pixels that it answers

    def __init__(self, teacher: SignalSource):
        if not isinstance(teacher, Teacher) or teacher.processing_class is None:
            raise ValueError(
                f"teacher_pixels is 'own' and the teacher is a {type(teacher).__name__}"
                f"{' without its image processor' if isinstance(teacher, Teacher) else ''}; expected one live teacher "
                "with it: Teacher(model, processing_class=...). Or set teacher_pixels: shared."
            )
        self.teacher = teacher
        self.processing_class = teacher.processing_class

    @property
    def notes(self) -> list[str]:  # type: ignore[override]
        return [*self.teacher.notes, "In training the teacher sees the files at its own size (teacher_pixels: own)."]

    @property
    def model(self) -> Any:
        """Of the teacher."""
        return self.teacher.model

    @property
    def teacher_batch(self) -> int | None:
        """Of the teacher."""
        return self.teacher.teacher_batch

    @teacher_batch.setter
    def teacher_batch(self, value: int | None) -> None:
        self.teacher.teacher_batch = value

    @property
    def order(self) -> list[int] | None:  # type: ignore[override]
        return self.teacher.order

    def match(self, student: nn.Module, processing_class: Any, compare_classes: bool | Collection[str]) -> None:
        self.teacher.match(student, processing_class, bool(compare_classes))

    def check_data(self, data: Any) -> None:
        """Refuse data that does not render the teacher's pixels, or by another processor than the teacher's."""
        rendered = [one.teacher_processor for one in holders(data, "teacher_processor")]
        if not rendered or None in rendered:
            raise ValueError(f"teacher_pixels is 'own' and train_dataset has no pixels for the teacher. Use {_MAKE}.")
        if any(processor_differences(one, self.processing_class) for one in rendered):
            raise ValueError(f"train_dataset renders the teacher's pixels by another image processor. Use {_MAKE}.")

    def unserved(self, needs: Needs) -> str:
        if needs.derivative:
            return (
                "it differentiates by the student's pixels, and with teacher_pixels 'own' the teacher sees others. "
                "Set teacher_pixels: shared."
            )
        return self.teacher.unserved(needs)

    @contextmanager
    def _as_given(self) -> Iterator[None]:
        """Pixels are in the teacher's own format."""
        adapter, self.teacher._pixels = self.teacher._pixels, None
        try:
            yield
        finally:
            self.teacher._pixels = adapter

    def geometry(self, pixel_values: Tensor) -> ModelGeometry:
        if (adapter := self.teacher._pixels) is None:
            return self.teacher.geometry(pixel_values)
        channels, size = len(adapter.target.mean), adapter.output_size(pixel_values)
        with self._as_given():
            return self.teacher.geometry(pixel_values.new_zeros(len(pixel_values), channels, *size))

    def capture(self, pixel_values: Tensor, needs: Needs, batch: Batch | None = None) -> Capture:
        own = (batch or {}).get("teacher_pixel_values")
        if own is None:
            raise ValueError(
                "teacher_pixels is 'own' and the batch has no 'teacher_pixel_values': only training data has them. "
                "Set teacher_pixels: shared to compare with the teacher elsewhere, as eval_objectives does."
            )
        with self._as_given():
            return self.teacher.capture(own, needs, batch)

    def pixels(self, pixel_values: Tensor) -> Tensor:
        return self.teacher.pixels(pixel_values)

    def provenance(self) -> SourceInfo:
        return self.teacher.provenance()

    @property
    def fingerprint(self) -> str:
        return self.teacher.fingerprint

    def facts(self) -> SourceFacts:
        return self.teacher.facts()

    def modules(self) -> list[nn.Module]:
        return self.teacher.modules()

    def classifier(self) -> Any:
        return self.teacher.classifier()

    def eval_context(self) -> AbstractContextManager[None]:
        return self.teacher.eval_context()

    def to(self, device: torch.device) -> OwnPixels:
        self.teacher.to(device)
        return self
