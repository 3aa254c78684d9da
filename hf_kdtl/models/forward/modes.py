"""The mode a model's modules are in during a pass, put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


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
    """Eval mode for the while of this context; then every module in the mode it had, also where they differed."""
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
