"""Student, objectives and teacher spread over processes by FSDP2; their tensors made whole, and parts again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.trainer.distiller import Distiller

LAUNCHED = "ACCELERATE_USE_FSDP"


def asked_for() -> bool:
    """Whether the launcher asks for FSDP."""
    return os.environ.get(LAUNCHED, "").lower() == "true"


def shard(distiller: Distiller, **options: Any) -> Distiller:
    """Put every block, what is around them and every objective with parameters into a unit of FSDP2; the teacher too.

    DistillationTrainer calls it where `accelerate launch` asks for FSDP2. In a loop of your own build the container
    with `context=RunContext.of(student, teacher, sharded=True)`, by which objectives choose what is exact here or
    refuse; then shard it; then make the optimizer. Every process calls it, for equal weights.

    The student is a unit of its own within the container: a derivative's inner backward pass ends with the weights of
    the outermost unit given back, and the student runs again after it.

    Args:
        options: of `torch.distributed.fsdp.fully_shard`, such as mesh.

    Returns:
        the container, changed in place.

    Raises:
        ValueError: for a container that a gradient rule wants apart; when the blocks of a model cannot be found.
    """
    if distiller.split_terms is not None:
        raise ValueError(
            "a gradient_rule compares whole gradients, and FSDP2 leaves each process a part of them. Use DDP, or no "
            "gradient_rule."
        )
    teacher = None if distiller.teacher is None else distiller.teacher.model
    models: list[Any] = [distiller.student] + ([] if teacher in (None, distiller.student) else [teacher])
    for model in models:
        if isinstance(model, FSDPModule):
            continue  # a teacher that has served another run
        for _, block in find_blocks(model):
            fully_shard(block, **options)
        # Given back after the backward pass only: one that begins inside the model fetches nothing around the blocks.
        fully_shard(model, **options, reshard_after_forward=False)
    for objective in distiller.objectives.values():
        if any(True for _ in objective.parameters()):
            fully_shard(objective, **options)
    if not isinstance(distiller, FSDPModule):
        fully_shard(distiller, **options)
        _begin(distiller)
    return distiller


def _begin(distiller: Distiller) -> None:
    """Run the container without content: FSDP2 takes the first module that runs for the outermost, and the student may
    run alone before a training step (to be evaluated, to have its layers counted)."""
    vars(distiller)["forward"] = lambda: None
    try:
        distiller()
    finally:
        del vars(distiller)["forward"]


def whole(tensors: Mapping[str, Any], keep: bool = True) -> dict[str, Any]:
    """Every tensor of a state_dict, whole and on the CPU. Every process must call it; `keep=False` returns nothing."""
    found = {}
    for name, value in tensors.items():
        if isinstance(value, DTensor):
            value = value.full_tensor()
            value = value.cpu() if keep else None
        if keep:
            found[name] = value
    return found


def in_parts(value: Any, like: Any) -> Any:
    """This process's part of a whole tensor, as `like` is in parts; anything else as it is."""
    if not isinstance(like, DTensor) or getattr(value, "shape", None) != like.shape or isinstance(value, DTensor):
        return value
    # Each process has the whole one, so none sends any.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a module that may be in parts, strictly."""
    own = module.state_dict()
    module.load_state_dict({name: in_parts(value, own.get(name)) for name, value in tensors.items()}, strict=True)


def plain_type(model: nn.Module) -> Any:
    """The class that a model had before it was sharded."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
