"""What a run depends on in addition to its checkpoint: recorded in it, and compared when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME
from transformers.utils import logging

from hf_kdtl.utils.wrapped import holders

logger = logging.get_logger(__name__)
KEPT = {"initial_lr": "learning_rate"} | {name: name for name in ("weight_decay", "betas", "eps", "momentum")}
"""Settings of an optimizer's param groups that its state brings along, and what they are called."""


def run_facts(trainer: Any) -> dict[str, Any]:
    """Plain data: of the settings, the training data and the teachers. Nothing of what is not known.

    Cost: the hash of a teacher's weights, once.
    """
    args, data = trainer.args, trainer.train_dataset
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    facts: dict[str, Any] = {"seed": args.seed, "lr_scheduler_type": str(schedule)}
    if hasattr(args, "view_seed"):
        facts["view_seed"] = args.view_seed
    if hasattr(data, "__len__"):
        facts["training images"] = len(data)
    if viewed := [_views(one) for one in holders(data, "view_facts")]:
        facts["data"] = viewed[0] if len(viewed) == 1 else dict(enumerate(viewed))
    elif trainer.processing_class is not None:
        facts["processing_class"] = _settings(trainer.processing_class)
    found = {name: _of_teacher(one) for name, one in _teachers(trainer).items()}
    return facts | {name: known for name, known in found.items() if known}


def _views(data: Any) -> dict[str, Any]:
    facts = {name: value for name, value in data.view_facts().items() if name != "view_seed"}
    return facts | {"views": data.views, "image_processor": _settings(data.image_processor)}


def _teachers(trainer: Any) -> dict[str, Any]:
    """Those whose weights this process has: not the student itself, and none that is spread over processes."""
    teacher = getattr(trainer, "teacher", None)
    if teacher is None or getattr(trainer, "sharded", False):
        return {}
    return {name: one for name, one in teacher.members().items() if not one.provenance().is_student}


def _of_teacher(source: Any) -> dict[str, Any]:
    try:
        return {"weights": source.fingerprint, "image_processor": _settings(source.processing_class)}
    except NotImplementedError:  # a source of the user's, or weights that are not in memory
        return {}


def _settings(processor: Any) -> Any:
    return json.loads(processor.to_json_string()) if hasattr(processor, "to_json_string") else None


def needed_files(trainer: Any) -> list[str]:
    """Trainer's own files that a checkpoint must have beyond the model, to be resumed from."""
    args = trainer.args
    if args.save_only_model:
        return []
    world = range(args.world_size) if not args.save_on_each_node else [args.process_index]
    random = [f"rng_state_{i}.pth" for i in world] if args.world_size > 1 else ["rng_state.pth"]
    scaler = [SCALER_NAME] if trainer.accelerator.scaler is not None else []
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # those have folders
    return random + scaler + ([] if sharded else [OPTIMIZER_NAME, SCHEDULER_NAME])


@contextmanager
def settings_that_are_kept(optimizer: Any, checkpoint: str | None) -> Iterator[None]:
    """Within it an optimizer's state is loaded, whose settings replace those that were asked for: say which."""
    asked = [dict(group) for group in optimizer.param_groups]
    yield
    kept = {
        f"{shown} {group[name]} (asked for: {wanted[name]})"
        for wanted, group in zip(asked, optimizer.param_groups, strict=True)
        for name, shown in KEPT.items()
        if name in wanted and name in group and _plain(group[name]) != _plain(wanted[name])
    }
    if kept:
        logger.warning(
            f"{checkpoint} is continued with the settings of its optimizer: {', '.join(sorted(kept))}. To change "
            f"them, start a new run from its weights: from_pretrained({checkpoint!r})."
        )


def _plain(value: Any) -> Any:
    """A setting that may be a tensor, as learning rates of a compiled optimizer are, or a list in place of a tuple."""
    return tuple(map(float, value)) if isinstance(value, list | tuple) else float(value)
