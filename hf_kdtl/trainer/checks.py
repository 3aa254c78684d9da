"""Settings, data and optimizers that are refused before training."""

from __future__ import annotations

import os
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_kdtl.config import DistillationConfig
from hf_kdtl.models.adapters import adapted, adapter_problems
from hf_kdtl.models.labels import MULTI_LABEL, adopt_class_names, class_problem, dataset_class_names, is_multi_label
from hf_kdtl.objectives.derivatives import DerivativeObjective
from hf_kdtl.optim.layerwise import check_layerwise
from hf_kdtl.trainer.data_checks import evaluation_pixels_problem, training_data_problems
from hf_kdtl.utils.versions import CHECKPOINTING

logger = logging.get_logger(__name__)

DDP = "accelerate launch --multi_gpu --num_processes <number of GPUs> <script>"
FSDP = "hf-kdtl configs copy fsdp2; accelerate launch --config_file fsdp2.yaml <script>"


def check_setting(trainer: Any) -> None:
    """Raises ValueError for settings that are not supported here, with an alternative."""
    args = trainer.args
    assert isinstance(args, DistillationConfig)
    problems = setting_problems(args, trainer.model)
    if trainer.is_deepspeed_enabled:
        problems.append(f"DeepSpeed is not supported: it runs the backward pass itself. Use DDP: {DDP}.")
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
    problems += training_data_problems(trainer)
    if args.layer_rates is not None and trainer._given_optimizer:
        check_layerwise(trainer.optimizer)
    eval_sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    adopt_class_names(trainer.model, dataset_class_names(trainer.train_dataset))
    for dataset in (trainer.train_dataset, *eval_sets.values()):
        problem = class_problem(trainer.model, dataset)
        problems += [problem] if problem else []
    for dataset in eval_sets.values():
        problem = evaluation_pixels_problem(trainer, dataset)
        problems += [problem] if problem else []
    if problems:
        raise ValueError(problems[0])
    if (higher := best_is_highest(args)) is not None and args.greater_is_better not in (None, higher):
        logger.warning_once(
            f"greater_is_better is {args.greater_is_better} and the best {args.metric_for_best_model} is the "
            f"{'highest' if higher else 'lowest'}: the worst model would be kept. Set greater_is_better={higher}; "
            "unset, Trainer goes by whether the name ends in 'loss'."
        )


def best_is_highest(args: DistillationConfig) -> bool | None:
    """Whether the highest value of `metric_for_best_model` is the best; None of a metric that is not known here."""
    if args.metric_for_best_model is None:
        return None
    from hf_kdtl.evaluation.metrics import RECORDS  # here: it imports evaluate and datasets

    name = args.metric_for_best_model.removeprefix("eval_")
    if name == "loss" or (args.eval_objectives and name in args.weights()):
        return False
    # Of several sets of evaluation data it is called photos_nll.
    return next((one.higher_is_better for key, one in RECORDS.items() if f"_{name}".endswith(f"_{key}")), None)


def sharding_problems(trainer: Any) -> list[str]:
    """What is not supported under FSDP, each with what to type instead."""
    args, student, found = trainer.args, trainer.model, []
    if trainer.is_fsdp_enabled or args.fsdp:  # not by the launcher; on CPUs accelerate silently ignores it
        found.append(
            f"FSDP is configured in the launcher alone: {FSDP}. Leave out fsdp, and create no Accelerator before."
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
        "a gradient_rule, which compares full gradients": args.gradient_rule is not None,
        "measured layer_rates": measured,
        'the weight "auto" (measure it once under DDP, and give the number)': bool(args.auto_ratios()),
        "torch_compile": args.torch_compile,
        "activation checkpointing together with derivatives": getattr(args, CHECKPOINTING) and derived,
        "fp16": trainer.accelerator.scaler is not None,
        "your own optimizer, which holds unsharded parameters (name it in optim=...)": trainer._given_optimizer,
        "push_to_hub (push what save_model wrote, with hf-kdtl push)": args.push_to_hub,
        "students with adapters": adapted(student),
        "students that are not a PreTrainedModel": not isinstance(student, PreTrainedModel),
        "students with BatchNorm, whose statistics would differ between processes": any(
            isinstance(m, _BatchNorm) and m.track_running_stats for m in student.modules()
        ),
    }
    return found + [f"{what} is not supported under FSDP2. Use DDP: {DDP}." for what, is_so in unfit.items() if is_so]


