"""The embedding and the patch tokens of one forward."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_kdtl.models.forward.embedding import last_hidden_state, patch_tokens, pooled_output
from hf_kdtl.models.forward.geometry import ModelGeometry, layer_at_size


class Final(NamedTuple):
    """What comes after the last block; None where it was not asked for, or there is none."""

    pooled: Tensor | None = None  # (B, D)
    patches: Tensor | None = None  # (B, P, D')
    grid: tuple[int, int] | None = None


def read_final(
    model: nn.Module, geometry: ModelGeometry | None, towers: list[Any], pixel_values: Tensor, pooled: bool
) -> Final:
    """The patch tokens, and the embedding where `pooled`, of what the part of a model without its head gave, if it was
    asked.

    Raises:
        ValueError: for a model that has no embedding.
    """
    if not towers or geometry is None:
        return Final()
    outputs, patches, token, grid = towers[0], None, None, None
    last = last_hidden_state(outputs)
    if last is not None and geometry.patches is not None:
        image = pixel_values.shape[-2], pixel_values.shape[-1]
        layer = geometry.patches
        if image != geometry.image:
            layer = layer_at_size(layer, image, len(pixel_values), last, None)
        patches, token = patch_tokens(last, layer.prefix, geometry.norm)
        grid = layer.grid
    if not pooled:
        return Final(None, patches, grid)
    if not geometry.pooling:
        raise ValueError(f"{geometry.name} gives neither a pooled output nor tokens, so it has no embedding.")
    return Final(pooled_output(geometry.pooling, model, outputs, patches, token, pixel_values), patches, grid)


def check_complete(name: str, needs: Any, attention: dict, hidden_states: dict, final: Final) -> None:
    """Nothing that was asked for may be missing: a sum over an empty capture would be 0.0 and look learned."""
    if missing := sorted(needs.tapped - attention.keys()):
        raise ValueError(
            f"{name} gave no attention for the blocks {missing}: it does not call transformers' attention interface "
            "there. Use an objective on hidden states instead: attention_transfer or hidden_states."
        )
    if missing := sorted(needs.hidden_states - hidden_states.keys()):
        raise ValueError(
            f"{name} did not run the blocks {missing} in this forward. If it drops layers, set the rate of that to 0. "
            "If it is compiled, the code may be of a forward that read none: set "
            "torch._dynamo.config.skip_nnmodule_hook_guards = False and call torch.compiler.reset()."
        )
    if needs.pooled and final.pooled is None:
        raise ValueError(f"{name} has no linear classifier with one output a class, so its pooled feature is unknown.")
    if needs.patches and final.patches is None:
        raise ValueError(f"{name} gives no last hidden state, so its patch tokens are unknown; use hidden_states.")
