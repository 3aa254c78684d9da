"""What a model gives, block by block: read off one small forward, not off a list of names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.models.forward.attention_hooks import Attention, attention_setting, recording, run
from hf_kdtl.models.forward.classifier import classifiers, pooled_features
from hf_kdtl.models.forward.embedding import (
    Pool,
    Pooling,
    choose_pooling,
    last_hidden_state,
    last_norm,
    patch_tokens,
    pooled_output,
    tower_outputs,
)
from hf_kdtl.models.forward.modes import evaluating
from hf_kdtl.models.forward.places import grid_of, halves_changed, places, prefix_roles, row_by_row

AttentionKind = Literal["full", "windowed", "reduced", "none"]


@dataclass(frozen=True)
class LayerGeometry:
    """One block's output and attention.

    Args:
        layout: "tokens" (B, N, D) or "maps" (B, D, gh, gw).
        prefix: roles of the tokens before the patches: "class", "distillation", "register"; empty for maps.
        grid: (gh, gw) of the patches or map; None where the tokens are on no known grid, or not in its order.
        width: D.
        attention: "full" (every token to every token), "windowed", "reduced" (fewer keys than queries) or "none".
        heads: attention heads; 0 without attention.
        attention_width: heads times the width of one (the concatenated queries); 0 where they are not seen.
    """

    layout: Literal["tokens", "maps"]
    prefix: tuple[str, ...]
    grid: tuple[int, int] | None
    width: int
    attention: AttentionKind
    heads: int
    attention_width: int = 0


@dataclass(frozen=True)
class ModelGeometry:
    """What a model gives.

    Args:
        name: its class.
        image: (h, w) of the pixels it was looked at with.
        layers: one entry a block, in order.
        pooled: width of the embedding: of what the classifier reads, or of what `pooling` says; 0 where there is none.
        weights_only: attention comes as finished weights (`output_attentions`), not as query and key.
        classifier: the linear layer with one output a class; None where there is not exactly one.
        pooling: how the embedding is made.
        patches: the patch tokens after the last norm, as of a block; None where the model gives no last hidden state.
        norm: what the patch tokens still go through, where the model leaves its last norm to its class token.
    """

    name: str
    image: tuple[int, int]
    layers: tuple[LayerGeometry, ...]
    pooled: int
    weights_only: bool
    classifier: nn.Linear | None = field(default=None, repr=False, compare=False)
    pooling: Pooling = ""
    patches: LayerGeometry | None = None
    norm: nn.Module | None = field(default=None, repr=False, compare=False)


@torch.no_grad()
def describe(model: nn.Module, pixel_values: Tensor, pool: Pool | None = None, pooler: bool = True) -> ModelGeometry:
    """Look at a model with one forward of five images in eval mode; its mode is put back.

    Whether tokens stand row by row on their grid is seen, not assumed: other pixels in one half of the image must
    change the tokens of that half. Perceiver's latents stand for no place, and Hiera works in another order.

    Args:
        pixel_values: (B, C, h, w); only the first image is used.
        pool, pooler: how the embedding of a teacher is made, and whether its pooler is trained; see `choose_pooling`.

    Raises:
        ValueError: when its blocks cannot be found, it does not run on images alone, or has no such pool.
    """
    probe = halves_changed(pixel_values[:1].to(next(model.parameters()).dtype))
    seen = _look(model, probe)
    # One entry a stage (SwinV2) or five dimensions (Hiera) is attention in windows: seen, and of no use here.
    usable = len(seen.weights) == len(seen.shapes) and all(w.ndim == 4 for w in seen.weights)
    shapes = [tuple(w.shape) for w in seen.weights] if usable else seen.shapes
    unseen: AttentionKind = "windowed" if seen.weights and not usable else "none"
    image, roles = (probe.shape[-2], probe.shape[-1]), prefix_roles(model)
    layers, before = [], seen.entering
    # Asked before the first block, where tokens have not mixed. A residual block keeps their order, so it is asked
    # again only where their number changes.
    ordered = row_by_row(before, image, roles)
    for hidden, shape in zip(seen.hidden_states, shapes, strict=True):
        if not ordered and hidden.shape[1] != before.shape[1]:
            ordered = row_by_row(hidden, image, roles)
        layers.append(_layer(hidden, shape, unseen, image, roles, ordered))
        before = hidden
    classifier = seen.answering[0] if len(seen.answering) == 1 else None
    found = ModelGeometry(type(model).__name__, image, tuple(layers), seen.pooled, usable, classifier)
    return _with_embedding(found, model, seen, probe, roles, pool, pooler)


def _with_embedding(
    found: ModelGeometry,
    model: nn.Module,
    seen: _Look,
    probe: Tensor,
    roles: tuple[str, ...],
    pool: Pool | None,
    pooler: bool,
) -> ModelGeometry:
    """Add the patch tokens after the last norm, and how the embedding is made."""
    final, patches, token = last_hidden_state(seen.final), None, None
    if final is not None:
        norm = last_norm(model, final, seen.hidden_states[-1])
        found = replace(found, patches=_patches(final, found.layers[-1], found.image, roles), norm=norm)
        assert found.patches is not None
        patches, token = patch_tokens(final, found.patches.prefix, norm)
    if found.pooled and pool in (None, "auto"):
        return replace(found, pooling="classifier")
    pooling = choose_pooling(model, seen.final, pool, pooler, token is not None, patches is not None)
    if not pooling:
        return found
    width = pooled_output(pooling, model, seen.final, patches, token, probe).shape[-1]
    return replace(found, pooling=pooling, pooled=width)


def _patches(final: Tensor, last: LayerGeometry, image: tuple[int, int], roles: tuple[str, ...]) -> LayerGeometry:
    """A last hidden state as the output of a block, in the order of the last block's tokens."""
    if last.layout == "maps" and last.grid and final.ndim == 3 and final.shape[1] == last.grid[0] * last.grid[1] + 1:
        # DINOv3's ConvNeXt puts the mean of its map before the cells.
        return LayerGeometry("tokens", ("class",), last.grid, final.shape[2], "none", 0)
    return _layer(final, None, "none", image, roles, last.grid is not None)


