"""What is set on a model's modules for one pass, and put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


@contextmanager
def running_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm by its running statistics inside: batch statistics would make an image's output depend on others."""
    changed = batch_norms(model)
    for norm in changed:
        norm.eval()
    try:
        yield
    finally:
        for norm in changed:
            norm.train()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within this context; then every module in the mode it had, also where they differed."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:  # outer ones first: train() of a module sets those inside it too
            module.train(mode)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers that are in train mode."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]


@contextmanager
def contiguous_gradients(model: nn.Module, pixel_values: Tensor) -> Iterator[None]:
    """Around a forward: the gradients that BatchNorm and InstanceNorm get in its backward pass are contiguous.

    On the CPU torch 2.13 reads a gradient in another memory order wrongly where the batch is one image (relative error
    1.2 to 1.4 in all gradients below, no warning). A transpose of tokens after the layer makes such a gradient: LeViT
    and CvT have them, and so do objectives that read a map as tokens.
    """
    affected = pixel_values.device.type == "cpu" and len(pixel_values) == 1 and torch.is_grad_enabled()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm | _InstanceNorm)] if affected else []
    handles = [norm.register_forward_hook(_contiguous_gradient) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _contiguous_gradient(module: nn.Module, args: Any, output: Tensor) -> None:
    if output.requires_grad and not torch.compiler.is_compiling():
        output.register_hook(Tensor.contiguous)
