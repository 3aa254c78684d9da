"""A hash of a model's weights, by which files and checkpoints name the model that they belong to."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_kdtl.models.adapters import adapted, plain_state


def fingerprint(model: nn.Module, gathered: bool = False) -> str:
    """A hash of a model's weights: of the names, shapes, dtypes and bytes of all tensors of its state_dict.

    Equal after saving and loading, another one after any training, and in another dtype. Of a model with adapters it
    is that of the model without them.

    Args:
        gathered: of a sharded model (FSDP2), gather one tensor after the other; every process calls it then.

    Cost: reads every weight once, about 1 s a GB.

    Raises:
        ValueError: for a sharded model that is not to be gathered, of which a process has only its own shard.
    """
    found = hashlib.blake2b(digest_size=16)
    state = plain_state(model) if adapted(model) else model.state_dict()
    for name, value in sorted(state.items()):
        if isinstance(value, DTensor) and gathered:
            value = value.full_tensor()
        elif isinstance(value, DTensor):
            raise ValueError("the model is sharded (FSDP2). Save it with trainer.save_model, and take that one.")
        if isinstance(value, Tensor):
            found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            # Byte for byte: numpy knows no bfloat16.
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
