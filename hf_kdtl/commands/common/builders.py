"""What the commands build from their settings: data, models, image processors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_kdtl.commands.common.arguments import mapping
from hf_kdtl.commands.common.labels import fewer_labels
from hf_kdtl.commands.common.next_command import SPLIT_OPTIONS
from hf_kdtl.data import ImageData, ImageDataset, load_images
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.data.digests import digests
from hf_kdtl.evaluation.cost import parameters
from hf_kdtl.evaluation.results import read_results, same_value
from hf_kdtl.models.blocks import vision_config
from hf_kdtl.models.cutting.families import family_of
from hf_kdtl.models.labels import MULTI_LABEL, class_names, is_multi_label, match_labels, same_classes, set_class_names
from hf_kdtl.models.teachers.processor_files import open_processor
from hf_kdtl.models.teachers.resolve import locate, open_classifier, open_config, renew_head
from hf_kdtl.utils.distributed import unsharded_class
from hf_kdtl.utils.options import check_known

CUTS = ("split_seed", "validation_fraction", "test_fraction")  # settings that decide which images become test images


@dataclass
class DataOptions:
    """The images: their source, splits and augmentation."""

    dataset: str = field(
        default="digits",
        metadata={"help": "A folder of images, parquet files, a saved dataset, a Hub name, or digits (built in)."},
    )
    image_column: str | None = field(default=None, metadata={"help": "By default the only column of images."})
    label_column: str | None = field(default=None, metadata={"help": "By default the only column of classes."})
    validation_fraction: float = field(default=0.15, metadata={"help": "Of train, where there is none."})
    test_fraction: float = field(default=0.15, metadata={"help": "Of train, where there is none."})
    split_seed: int = field(default=42, metadata={"help": "Of these cuts. The same for teacher and student!"})
    on_bad_image: str = field(default="error", metadata={"help": "error, or skip: leave unreadable images out."})
    high_bit_depth: str = field(
        default="clip",
        metadata={"help": "16-bit, 32-bit, float images: clip as pipeline() does, or scale."},
    )
    multi_label: bool = field(
        default=False, metadata={"help": "Several labels an image: cat;dog in a cell, none for no class."}
    )
    train_images: int | None = field(default=None, metadata={"help": "Train on so many, each class by its share."})
    labels_per_class: int | None = field(default=None, metadata={"help": "Train on so many labels of each class."})
    augmentation: dict | str | None = field(
        default=None, metadata={"help": 'As JSON, such as {"crop": 4, "flip": true, "mixup": 0.2}.'}
    )
    views: int | None = field(
        default=None, metadata={"help": "Augmented versions of each image, in turn; by default always new ones."}
    )


def check_read(typed: set[str], further: Sequence[str] = ()) -> None:
    """Raises ValueError for settings of training that were typed where nothing is trained: of augmentation, and
    `further` ones."""
    if found := sorted({"augmentation", "views", *further} & typed):
        raise ValueError(f"{found[0]} is about training images, and nothing is trained here; leave {found[0]} out.")


def open_data(options: DataOptions) -> ImageData:
    """The three splits, with train cut to `train_images` or `labels_per_class`."""
    Augmentation(mapping("augmentation", options.augmentation))  # a misspelt key fails before the images are read
    data = read_splits(options)
    if options.on_bad_image == "error":
        data.check_readable()  # all of them now: a bad test image would be found after hours of training
    return fewer_images(data, options)


def read_splits(options: DataOptions) -> ImageData:
    """The three splits, as `SPLIT_OPTIONS` say. None of the images is read."""
    given: dict[str, Any] = {name: getattr(options, name) for name in SPLIT_OPTIONS}
    return load_images(given.pop("dataset"), seed=given.pop("split_seed"), **given)


def fewer_images(data: ImageData, options: DataOptions) -> ImageData:
    """The data with train cut to `train_images` or `labels_per_class`."""
    return fewer_labels(data, options.train_images, options.labels_per_class, options.split_seed)


def pixels(
    split: Any,
    processor: Any,
    options: DataOptions | None = None,
    labelled_share: float | None = None,
    config: Any = None,
    teacher: Any = None,
) -> ImageDataset:
    """A split as what the model is fed; augmented where `options` are given, with the seeds of the `config`."""
    settings = mapping("augmentation", options.augmentation) if options else {}
    augmentation = Augmentation(settings) if settings else None
    given: dict[str, Any] = {} if config is None else {"seed": config.seed, "view_seed": config.view_seed}
    needed = teacher is not None and getattr(teacher, "needs_pixels", True)
    if needed and config is not None and config.teacher_pixels == "own":
        given["teacher_processor"] = teacher.processing_class
    views = options.views if options else None
    return ImageDataset(
        split, processor, augmentation=augmentation, labelled_share=labelled_share, views=views, **given
    )


def batch_of(dataset: Any, rows: Iterable[int]) -> Tensor:
    """The pixel_values of some items, (n, C, h, w)."""
    return torch.stack([item["pixel_values"] for item in dataset.__getitems__(list(rows))])


def labels_of(names: Sequence[str]) -> dict[str, Any]:
    """What a model config says about its classes."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def from_config(settings: dict[str, Any], names: Sequence[str], what: str) -> Any:
    """A model with random weights, from the fields of its config and `model_type`.

    Raises:
        ValueError: for an unknown model_type or field, and for classes, which are those of the data.
    """
    settings = dict(settings)
    kind = settings.pop("model_type", None)
    if own := [name for name in ("num_labels", "id2label", "label2id") if name in settings]:
        raise ValueError(f"{what} has {', '.join(own)}; leave them out: the classes are those of the data.")
    check_known(f"model_type in {what}", kind, list(CONFIG_MAPPING))
    valid, family = CONFIG_MAPPING[kind]().to_dict(), family_of(CONFIG_MAPPING[kind]())
    further = {"head_dim": None} if family is not None and family.heads == "any" else {}  # of a student cut by heads
    _check_fields(settings, valid | further, what)
    return AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, **settings, **labels_of(names)))


