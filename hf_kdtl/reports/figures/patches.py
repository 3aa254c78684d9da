"""Patch features of teacher and student as colors, next to the photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hf_kdtl.reports.figures.style import new_figure, save

PATCHES = "patches.png"


def patch_figure(path: str | Path, images: Sequence[np.ndarray], colors: Mapping[str, np.ndarray]) -> None:
    """A row for each image: what the student saw, then each model's patches.

    Args:
        images: (h, w, 3) in [0, 1].
        colors: {column title: (n, gh, gw, 3) in [0, 1]}, the first three principal components of a model's patch
            tokens. Each model has its own components: compare shapes, not colors.
    """
    columns = ["image", *colors]
    figure = new_figure(1.8 * len(columns), 1.8 * len(images) + 0.4)
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for row, image in enumerate(images):
        axes[row, 0].imshow(np.clip(image, 0, 1), interpolation="nearest")
        for column, found in enumerate(colors.values(), start=1):
            axes[row, column].imshow(found[row], interpolation="nearest")
    for column, title in enumerate(columns):
        axes[0, column].set_title(title, fontsize=9)
    for one in axes.flat:
        one.set_axis_off()
    save(figure, path, 110)
