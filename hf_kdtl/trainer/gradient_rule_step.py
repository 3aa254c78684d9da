"""A training step under a gradient rule: one backward pass for the task, one for the transfer, one gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch import config as functorch

from hf_kdtl.gradient_rules import GradientAccumulator, GradientRule
from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.optim import parameter_layers
from hf_kdtl.trainer.distiller import Distiller


def build_accumulator(rule: GradientRule | None, distiller: Distiller) -> GradientAccumulator | None:
    """The accumulator of a rule, for everything that the container may train; None without a rule.

    Raises:
        ValueError: when the rule works by blocks and the student's are not found.
    """
    if rule is None:
        return None
    parameters = list(distiller.named_parameters())
    own = {key: [f"objectives.{key}.{name}" for name, _ in objective.named_parameters()]
           for key, objective in distiller.objectives.items()}  # fmt: skip
    try:
        layer_of = {f"student.{name}": str(layer) for name, layer in parameter_layers(distiller.student).items()}
        layer_of |= {name: "objectives" for names in own.values() for name in names}
    except ValueError:  # no blocks, and one layer in the log; a local rule fails below
        layer_of = {}
    layers = [layer_of.get(name, "model") for name, _ in parameters]
    blocks: dict[int, list[str]] = {}
    if rule.local:
        names = {id(p): name for name, p in parameters}
        for i, (_, block) in enumerate(find_blocks(distiller.student)):
            blocks[i] = [names[id(p)] for p in block.parameters()]
    return GradientAccumulator(rule, parameters, layers, blocks, own)


Parts = dict[str, Tensor | list[Tensor]]


def separate_backward(
    trainer: Any, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any, gradients: GradientAccumulator
) -> Tensor:
    """Trainer's training_step with two backward passes in place of one; the window's last one applies the rule.

    DDP, which knows one gradient, does not synchronize here: each of the two is reduced once, at the window's end.

    Returns:
        the loss, detached.
    """
    accelerator = trainer.accelerator
    model.train()
    if callable(getattr(trainer.optimizer, "train", None)):  # a schedule-free optimizer
        trainer.optimizer.train()
    inputs = trainer._prepare_inputs(inputs)
    # A compiled graph gives its buffers away in its first backward pass, and there are two.
    with accelerator.no_sync(model), functorch.patch(donated_buffer=False):
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        # Taken away, so that the graph does not live until the next forward pass.
        term_losses, trainer._term_losses = trainer._term_losses, {}
        gradients.add(*_sides(term_losses, trainer.distiller))
    if accelerator.sync_gradients:
        _write(trainer, gradients)
    return loss.detach()


def _write(trainer: Any, gradients: GradientAccumulator) -> None:
    """Write the rule's gradient, of the accumulated batch on all processes."""
    args, step = trainer.args, trainer.state.global_step + 1
    every = (trainer.state.logging_steps or 1) if args.logging_strategy == "steps" else 1
    gradients.watch = step % every == 0 or (step == 1 and args.logging_first_step)
    several = dist.is_initialized() and dist.get_world_size() > 1
    gradients.write(int(trainer.state.epoch or 0), _mean_over_ranks if several else None)
    for buffer in trainer.distiller.buffers() if several else ():
        dist.broadcast(buffer, 0)  # BatchNorm's statistics, which DDP would have sent with its next forward pass


def _sides(parts: Parts, distiller: Distiller) -> tuple[Tensor | None, Parts, dict[str, list[int]]]:
    """The task's loss, the transfer terms, and the student's block of each entry of those that are lists of pairs."""
    roles = {key: distiller.objective(key).role for key in parts}
    task = [entry for key, part in parts.items() if roles[key] == "task" for entry in _entries(part)]
    transfer = {key: part for key, part in parts.items() if roles[key] == "transfer"}
    pairs = {
        key: [pair.student_layer for pair in distiller.objectives[key].pairs]  # type: ignore[union-attr]
        for key, part in transfer.items()
        if isinstance(part, list)
    }
    return torch.stack(task).sum() if task else None, transfer, pairs


def _entries(part: Tensor | list[Tensor]) -> list[Tensor]:
    return part if isinstance(part, list) else [part]


def _mean_over_ranks(tensor: Tensor) -> None:
    # DDP's mean: gloo has no mean of its own.
    dist.all_reduce(tensor)
    tensor.div_(dist.get_world_size())