def _check_fields(settings: dict[str, Any], valid: dict[str, Any], what: str) -> None:
    # Any field is accepted by transformers, a misspelt one too, and then the model is another one than was asked for.
    for name, value in settings.items():
        check_known(f"field of {what}", name, sorted(valid))
        if isinstance(value, dict) and isinstance(valid[name], dict) and "model_type" in valid[name]:
            _check_fields(value, valid[name], f"{what}.{name}")


def pretrained(path: str, names: Sequence[str], notes: list[str]) -> Any:
    """A saved model for the classes `names`: its own head where its classes are these, else a new one.

    In float32: transformers loads the dtype that was saved, and half precision does not train.
    """
    config, role = open_config(path), "the model"
    known, count = class_names(config), config.num_labels
    if known is not None and same_classes(known, names):
        opened = open_classifier(path, role=role, keep_head=False, dtype=torch.float32)
        notes += opened.notes
        return opened.model
    opened = open_classifier(
        path, role=role, keep_head=False, dtype=torch.float32, ignore_mismatched_sizes=True, **labels_of(names)
    )
    if known is None and count == len(names):
        named = f"{path} does not name its {count} classes: they are taken to be those of the data, in order."
        notes += [*opened.notes, *([] if opened.new_head else [named])]
        return opened.model
    notes.append(f"{path} has a head for {count} other classes: it gets a new one for the {len(names)} of the data.")
    notes += opened.unread
    if not opened.new_head:  # of the same size, so it was loaded
        renew_head(opened.model)
    return opened.model


def answering(model: Any, data: ImageData) -> Any:
    """The model, whose config says that an image has several labels where the data's have.

    Raises:
        ValueError: for a model of several labels an image and data of one.
    """
    if is_multi_label(model) and not data.multi_label:
        raise ValueError(
            f"{type(model).__name__} has several labels an image (its problem_type), and the data was read with one. "
            "Type --multi_label true, or take another model."
        )
    if data.multi_label:
        model.config.problem_type = MULTI_LABEL
    return model


def named(model: Any, names: Sequence[str]) -> Any:
    """A model whose head answers in the classes `names`, in any order; one that names none takes these.

    Raises:
        ValueError: when its classes are others.
    """
    match_labels(SimpleNamespace(num_labels=len(names), id2label=dict(enumerate(names))), model.config)
    if class_names(model.config) is None:
        set_class_names(model.config, names)
    return model


