"""Sheets of images with maps of teacher and student, before and after training: where they look, what moves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from hf_kdtl.functional.attention import attention_rows, mean_heads
from hf_kdtl.functional.divergences import log_probabilities
from hf_kdtl.functional.features import energy
from hf_kdtl.models.forward.capture import Needs, capture
from hf_kdtl.models.forward.geometry import describe

ATTENTION_SHEET, GRADIENT_SHEET = "attention.png", "gradients.png"


@torch.no_grad()
def looked_at(model: nn.Module, pixel_values: Tensor) -> tuple[Tensor, str]:
    """Where the last block looks, (B, gh, gw), each map summing to 1; and what the map is.

    The class token's attention to the patches, mean over heads, where there is a class token and full attention; else
    the energy of the features, mean_d h^2, of the last block whose grid is larger than one cell.

    Raises:
        ValueError: when no block lies on a grid.
    """
    training = model.training
    model.eval()
    try:
        geometry = describe(model, pixel_values)
        last, layer = len(geometry.layers) - 1, geometry.layers[-1]
        if layer.attention == "full" and layer.prefix[:1] == ("class",) and layer.grid and not geometry.weights_only:
            got = capture(model, pixel_values, Needs(attention=frozenset({last})), geometry).attention[last]
            assert got.query is not None and got.key is not None
            rows = mean_heads(attention_rows(got.query, got.key, got.scale, got.bias, "cls")).exp()
            values, what = rows[:, 0, 0, len(layer.prefix) :], "attention of the class token"
        else:
            on_grid = [i for i, found in enumerate(geometry.layers) if found.grid and found.grid != (1, 1)]
            if not on_grid:
                raise ValueError(f"{geometry.name} has no block on a grid of the image; there is no map to show.")
            last, layer = on_grid[-1], geometry.layers[on_grid[-1]]
            hidden = capture(model, pixel_values, Needs(hidden_states=frozenset({last})), geometry).hidden_states[last]
            tokens = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden[:, len(layer.prefix) :]
            values, what = energy(tokens), "energy of the features"
    finally:
        model.train(training)
    assert layer.grid is not None
    return (values / values.sum(-1, keepdim=True)).reshape(-1, *layer.grid), what


def moved_by(
    model: nn.Module, pixel_values: Tensor, classes: Tensor, shown: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, str]:
    """How much each pixel moves the log-probability of a class, (B, h, w): || d log p_c / d x || over the channels.

    Args:
        classes: (B,) c of each image, in the model's own order.
        shown: what the model is shown for `pixel_values` (a teacher's `pixels`).
    """
    training = model.training
    model.eval()
    try:
        got = capture(model, pixel_values, Needs(input_gradient=True, order=1, fraction=1.0), shown=shown)
        chosen = log_probabilities(got.logits).gather(1, classes[:, None].to(got.logits.device))
        return got.input_gradient(chosen[:, 0], create_graph=False).norm(dim=1), "input gradient"
    finally:
        model.train(training)


def map_sheet(path: str | Path, images: Sequence[np.ndarray], maps: dict[str, tuple[Tensor, str]], about: str) -> str:
    """A row for each image: the pixels the student saw, then one map for each model; returns the caption.

    Args:
        images: (h, w, 3) in [0, 1].
        maps: {column title: what `looked_at` or `moved_by` gave for these images}.
        about: the caption's first words.
    """
    rows, columns = len(images), 1 + len(maps)
    figure = Figure(figsize=(1.9 * columns, 1.75 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
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


def unnormalised(pixel_values: Tensor, processor: Any) -> list[np.ndarray]:
    """Pixels as (h, w, 3) in [0, 1] again, from what the image processor made."""
    normalised = getattr(processor, "do_normalize", False)
    mean, std = (processor.image_mean, processor.image_std) if normalised else ([0.0] * 3, [1.0] * 3)
    shape = (3, 1, 1)
    shown = pixel_values.cpu() * torch.tensor(std).reshape(shape) + torch.tensor(mean).reshape(shape)
    return [image.permute(1, 2, 0).numpy() for image in shown]
