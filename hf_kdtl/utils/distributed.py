"""Tensors that FSDP2 shards over processes: gathered, and sharded again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

LAUNCHED = "ACCELERATE_USE_FSDP"


def fsdp_requested() -> bool:
    """Whether the launcher requests FSDP."""
    return os.environ.get(LAUNCHED, "").lower() == "true"


def gather_full(tensors: Mapping[str, Any], keep: bool = True) -> dict[str, Any]:
    """Every tensor of a state_dict, gathered on the CPU. Every process must call it; `keep=False` returns nothing."""
    found = {}
    for name, value in tensors.items():
        if isinstance(value, DTensor):
            value = value.full_tensor()
            value = value.cpu() if keep else None
        if keep:
            found[name] = value
    return found


def shard_like(value: Any, like: Any) -> Any:
    """This process's shard of a full tensor, placed as `like` is; anything else unchanged."""
    if not isinstance(like, DTensor) or getattr(value, "shape", None) != like.shape or isinstance(value, DTensor):
        return value
    # Each process has the full tensor, so none sends any.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_full_state_dict(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load full tensors into a module that may be sharded, strictly."""
    own = module.state_dict()
    module.load_state_dict({name: shard_like(value, own.get(name)) for name, value in tensors.items()}, strict=True)


def unsharded_class(model: nn.Module) -> Any:
    """The class that a model had before it was sharded."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
