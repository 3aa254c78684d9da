"""What is wrong with a dataset or a model, where a batch or a step failed with an error that does not say so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

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
        if isinstance(error, RuntimeError | ValueError | TypeError | LookupError | AttributeError):
            problem = data_problem(trainer.train_dataset, trainer.args.remove_unused_columns, trainer.model)
            if problem:
                raise ValueError(problem) from error
        raise


def data_problem(dataset: Any, remove_unused_columns: bool, model: Any = None) -> str:
    """What the model cannot read in the first item of a dataset, and what to do; "" where nothing is seen."""
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
    return _pixel_problem(item["pixel_values"], channels)


def _pixel_problem(pixels: Any, channels: int | None) -> str:
    if type(pixels).__module__.startswith("PIL"):
        return f"'pixel_values' are PIL images, expected tensors (C, H, W): {_MAKE}."
    shape = np.shape(pixels)
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
