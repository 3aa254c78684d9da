"""What users override of Trainer, or bring with a model of their own: kept where it can be, else refused by name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.utils import logging

from hf_kdtl.config import DistillationConfig
from hf_kdtl.models.adapters import adapted
from hf_kdtl.models.teachers.processor_files import check_processor
from hf_kdtl.trainer.data_errors import dataset_problem
from hf_kdtl.trainer.distiller import Distiller

logger = logging.get_logger(__name__)


def check_config(args: Any) -> None:
    """Raises TypeError for what is no DistillationConfig."""
    if not isinstance(args, DistillationConfig):
        raise TypeError(
            f"args is {type(args).__name__}; expected DistillationConfig, which takes the same arguments and "
            "objectives: DistillationConfig(output_dir, ..., objectives=[...])."
        )


def check_arguments(args: DistillationConfig, model: Any, data: dict[str, Any], processing_class: Any) -> None:
    """Raises TypeError or ValueError for a student, data ({argument: dataset}) or an image processor of a type that
    Trainer fails on without saying so; and turns off Trainer's own saving on SIGTERM: two handlers would each put back
    the other's."""
    check_config(args)
    if model is not None and not isinstance(model, nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        found = f"the text {model!r}" if isinstance(model, str) else found
        raise TypeError(
            f"model is {found}; expected the student itself: AutoModelForImageClassification.from_pretrained(<a "
            "path>), or hf_kdtl.make_student(teacher)."
        )
    check_processor(processing_class)
    for name, dataset in data.items():
        several = dataset.values() if name == "eval_dataset" and isinstance(dataset, dict) else [dataset]
        if problem := next((p for one in several if (p := dataset_problem(one, name))), ""):
            raise (TypeError if "expected" in problem else ValueError)(problem)
    if args.torch_compile:
        guard_hooks()
    if getattr(args, "enable_jit_checkpoint", False):  # not in every version
        args.enable_jit_checkpoint = False
        logger.info("enable_jit_checkpoint: DistillationTrainer saves on SIGTERM in any case, after the step.")


def guard_hooks() -> None:
    """Let torch.compile see whether a module has hooks, by which hidden states are read.

    By default torch 2.13 compares the modules and not their hooks: code that was compiled without them would serve a
    forward with them, of the next trainer or of a step that measures layer rates, and nothing would be read.
    """
    import torch._dynamo as dynamo

    if getattr(dynamo.config, "skip_nnmodule_hook_guards", False):
        dynamo.config.skip_nnmodule_hook_guards = False
        dynamo.reset()  # what is compiled so far has no such guards


def check(trainer: Any, own_compute_loss: bool) -> None:
    """Raises ValueError for an override that a gradient rule cannot keep, a loss of the student's own that would be
    replaced, and a student without pixel_values.

    Args:
        own_compute_loss: whether `compute_loss` is overridden.
    """
    check_rule(trainer.args, own_compute_loss)
    base = trainer.model.get_base_model() if adapted(trainer.model) else trainer.model
    own_loss = trainer.compute_loss_func is not None or own_compute_loss
    if "task" in trainer.args.weights() and "_loss_function" in vars(base) and not own_loss:
        raise ValueError(
            f"the loss_function of {type(base).__name__} was set, and the objective 'task' is cross-entropy. Give it "
            "as compute_loss_func=lambda outputs, labels, num_items_in_batch=None: ..., which 'task' then is."
        )
    if hasattr(trainer.model, "_orig_mod"):
        raise ValueError(
            "the student is the result of torch.compile, whose forward does not say what it takes. Pass the model "
            "itself, and set torch_compile=True in DistillationConfig."
        )
    taken = inspect.signature(trainer.model.forward).parameters.values()
    if "pixel_values" not in [p.name for p in taken] and getattr(base, "main_input_name", "") == "input_ids":
        raise ValueError(f"the student is a {type(base).__name__}, which reads input_ids; expected one of images.")
    if not any(p.name == "pixel_values" or p.kind is p.VAR_KEYWORD for p in taken):
        raise ValueError(
            f"the forward of {type(trainer.model).__name__} takes {[p.name for p in taken]}; expected 'pixel_values', "
            "by which the student and the teacher are given the images. Rename its argument and the data's column."
        )


def check_rule(args: DistillationConfig, own_compute_loss: bool) -> None:
    """Raises ValueError for an override of `compute_loss` under a gradient rule."""
    if own_compute_loss and args.gradient_rule is not None:
        raise ValueError(
            "compute_loss is overridden, and a gradient_rule takes the gradients of the objectives apart, so what the "
            "override adds would be lost. Write it as an Objective, or leave gradient_rule out."
        )


def check_replaced_step(args: DistillationConfig) -> None:
    """Raises ValueError where an overridden `training_step` did not call ours, which does more than Trainer's."""
    options = args.rate_options
    lost = ["gradient_rule"] if args.gradient_rule is not None else []
    lost += ["layer_rates"] if options is not None and options.measured else []
    if lost:
        raise ValueError(
            "training_step is overridden and does not call super().training_step(model, inputs, ...), so "
            f"{' and '.join(lost)} would do nothing. Call it, or leave {' and '.join(lost)} out."
        )


def check_replaced_loss(args: DistillationConfig) -> None:
    """Raises ValueError where an overridden `compute_loss` did not call ours, and there is more than the task."""
    names = [key for key, objective in args.build_objectives().items() if objective.role != "task"]
    if names:
        raise ValueError(
            "compute_loss is overridden and does not call super().compute_loss(model, inputs, ...), so the objectives "
            f"{', '.join(names)} are not trained. Call it and add to its loss, or write the loss as an Objective."
        )


def add_objectives(optimizer: Any, objectives: nn.Module, args: DistillationConfig) -> None:
    """Add the objectives' own parameters to an optimizer that was made of the student, where it lacks them.

    Raises:
        ValueError: for an optimizer that steps in the backward pass, and has no param groups.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left = {n: p for n, p in objectives.named_parameters() if p.requires_grad and id(p) not in held}
    if not left:
        return
    if any(word in str(args.optim).lower() for word in ("layerwise", "lomo")):
        raise ValueError(
            f"optim {str(args.optim)!r} steps during the backward pass, of the student alone, and the objectives have "
            f"parameters to train, such as {next(iter(left))}. Use another optimizer, such as adamw_torch."
        )
    decaying = set(Trainer.get_decay_parameter_names(None, nn.ModuleDict({"objectives": objectives})))  # type: ignore[arg-type]
    for decays in (True, False):
        chosen = [p for n, p in left.items() if (f"objectives.{n}" in decaying) is decays]
        if chosen:
            group = {"params": chosen, "weight_decay": args.weight_decay if decays else 0.0}
            optimizer.add_param_group(group | {"layer": "objectives", "lr_multiplier": 1.0})


def check_plain_checkpoint(distiller: Distiller, folder: str) -> None:
    """Raises ValueError where training needs what a plain Trainer's checkpoint does not have."""
    needed = {
        "the objectives' own parameters": bool(distiller.objectives.state_dict()),
        "the starting point of the student": distiller.start is not None,
        "the layer_rates": distiller.rates is not None,
    }
    if missing := [what for what, is_so in needed.items() if is_so]:
        raise ValueError(
            f"{folder} was written by a plain Trainer and does not have {' and '.join(missing)}. Start a new run from "
            "its weights: from_pretrained."
        )