def existing(path: str) -> str:
    """A model's folder or Hub name, `~` expanded.

    Raises:
        FileNotFoundError: when it looks like a path and nothing is there.
    """
    return locate(path)


def processor_of(path: str, model: Any, notes: list[str] | None = None) -> Any:
    """The image processor saved with a model; where none was saved, one made from its config, with a note.

    Raises:
        OSError: when one is there and cannot be read.
    """
    saved = open_processor(path)
    if saved is None and notes is not None:
        notes.append(f"no image processor is saved with {path}: its pixels are in [-1, 1], of its config's size.")
    return new_processor(model.config) if saved is None else saved


def new_processor(config: Any, image_size: int | None = None) -> Any:
    """Square pixels of the config's image_size, in [-1, 1].

    Raises:
        ValueError: when neither the config nor the settings name a size.
    """
    size = image_size or getattr(vision_config(config), "image_size", None)
    if size is None:
        raise ValueError(f"{type(config).__name__} has no image_size; type --image_size, such as --image_size 64.")
    height, width = (size, size) if isinstance(size, int) else size
    half = [0.5, 0.5, 0.5]
    # By attribute: transformers says at its import which backend it takes, before `cli.quiet` is called.
    return transformers.ViTImageProcessor(size={"height": height, "width": width}, image_mean=half, image_std=half)


def summary(model: Any) -> str:
    """A model in a few words."""
    return f"{unsharded_class(model).__name__}, {parameters(model):,} parameters"


def is_on_hub(source: str) -> bool:
    """Whether images were read by a name on the Hub: it is neither the built-in set nor a path here."""
    return source != "digits" and not glob(str(Path(source).expanduser()))


def facts(data: ImageData, options: DataOptions, unlabelled: Dataset | None = None) -> dict[str, Any]:
    """The section `data` of results.json."""
    splits = {name: getattr(data, name) for name in ("train", "validation", "test")}
    further = {} if unlabelled is None else {"unlabelled": unlabelled}
    return {
        "source": data.source,
        "hub": is_on_hub(data.source),
        "sizes": {name: len(split) for name, split in splits.items()},
        "classes": data.label_names,
        "splits": {name: getattr(options, name) for name in CUTS},
        "digests": digests(splits | further),
        "augmentation": mapping("augmentation", options.augmentation),
        "high_bit_depth": data.high_bit_depth,
        "notes": data.notes,
    }


def split_notes(model: str, data: ImageData, options: DataOptions, called: str = "the teacher") -> list[str]:
    """A warning where a saved model was trained by these commands on images that are test images here."""
    before, cut = trained_on(model), {name: getattr(options, name) for name in CUTS}
    if "splits" not in before or not same_value(before["source"], data.source):
        return []
    seen = before.get("digests", {}).get("test")  # results of earlier versions have none
    if before["splits"] == cut if seen is None else seen == digests({"test": data.test})["test"]:
        return []
    how, cure = f"split by {before['splits']}, here it is split by {cut}", "Use the same three settings."
    if before["splits"] == cut:
        how, cure = "when it held other images", f"Train {called} again, or test on images of their own."
    return [
        f"Careful: {called} was trained on {before['source']} {how}: it may have seen images that are test images "
        f"here. {cure}"
    ]


def trained_on(model: str) -> dict[str, Any]:
    """The section `data` of the run that a saved model is of: in its folder, or that of one of several seeds; {} of a
    model of no run."""
    for folder in [*Path(model).expanduser().resolve().parents][:2]:
        try:
            results = read_results(folder)
        except (OSError, ValueError):
            continue
        return {} if results.get("run", {}).get("recipe") == "evaluate_student" else results.get("data", {})
    return {}


def describe_data(data: ImageData) -> list[str]:
    """The data, for the terminal."""
    sizes = ", ".join(f"{len(getattr(data, name))} {name}" for name in ("train", "validation", "test"))
    return [f"{data.source}: {sizes} images of {len(data.label_names)} classes", *(f"- {note}" for note in data.notes)]
