"""One forward of one model, and what objectives may read of it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from hf_kdtl.models.geometry import ModelGeometry, describe, flat_attentions, pooled_features
from hf_kdtl.models.tap import Attention, attention_setting, recording, run


@dataclass(frozen=True)
class Needs:
    """What an objective must have captured of one model. `a | b` is what serves both.

    Args:
        logits: the class outputs.
        pooled: what the classifier reads.
        hidden_states: blocks whose output is needed, counted from 0.
        attention: blocks whose query, key and value are needed.
    """

    logits: bool = False
    pooled: bool = False
    hidden_states: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()

    def __or__(self, other: Needs) -> Needs:
        return Needs(*(getattr(self, f.name) | getattr(other, f.name) for f in fields(self)))

    def __bool__(self) -> bool:
        return any(getattr(self, f.name) for f in fields(self))


@dataclass
class Capture:
    """What one forward gave. Only what was asked for is there.

    Args:
        logits: (B, K) class outputs, as the model gave them. A teacher's columns are in the student's class order.
        pixel_values: (B, C, h, w) the pixels this model saw.
        outputs: the model's own output object.
        pooled: (B, D) what the classifier reads, if needed.
        hidden_states: {layer: (B, N, D) tokens, or (B, D, gh, gw) maps}, the outputs of blocks.
        attention: {layer: query, key, value (B, H, N, d), scale, bias}.
        geometry: prefix tokens and grid of each block.
    """

    logits: Tensor
    pixel_values: Tensor | None = None
    outputs: Any = None
    pooled: Tensor | None = None
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Attention] = field(default_factory=dict)
    geometry: ModelGeometry | None = None


def capture(
    model: nn.Module, pixel_values: Tensor, needs: Needs, geometry: ModelGeometry | None = None, **inputs: Any
) -> Capture:
    """Run one forward and keep what is needed.

    The model runs its own kernels: attention is read as query, key and value on the way in, and nothing of size N x N
    is built here. What is kept holds the graph, and is freed with the Capture.

    Args:
        model: an image classifier of transformers, or anything called with `pixel_values=` that gives `.logits`.
        pixel_values: (B, C, h, w).
        needs: what must be captured; an empty `Needs` still runs the model and gives its logits.
        geometry: of this model at this image size; by default looked up with one more small forward, if needed.
        inputs: further keyword arguments of the model's forward.

    Raises:
        ValueError: when the model gives no logits, does not run on images of this size or on images alone, has no
            such layer, or gives nothing for a layer that was asked for.
    """
    layers = needs.attention | needs.hidden_states
    if layers and geometry is None:
        geometry = describe(model, pixel_values)
    if geometry is not None and layers and not layers <= set(range(len(geometry.layers))):
        raise ValueError(
            f"{geometry.name} has the blocks 0 to {len(geometry.layers) - 1}; asked for {sorted(layers)}."
        )
    by_weights = bool(needs.attention) and geometry is not None and geometry.weights_only
    with ExitStack() as stack:
        tapped = frozenset() if by_weights else needs.attention
        recorder = stack.enter_context(recording(model, tapped, needs.hidden_states))
        pooled = stack.enter_context(pooled_features(model)) if needs.pooled else []
        if by_weights:
            stack.enter_context(attention_setting(model, "eager"))
            inputs = {**inputs, "output_attentions": True}
        outputs = run(model, pixel_values, inputs)
    attention = recorder.attention
    if by_weights:
        weights = flat_attentions(outputs)
        attention = {i: Attention(None, None, None, 1.0, None, weights[i]) for i in needs.attention}
    _check_complete(model, needs, attention, recorder.hidden_states, pooled)
    first = pooled[0] if pooled else None
    return Capture(outputs.logits, pixel_values, outputs, first, recorder.hidden_states, attention, geometry)


def _check_complete(model, needs: Needs, attention: dict, hidden_states: dict, pooled: list) -> None:
    """Nothing that was asked for may be missing: a sum over an empty capture would be 0.0 and look learned."""
    name = type(model).__name__
    if missing := sorted(needs.attention - attention.keys()):
        raise ValueError(
            f"{name} gave no attention for the blocks {missing}: it does not call transformers' attention interface "
            "there. Use an objective on hidden states instead: attention_transfer or hidden_states."
        )
    if missing := sorted(needs.hidden_states - hidden_states.keys()):
        raise ValueError(f"{name} did not run the blocks {missing} in this forward (layer drop?); set it to 0.")
    if needs.pooled and not pooled:
        raise ValueError(f"{name} has no linear classifier with one output a class, so its pooled feature is unknown.")
