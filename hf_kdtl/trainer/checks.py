"""What is refused before training, and what is said when a run breaks down."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel, Trainer

from hf_kdtl.checkpoints.manifest import verify
from hf_kdtl.checkpoints.rotation import checkpoints
from hf_kdtl.config import DistillationConfig
from hf_kdtl.models.adapters import adapted, adapter_problems
from hf_kdtl.models.labels import adopt_class_names, class_problem, dataset_class_names
from hf_kdtl.objectives.derivatives import DerivativeObjective
from hf_kdtl.optim.layer_rates import LayerRates, check_layerwise

DDP = "accelerate launch --multi_gpu --num_processes <number of GPUs> <script>"
FSDP = "hf-kdtl configs copy fsdp2; accelerate launch --config_file fsdp2.yaml <script>"


def check_teacher_usage(teacher: Any, config: DistillationConfig) -> None:
    """Raises ValueError when a teacher or a start is given and unused, or a teacher is missing."""
    objectives = config.build_objectives()
    if config.start is not None and all(objective.source == "teacher" for objective in objectives.values()):
        raise ValueError(
            f"start is {config.start!r} and no objective holds the student to it. Add one, such as "
            '{"name": "l2_sp", "weight": 0.01}, or leave start out (the student is chosen by model=...).'
        )
    needing = [key for key, objective in objectives.items() if objective.needs_teacher]
    options = config.rate_options
    measured = options is not None and options.measured
    if teacher is None and needing:
        raise ValueError(
            f"the objectives {', '.join(needing)} need a teacher and none was given. Pass teacher=<a model, Teacher, "
            'or path>, or train without one: objectives=[{"name": "task"}].'
        )
    if teacher is None and options is not None and measured:
        raise ValueError(
            f"layer_rates: mode {options.mode!r} compares the student with a teacher and none was given. Pass "
            "teacher=<a model, Teacher, or path>, or take mode 'llrd'."
        )
    if teacher is not None and not needing and not measured:
        raise ValueError(
            'a teacher was given and no objective uses it. Add one, such as {"name": "logit_kd", "weight": 0.9}, or '
            "leave the teacher out."
        )


def check_setting(trainer: Trainer) -> None:
    """Refuse what could not keep its meaning. Raises ValueError, with the way out."""
    args = trainer.args
    assert isinstance(args, DistillationConfig)
    problems = setting_problems(args, trainer.model)
    if trainer.is_deepspeed_enabled:
        problems.append(f"DeepSpeed is not supported: it owns the backward pass. Use DDP: {DDP}.")
    problems += sharding_problems(trainer)
    handler = getattr(trainer.accelerator, "ddp_handler", None)
    derived = [key for key, o in args.build_objectives().items() if isinstance(o, DerivativeObjective)]
    if derived and getattr(handler, "static_graph", False):
        problems.append(static_graph_problem(derived))
    if trainer.compute_loss_func is not None and "task" not in args.weights():
        problems.append(
            "compute_loss_func replaces the value of the task objective, and there is none. Add "
            '{"name": "task"} to objectives, or write an Objective instead of compute_loss_func.'
        )
    if trainer.accelerator.scaler is not None and (derived or args.gradient_rule is not None):
        problems.append(
            "mixed precision is fp16 (from the launcher), whose scaling of the loss neither a gradient_rule nor "
            "derivative objectives allow. Use bf16: accelerate launch --mixed_precision bf16."
        )
    problems += _too_few(trainer)
    if args.layer_rates is not None and trainer.optimizer is not None:
        check_layerwise(trainer.optimizer)
    eval_sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    adopt_class_names(trainer.model, dataset_class_names(trainer.train_dataset))
    for dataset in (trainer.train_dataset, *eval_sets.values()):
        problem = class_problem(trainer.model, dataset)
        problems += [problem] if problem else []
    if problems:
        raise ValueError(problems[0])


def sharding_problems(trainer: Any) -> list[str]:
    """What would be wrong under FSDP, each with what to type instead."""
    args, student, found = trainer.args, trainer.model, []
    if trainer.is_fsdp_enabled or args.fsdp:  # not by the launcher; on CPUs accelerate leaves it out without a word
        found.append(
            f"FSDP is asked for by the launcher alone: {FSDP}. Leave out fsdp, and make no Accelerator before."
        )
    if not trainer.sharded:
        return found
    if os.environ.get("FSDP_VERSION") != "2":
        found.append(f"FSDP1 is not supported: derivatives need FSDP2. {FSDP}.")
    for name in ("FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_OFFLOAD_PARAMS"):
        if os.environ.get(name, "").lower() == "true":
            found.append(f"{name.lower()} is not supported: set it to false, as fsdp2.yaml does.")
    measured = args.rate_options is not None and args.rate_options.measured
    derived = any(isinstance(objective, DerivativeObjective) for objective in args.build_objectives().values())
    unfit = {
        "gradient_rule, which compares whole gradients": args.gradient_rule is not None,
        "layer_rates that are measured": measured,
        "torch_compile": args.torch_compile,
        "activation checkpointing together with derivatives": args.activation_checkpointing and derived,
        "fp16": trainer.accelerator.scaler is not None,
        "an optimizer of your own, made of the whole parameters: name it in optim=...": trainer.optimizer is not None,
        "push_to_hub: push what save_model wrote, with hf_kdtl.trainer.publishing.publish": args.push_to_hub,
        "students with adapters": adapted(student),
        "students that are not a PreTrainedModel": not isinstance(student, PreTrainedModel),
        "students with BatchNorm, whose statistics would differ by process": any(
            isinstance(m, _BatchNorm) and m.track_running_stats for m in student.modules()
        ),
    }
    return found + [f"FSDP2 does not go with {what}. Or use DDP: {DDP}." for what, is_so in unfit.items() if is_so]


def _too_few(trainer: Trainer) -> list[str]:
    """Batch statistics that the last micro-batch of an epoch is too small for: known now, not after an epoch."""
    args: Any = trainer.args
    data: Any = trainer.train_dataset
    if not hasattr(data, "__len__") or args.dataloader_drop_last or args.world_size > 1:
        return []
    size = args.per_device_train_batch_size
    last = len(data) % size or size
    return [
        f"objective {key!r} needs {least} images in a micro-batch, and the last one of an epoch has {last} "
        f"({len(data)} images in batches of {size}). Set dataloader_drop_last=True, or another batch size."
        for key, objective in args.build_objectives().items()
        if (least := getattr(objective, "least_images", 1)) > last
    ]


def setting_problems(args: DistillationConfig, student: Any) -> list[str]:
    """What of the training arguments cannot keep its meaning with this student, each with what to type instead."""
    found = []
    if args.n_gpu > 1:
        found.append(
            f"{args.n_gpu} GPUs in one process would use nn.DataParallel, which cannot hold the teacher. Start one "
            f"process a GPU: accelerate launch --multi_gpu --num_processes {args.n_gpu} <script>; or show it one GPU: "
            "CUDA_VISIBLE_DEVICES=0."
        )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        found.append(
            "average_tokens_across_devices=False would weigh the images of the ranks differently; the loss here is "
            "the mean over all images of the batch. Leave it at True."
        )
    if args.label_names not in (None, ["labels"]):
        found.append(f"label_names is {args.label_names}; the objectives read 'labels'. Rename the column.")
    objectives = args.build_objectives()
    derived = [key for key, objective in objectives.items() if isinstance(objective, DerivativeObjective)]
    disturbed = [key for key, objective in objectives.items() if objective.needs_plan or key in derived]
    kwargs: Any = args.activation_checkpointing_kwargs
    if disturbed and args.activation_checkpointing and kwargs and kwargs.get("use_reentrant"):
        found.append(
            f"the objectives {', '.join(disturbed)} would get wrong gradients under reentrant checkpointing, "
            'silently; use activation_checkpointing_kwargs={"use_reentrant": false}.'
        )
    options = args.rate_options
    if options is not None and options.mode == "loss_weight" and not any(o.needs_plan for o in objectives.values()):
        found.append(
            "layer_rates: mode 'loss_weight' weighs the losses of pairs of layers, and no objective has any. Add one, "
            'such as {"name": "attention_transfer"}, or take mode \'discrepancy\'.'
        )
    if args.gradient_rule is not None and args.fp16:
        found.append(
            "gradient_rule compares two gradients, and fp16 would have scaled them. Use bf16=True, or float32."
        )
    if args.gradient_rule is not None and args.activation_checkpointing and kwargs and kwargs.get("use_reentrant"):
        found.append(
            "gradient_rule runs two backward passes, which reentrant checkpointing has not; use "
            'activation_checkpointing_kwargs={"use_reentrant": false}.'
        )
    if args.gradient_rule is not None and any(word in str(args.optim).lower() for word in ("layerwise", "lomo")):
        found.append(
            f"optim {str(args.optim)!r} steps while gradients are made, and gradient_rule needs both of them first. "
            "Use another optimizer, such as adamw_torch."
        )
    if derived and args.ddp_static_graph:
        found.append(static_graph_problem(derived))
    if derived and args.fp16:
        found.append(
            f"the objectives {', '.join(derived)} take gradients before fp16's loss scaling, where they underflow. "
            "Use bf16=True, or float32."
        )
    found += adapter_problems(student)
    problem = getattr(getattr(student, "config", None), "problem_type", None)
    if problem not in (None, "single_label_classification"):
        found.append(
            f"the student's problem_type is {problem!r}; the objectives compare class distributions. Expected "
            "'single_label_classification': set model.config.problem_type, or use plain Trainer."
        )
    return found


def static_graph_problem(keys: list[str]) -> str:
    """Why derivatives do not go with DDP's static graph."""
    return (
        f"the objectives {', '.join(keys)} take a gradient inside the step, after which DDP with static_graph=True no "
        "longer synchronises the processes, silently. Leave ddp_static_graph (and accelerate's) at False."
    )


