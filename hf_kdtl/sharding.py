"""Student, objectives and teacher spread over processes by FSDP2, for a training loop of one's own."""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import FSDPModule, fully_shard

from hf_kdtl.distiller import Distiller
from hf_kdtl.models.blocks import find_blocks


def shard(distiller: Distiller, **options: Any) -> Distiller:
    """Put every block, what is around them and every objective with parameters into a unit of FSDP2; the teacher too.

    Build the container with `setting=Setting.of(student, teacher, sharded=True)`, by which objectives choose what is
    exact here or refuse; then shard it; then make the optimizer. Every process calls it, for equal weights.

    The student is a unit of its own within the container: a derivative's inner backward pass ends with the weights of
    the outermost unit given back, and the student runs again after it.

    Args:
        options: of `torch.distributed.fsdp.fully_shard`, such as mesh.

    Returns:
        the container, changed in place.

    Raises:
        ValueError: for a container that a gradient rule wants apart; when the blocks of a model cannot be found.
    """
    if distiller.parts is not None:
        raise ValueError(
            "a gradient_rule compares whole gradients, and FSDP2 leaves each process a part of them. Use DDP, or no "
            "gradient_rule."
        )
    teacher = None if distiller.teacher is None else distiller.teacher.model
    models: list[Any] = [distiller.student] + ([] if teacher in (None, distiller.student) else [teacher])
    for model in models:
        for _, block in find_blocks(model):
            fully_shard(block, **options)
        # Given back after the backward pass only: one that begins inside the model fetches nothing around the blocks.
        fully_shard(model, **options, reshard_after_forward=False)
    for objective in distiller.objectives.values():
        if any(True for _ in objective.parameters()):
            fully_shard(objective, **options)
    if not isinstance(distiller, FSDPModule):
        fully_shard(distiller, **options)
    return distiller
