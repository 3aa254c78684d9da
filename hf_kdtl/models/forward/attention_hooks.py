"""Reading a model's attention and block outputs while it runs its own forward, with its own kernels."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_outputs import ImageClassifierOutput

from hf_kdtl.functional.attention import attention_rows, mean_heads
from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.models.forward.embedding import is_headless

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


def first_row(attention: Attention) -> Tensor:
    """log A of the first token, mean over the heads, (B, N) in at least float32."""
    if attention.query is None or attention.key is None:
        assert attention.weights is not None
        rows = attention.weights[:, :, :1].float().clamp(min=torch.finfo(torch.float32).tiny).log()
    else:
        rows = attention_rows(attention.query, attention.key, attention.scale, attention.bias)
    return mean_heads(rows)[:, 0, 0]


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

    The model's attention setting is changed temporarily and restored, so two models built from one config object
    do not disturb each other, a saved config never names the tap, and a recomputation in the backward pass (gradient
    checkpointing) is not recorded a second time.
    """
    if not attention and not hidden_states:
        yield Recorder({}, attention, "eager")
        return
    wiring = _wired(model)
    own = next((config._attn_implementation for config in wiring.configs), None)
    recorder = Recorder(wiring.layer_of, attention, own or "eager")
    handles = [wiring.blocks[i].register_forward_hook(_keep(recorder, i)) for i in hidden_states]
    _active.append(recorder)
    try:
        with attention_setting(model, NAME) if attention else nullcontext():
            yield recorder
    finally:
        _active.pop()
        for handle in handles:
            handle.remove()


class _Wiring(NamedTuple):
    blocks: list[nn.Module]
    layer_of: dict[int, int]
    configs: list[Any]  # that the model's modules read; CLIP's attention reads the vision tower's own


_known: WeakKeyDictionary[nn.Module, _Wiring] = WeakKeyDictionary()


def _wired(model: nn.Module) -> _Wiring:
    """Where to listen, found once a model: walking its modules at every step would cost a percent of it.

    Should the blocks be exchanged later, those listened to give nothing, which `capture` refuses.
    """
    if model not in _known:
        blocks = [block for _, block in find_blocks(model)]
        layer_of = {id(module): i for i, block in enumerate(blocks) for module in block.modules()}
        _known[model] = _Wiring(blocks, layer_of, _configs(model))
    return _known[model]


@contextmanager
def attention_setting(model: nn.Module, name: str) -> Iterator[None]:
    """Every attention of the model by this name of transformers', within this context."""
    configs = _wired(model).configs
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation_internal = old


def _configs(model: nn.Module) -> list[Any]:
    found = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    return [config for config in found.values() if hasattr(config, "_attn_implementation_internal")]


def _keep(recorder: Recorder, layer: int) -> Callable:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        # A recomputation after the pass runs with the hooks removed; inside it, a block runs once.
        recorder.hidden_states[layer] = output[0] if isinstance(output, tuple) else output

    return hook


def run(model: nn.Module, pixel_values: Tensor, inputs: dict[str, Any] | None = None) -> Any:
    """The model's own forward on (B, C, h, w), with an error that explains what does not fit.

    Raises:
        ValueError: for pixels of another size than the model's, a model that does not run on images alone, or a
            classifier that gives no logits. Other errors of the model pass unchanged.
    """
    inputs = inputs or {}
    try:
        outputs = model(pixel_values=pixel_values, **inputs)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if explained := _other_size(error, model, pixel_values) or _other_inputs(error, model, pixel_values, inputs):
            raise ValueError(explained) from error
        raise
    if getattr(outputs, "logits", None) is not None or is_headless(model):
        return outputs
    outputs = class_outputs(outputs)
    if getattr(outputs, "logits", None) is None:
        given = ", ".join(outputs) if isinstance(outputs, dict) else type(outputs).__name__
        raise ValueError(
            f"{type(model).__name__} gave no logits, only {given}; expected an image classifier, whose output has "
            "them. Load it with AutoModelForImageClassification.from_pretrained; a few architectures (PP-LCNet) give "
            "none even so: choose another."
        )
    return outputs


def class_outputs(outputs: Any) -> Any:
    """A model's outputs as an object with `.logits`: also of one that gives a dict, or a tuple of (loss,) logits."""
    if type(outputs) is dict and "logits" in outputs:
        return ImageClassifierOutput(**{k: v for k, v in outputs.items() if k in ("loss", "logits")})
    if type(outputs) is tuple and outputs:
        first = next((x for x in outputs if isinstance(x, Tensor) and x.ndim == 2), None)
        return outputs if first is None else ImageClassifierOutput(logits=first)
    return outputs


def _other_size(error: Exception, model: nn.Module, pixel_values: Tensor) -> str | None:
    size = getattr(getattr(model, "config", None), "image_size", None)
    if size is None:
        return None
    expected = (size, size) if isinstance(size, int) else tuple(size)
    found = tuple(pixel_values.shape[-2:])
    if found == expected:
        return None
    return (
        f"{type(model).__name__} was given pixels of {found[0]} x {found[1]} and is made for {expected[0]} x "
        f"{expected[1]} (error: {error}). Resize them, with an image processor of size={{'height': {expected[0]}, "
        f"'width': {expected[1]}}}, or make the model with image_size={found[0]}."
    )


def _other_inputs(error: Exception, model: nn.Module, pixel_values: Tensor, given: dict[str, Any]) -> str | None:
    """Tensors that the forward names and was not given: ImageGPT reads colour ids, SigLIP 2 patches and a mask."""
    named = inspect.signature(model.forward).parameters.values()
    tensors = [p.name for p in named if "Tensor" in str(p.annotation)]
    # A mask over tokens is what any transformer may be given, and none needs.
    others = [name for name in tensors if name not in ("pixel_values", "labels", "attention_mask", *given)]
    if not others:
        return None
    shape = " x ".join(map(str, pixel_values.shape))
    return (
        f"{type(model).__name__} does not run on pixel_values of {shape} (B, C, h, w) alone: its forward also takes "
        f"{', '.join(others)} (error: {error}). Choose a model that classifies plain images, such as ViT."
    )