def setting_problems(args: DistillationConfig, student: Any) -> list[str]:
    """Training arguments that are not supported with this student, each with what to type instead."""
    found = [*_argument_problems(args), *reentrant_problems(args, student)]
    found += [*_objective_problems(args), *_rule_problems(args), *adapter_problems(student)]
    one_class = getattr(getattr(student, "config", None), "num_labels", None) == 1
    if one_class and not is_multi_label(student) and (reading := _class_readers(args)):
        found.append(
            f"the student has one class, of which every answer is right, so {', '.join(reading)} would be 0 and train "
            "nothing. Expected two classes or more: num_labels=2, with labels 0 and 1."
        )
    problem = getattr(getattr(student, "config", None), "problem_type", None)
    if problem not in (None, "single_label_classification", MULTI_LABEL):
        found.append(
            f"the student's problem_type is {problem!r}; the objectives compare class distributions. Expected "
            f"'single_label_classification' or {MULTI_LABEL!r}: set model.config.problem_type, or use plain Trainer."
        )
    return found


def _class_readers(args: DistillationConfig) -> list[str]:
    return [key for key, o in args.build_objectives().items() if o.compares_classes or o.needs_labels]


def _argument_problems(args: DistillationConfig) -> list[str]:
    found = []
    if args.n_gpu > 1:
        found.append(
            f"{args.n_gpu} GPUs in one process would use nn.DataParallel, which does not replicate the teacher. Start "
            f"one process per GPU: accelerate launch --multi_gpu --num_processes {args.n_gpu} <script>; or use one "
            "GPU: CUDA_VISIBLE_DEVICES=0."
        )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        found.append(
            "average_tokens_across_devices=False would weight the images of the ranks differently; the loss here is "
            "the mean over all images of the batch. Leave it at True."
        )
    if args.label_names not in (None, ["labels"]):
        found.append(f"label_names is {args.label_names}; the objectives read 'labels'. Rename the column.")
    return found


def _objective_problems(args: DistillationConfig) -> list[str]:
    found, objectives, options = [], args.build_objectives(), args.rate_options
    derived = [key for key, objective in objectives.items() if isinstance(objective, DerivativeObjective)]
    if options is not None and options.mode == "loss_weight" and not any(o.needs_plan for o in objectives.values()):
        found.append(
            "layer_rates: mode 'loss_weight' weights the losses of pairs of layers, and no objective has any. Add "
            'one, such as {"name": "attention_transfer"}, or take mode \'discrepancy\'.'
        )
    if derived and args.ddp_static_graph:
        found.append(static_graph_problem(derived))
    if derived and args.fp16:
        found.append(
            f"the objectives {', '.join(derived)} take gradients before fp16's loss scaling, where they underflow. "
            "Use bf16=True, or float32."
        )
    return found


def _rule_problems(args: DistillationConfig) -> list[str]:
    if args.gradient_rule is None:
        return []
    found = []
    if args.fp16:
        found.append("gradient_rule compares two gradients, and fp16 would scale them. Use bf16=True, or float32.")
    if any(word in str(args.optim).lower() for word in ("layerwise", "lomo")):
        found.append(
            f"optim {str(args.optim)!r} steps during the backward pass, and gradient_rule needs both gradients first. "
            "Use another optimizer, such as adamw_torch."
        )
    return found


def reentrant_problems(args: DistillationConfig, student: Any) -> list[str]:
    """What is not supported where blocks are recomputed in reentrant form, each with what to type instead."""
    if not (cure := reentrant(args, student)):
        return []
    found = []
    disturbed = [
        key for key, o in args.build_objectives().items() if o.needs_plan or isinstance(o, DerivativeObjective)
    ]
    if disturbed:
        found.append(
            f"the objectives {', '.join(disturbed)} would get wrong gradients under reentrant checkpointing, "
            f"silently; {cure}."
        )
    if args.auto_ratios():
        found.append(
            'the weight "auto" takes the gradient of each term apart, which reentrant checkpointing does not support; '
            f"{cure}."
        )
    if args.gradient_rule is not None:
        found.append(
            f"gradient_rule runs two backward passes, which reentrant checkpointing does not support; {cure}."
        )
    return found


def reentrant(args: DistillationConfig, student: Any) -> str:
    """What to type where blocks are, or will be, recomputed in reentrant form; else empty. The arguments' form
    replaces that of the model when training begins."""
    kwargs: Any = getattr(args, f"{CHECKPOINTING}_kwargs") or {}
    if getattr(args, CHECKPOINTING):
        return f'use {CHECKPOINTING}_kwargs={{"use_reentrant": false}}' if kwargs.get("use_reentrant") else ""
    recomputed = [m for m in student.modules() if getattr(m, "gradient_checkpointing", False)]
    how = [getattr(getattr(m, "_gradient_checkpointing_func", None), "keywords", {}) for m in recomputed]
    of_model = f'use student.{CHECKPOINTING}_enable({{"use_reentrant": False}})'
    return of_model if any(one.get("use_reentrant") for one in how) else ""


def static_graph_problem(keys: list[str]) -> str:
    """Why derivatives are not supported with DDP's static graph."""
    return (
        f"the objectives {', '.join(keys)} take a gradient inside the step, after which DDP with static_graph=True no "
        "longer synchronizes the processes, silently. Leave ddp_static_graph (and accelerate's) at False."
    )
