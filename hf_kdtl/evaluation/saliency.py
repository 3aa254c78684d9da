"""Sheets of images with maps of teacher and student, before and after training: where they look, what moves them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_kdtl.functional.attention import attention_rows, mean_heads
from hf_kdtl.functional.divergences import log_probabilities
from hf_kdtl.functional.features import energy
from hf_kdtl.models.forward.capture import Needs, capture
from hf_kdtl.models.forward.geometry import describe
from hf_kdtl.models.forward.modes import evaluating


@torch.no_grad()
def attention_map(model: nn.Module, pixel_values: Tensor) -> tuple[Tensor, str]:
    """Where the last block looks, (B, gh, gw), each map summing to 1; and what the map is.

    The class token's attention to the patches, mean over heads, where there is a class token and full attention; else
    the energy of the features, mean_d h^2, of the last block whose grid is larger than one cell.

    Raises:
        ValueError: when no block lies on a grid.
    """
    with evaluating(model):
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
    assert layer.grid is not None
    return (values / values.sum(-1, keepdim=True)).reshape(-1, *layer.grid), what


def input_saliency(
    model: nn.Module, pixel_values: Tensor, classes: Tensor, shown: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, str]:
    """How much each pixel moves the log-probability of a class, (B, h, w): || d log p_c / d x || over the channels.

    Args:
        classes: (B,) c of each image, in the model's own order.
        shown: what the model is shown for `pixel_values` (a teacher's `pixels`).
    """
    with evaluating(model):
        got = capture(model, pixel_values, Needs(input_gradient=True, order=1, fraction=1.0), shown=shown)
        chosen = log_probabilities(got.logits).gather(1, classes[:, None].to(got.logits.device))
        return got.input_gradient(chosen[:, 0], create_graph=False).norm(dim=1), "input gradient"
