"""Reading a model's attention and block outputs while it runs its own forward, with its own kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface

from hf_kdtl.models.blocks import find_blocks

NAME = "hf_kdtl_tap"


class Attention(NamedTuple):
    """What one block's attention was computed from.

    softmax(scale query key' + bias) is the attention. Where the architecture only gives the finished weights, they
    are in `weights` and query, key and value are None.
    """

    query: Tensor | None  # (B, H, Nq, d)
    key: Tensor | None  # (B, H, Nk, d)
    value: Tensor | None  # (B, H, Nk, d)
    scale: float
    bias: Tensor | None  # additive, broadcastable to (B, H, Nq, Nk): masks, relative position biases
    weights: Tensor | None = None  # (B, H, Nq, Nk), softmax already taken


@dataclass
class Recorder:
    """What one pass of one model has given so far. One is active at a time; a nested pass has its own."""

    layer_of: dict[int, int]  # id of a module inside a block -> the block's index
    wanted: frozenset[int]
    kernel: str
    attention: dict[int, Attention] = field(default_factory=dict)
    hidden_states: dict[int, Tensor] = field(default_factory=dict)


_active: list[Recorder] = []


def _tap(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
):
    """The attention function that transformers calls: the model's own kernel, and a note of what went in."""
    recorder = _active[-1]
    layer = recorder.layer_of.get(id(module))
    if layer is not None and layer in recorder.wanted:
        if layer in recorder.attention:
            raise RuntimeError(f"block {layer} computes attention more than once a forward; it cannot be captured.")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        recorder.attention[layer] = Attention(query, key, value, scale, attention_mask)
    return _kernel(module, recorder.kernel)(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _kernel(module: nn.Module, name: str) -> Callable:
    if name != "eager":
        return AttentionInterface._global_mapping[name]
    # Every modeling file that uses the interface has an eager function of its own, by this name.
    return sys.modules[type(module).__module__].eager_attention_forward


AttentionInterface.register(NAME, _tap)


@contextmanager
def recording(model: nn.Module, attention: frozenset[int], hidden_states: frozenset[int]) -> Iterator[Recorder]:
    """Record the named blocks' attention inputs and outputs while the model runs inside this context.

    The model's attention setting is changed for the while and put back, so two models built from one config object
    do not disturb each other, a saved config never names the tap, and a recomputation in the backward pass (gradient
    checkpointing) is not recorded a second time.
    """
    blocks = find_blocks(model) if attention or hidden_states else []
    layer_of = {id(m): i for i, (_, block) in enumerate(blocks) for m in block.modules()} if attention else {}
    own = next((config._attn_implementation for config in _configs(model)), "eager") or "eager"
    recorder = Recorder(layer_of, attention, own)
    handles = [
        block.register_forward_hook(_keep(recorder, i)) for i, (_, block) in enumerate(blocks) if i in hidden_states
    ]
    _active.append(recorder)
    try:
        with attention_setting(model, NAME) if attention else nullcontext():
            yield recorder
    finally:
        _active.pop()
        for handle in handles:
            handle.remove()


@contextmanager
def attention_setting(model: nn.Module, name: str) -> Iterator[None]:
    """Every attention of the model by this name of transformers', for the while of this context."""
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation_internal = old


def _configs(model: nn.Module) -> list[Any]:
    """The configs that the model's modules read; CLIP's attention reads the vision tower's own."""
    found = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    return [config for config in found.values() if hasattr(config, "_attn_implementation_internal")]


def _keep(recorder: Recorder, layer: int) -> Callable:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        # A recomputation after the pass runs with the hooks removed; inside it, a block runs once.
        recorder.hidden_states[layer] = output[0] if isinstance(output, tuple) else output

    return hook
