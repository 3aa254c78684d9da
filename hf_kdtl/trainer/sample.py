"""Images of training as the student will get them, read before training begins."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from hf_kdtl.data.indexed import INDEX, TEACHER_PIXELS, VIEW, IndexedDataset
from hf_kdtl.data.stream import ImageStream
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.teachers.source import ItemCheck, SignalSource
from hf_kdtl.objectives.base import Objective

Images = Callable[[int], Iterable[dict[str, Any]] | None]
"""n -> batches of n training images spread over the data, or of all where there are fewer; the same at each iteration.
Their `total` is the number of all. None where the data has no index."""


class TrainingSample:
    """Batches of some training images, evenly spaced, for data may be sorted; the same images at each iteration.

    The random streams are left as they were, so that training draws what it would have drawn, and the user's
    augmentation gives the same images again.

    Args:
        data: the training data, with a length and an index.
        collate: the user's collator.
        number: of images: at least two (one is repeated), at most all.
        batch_size: of the batches.
        device: where their tensors go.
    """

    def __init__(self, data: Any, collate: Callable, number: int, batch_size: int, device: torch.device):
        self.total = len(data)
        number = max(2, min(number, self.total))
        self.data, self.collate, self.device = data, collate, device
        self.rows = [i * len(data) // number for i in range(number)]
        self.batch_size = batch_size
        self._begin = random_state()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        state = self._begin
        for first in range(0, len(self.rows), self.batch_size):
            rows = self.rows[first : first + self.batch_size]
            outside = random_state()
            set_random_state(state)
            try:
                batch = self.collate([self.data[i] for i in rows])
                state = random_state()
            finally:
                set_random_state(outside)
            yield {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}


class CapturedSample:
    """The first `images` of a sample as a source captures them, batch by batch, each time it is iterated."""

    def __init__(self, source: SignalSource, needs: Needs, sample: Iterable[dict[str, Any]], images: int):
        self.source, self.needs, self.sample, self.images = source, needs, sample, images

    def __iter__(self) -> Iterator[tuple[Capture, Tensor | None]]:
        left = self.images
        for inputs in self.sample:
            if left <= 0:
                return
            names = ("pixel_values", "labels", INDEX, VIEW, TEACHER_PIXELS)
            known = {name: inputs[name][:left] for name in names if name in inputs}
            left -= len(known["pixel_values"])
            batch: Any = {name: value for name, value in known.items() if name != "pixel_values"}
            with torch.set_grad_enabled(self.needs.input_gradient):
                captured = self.source.capture(known["pixel_values"], self.needs, batch)
                captured.image_index = known.get(INDEX)
                yield captured, known.get("labels")


def read_sample(key: str, objective: Objective, source: SignalSource, needs: Needs, images: Images) -> None:
    """Let an objective read the training images that it asks for.

    Raises:
        ValueError: where the data has no index, or the objective cannot learn from it.
    """
    found = images(objective.sample)
    if found is None:
        raise ValueError(
            f"objective {key!r} reads {objective.sample} training images before training, and the train_dataset "
            "cannot be asked for them. Use one with a length and an index."
        )
    try:
        number = objective.sample_size(getattr(found, "total", objective.sample))
        sample = found if number >= objective.sample else images(number)
        assert sample is not None
        objective.observe(CapturedSample(source, needs, sample, number))
    except ValueError as error:
        raise ValueError(f"objective {key!r}: {error}") from error


def carries_rows(trainer: Any) -> bool:
    """Whether training batches carry the row of each image: where a source or the images' augmentation needs it, or an
    objective wants it and the data has an index."""
    if trainer.args.augment_on_device or (trainer.teacher is not None and trainer.teacher.needs_index):
        return True
    data = trainer.train_dataset
    listed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    return listed and any(objective.needs_index for objective in trainer.args.build_objectives().values())


def item_checks(trainer: Any) -> list[ItemCheck]:
    """What the teachers ask of each training item."""
    teachers = [] if trainer.teacher is None else trainer.teacher.members().values()
    return [check for teacher in teachers for check in teacher.item_checks()]


class StreamSample:
    """Batches of the first images of a stream, as process 0 reads them; the same at each iteration."""

    def __init__(self, data: ImageStream, collate: Callable, number: int, batch_size: int, device: torch.device):
        self.data, self.collate, self.number = data, collate, max(2, number)
        self.batch_size, self.device = batch_size, device

    def __iter__(self) -> Iterator[dict[str, Any]]:
        items = self.data.first(self.number)
        while rows := list(itertools.islice(items, self.batch_size)):
            batch = self.collate(rows)
            yield {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def training_sample(trainer: Any, number: int) -> TrainingSample | StreamSample | None:
    """Of a trainer's data, with their rows where a source looks its signals up by them; None where the data has no
    length or no index, and is no `ImageStream`."""
    data: Any = trainer.train_dataset
    size = max(2, trainer.args.per_device_train_batch_size)
    if isinstance(data, ImageStream):
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
        return StreamSample(data, collate, number, size, trainer.accelerator.device)
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or isinstance(data, IterableDataset):
        return None
    data, collate = (
        without_unused_columns(trainer, data),
        trainer._get_collator_with_removed_columns(trainer.data_collator),
    )
    if carries_rows(trainer):
        data = IndexedDataset(data, checks=item_checks(trainer))
    # All at once where a batch in training is as large: results do not depend on the split beyond rounding.
    return TrainingSample(data, collate, number, size, trainer.accelerator.device)


def without_unused_columns(trainer: Any, data: Any) -> Any:
    """A datasets.Dataset without the columns that the student does not take, as Trainer removes them; others as is."""
    import datasets

    is_table = isinstance(data, datasets.Dataset)
    return trainer._remove_unused_columns(data, description="training") if is_table else data


def random_state() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_random_state(state: tuple[Any, Any, Tensor]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
