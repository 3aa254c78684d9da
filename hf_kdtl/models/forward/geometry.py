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
from hf_kdtl.models.forward.modes import evaluating

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
        pooled: width of what the classifier reads; 0 where it could not be found.
        weights_only: attention comes as finished weights (`output_attentions`), not as query and key.
        classifier: the linear layer with one output a class; None where there is not exactly one.
    """

    name: str
    image: tuple[int, int]
    layers: tuple[LayerGeometry, ...]
    pooled: int
    weights_only: bool
    classifier: nn.Linear | None = field(default=None, repr=False, compare=False)


@torch.no_grad()
def describe(model: nn.Module, pixel_values: Tensor) -> ModelGeometry:
    """Look at a model with one forward of five images in eval mode; its mode is put back.

    Whether tokens stand row by row on their grid is seen, not assumed: other pixels in one half of the image must
    change the tokens of that half. Perceiver's latents stand for no place, and Hiera works in another order.

    Args:
        pixel_values: (B, C, h, w); only the first image is used.

    Raises:
        ValueError: when its blocks cannot be found, or it does not run on images alone.
    """
    probe = _halves_changed(pixel_values[:1].to(next(model.parameters()).dtype))
    seen = _look(model, probe)
    # One entry a stage (SwinV2) or five dimensions (Hiera) is attention in windows: seen, and of no use here.
    usable = len(seen.weights) == len(seen.shapes) and all(w.ndim == 4 for w in seen.weights)
    shapes = [tuple(w.shape) for w in seen.weights] if usable else seen.shapes
    unseen: AttentionKind = "windowed" if seen.weights and not usable else "none"
    image, roles = (probe.shape[-2], probe.shape[-1]), _prefix_roles(model)
    layers, before = [], seen.entering
    # Asked before the first block, where tokens have not mixed. A residual block keeps their order, so it is asked
    # again only where their number changes.
    ordered = _row_by_row(before, image, roles)
    for hidden, shape in zip(seen.hidden_states, shapes, strict=True):
        if not ordered and hidden.shape[1] != before.shape[1]:
            ordered = _row_by_row(hidden, image, roles)
        layers.append(_layer(hidden, shape, unseen, image, roles, ordered))
        before = hidden
    classifier = seen.answering[0] if len(seen.answering) == 1 else None
    return ModelGeometry(type(model).__name__, image, tuple(layers), seen.pooled, usable, classifier)


class _Look(NamedTuple):
    """What one forward of a probe showed."""

    entering: Tensor  # what the first block was given
    hidden_states: list[Tensor]  # of each block
    shapes: list[tuple[int, ...] | None]  # of each block's attention: images, heads, queries, keys, heads x width
    weights: list[Tensor]  # finished attention weights, where queries and keys are not seen
    answering: list[nn.Linear]  # the classifiers that ran: PEFT keeps the original head next to the one that it trains
    pooled: int


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
            with pooled_features(model, probe) as pooled, recording(model, every, every) as recorder:
                run(model, probe)
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
    return _Look(entering[0] if entering else hidden_states[0], hidden_states, shapes, weights, answered, width)


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
        layers[i] = _layer_at_size(layers[i], image, len(pixel_values), hidden_states.get(i), attention.get(i))
    return replace(geometry, image=image, layers=tuple(layers))


def _layer_at_size(
    layer: LayerGeometry, image: tuple[int, int], images: int, hidden: Tensor | None, attention: Attention | None
) -> LayerGeometry:
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
        grid = _grid(tokens - len(layer.prefix), image)
    return replace(layer, grid=grid, attention=kind)


def _halves_changed(image: Tensor) -> Tensor:
    """(5, C, h, w): the image (1, C, h, w), and it with noise added to its top, bottom, left and right half."""
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).to(image)
    rows, columns = image.shape[-2] // 2, image.shape[-1] // 2
    where = image.new_zeros(5, 1, *image.shape[-2:])
    where[1, :, :rows] = where[2, :, -rows:] = where[3, :, :, :columns] = where[4, :, :, -columns:] = 1
    return image + where * noise


def _row_by_row(hidden: Tensor, image: tuple[int, int], roles: tuple[str, ...]) -> bool:
    """Whether the patches' tokens stand on their grid row by row; `hidden` is of the images of `_halves_changed`.

    A ratio that does not depend on how strongly each token answers: about 1 for tokens in another order or of no
    place, in the hundreds or infinite for those in order.
    """
    if hidden.ndim == 4:
        return True
    prefix, grid = _places(hidden.shape[1], image, roles)
    if grid is None:
        return False
    change = (hidden[1:] - hidden[:1]).float().norm(dim=-1)[:, len(prefix) :].unflatten(1, grid)
    for first, last in ((change[0], change[1]), (change[2].T, change[3].T)):
        if half := len(first) // 2:
            own = first[:half].mean() * last[-half:].mean()
            other = first[-half:].mean() * last[:half].mean()
            if own < 2 * other:
                return False
    return True


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


def _prefix_roles(model: nn.Module) -> tuple[str, ...]:
    """Roles of the special tokens, in the order they are put before the patches: class, distillation, registers."""
    roles: list[str] = []
    shapes = {name.split(".")[-1]: tuple(p.shape) for name, p in model.named_parameters()}
    for role, words in (("class", ("cls_token", "class_embedding")), ("distillation", ("distillation_token",))):
        roles += [role for word in words if word in shapes]
    roles += ["register"] * shapes.get("register_tokens", (1, 0, 1))[1]
    return tuple(roles)


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
    prefix, grid = _places(tokens, image, roles)
    if shape is None:
        kind = unseen
    elif shape[0] != hidden.shape[0]:
        kind = "windowed"
    else:
        kind = "full" if shape[2] == shape[3] == tokens else "reduced"
    return LayerGeometry("tokens", prefix, grid if ordered else None, hidden.shape[2], kind, heads, width)


def _places(
    tokens: int, image: tuple[int, int], roles: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[int, int] | None]:
    """Which of that many tokens come before the patches, and the patches' grid."""
    # A stage before the class token joins (PVT, CvT) has none.
    prefix = next((p for p in (roles, ()) if _grid(tokens - len(p), image)), ())
    return prefix, _grid(tokens - len(prefix), image)


def _grid(patches: int, image: tuple[int, int]) -> tuple[int, int] | None:
    """The grid of that many patches with the image's aspect ratio, None if there is none."""
    if patches < 1:
        return None
    rows = round((patches * image[0] / image[1]) ** 0.5)
    if rows and patches % rows == 0 and abs(rows / (patches // rows) - image[0] / image[1]) < 0.26:
        return rows, patches // rows
    return None
