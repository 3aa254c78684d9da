"""Every degradation at every severity on one example image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hf_kdtl.data.degradations import DEGRADATIONS, SEVERITIES, degrade_image


def degradation_gallery(path: str | Path, image: Image.Image | None = None, index: int = 0) -> None:
    """Every degradation in a row, the image as it is first, then severity 1 to 5.

    Args:
        path: of the PNG.
        image: 8-bit RGB; by default a drawing.
        index: of the image in its data set, by which places and directions are drawn.
    """
    from matplotlib.figure import Figure

    image = image or example_image()
    # Without a layout engine: matplotlib's own takes seconds for so many panels.
    figure = Figure(figsize=(8.4, 1.36 * len(DEGRADATIONS)))
    sides = {"left": 0.11, "right": 0.995, "top": 0.985, "bottom": 0.005, "wspace": 0.05, "hspace": 0.15}
    axes = figure.subplots(len(DEGRADATIONS), 1 + len(SEVERITIES), gridspec_kw=sides)
    for row, one in zip(axes, DEGRADATIONS.values(), strict=True):
        row[0].set_ylabel(one.name.replace("_", "\n"), rotation=0, ha="right", va="center")
        shown = [image, *(degrade_image(image, one.name, severity, index) for severity in SEVERITIES)]
        for column, title, pixels in zip(row, ("as it is", *one.amounts), shown, strict=True):
            column.imshow(pixels, interpolation="nearest")
            column.set_title(title if isinstance(title, str) else f"{title:g}", fontsize=8, pad=2)
            column.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=90)


def example_image(side: int = 96) -> Image.Image:
    """A picture to look at degradations with: edges, thin lines, a fine pattern, a smooth sky, several colours."""
    n = 4 * side
    sky = np.linspace((90, 150, 230), (225, 235, 250), n)[:, None].repeat(n, axis=1)
    image = Image.fromarray(sky.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    at = lambda *places: [round(p * n) for p in places]  # noqa: E731
    draw.ellipse(at(0.68, 0.08, 0.88, 0.28), fill=(250, 220, 70))
    draw.ellipse(at(-0.3, 0.62, 1.3, 1.6), fill=(70, 140, 60))
    draw.rectangle(at(0.2, 0.42, 0.58, 0.8), fill=(205, 190, 165))
    draw.polygon(at(0.15, 0.42, 0.39, 0.2, 0.63, 0.42), fill=(170, 50, 40))
    draw.rectangle(at(0.26, 0.56, 0.36, 0.8), fill=(95, 60, 35))
    draw.rectangle(at(0.42, 0.5, 0.54, 0.64), fill=(40, 50, 70))
    for k in range(8):  # a fence
        draw.rectangle(at(0.66 + 0.04 * k, 0.66, 0.68 + 0.04 * k, 0.84), fill=(245, 245, 240))
    for k in range(12):  # a chequered cloth
        for j in range(k % 2, 6, 2):
            draw.rectangle(at(0.05 + 0.025 * k, 0.84 + 0.025 * j, 0.072 + 0.025 * k, 0.862 + 0.025 * j), fill="black")
    return image.resize((side, side), Image.Resampling.BOX)
