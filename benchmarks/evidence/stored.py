"""Runs on a teacher's outputs that hf-kdtl cache stored, with views that are kept in memory: tables 2 and 7."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from benchmarks.auto_weight import HELD_OUT, accuracy, stacked, subset
from benchmarks.evidence.backbone_transfer import PROCESSOR, Rendered
from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.commands.cache import main as cache
from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.models.teachers import StoredTeacher
from hf_kdtl.models.teachers.store.manifest import is_store

AUGMENTATION = {"crop": 4, "flip": True}


class StoredSet:
    """So many training images of each class at 32 px, the teacher's outputs for their views, and the held-out images.

    Args:
        folder: of what is made on first use.
        student: the fields of a student's config, by which the store knows pairs of layers.
        objectives: all that the table's arms read.
        views: of each image; a batch shows the next one.
        teacher_pixels: "own" where the teacher sees each view at its own size.
        on_the_way: every so many-th validation image is looked at while a student trains.
    """

    def __init__(
        self, folder: Path, dataset: str, teacher: str, student: dict[str, Any], objectives: list[Any], *, each: int,
        views: int = 4, teacher_pixels: str = "shared", on_the_way: int = 1,
    ):  # fmt: skip
        self.saved, self.store = subset(dataset, each, folder / "data"), folder / "store"
        data = load_images(self.saved)
        self.names = data.label_names
        if not is_store(str(self.store)):
            cache(
                ["--teacher", teacher, "--dataset", self.saved, "--student_config", json.dumps(student),
                 "--objectives", json.dumps(objectives), "--augmentation", json.dumps(AUGMENTATION),
                 "--views", str(views), "--image_size", "32", "--teacher_pixels", teacher_pixels,
                 "--precision", "float16", "--output", str(self.store)]
            )  # fmt: skip
        self.images = Rendered(data.train, PROCESSOR, augmentation=Augmentation(AUGMENTATION))
        self.held_out = {split: stacked(ImageDataset(getattr(data, split), PROCESSOR)) for split in HELD_OUT}
        self.looked_at = tuple(part[::on_the_way] for part in self.held_out["validation"])

    def trained(self, student: Any, config: DistillationConfig, marks: tuple[int, ...]) -> dict[str, Any]:
        """Accuracy of the last step on validation and test, and on validation after so many steps."""
        curve = Curve(self.looked_at, marks)
        reads_teacher = any(entry["name"] != "task" for entry in config.objectives)
        trainer = DistillationTrainer(
            student, config, train_dataset=self.images, processing_class=PROCESSOR, callbacks=[curve],
            teacher=StoredTeacher(self.store) if reads_teacher else None,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return {name: accuracy(trainer.model, *images) for name, images in self.held_out.items()} | {
            "curve": curve.found
        }


class Curve(TrainerCallback):
    """Accuracy on validation images after so many steps."""

    def __init__(self, images: tuple[torch.Tensor, ...], marks: tuple[int, ...]):
        self.images, self.marks, self.found = images, marks, {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.marks:
            self.found[state.global_step] = round(accuracy(kwargs["model"], *self.images), 4)
            kwargs["model"].train()