class _Look(NamedTuple):
    """What one forward of a probe showed."""

    entering: Tensor  # what the first block was given
    hidden_states: list[Tensor]  # of each block
    shapes: list[tuple[int, ...] | None]  # of each block's attention: images, heads, queries, keys, heads x width
    weights: list[Tensor]  # finished attention weights, where queries and keys are not seen
    answering: list[nn.Linear]  # the classifiers that ran: PEFT keeps the original head next to the one that it trains
    pooled: int
    final: Any  # what the model without its head gave


def _look(model: nn.Module, probe: Tensor) -> _Look:
    blocks = find_blocks(model)
    every = frozenset(range(len(blocks)))
    entering: list[Tensor] = []
    answering: list[nn.Linear] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if torch.is_tensor(x)]
        entering.extend(x for x in tensors if x.ndim in (3, 4) and len(x) == len(probe))

    heads = classifiers(model, probe)
    handles = [head.register_forward_pre_hook(lambda head, _: answering.append(head)) for head in heads]
    handles.append(blocks[0][1].register_forward_pre_hook(enter, with_kwargs=True))
    try:
        with evaluating(model):
            with (
                pooled_features(model, probe) as pooled,
                recording(model, every, every) as recorder,
                tower_outputs(model) as towers,
            ):
                run(model, probe)
            final = towers[0] if towers else None
            answered = list(answering)  # before the second forward
            weights = [] if recorder.attention else _attention_weights(model, probe)
    finally:
        for handle in handles:
            handle.remove()
    shapes: list[tuple[int, ...] | None] = [None] * len(every)
    for i, seen in recorder.attention.items():
        assert seen.query is not None and seen.key is not None
        shapes[i] = (*seen.query.shape[:3], seen.key.shape[2], seen.query.shape[1] * seen.query.shape[3])
    hidden_states = [recorder.hidden_states[i] for i in sorted(every)]
    width = pooled[0].shape[-1] if pooled else 0
    entered = entering[0] if entering else hidden_states[0]
    return _Look(entered, hidden_states, shapes, weights, answered, width, final)


