"""What is wrong with a dataset or a model, where a batch or a step failed with an error that does not say so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from hf_kdtl.data.loading import ImageData
from hf_kdtl.models.blocks import vision_config
from hf_kdtl.objectives.estimators import missing_derivative

_MAKE = "hf_kdtl.data.ImageDataset(load_images(dataset).train, image_processor) makes them"


@contextmanager
def explain_data_errors(trainer: Any) -> Iterator[None]:
    """Within this context, an error that data or model explain is raised as a ValueError that says so.

    The data is looked at only then: another look at the first image would draw from a random generator.
    """
    try:
        yield
    except Exception as error:
        if "Expected more than 1 value per channel" in str(error):
            raise ValueError(
                "a batch of one image reached a batch normalization that has one value per channel left: its variance "
                "is 0. It is the last batch of an epoch: set dataloader_drop_last=True, or another batch size."
            ) from error
        if without := missing_derivative(error):
            raise ValueError(without) from error
        if "stack expects each tensor to be equal size" in str(error):
            raise ValueError(
                f"the images of a batch have different sizes ({error}). Expected one: an image processor with a size "
                f"of height and width, or with a center crop. {_MAKE}."
            ) from error
        if "Batch does not contain any data" in str(error):
            raise ValueError("train_dataset gave no images, expected at least one batch of them.") from error
        if "Boolean value of Tensor" in str(error):
            raise ValueError(
                "a batch makes tensors of its items, and the student's forward takes one of them for True or False, "
                "such as interpolate_pos_encoding. Leave it out of the items: resize the images to the student's "
                "image_size with its image processor, or set it in a data_collator."
            ) from error
        if isinstance(error, RuntimeError | ValueError | TypeError | LookupError | AttributeError):
            # Errors of collating labels: the odd one may be in any row.
            first = not any(words in str(error) for words in ("NoneType", "'label", "Python scalars", "dtype of dict"))
            problem = data_problem(trainer.train_dataset, trainer.args.remove_unused_columns, trainer.model, first)
            if problem:
                raise ValueError(problem) from error
        raise


def dataset_problem(dataset: Any, name: str = "train_dataset") -> str:
    """Why something is no dataset, and what to type; "" where it is, or there is none."""
    if dataset is None:
        return ""
    if isinstance(dataset, str | Path):
        return (
            f"{name} is {str(dataset)!r}, expected a dataset: "
            f"ImageDataset(load_images({str(dataset)!r}).train, image_processor)."
        )
    if isinstance(dataset, ImageData | Mapping):
        splits = sorted(dataset) if isinstance(dataset, Mapping) else ["train", "validation", "test"]
        return (
            f"{name} is {type(dataset).__name__} of {', '.join(map(str, splits))}, expected one split of it, "
            "such as ImageDataset(data.train, image_processor)."
        )
    if isinstance(dataset, DataLoader):
        return f"{name} is a DataLoader, expected the dataset in it: {name}=loader.dataset."
    if not hasattr(dataset, "__getitem__") and not hasattr(dataset, "__iter__"):
        return f"{name} is {type(dataset).__name__}, expected a dataset with a length and items by index."
    if isinstance(dataset, Iterator):
        return f"{name} is a {type(dataset).__name__}, which ends after an epoch; expected a list or a dataset."
    empty = (
        name == "train_dataset" and hasattr(dataset, "__len__") and len(dataset) == 0
    )  # for eval_dataset Trainer takes it
    return f"{name} has no images." if empty else ""


def data_problem(dataset: Any, remove_unused_columns: bool, model: Any = None, first: bool = True) -> str:
    """What the model cannot read in the first item of a dataset, and what to do; "" where nothing is seen.

    Args:
        first: otherwise the labels of the first 1000 items are looked at too.
    """
    if getattr(dataset, "format", {}).get("type") == "custom" and remove_unused_columns:
        return (
            "the dataset has a transform (set_transform, with_transform), and Trainer removes the columns that the "
            "model does not take before it runs. Set remove_unused_columns=False."
        )
    try:
        item = dataset[0]
    except Exception:
        return ""
    if isinstance(item, tuple | list):
        return (
            f"an item of the dataset is a {type(item).__name__} of {len(item)}, expected a dict with 'pixel_values' "
            "and 'labels'. Give data_collator=lambda rows: {'pixel_values': torch.stack([x for x, _ in rows]), "
            "'labels': torch.tensor([y for _, y in rows])} for pairs of pixels and label."
        )
    if not isinstance(item, dict):
        return f"an item of the dataset is a {type(item).__name__}, expected a dict with 'pixel_values' and 'labels'."
    if "pixel_values" not in item:
        return f"an item of the dataset has {sorted(item)} and no 'pixel_values', expected pixels: {_MAKE}."
    channels = getattr(vision_config(getattr(model, "config", None)), "num_channels", None)
    rows = [item] if first else (dataset[i] for i in range(min(1000, len(dataset))))
    return _pixel_problem(item["pixel_values"], channels) or _labels_problem(rows)


def _labels_problem(rows: Iterable[dict[str, Any]]) -> str:
    forms: dict[str, int] = {}  # of a label, and the first item that has it
    for i, row in enumerate(rows):
        if problem := _label_problem(row, i):
            return problem
        label = row.get("labels", row.get("label"))
        shape = np.shape(label) if label is not None else None
        forms.setdefault("no label" if shape is None else f"one of shape {shape}" if shape else "a class index", i)
    if len(forms) < 2:
        return ""
    (one, i), (other, j) = list(forms.items())[:2]
    return (
        f"the labels have different forms: item {i} of the dataset has {one}, and item {j} has {other}. Expected "
        "class indices, with -100 where an image has no label, or distributions over the classes for all."
    )


def _label_problem(item: dict[str, Any], index: int) -> str:
    name = next((name for name in ("labels", "label") if name in item), None)
    other = sorted(
        {n for n in item if str(n).lower() in ("label_ids", "target", "targets", "class", "y", "labels", "label")}
    )
    if name is None:
        return f"an item of the dataset has {other[0]!r} and no 'labels': rename the column." if other else ""
    if isinstance(item[name], str):
        return (
            f"the labels are text, such as {item[name]!r}; expected class indices: label2id[label], as "
            "model.config.label2id has them."
        )
    if isinstance(item[name], dict):
        return f"the labels are dicts, such as {str(item[name])[:60]}; expected class indices."
    if item[name] is None:
        return f"item {index} of the dataset has the label None; expected a class index, or -100 where it has none."
    return ""


def _pixel_problem(pixels: Any, channels: int | None) -> str:
    if type(pixels).__module__.startswith("PIL"):
        return f"'pixel_values' are PIL images, expected tensors (C, H, W): {_MAKE}."
    if pixels is None or isinstance(pixels, str):
        return f"'pixel_values' is {pixels!r:.60}, expected a tensor (C, H, W): {_MAKE}."
    shape = np.shape(pixels)
    if len(shape) < 3:
        return f"'pixel_values' have the shape {tuple(shape)}, expected (C, H, W)."
    if len(shape) == 3 and shape[-1] in (1, 3, 4) and shape[0] not in (1, 3, 4):
        return (
            f"'pixel_values' have the shape {tuple(shape)}, channels last; expected (C, H, W): "
            "pixel_values.permute(2, 0, 1), or for an array .transpose(2, 0, 1)."
        )
    if len(shape) == 4:
        return f"'pixel_values' have the shape {tuple(shape)}, expected (C, H, W), one image an item."
    if len(shape) == 3 and isinstance(channels, int) and shape[0] != channels:
        grey = "pixel_values.mean(0, keepdim=True)" if channels == 1 else "pixel_values.expand(3, -1, -1)"
        return (
            f"'pixel_values' have the shape {tuple(shape)} and the student reads {channels} channels; expected "
            f"({channels}, H, W): {grey}, or a student with num_channels={shape[0]}."
        )
    return ""
