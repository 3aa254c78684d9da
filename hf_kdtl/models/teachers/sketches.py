"""Sketches of a live teacher's input gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hf_kdtl.functional.derivatives import scores
from hf_kdtl.functional.resample import precise
from hf_kdtl.functional.sketch import projection, signs, sketch
from hf_kdtl.models.forward.capture import Capture
from hf_kdtl.models.forward.needs import Needs
from hf_kdtl.models.forward.partial_batch import capture_in_chunks
from hf_kdtl.models.teachers.source import Batch


def sketched(
    forward: Callable[[Tensor, Needs], Capture],
    pixel_values: Tensor,
    needs: Needs,
    batch: Batch,
    places: Tensor,
    chunk: int | None,
) -> Capture:
    """A capture with the sketches that are needed: of the class output that is the largest, by the pixels.

    Where no other derivative is needed too, forward and backward run in chunks and nothing keeps a graph.

    Args:
        places: (b,) of these images in the batch, by which their signs are drawn.
        chunk: images in each forward; None: all at once.
    """
    others = replace(needs, sketches=frozenset())
    wanted = others | Needs(input_gradient=True, order=1)

    def run(x: Tensor, _: Needs) -> Capture:
        captured = forward(x, wanted)
        top = captured.logits.argmax(-1, keepdim=True)
        for spec in needs.sketches:
            with torch.enable_grad():
                scalar = scores(captured.logits, spec.of).gather(1, top)[:, 0]  # type: ignore[arg-type]
                captured.sketches[spec] = captured.input_gradient(scalar, create_graph=False)
        return captured if others.derivative else _without_graph(captured)

    whole = chunk is None or others.derivative
    captured = run(pixel_values, needs) if whole else capture_in_chunks(run, pixel_values, needs, chunk or 1)
    draws = batch.get("view_draws", batch.get("draws"))
    if draws is None:
        raise ValueError("a sketch needs the draws of the images; pass batch={'view_draws': Draws(...)}.")
    mine = draws.permuted(places)
    for spec, g in captured.sketches.items():
        g = precise(g)
        matrix = projection(spec.rows, g[0].numel(), draws.seed)
        captured.sketches[spec] = sketch(g, matrix.to(g), signs(mine, g), by_image=True)
    return captured


def _without_graph(captured: Capture) -> Capture:
    names = ("logits", "pixel_values", "pooled", "patches", "hidden_states", "attention", "attention_rows", "sketches")
    detached = {n: tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, getattr(captured, n)) for n in names}
    return Capture(**detached, geometry=captured.geometry, patch_grid=captured.patch_grid)
