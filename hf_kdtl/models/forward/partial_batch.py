"""A batch of which only some images are differentiated: two forwards of half the work each, put together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.forward.modes import batch_norms


def capture_subset(
    run: Callable[..., Capture], model: nn.Module, pixel_values: Tensor, needs: Needs, rows: Tensor, **inputs: Any
) -> Capture:
    """One capture of the batch, whose images `rows` can be differentiated.

    The forward of those images serves all objectives, and the others take the plain one; no image runs twice. Only
    where BatchNorm is in train mode do the chosen images run once more, by its running statistics: batch statistics
    belong to the batch, and tie the images to each other.

    Args:
        run: (pixel_values, needs, **inputs) -> Capture.
        rows: (b,) indices of the images to differentiate; may be empty.
    """
    number = pixel_values.shape[0]
    if not needs.derivative or not len(rows):
        return run(pixel_values, needs.plain(), **inputs)
    if batch_norms(model):
        full = run(pixel_values, needs.plain(), **inputs)
        full.differentiated = run(pixel_values[rows], needs, **_of_images(inputs, rows, number))
        full.differentiated_rows = rows
        return full
    if len(rows) == number:
        return run(pixel_values, needs, **inputs)
    others = torch.ones(number, dtype=torch.bool, device=rows.device).index_fill(0, rows, False).nonzero()[:, 0]
    part = run(pixel_values[rows], needs, **_of_images(inputs, rows, number))
    rest = run(pixel_values[others], needs.plain(), **_of_images(inputs, others, number))
    return _joined(part, rest, rows, torch.cat([rows, others]).argsort())


def _of_images(inputs: dict[str, Any], rows: Tensor, number: int) -> dict[str, Any]:
    return {k: v[rows] if isinstance(v, Tensor) and v.shape[:1] == (number,) else v for k, v in inputs.items()}


def _joined(part: Capture, rest: Capture, rows: Tensor, order: Tensor) -> Capture:
    sizes = len(part.pixel_values), len(rest.pixel_values)

    def join(a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return a if a is None or isinstance(a, int | float | str) else None
        if (*a.shape[:1], *b.shape[:1]) == sizes:
            return torch.cat([a, b])[order]
        return a if a.shape[:1] == (1,) else None  # a bias that all images share; else nothing is known of it

    both = part.outputs is not None and rest.outputs is not None  # forwards in chunks give none
    names = ("logits", "pixel_values", "outputs", "pooled", "patches", "hidden_states", "attention", "attention_rows")
    values: dict[str, Any] = {
        name: tree_map(join, getattr(part, name), getattr(rest, name)) for name in names if both or name != "outputs"
    }
    values["patch_grid"] = part.patch_grid
    return Capture(**values, geometry=part.geometry, differentiated=part, differentiated_rows=rows)


def capture_in_chunks(run: Callable[..., Capture], pixel_values: Tensor, needs: Needs, size: int) -> Capture:
    """One capture of forwards of exactly `size` images, the last one filled up with copies of its last image.

    What a model gives for an image depends on how many images a forward has, by rounding (3e-6 measured between 8 and
    16): in equal chunks it is bitwise the same.

    Args:
        run: (pixel_values, needs) -> Capture.
    """
    parts = []
    for chunk in pixel_values.split(size):
        filled = torch.cat([chunk, chunk[-1:].expand(size - len(chunk), *chunk.shape[1:])])
        parts.append((run(filled, needs), len(chunk)))
    if len(parts) == 1 and parts[0][1] == size:
        return parts[0][0]

    def join(*values: Any) -> Any:
        first = values[0]
        if not isinstance(first, Tensor):
            return first if first is None or isinstance(first, int | float | str) else None
        if all(isinstance(v, Tensor) and len(v) == size for v in values):
            return torch.cat([v[:n] for v, (_, n) in zip(values, parts, strict=True)])
        return first if first.shape[:1] == (1,) else None  # a bias that all images share; else nothing is known of it

    names = ("logits", "pixel_values", "pooled", "patches", "hidden_states", "attention", "attention_rows", "sketches")
    joined: dict[str, Any] = {n: tree_map(join, *(getattr(part, n) for part, _ in parts)) for n in names}
    return Capture(**joined, geometry=parts[0][0].geometry, patch_grid=parts[0][0].patch_grid)
