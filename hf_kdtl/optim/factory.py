"""The optimizer that Trainer would make, with a multiplier of the learning rate for each param group."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_kdtl.optim.groups import layer_groups
from hf_kdtl.optim.layer_rates import LayerRates
from hf_kdtl.optim.layerwise import layerwise

# Optimizers that own their groups, their step or their averaging: {start of the name in TrainingArguments: reason}.
_REFUSED = {
    "lomo": "it steps inside the backward pass",
    "adalomo": "it steps inside the backward pass",
    "galore": "it makes its own param groups",
    "apollo": "it makes its own param groups",
    "schedule_free": "it averages the weights by its own learning rates",
}


def create_layerwise_optimizer(
    model: nn.Module,
    args: TrainingArguments,
    objectives: nn.Module | None = None,
    layer_rates: LayerRates | Mapping[str, Any] | None = None,
    decaying: Collection[str] | None = None,
    *,
    spare_tokens: bool = False,
    blocks: Sequence[str] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of `args.optim`, with a param group for each layer whose rate is

        schedule(t) x base x lr_multiplier

    The scheduler owns `group["lr"]`, as ever; the multiplier is applied inside `step` and taken back after it, also
    when it raises. So every scheduler works, the logged rate is the schedule's, and the multipliers are in
    `optimizer.state_dict()`. With multipliers of 1 the weights are bitwise those of Trainer's own optimizer.

    In a plain transformers.Trainer:

        Trainer(model, args, optimizers=(create_layerwise_optimizer(model, args, layer_rates={"mode": "llrd"}), None))

    and for a measured mode, where somebody has to measure (DistillationTrainer does):

        rates = LayerRates({"mode": "discrepancy"}, model, hf_kdtl.models.plan(model, teacher))
        optimizer = create_layerwise_optimizer(model, args, layer_rates=rates)
        # and in a callback's on_step_begin:
        if rates.due(state.global_step):
            rates.measure(model, teacher, [pixel_values], step=state.global_step)
            rates.apply(optimizer)

    Args:
        model: the student.
        args: read as Trainer reads it: `optim`, `learning_rate`, `weight_decay`, `adam_*`, `optim_args`.
        objectives: whose parameters are trained along.
        layer_rates: options of a mode that needs no measuring, or a `LayerRates`. None: every multiplier is 1.
        decaying, spare_tokens, blocks: as in `layer_groups`.

    Raises:
        ValueError: as `layer_groups`; for an optimizer that cannot have rates per group; for options whose mode must
            be measured.
    """
    check_optimizer_name(args)
    if layer_rates is not None and not isinstance(layer_rates, LayerRates):
        layer_rates = LayerRates(layer_rates, model, blocks=blocks)
    if layer_rates is not None:
        blocks = layer_rates.blocks
    groups = layer_groups(
        model, objectives, args.weight_decay, spare_tokens=spare_tokens, blocks=blocks, decaying=decaying
    )
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    own = {"params", "model", "optimizer_dict"} & options.keys()
    if own or not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ValueError(_refusal(args, "it makes its own param groups"))
    optimizer = layerwise(kind)(groups, **options)
    if layer_rates is not None:
        layer_rates.apply(optimizer)
    return optimizer


class LayerwiseOptimizer:
    """`create_layerwise_optimizer` in the form that Trainer takes as `optimizer_cls_and_kwargs`.

        Trainer(model, args, optimizer_cls_and_kwargs=(LayerwiseOptimizer, {"args": args, "layer_rates": {...}}))

    Trainer calls `LayerwiseOptimizer()(model, **kwargs)`; DistillationTrainer's model there is its container of
    student and objectives.
    """

    def __call__(self, model: nn.Module, args: TrainingArguments, **options: Any) -> torch.optim.Optimizer:
        student, objectives = getattr(model, "student", None), getattr(model, "objectives", None)
        if isinstance(student, nn.Module) and isinstance(objectives, nn.Module):
            return create_layerwise_optimizer(student, args, objectives, **options)
        return create_layerwise_optimizer(model, args, **options)


def check_optimizer_name(args: TrainingArguments) -> None:
    """Raises ValueError when `args.optim` cannot have rates per layer."""
    name = _name(args)
    for start, why in _REFUSED.items():
        if name.startswith(start):
            raise ValueError(_refusal(args, why))


def _name(args: TrainingArguments) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _refusal(args: TrainingArguments, why: str) -> str:
    return (
        f"optim is {_name(args)!r}, which cannot have a learning rate per layer: {why}. Use another, such as "
        "optim='adamw_torch', or leave layer_rates out."
    )