def check_optimizer(optimizer: Any, objectives: nn.Module, rates: LayerRates | None) -> None:
    """Refuse an optimizer that would leave the objectives or the layers' rates out, and give it those rates.

    Raises:
        ValueError: with the way out.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left = [n for n, p in objectives.named_parameters() if p.requires_grad and id(p) not in held]
    if left:
        raise ValueError(
            f"the optimizer does not hold the objectives' parameters {left[:3]}, so they would never move. Build "
            "it from trainer.distiller.parameters(), or let the trainer make it (optim=...)."
        )
    if rates is not None:
        rates.apply(optimizer)


def check_finite(trainer: Any, result: dict[str, Any]) -> None:
    """Raises FloatingPointError where the loss of a micro-batch, as `Distiller` returns it, is nan or infinite."""
    if not torch.isfinite(result["loss"]):
        counted, weights = result["counted"], trainer.distiller.weights
        terms = {k: (weights[k] * s / counted[k].clamp(min=1)).item() for k, s in result["sums"].items()}
        step, folder = trainer.state.global_step, trainer.args.output_dir
        raise non_finite_loss_error(step, result["loss"].item(), terms, folder)


def non_finite_loss_error(
    step: int, loss: float, terms: dict[str, float], output_dir: str | None
) -> FloatingPointError:
    """The error for a loss that is nan or infinite. `terms` are weighted means over the micro-batch."""
    broken = [key for key, value in terms.items() if not math.isfinite(value)]
    largest = max(terms, key=lambda key: math.inf if math.isnan(terms[key]) else abs(terms[key]))
    shown = ", ".join(f"{key} {value:.4g}" for key, value in terms.items())
    return FloatingPointError(
        f"the loss is {loss} at step {step}: {', '.join(broken) or 'the sum of the terms'} is not finite. Weighted "
        f"terms: {shown}; the largest is {largest}. {_last_good(output_dir)} Lower the learning rate or that term's "
        "weight, or check the data."
    )


def non_finite_gradient_error(step: int, norm: float, output_dir: str | None) -> FloatingPointError:
    """The error for a gradient that is nan or infinite where the loss was not."""
    return FloatingPointError(
        f"the gradient's norm is {norm} at step {step}; the weights were left as they were. {_last_good(output_dir)} "
        "Lower the learning rate, or check the data."
    )


def _last_good(output_dir: str | None) -> str:
    whole = [c for c in checkpoints(output_dir or "") if not verify(c, contents=False)]
    return f"The last good checkpoint is {whole[-1]}." if whole else "No checkpoint was written yet."
