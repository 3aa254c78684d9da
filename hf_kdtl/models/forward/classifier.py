"""Which layers give the logits, and what they read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.models.forward.attention_hooks import run
from hf_kdtl.models.forward.embedding import is_headless
from hf_kdtl.models.forward.modes import evaluating

_classifiers: WeakKeyDictionary[nn.Module, tuple[list[nn.Linear], list[nn.Linear]]] = WeakKeyDictionary()


def classifiers(model: nn.Module, pixel_values: Tensor | None = None) -> list[nn.Linear]:
    """The linear layers that give the logits: one, or two with a distillation token.

    They are outside the blocks and have one output per class. An inner layer can have as many by chance (SigLIP with
    as many classes as channels, Swin with twice as many as its first stage): where there are several, a few forwards
    of one image in eval mode show which of them the logits are made of, with no other one in between. Layers that
    these do not call stay in the list: PEFT keeps the original head next to the one that it trains.

    Args:
        pixel_values: (B, C, h, w) for these forwards; by default zeros of the size in the config, or 64 x 64.
    """
    labels = None if is_headless(model) else getattr(getattr(model, "config", None), "num_labels", None)
    if labels is None or not any(isinstance(m, nn.Linear) and m.out_features == labels for m in model.modules()):
        return []
    inside = {id(m) for _, block in find_blocks(model) for m in block.modules()}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inside]
    found = [m for m in linear if m.out_features == labels]
    if len(found) < 2:
        return found
    if model not in _classifiers or _classifiers[model][0] != found:
        inner = _inner_layers(model, found, pixel_values)
        _classifiers[model] = found, [m for m in found if m not in inner]
    return _classifiers[model][1]


def check_outputs(model: nn.Module, logits: Any) -> None:
    """Raises ValueError for (B, K) class outputs of another number than the config's, as after a head was replaced by
    hand: which of them is which class is then unknown."""
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if torch.is_tensor(logits) and logits.ndim > 2:
        raise ValueError(
            f"{type(model).__name__} gives logits of shape {tuple(logits.shape)}, expected (B, K): one answer an "
            "image. Models of detection and segmentation give one for each place: use an image classifier."
        )
    if torch.is_tensor(logits) and logits.ndim == 2 and labels not in (None, logits.shape[-1]):
        raise ValueError(
            f"the head of {type(model).__name__} gives {logits.shape[-1]} outputs and its config has {labels} "
            f"classes, so it is unknown which is which, and a saved copy could not be loaded. Set both: "
            f"from_pretrained(..., num_labels={logits.shape[-1]}, ignore_mismatched_sizes=True), or "
            "model.config.id2label and label2id."
        )


@torch.no_grad()
def _inner_layers(model: nn.Module, found: list[nn.Linear], pixel_values: Tensor | None) -> list[nn.Linear]:
    """Those of the layers whose output reaches another one of them, or does not change the logits.

    Seen by changing one output at a time. Not by a graph: LeViT would keep it in its cache of attention biases.
    """
    if pixel_values is None:
        pixel_values = blank_pixels(model, default=64)
    image = pixel_values[:1].to(next(model.parameters()).dtype)

    def inputs_and_logits(changed: nn.Linear | None = None) -> dict[nn.Linear | None, Tensor]:
        seen: dict[nn.Linear | None, Tensor] = {}

        def keep(module: nn.Linear, args: Any, output: Tensor) -> Tensor:
            seen[module] = args[0]
            return output + 1 if module is changed else output

        handles = [module.register_forward_hook(keep) for module in found]
        try:
            seen[None] = run(model, image).logits
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def is_inner(module: nn.Linear) -> bool:
        there = inputs_and_logits(module)
        reaches = {key for key in before if not torch.equal(before[key], there[key])}
        return reaches != {None}

    with evaluating(model):
        before = inputs_and_logits()
        return [module for module in found if module in before and is_inner(module)]


def blank_pixels(model: nn.Module, default: int | None = None) -> Tensor:
    """Two gray images of the size that the model's config names, or of the default.

    Raises:
        ValueError: where it names none and there is no default.
    """
    config: Any = model.config
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", None)
    size = size or default
    if size is None:
        raise ValueError(
            f"{type(model).__name__}'s config names no image size; pass pixel_values=<a batch of images>."
        )
    height, width = (size, size) if isinstance(size, int) else size
    device = next(model.parameters()).device
    return torch.zeros(2, getattr(config, "num_channels", 3), height, width, device=device)


@contextmanager
def pooled_features(model: nn.Module, pixel_values: Tensor) -> Iterator[list[Tensor]]:
    """Around a forward of these pixels: what the classifier reads, (B, D)."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Perceiver's decoder answers one query: (B, 1, D).
        found.append(args[0].squeeze(1) if args[0].ndim == 3 and args[0].shape[1] == 1 else args[0])

    handles = [head.register_forward_pre_hook(keep) for head in classifiers(model, pixel_values)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
