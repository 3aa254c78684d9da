"""What a trainer trains, put together: models looked at, layers paired, objectives built."""

from __future__ import annotations

import random
from typing import Any

import datasets
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers.utils import logging

from hf_kdtl.models.pairing import plan
from hf_kdtl.models.run_context import RunContext
from hf_kdtl.models.teachers.chance import ChanceCheck
from hf_kdtl.models.teachers.start import StartingPoint
from hf_kdtl.optim import LayerRates
from hf_kdtl.trainer.distiller import Distiller

logger = logging.get_logger(__name__)


def assemble(trainer: Any) -> Distiller:
    """The student and the objectives of the trainer's settings, on its device.

    Args:
        trainer: a DistillationTrainer, whose teacher and settings are taken.

    Raises:
        ValueError: where the models, the data and the objectives do not fit.
    """
    args, student, teacher, device = trainer.args, trainer.model, trainer.teacher, trainer.accelerator.device
    objectives, options = args.build_objectives(), args.rate_options
    by_start = [objective for objective in objectives.values() if objective.source == "start"]
    by_teacher = [objective for objective in objectives.values() if objective.source == "teacher"]
    if teacher is not None:
        trainer._match_teacher()
        teacher.to(device)
    start = _start(trainer).to(device) if by_start else None
    measured, pairing, beside = options is not None and options.measured, None, None
    if teacher is not None and (measured or any(objective.needs_plan for objective in by_teacher)):
        pairing = plan(student, teacher, pixel_values=_pixels(trainer))
    if start is not None and any(objective.needs_plan for objective in by_start):
        beside = plan(student, start, pixel_values=_pixels(trainer))
    rates = None if options is None else LayerRates(options, student, pairing, seed=args.seed)
    compiled, checkpointing = bool(args.torch_compile), bool(args.activation_checkpointing)
    context = RunContext.of(student, teacher, compiled, checkpointing, trainer.sharded)
    rule = args.build_rule()
    split_terms: Any = None if rule is None else "pairs" if rule.local else "terms"
    distiller = Distiller(
        student, objectives, args.weights(), teacher, pairing, trainer.compute_loss_func, context, rates,
        start, beside, split_terms,
    )  # fmt: skip
    if any(objective.compares_classes for objective in by_teacher):
        distiller.chance = ChanceCheck()
    for note in distiller.notes:
        logger.info(note)
    if trainer.place_model_on_device:
        distiller.to(device)
    if sample := max(objective.sample for objective in objectives.values()):
        distiller.measure(_sample(trainer, sample))
    return distiller


def some_images(trainer: Any, number: int) -> dict[str, Any] | None:
    """Images of training as the student will see them, with their labels: evenly spaced, for data may be sorted.

    At least two (one is repeated), at most all. None where the data has no length or no index.
    """
    data: Any = trainer.train_dataset
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or isinstance(data, IterableDataset):
        return None
    if isinstance(data, datasets.Dataset):
        data = trainer._remove_unused_columns(data, description="training")
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():  # the user's augmentation must not draw what training will draw
        wanted = max(2, min(number, len(data)))
        batch = collate([data[i * len(data) // wanted] for i in range(wanted)])
    random.setstate(state[0])
    np.random.set_state(state[1])
    device = trainer.accelerator.device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _pixels(trainer: Any) -> Tensor | None:
    images = some_images(trainer, 2)
    return None if images is None else images["pixel_values"]


def _start(trainer: Any) -> StartingPoint:
    """What the student started from, as the config says."""
    student, path = trainer.model, trainer.args.start
    if path is not None:
        start = StartingPoint.from_path(path, student, trainer.processing_class)
        for note in start.notes:
            logger.info(note.replace("the teacher", "the start"))
        return start
    if dist.is_initialized() and dist.get_world_size() > 1:
        # As DDP will do when it wraps: a head with random weights is another one on every rank.
        if trainer.place_model_on_device:
            student.to(trainer.accelerator.device)
        for tensor in (*student.parameters(), *student.buffers()):
            dist.broadcast(tensor.data, 0)
    return StartingPoint(student)


def _sample(trainer: Any, number: int) -> dict[str, Any]:
    images = some_images(trainer, number)
    if images is None:
        raise ValueError(
            f"an objective looks at {number} training images before training, and the train_dataset "
            f"({type(trainer.train_dataset).__name__}) cannot be asked for them. Use one with a length and an index."
        )
    return images