def at_size(
    geometry: ModelGeometry,
    pixel_values: Tensor,
    hidden_states: Mapping[int, Tensor],
    attention: Mapping[int, Attention],
) -> ModelGeometry:
    """The geometry of the captured blocks for the size of these pixels, read off what was captured of them.

    The same object at the size that the model was first looked at with. Nothing is run: prefix tokens, order and
    layout of a block do not depend on the size of the image.
    """
    image = (pixel_values.shape[-2], pixel_values.shape[-1])
    if image == geometry.image:
        return geometry
    layers = list(geometry.layers)
    for i in hidden_states.keys() | attention.keys():
        layers[i] = layer_at_size(layers[i], image, len(pixel_values), hidden_states.get(i), attention.get(i))
    return replace(geometry, image=image, layers=tuple(layers))


def layer_at_size(
    layer: LayerGeometry, image: tuple[int, int], images: int, hidden: Tensor | None, attention: Attention | None
) -> LayerGeometry:
    """A block's geometry for images of this size, read off what was captured of it."""
    kind, tokens = layer.attention, None if hidden is None else hidden.shape[1]
    if attention is not None:
        from_, to = (attention.query, attention.key) if attention.weights is None else (attention.weights,) * 2
        assert from_ is not None and to is not None
        queries, keys = from_.shape[2], to.shape[2 if attention.weights is None else 3]
        if kind == "full" and (from_.shape[0] != images or queries != keys):
            kind = "windowed" if from_.shape[0] != images else "reduced"
        tokens = queries if tokens is None and kind == "full" else tokens
    grid = layer.grid
    if layer.layout == "maps":
        grid = grid if hidden is None else (hidden.shape[2], hidden.shape[3])
    elif grid is not None and tokens is not None:
        grid = grid_of(tokens - len(layer.prefix), image)
    return replace(layer, grid=grid, attention=kind)


def flat_attentions(outputs: Any) -> list[Tensor]:
    """`outputs.attentions` as one list of (B, H, Nq, Nk) weights; stages come as lists of lists in some models."""
    found = getattr(outputs, "attentions", None) or ()
    flat = [item for entry in found for item in (entry if isinstance(entry, list | tuple) else [entry])]
    return flat if all(torch.is_tensor(item) for item in flat) else []


def _attention_weights(model: nn.Module, pixel_values: Tensor) -> list[Tensor]:
    """Every block's attention weights; empty where the architecture gives none."""
    try:
        with attention_setting(model, "eager"):
            return flat_attentions(model(pixel_values=pixel_values, output_attentions=True))
    except (TypeError, ValueError):  # the architecture has no such output
        return []


def _layer(
    hidden: Tensor,
    shape: tuple[int, ...] | None,
    unseen: AttentionKind,
    image: tuple[int, int],
    roles: tuple[str, ...],
    ordered: bool,
) -> LayerGeometry:
    heads = shape[1] if shape else 0
    width = shape[4] if shape and len(shape) > 4 else 0
    if hidden.ndim == 4:
        kind = unseen if shape is None else "windowed"
        return LayerGeometry("maps", (), (hidden.shape[2], hidden.shape[3]), hidden.shape[1], kind, heads, width)
    tokens = hidden.shape[1]
    prefix, grid = places(tokens, image, roles)
    if shape is None:
        kind = unseen
    elif shape[0] != hidden.shape[0]:
        kind = "windowed"
    else:
        kind = "full" if shape[2] == shape[3] == tokens else "reduced"
    return LayerGeometry("tokens", prefix, grid if ordered else None, hidden.shape[2], kind, heads, width)
