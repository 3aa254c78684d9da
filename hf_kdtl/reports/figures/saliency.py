"""Attention and saliency maps of teacher and student, drawn over the images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_kdtl.reports.figures.style import new_figure, save

ATTENTION_SHEET, GRADIENT_SHEET = "attention.png", "gradients.png"


def saliency_figure(
    path: str | Path, images: Sequence[np.ndarray], maps: dict[str, tuple[Tensor, str]], about: str
) -> str:
    """A row for each image: the pixels the student saw, then each model's map over them; returns the caption.

    All maps are on one scale, in multiples of the map's own mean: 1 is a model that looks everywhere alike.

    Args:
        images: (h, w, 3) in [0, 1].
        maps: {column title: what `attention_map` or `input_saliency` gave for these images}.
        about: the caption's first words.
    """
    rows, columns = len(images), 1 + len(maps)
    relative = {who: [_relative(one) for one in values] for who, (values, _) in maps.items()}
    everything = np.concatenate([one.ravel() for found in relative.values() for one in found])
    top = max(2.0, float(np.quantile(everything, 0.995)))
    figure = new_figure(1.75 * columns + 0.9, 1.7 * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False)
    shown = None
    for row, image in enumerate(images):
        clipped = np.clip(image, 0, 1)
        axes[row, 0].imshow(clipped, interpolation="nearest")
        gray = 0.35 + 0.65 * clipped.mean(-1)
        for column, found in enumerate(relative.values(), start=1):
            shown = _over(axes[row, column], gray, found[row], top)
    for column, title in enumerate(["image", *(f"{who}\n{what}" for who, (_, what) in maps.items())]):
        # As wide as the column: neighbouring titles must not meet.
        wrapped = "\n".join(textwrap.fill(line, 20) for line in title.splitlines())
        axes[0, column].set_title(wrapped, fontsize=9)
    for one in axes.flat:
        one.set_axis_off()
    if shown is not None:
        bar = figure.colorbar(shown, ax=axes, shrink=0.6, aspect=30, extend="max")
        bar.set_label("times the mean of the map", fontsize=10)
    save(figure, path, 110)
    return (
        f"{about}: "
        + "; ".join(f"{who}: {what}" for who, (_, what) in maps.items())
        + ". All maps are on one scale, as multiples of their own mean: a map of 1 everywhere has no preference. The "
        "images are those the student saw, one of each class in turn."
    )


def _relative(values: Tensor) -> np.ndarray:
    found = values.float().cpu().numpy()
    return found / max(float(found.mean()), 1e-12)


def _over(axes: Any, gray: np.ndarray, values: np.ndarray, top: float) -> Any:
    """The map over the gray image, more opaque where it is larger."""
    height, width = gray.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(gray, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    alpha = np.clip(values / top, 0, 1) * 0.55 + 0.3
    return axes.imshow(values, cmap="inferno", vmin=0, vmax=top, alpha=alpha, extent=extent, interpolation="nearest")


def unnormalized(pixel_values: Tensor, processor: Any) -> list[np.ndarray]:
    """Pixels as (h, w, 3) in [0, 1] again, from what the image processor made."""
    normalised = getattr(processor, "do_normalize", False)
    mean, std = (processor.image_mean, processor.image_std) if normalised else ([0.0] * 3, [1.0] * 3)
    shape = (3, 1, 1)
    shown = pixel_values.cpu() * torch.tensor(std).reshape(shape) + torch.tensor(mean).reshape(shape)
    return [image.permute(1, 2, 0).numpy() for image in shown]
