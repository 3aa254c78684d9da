"""Training and evaluation data that do not fit the settings: refused before they are read."""

from __future__ import annotations

from typing import Any

from transformers import Trainer
from transformers.utils import logging

from hf_kdtl.models.teachers.processor_files import processor_differences
from hf_kdtl.utils.wrapped import holders

logger = logging.get_logger(__name__)
GEOMETRY = {"size", "crop_size", "crop_pct", "do_resize", "do_center_crop", "resample", "default_to_square"}
"""Settings of an image processor that change how much of an image is shown and how large, and no pixel's value."""


def training_data_problems(trainer: Any) -> list[str]:
    """What of the training data does not fit the settings, each with what to type."""
    return [
        *_too_few(trainer),
        *_view_problems(trainer),
        *_pixel_problems(trainer),
        *_on_device_problems(trainer),
    ]


def evaluation_pixels_problem(trainer: Any, dataset: Any) -> str:
    """Why data for evaluation shows other values than the student learns, with what to type; "" where it does not.
    Another size or crop is a note."""
    own, name = _processor(trainer)
    for one in holders(dataset, "image_processor"):
        found = processor_differences(one.image_processor, own)
        if {*found} - GEOMETRY:
            return (
                f"the images for evaluation are made by another image processor than {name}: {', '.join(found)} "
                "differ, so the student would see other pixels than it learns from. Give both the same: "
                "ImageDataset(split, image_processor) and processing_class=image_processor."
            )
        if found:
            logger.warning_once(
                f"images for evaluation are shown otherwise than by {name}: {', '.join(found)} of their image "
                "processor differ. Give ImageDataset that one where this is not meant."
            )
    return ""


def _pixel_problems(trainer: Any) -> list[str]:
    """The teacher's pixels are made from the student's, and the student is served with processing_class: training data
    by another image processor would make both wrong."""
    own, name = _processor(trainer)
    found = (processor_differences(one.image_processor, own) for one in _of_training(trainer, "image_processor"))
    return [
        f"train_dataset makes its pixels by another image processor than {name}: {', '.join(differing)} differ. Give "
        "both the same: ImageDataset(split, image_processor) and processing_class=image_processor."
        for differing in found
        if differing
    ]


def _processor(trainer: Any) -> tuple[Any, str]:
    """The student's image processor, and what it is called: that of the training data where none was given."""
    if (given := trainer.processing_class) is not None:
        return getattr(given, "image_processor", given), "processing_class"
    known = _of_training(trainer, "image_processor")
    return (known[0].image_processor if known else None), "that of train_dataset"


def _of_training(trainer: Any, name: str) -> list[Any]:
    return holders(trainer.train_dataset, name)


def _view_problems(trainer: Any) -> list[str]:
    asked = trainer.args.view_seed
    found = [
        f"view_seed is {asked} in the config and {one.view_seed} in train_dataset, where the views are drawn. Give "
        f"both the same: ImageDataset(..., view_seed={asked})."
        for one in _of_training(trainer, "view_seed")
        if one.view_seed != asked
    ]
    for one in _of_training(trainer, "labelled_share"):
        if one is not trainer.train_dataset and one.labelled_share is not None:
            found.append(
                f"labelled_share is set inside a {type(trainer.train_dataset).__name__}, where it does not reach the "
                "order of training. Select rows of the split in its place: ImageDataset(split.select(rows), ..., "
                f"labelled_share={one.labelled_share})."
            )
    return found


def _on_device_problems(trainer: Any) -> list[str]:
    if not trainer.args.augment_on_device:
        return []
    if not hasattr(trainer.train_dataset, "unfinished_items"):
        found = type(trainer.train_dataset).__name__
        return [f"augment_on_device is of an ImageDataset, and train_dataset is {found}. Use one, or leave it out."]
    if trainer.args.teacher_pixels == "own":
        return ["augment_on_device does not go with teacher_pixels 'own', made where images are read. Leave one out."]
    if trainer.teacher is not None and trainer.teacher.needs_index and trainer.train_dataset.finishes_later:
        return [
            "augment_on_device does not go with a stored teacher, which saw pixels rounded to 8 bits. Leave it out."
        ]
    return []


def _too_few(trainer: Trainer) -> list[str]:
    """Batch statistics for which the last micro-batch of an epoch is too small: reported now, not after an epoch."""
    args: Any = trainer.args
    data: Any = trainer.train_dataset
    full = args.dataloader_drop_last or getattr(data, "labelled_share", None) is not None
    if not hasattr(data, "__len__") or full or args.world_size > 1:
        return []
    size = args.per_device_train_batch_size
    last = len(data) % size or size
    return [
        f"objective {key!r} needs {least} images in a micro-batch, and the last one of an epoch has {last} "
        f"({len(data)} images in batches of {size}). Set dataloader_drop_last=True, or another batch size."
        for key, objective in args.build_objectives().items()
        if (least := getattr(objective, "least_images", 1)) > last
    ]
