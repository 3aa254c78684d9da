"""A training step under a gradient rule: one backward pass for the task, one for the transfer, one gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from hf_kdtl.distiller import Distiller
from hf_kdtl.gradient_rules import GradientRule, TwoGradients
from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.optim import layer_groups


def two_gradients(rule: GradientRule | None, distiller: Distiller) -> TwoGradients | None:
    """The buffers of a rule, for everything that the container trains; None without a rule.

    Raises:
        ValueError: when the rule goes by blocks and the student's cannot be found.
    """
    if rule is None:
        return None
    trained = [(name, p) for name, p in distiller.named_parameters() if p.requires_grad]
    try:
        groups = layer_groups(distiller.student, distiller.objectives)
        layer_of = {id(p): str(group["layer"]) for group in groups for p in group["params"]}
    except ValueError:  # no blocks to be found, and one layer in the log; a local rule fails below
        layer_of = {}
    layers = [layer_of.get(id(p), "model") for _, p in trained]
    blocks: dict[int, list[str]] = {}
    if rule.local:
        names = {id(p): name for name, p in trained}
        for i, (_, block) in enumerate(find_blocks(distiller.student)):
            blocks[i] = [names[id(p)] for p in block.parameters() if id(p) in names]
    own = {key: [f"objectives.{key}.{name}" for name, p in objective.named_parameters() if p.requires_grad]
           for key, objective in distiller.objectives.items()}  # fmt: skip
    return TwoGradients(rule, trained, layers, blocks, own)


@contextmanager
def two_backwards(
    trainer: Any, model: nn.Module, gradients: TwoGradients | None, parts: Callable[[], dict[str, Tensor]]
) -> Iterator[None]:
    """Around Trainer's training_step: its one backward pass becomes the rule's two, and the window's end the rule.

    DDP, which knows one gradient, does not synchronise here: each of the two is reduced once, at the window's end.
    """
    if gradients is None:
        yield
        return
    accelerator = trainer.accelerator

    def backward(loss: Tensor, **kwargs: Any) -> None:
        gradients.add(*_sides(parts(), trainer.distiller))

    accelerator.backward = backward  # hides the method
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        del accelerator.backward
    if accelerator.sync_gradients:
        gradients.watch = (trainer.state.global_step + 1) % (trainer.state.logging_steps or 1) == 0
        several = dist.is_initialized() and dist.get_world_size() > 1
        gradients.write(int(trainer.state.epoch or 0), _mean_over_ranks if several else None)


def _sides(
    parts: dict[str, Tensor], distiller: Distiller
) -> tuple[Tensor | None, dict[str, Tensor], dict[str, list[int]]]:
    """The task's loss, the transfer terms, and the student's block of each entry of those that pair layers."""
    roles = {key: distiller.objective(key).role for key in parts}
    task = [part.sum() for key, part in parts.items() if roles[key] == "task"]
    transfer = {key: part for key, part in parts.items() if roles[key] == "transfer"}
    pairs = {
        key: [pair.student_layer for pair in distiller.objectives[key].pairs]  # type: ignore[union-attr]
        for key, part in transfer.items()
        if part.ndim == 1
    }
    return sum(task[1:], task[0]) if task else None, transfer, pairs


def _mean_over_ranks(tensor: Tensor) -> None:
    # DDP's mean: gloo has no mean of its own.
    dist.all_reduce(tensor)
    tensor.div_(dist.get_world_size())
