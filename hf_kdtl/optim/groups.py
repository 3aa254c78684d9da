"""Which layer each trainable tensor belongs to: the blocks by structure, the rest by when it runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

from hf_kdtl.models.blocks import Blocks, find_blocks
from hf_kdtl.models.forward.attention_hooks import run
from hf_kdtl.models.forward.classifier import blank_pixels
from hf_kdtl.models.forward.modes import evaluating

Layer = int | str
"""A block's index from 0, or "embeddings", "norm", "head", "objectives"."""

# A net whose config names no image size is a convolutional one, and takes any.
_ANY_SIZE = 64


def layer_groups(
    model: nn.Module,
    objectives: nn.Module | None = None,
    weight_decay: float = 0.0,
    *,
    spare_tokens: bool = False,
    blocks: Sequence[str] | None = None,
    decaying: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Every trainable tensor in exactly one param group, in depth order: embeddings, blocks, norm, head, objectives.

    A group holds `params`, `name`, `layer` (a block's index, or "embeddings", "norm", "head", "objectives"),
    `weight_decay` and `lr_multiplier` (1.0). A layer has one group of tensors that decay and one of those that do
    not, whichever it has; a layer without trainable tensors has none. A tensor that two places share (tied weights)
    belongs to the first that names it.

    What lies outside the blocks is distinguished by when it runs in one small forward in eval mode: what runs before a
    block belongs to that block, before the first to "embeddings"; after the last block, the module that gives the
    class outputs is the "head", with what lies in it, and the rest is "norm". What is never called on its own
    belongs where the module around it runs.

    Args:
        model: an image classifier, also wrapped by PEFT.
        objectives: whose projectors and heads are trained along.
        weight_decay: of the tensors that decay. Which do is decided as transformers' Trainer does: no bias, no norm.
        spare_tokens: also spare class, position and register tokens: tensors outside the blocks that a module keeps
            as they are, with a first axis of 1. Trainer lets them decay.
        blocks: names of the blocks in order, for a model whose blocks cannot be found.
        decaying: names of the model's tensors that decay, in place of Trainer's choice.

    Cost: one forward of the model on one or two grey images.

    Raises:
        ValueError: when the blocks cannot be found (naming the containers that were seen), a name in `blocks` is no
            module, the model does not run on images alone, or nothing is trainable.
    """
    found = named_blocks(model, blocks)
    # Names as in the container that the trainer hands to Trainer, so that the same patterns meet the same names.
    joint: nn.Module = nn.ModuleDict({"student": model} | ({} if objectives is None else {"objectives": objectives}))
    decay = set(Trainer.get_decay_parameter_names(None, joint))  # type: ignore[arg-type]
    if decaying is not None:
        decay = {n for n in decay if not n.startswith("student.")} | {f"student.{name}" for name in decaying}
    layer_of = _layers(model, found)
    sorted_in: dict[tuple[Layer, bool], list[Tensor]] = {}
    for name, parameter in joint.named_parameters():
        if parameter.requires_grad:
            root, _, rest = name.partition(".")
            layer = layer_of[rest] if root == "student" else "objectives"
            token = spare_tokens and isinstance(layer, str) and parameter.ndim > 1 and parameter.shape[0] == 1
            sorted_in.setdefault((layer, name in decay and not token), []).append(parameter)
    if not sorted_in:
        raise ValueError(f"{type(model).__name__} has no trainable tensor: every parameter has requires_grad=False.")
    order: list[Layer] = ["embeddings", *range(len(found)), "norm", "head", "objectives"]
    return [
        {
            "params": sorted_in[layer, decays],
            "name": _label(layer) + ("" if decays else " (no decay)"),
            "layer": layer,
            "weight_decay": weight_decay if decays else 0.0,
            "lr_multiplier": 1.0,
        }
        for layer in order
        for decays in (True, False)
        if (layer, decays) in sorted_in
    ]


def parameter_layers(model: nn.Module, blocks: Sequence[str] | None = None) -> dict[str, Layer]:
    """{name: layer} of every parameter, also of those that are frozen; as in `layer_groups`, which raises the same."""
    return _layers(model, named_blocks(model, blocks))


def named_blocks(model: nn.Module, names: Sequence[str] | None = None) -> Blocks:
    """The model's blocks in order, as (name, module): found by structure, or those that are named.

    Raises:
        ValueError: when they cannot be found, saying what was seen, or a name is no module of the model.
    """
    if names is None:
        try:
            return find_blocks(model)
        except ValueError as error:
            raise ValueError(f"{error} Or name them, in order: blocks=['encoder.0', 'encoder.1', ...].") from error
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown or not names or len(set(names)) != len(names):
        raise ValueError(
            f"blocks is {list(names)!r}; expected names of different modules of {type(model).__name__}, in the order "
            f"they run{f', and {unknown[0]!r} is none' if unknown else ''}. Its modules begin with "
            f"{[name for name in modules if name][:8]}."
        )
    return [(name, modules[name]) for name in names]


def group_table(groups: Sequence[dict[str, Any]]) -> str:
    """The groups as a table that one can read."""
    rows = [("group", "tensors", "parameters", "weight decay", "rate x")]
    for group in groups:
        size = sum(p.numel() for p in group["params"])
        cells = f"{len(group['params'])}", f"{size:,}", f"{group['weight_decay']:g}", f"{group['lr_multiplier']:.3f}"
        rows.append((group["name"], *cells))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 5))]) for row in rows
    )


def _label(layer: Layer) -> str:
    return f"block {layer}" if isinstance(layer, int) else layer


def _layers(model: nn.Module, blocks: Blocks) -> dict[str, Layer]:
    """The layer of every parameter, by name."""
    order, last = _execution(model)
    block_of = {id(module): i for i, (_, block) in reversed([*enumerate(blocks)]) for module in block.modules()}
    starts = [order.get(name, -1) for name, _ in blocks]
    after = max(starts)
    # Where a module runs; one that is never called runs where the nearest module around it does.
    place: dict[str, int] = {}
    for name, _ in model.named_modules():
        place[name] = order.get(name, place.get(name.rpartition(".")[0], 0))
    heads = _heads([name for name in last if order[name] > after], place, after)
    layer_of: dict[str, Layer] = {}
    for name, module in model.named_modules():
        layer: Layer
        if id(module) in block_of:
            layer = block_of[id(module)]
        elif any(name == head or name.startswith(f"{head}.") for head in heads):
            layer = "head"
        elif place[name] > after:
            layer = "norm"
        else:
            following = next(i for i, start in enumerate(starts) if start >= place[name])
            layer = following if following else "embeddings"
        for own in module._parameters:
            layer_of[f"{name}.{own}" if name else own] = layer
    return layer_of


def _heads(last: list[str], place: dict[str, int], after: int) -> list[str]:
    """The largest modules around those that give the class outputs, in which everything runs after the last block."""
    heads = []
    for name in last:
        while "." in name:
            around = name.rpartition(".")[0]
            if any(place[n] <= after for n in place if n == around or n.startswith(f"{around}.")):
                break
            name = around
        heads.append(name)
    return heads


@torch.no_grad()
def _execution(model: nn.Module) -> tuple[dict[str, int], list[str]]:
    """One small forward: {module: when it was first called}, and the modules that gave the class outputs: of the
    logits' size, and read by no other module with parameters."""
    order: dict[str, int] = {}
    given: dict[str, Tensor] = {}

    def enter(name: str):
        def hook(module: nn.Module, args: Any) -> None:
            order.setdefault(name, len(order))
            # What another module reads on is not an output of the model. Views (eval dropout) share their storage.
            read = {x.untyped_storage().data_ptr() for x in args if torch.is_tensor(x)}
            for other in [
                n for n, y in given.items() if y.untyped_storage().data_ptr() in read and module._parameters
            ]:
                del given[other]

        return hook

    def leave(name: str):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if torch.is_tensor(output):
                given[name] = output

        return hook

    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        if module._parameters and not any(module.children()):
            handles.append(module.register_forward_hook(leave(name)))
    try:
        with evaluating(model):
            logits = getattr(run(model, _blank(model)), "logits", None)
    finally:
        for handle in handles:
            handle.remove()
        if isinstance(model, FSDPModule):
            model.reshard()  # or its parameters would be the gathered copies, which are discarded
    if logits is None:
        return order, []
    same = [n for n, y in given.items() if y.shape[-1] == logits.shape[-1] and y.numel() == logits.numel()]
    return order, same


def _blank(model: Any) -> Tensor:
    parameter = next(model.parameters())
    try:
        pixels = blank_pixels(model)
    except ValueError:
        channels = getattr(model.config, "num_channels", 3)
        pixels = torch.zeros(2, channels, _ANY_SIZE, _ANY_SIZE, device=parameter.device)
    return pixels.to(parameter.dtype)
