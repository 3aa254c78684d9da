"""A teacher that ran once: its outputs are read from a store by image and view."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.forward.geometry import ModelGeometry
from hf_kdtl.models.labels import classes_of, match_labels
from hf_kdtl.models.teachers.facts import in_order
from hf_kdtl.models.teachers.own_pixels import OwnPixels
from hf_kdtl.models.teachers.processor_files import open_processor
from hf_kdtl.models.teachers.source import Batch, ItemCheck, SignalSource, SourceInfo
from hf_kdtl.models.teachers.store import signals
from hf_kdtl.models.teachers.store.facts import load_classifier, teacher_record
from hf_kdtl.models.teachers.store.images import FirstReads, TrainingImages
from hf_kdtl.models.teachers.store.manifest import DIGESTS, differences
from hf_kdtl.models.teachers.store.named import find_store
from hf_kdtl.models.teachers.store.shards import Reader
from hf_kdtl.models.teachers.teacher import Teacher


class StoredTeacher(SignalSource):
    """The outputs that `hf-kdtl cache` wrote, as the source of teacher signals.

    Objectives do not notice. A float32 store gives bitwise what the live teacher gives on the same views with the
    same `teacher_batch`; images outside the training data (evaluation) are shown to the live teacher, which is opened
    where it was when the store was written, if it is still there.

    Args:
        folder: of the store, or the name of a dataset repository on the Hub that `hf-kdtl push --cache` made.
        where: revision and token of the repository.

    Raises:
        ValueError: for a store that is not complete, or damaged; where there is none.
    """

    needs_index = True
    needs_pixels = False  # data need not render the teacher's own pixels for it

    def __init__(self, folder: str | Path, **where: Any):
        self._read_from(Reader(find_store(folder, **where) or folder), str(folder))

    def _read_from(self, reader: Reader, name: str) -> None:
        self.reader, self.name = reader, name
        self.folder, self.manifest = self.reader.folder, self.reader.manifest
        # A repository's copy is not written to.
        self._growable = shlex.quote(self.name) if Path(self.name).expanduser().exists() else "<a folder of your own>"
        self.processing_class = open_processor(self.folder / "teacher", role="the stored teacher")
        self.notes, self.order = [], None
        self._live: Teacher | OwnPixels | None = None
        self._looked = False
        self._matched: tuple[Any, ...] = ()
        self._checked: Any = None
        self._first_reads: FirstReads | None = None

    # ---- What it belongs to ----

    def match(self, student: nn.Module, processing_class: Any, compare_classes: bool | Collection[str]) -> None:
        """Learn the student's class order. Its pixels are checked with the data (`check_data`)."""
        self.notes, self.order = [], None
        self._matched = student, processing_class, compare_classes
        if compare_classes:
            self.order, note = match_labels(classes_of(student), self.provenance())
            self.notes.append(note)
        if self._live is not None:
            self._live.match(*self._matched)
        self.notes.append(self.summary())

    def summary(self) -> str:
        """What is read, as a note."""
        holds = f"{self.manifest.images} images, {self.manifest.views} views, {self.manifest.precision}"
        own = " It saw the files at its own size." if self.own else ""
        return f"the teacher's outputs are read from {self.name} ({holds}); it does not run.{own}"

    @property
    def own(self) -> bool:
        """Whether the teacher saw the files at its own size (`teacher_pixels: own`)."""
        return self.manifest.fingerprint.get("data", {}).get("teacher_pixels") == "own"

    def check_data(self, data: Any) -> None:
        """Refuse training data whose views are not those of the store; tell it how many views there are."""
        if data is self._checked:
            return
        images = TrainingImages(data)
        if found := differences(self.manifest.fingerprint, {"data": images.record(self.own)}):
            raise ValueError(
                f"the store {self.name} is of other pixels: {'; '.join(found)}. Set the data as it was when the "
                f"store was written, or write another: hf-kdtl cache --output <another folder> with these settings."
            )
        there = self.reader.has(images.rows)
        if not there.all():
            raise ValueError(
                f"the store {self.name} has {self.manifest.images} images, and {(~there).sum()} of the "
                f"{len(there)} training images are not there, such as row {images.rows[~there][0]}. Add them: "
                f"hf-kdtl cache --output {self._growable} with this data."
            )
        rows = np.unique(images.rows)
        digests = self._digests()[self.reader.places(rows)]
        images.check(rows, digests, self.name)
        if images.viewed:
            self._share_views(images.data)
        elif self.manifest.views > 1:
            raise ValueError(
                f"the store {self.name} has {self.manifest.views} views of an image, and {type(data).__name__} does "
                "not say which one it gives. Use hf_kdtl.data.ImageDataset, or a store with --views 1."
            )
        self._checked = data
        if images.has_files or not images.viewed:  # else an item has other pixels in another view
            self._first_reads = FirstReads(images, rows, digests, self.name)

    def _share_views(self, data: Any) -> None:
        """The data shows the store's views, or as many of the first of them as it was made with."""
        if data.views is not None and data.views > self.manifest.views:
            raise ValueError(
                f"the training data shows {data.views} views of an image, and the store {self.name} has "
                f"{self.manifest.views}. Give the data views={self.manifest.views} (--views), or add to the store: "
                f"hf-kdtl cache --views {data.views} --output {self._growable}."
            )
        data.views = data.views or self.manifest.views

    def item_checks(self) -> list[ItemCheck]:
        """Each image is compared with the one of the store when it is first read."""
        return [] if self._first_reads is None else [self._first_reads]

    def check_teacher(self, teacher: Teacher) -> None:
        """Refuse a live teacher that is not the one of the store, naming what differs."""
        if found := differences(self.manifest.fingerprint, teacher_record(teacher)):
            raise ValueError(
                f"the store {self.name} is of another teacher: {'; '.join(found)}. Leave the teacher out, or write "
                "another store: hf-kdtl cache --output <another folder>."
            )

    def _digests(self) -> np.ndarray:
        return np.load(self.folder / DIGESTS, mmap_mode="r")

    # ---- What it gives ----

    def unserved(self, needs: Needs) -> str:
        """Whether a store can have it, and whether this one does."""
        if reason := signals.unstorable(needs):
            return f"it cannot be stored, because {reason}."
        if lacking := signals.missing(needs, self.manifest):
            return (
                f"{', '.join(lacking)} of the teacher {'is' if len(lacking) == 1 else 'are'} not stored in "
                f"{self.name}; type hf-kdtl cache --output {self._growable} --objectives <all "
                "objectives> with the student's flags (and --layer_rates, where there are any), which adds what is "
                "missing."
            )
        return ""

    def geometry(self, pixel_values: Tensor) -> ModelGeometry:
        """As the teacher gave it when the store was written; its classifier in the student's order."""
        if self.manifest.geometry is None:
            return super().geometry(pixel_values)
        classifier = load_classifier(self.folder / "teacher")
        return in_order(replace(self.manifest.geometry, classifier=classifier), self.order)

    def capture(self, pixel_values: Tensor, needs: Needs, batch: Batch | None = None) -> Capture:
        """What is stored for the images of `batch`; of a batch without rows, what the live teacher gives.

        Raises:
            ValueError: for a view that is not stored; without rows and without a live teacher.
        """
        if batch is None or "image_index" not in batch:
            return self._of_live(pixel_values, needs, batch)
        rows, views = rows_and_views(batch)
        captured = self._read(needs, rows, views, pixel_values)
        chosen = batch.get("differentiated_rows")
        if needs.sketches and chosen is not None and len(chosen) < len(rows):
            part = chosen.cpu().numpy()
            captured.differentiated = self._read(needs, rows[part], views[part], pixel_values)
            captured.differentiated_rows = chosen
        return captured

    def _read(self, needs: Needs, rows: np.ndarray, views: np.ndarray, like: Tensor) -> Capture:
        arrays = self.reader.read(signals.names(needs, self.manifest.top_k), rows, views)
        captured = signals.unpack(arrays, needs, self.manifest.teacher.num_labels, like)
        if captured.logits is not None and self.order is not None:
            captured.logits = captured.logits[:, self.order]
        captured.geometry, captured.patch_grid = self.manifest.geometry, self.manifest.patch_grid
        return captured

    def _of_live(self, pixel_values: Tensor, needs: Needs, batch: Batch | None) -> Capture:
        live = self.live()
        if self.own:
            raise ValueError(
                f"the store {self.name} is of files at the teacher's own size, and only training data has them. Leave "
                "eval_objectives out."
            )
        if live is None:
            raise ValueError(
                f"these images are not those of the store {self.name}, and the teacher "
                f"{self.manifest.teacher.name_or_path!r} could not be opened to show it to them. Leave "
                "eval_objectives out, or put the teacher back where it was."
            )
        return live.to(pixel_values.device).capture(pixel_values, needs, batch)

    # ---- The model behind it ----

    @property
    def answers_without_index(self) -> bool:  # type: ignore[override]
        """Whether the live teacher is there, and is shown the student's pixels."""
        return not self.own and self.live() is not None

    def live(self) -> Any:
        """The teacher itself, opened by the path or Hub name it had; None where it is not there any more, with a
        note."""
        if self._looked:
            return self._live
        self._looked, path = True, self.manifest.teacher.name_or_path
        try:
            if not path:
                raise OSError("its path was not known")
            found = Teacher.from_pretrained(path)
        except (OSError, ValueError) as error:
            self.notes.append(f"the live teacher {path!r} is not used for evaluation: {error}")
            return None
        self.check_teacher(found)
        found.teacher_batch = self.manifest.teacher_batch
        if self._matched:
            found.match(*self._matched)
        self._live = found
        return found

    def classifier(self) -> Any:
        """The live teacher's model, where it is there."""
        live = self.live()
        return None if live is None else live.classifier()

    def pixels(self, pixel_values: Tensor) -> Tensor:
        """What the live teacher would be shown."""
        live = self.live()
        return pixel_values if live is None else live.pixels(pixel_values)

    def provenance(self) -> SourceInfo:
        """As recorded in the store."""
        return copy.copy(self.manifest.teacher)

    @property
    def fingerprint(self) -> str:
        """Of the teacher's weights when the store was written."""
        return self.manifest.fingerprint["teacher"]

    def to(self, device: torch.device) -> StoredTeacher:
        """Arrays are read to the device of the pixels."""
        return self


def rows_and_views(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(n,) each, of a batch that has rows."""
    rows = batch["image_index"].cpu().numpy()
    return rows, batch["image_view"].cpu().numpy() if "image_view" in batch else np.zeros_like(rows)


def open_store(path: str | Path, options: dict[str, Any]) -> StoredTeacher | None:
    """The store that a folder or a dataset repository on the Hub holds, if it holds one."""
    where = {name: options[name] for name in ("revision", "token") if name in options}
    return None if find_store(path, **where) is None else StoredTeacher(path, **where)
