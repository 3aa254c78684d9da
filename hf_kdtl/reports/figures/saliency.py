"""Images with the attention or saliency maps of teacher and student next to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_kdtl.reports.figures.style import new_figure

ATTENTION_SHEET, GRADIENT_SHEET = "attention.png", "gradients.png"


def saliency_figure(
    path: str | Path, images: Sequence[np.ndarray], maps: dict[str, tuple[Tensor, str]], about: str
) -> str:
    """A row for each image: the pixels the student saw, then one map for each model; returns the caption.

    Args:
        images: (h, w, 3) in [0, 1].
        maps: {column title: what `attention_map` or `input_saliency` gave for these images}.
        about: the caption's first words.
    """
    rows, columns = len(images), 1 + len(maps)
    figure = new_figure(1.9 * columns, 1.75 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, image in enumerate(images):
        axes[row, 0].imshow(np.clip(image, 0, 1), interpolation="nearest")
        for column, (values, _) in enumerate(maps.values(), start=1):
            values_here = values[row].float().cpu().numpy()
            axes[row, column].imshow(values_here, cmap="magma", vmin=0, interpolation="nearest")
    for column, title in enumerate(["image", *(f"{who}\n{what}" for who, (_, what) in maps.items())]):
        axes[0, column].set_title(title, fontsize=8)
    for one in axes.flat:
        one.set_axis_off()
    figure.savefig(path, dpi=130)
    return (
        f"{about}: "
        + "; ".join(f"{who}: {what}" for who, (_, what) in maps.items())
        + ". Each map is scaled to its own largest value. The pixels are those the student saw."
    )


def unnormalized(pixel_values: Tensor, processor: Any) -> list[np.ndarray]:
    """Pixels as (h, w, 3) in [0, 1] again, from what the image processor made."""
    normalised = getattr(processor, "do_normalize", False)
    mean, std = (processor.image_mean, processor.image_std) if normalised else ([0.0] * 3, [1.0] * 3)
    shape = (3, 1, 1)
    shown = pixel_values.cpu() * torch.tensor(std).reshape(shape) + torch.tensor(mean).reshape(shape)
    return [image.permute(1, 2, 0).numpy() for image in shown]
