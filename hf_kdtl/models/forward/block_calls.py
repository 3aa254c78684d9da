"""Blocks and what a forward called them with, so that one can be run again alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from hf_kdtl.models.blocks import find_blocks


class BlockCall(NamedTuple):
    """A block and what it was called with."""

    block: nn.Module
    args: tuple
    kwargs: dict[str, Any]


@contextmanager
def block_calls(model: nn.Module, layers: frozenset[int]) -> Iterator[dict[int, BlockCall]]:
    """{layer: its first call} of the forward that runs inside this context."""
    calls: dict[int, BlockCall] = {}
    blocks = find_blocks(model) if layers else []

    def keep(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls.setdefault(layer, BlockCall(module, args, kwargs))

        return hook

    handles = [blocks[i][1].register_forward_pre_hook(keep(i), with_kwargs=True) for i in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
