"""A Trainer whose settings may change after it was made: what is built again then, and what is kept."""

from __future__ import annotations

import copy
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from transformers.utils import logging

from hf_kdtl.config import DistillationConfig
from hf_kdtl.gradient_rules import GradientAccumulator
from hf_kdtl.models.labels import adopt_class_names, dataset_class_names
from hf_kdtl.models.teachers import as_source, shown
from hf_kdtl.models.teachers.source import SignalSource
from hf_kdtl.objectives import Objective
from hf_kdtl.objectives.entries import auto_ratio, entry_key
from hf_kdtl.optim import LayerRates
from hf_kdtl.trainer.build import build_distiller, match_teacher
from hf_kdtl.trainer.distiller import Distiller
from hf_kdtl.trainer.gradient_rule_step import build_accumulator
from hf_kdtl.trainer.loss import LossTrainer
from hf_kdtl.trainer.sample import training_sample
from hf_kdtl.trainer.teacher_checks import check_teacher_given
from hf_kdtl.utils.versions import CHECKPOINTING

logger = logging.get_logger(__name__)

OF_TRAINER = ("model", "teacher", "processing_class", "compute_loss_func")
OF_ARGS = ("objectives", "layer_rates", "gradient_rule", "start", "quantize", "label_smoothing_factor", "view_seed",
           CHECKPOINTING)  # fmt: skip
"""What the container is made of."""
NAMES = OF_TRAINER + OF_ARGS
_of_trainer, _of_args = attrgetter(*OF_TRAINER), attrgetter(*OF_ARGS)


class ChangeableTrainer(LossTrainer):
    """A Trainer whose container follows the student, the teacher and the settings as they are now."""

    args: DistillationConfig
    _teacher: SignalSource | None = None
    _built_from: tuple[Any, ...]
    _stepping = False
    """Whether training steps are under way."""
    _made_optimizer: torch.optim.Optimizer | None = None
    """The optimizer that the trainer made itself."""

    @property
    def teacher(self) -> SignalSource | None:
        """Where the teacher's signals come from. What is assigned may be whatever the constructor takes."""
        return self._teacher

    @teacher.setter
    def teacher(self, teacher: Any) -> None:
        self._teacher = None if teacher is None else shown(as_source(teacher), self.args.teacher_pixels)

    @property
    def distiller(self) -> Distiller:
        """Student and objectives as one module, built at the first access: `model_init` makes the student late.

        It is built again where the student, the teacher or a setting that it is made of has changed. The same student
        keeps its start, an entry that is the same but for its weight its parameters, which the optimizer holds. Other
        numbers as weights are only put in use, at the next step of training too.

        Raises:
            ValueError: where anything else changes during training, and as the constructor.
        """
        if self._distiller is not None and self.model is self._distiller:  # inside _prepare_for_training
            return self._distiller
        if self._distiller is None or _of_trainer(self) + _of_args(self.args) != self._built_from:
            self._follow()
        assert self._distiller is not None
        return self._distiller

    def _follow(self) -> None:
        """Put what has changed in use."""
        ours, args = self._distiller, _of_args(self.args)
        now = dict(zip(NAMES, _of_trainer(self) + args, strict=True))
        then = dict(zip(NAMES, self._built_from, strict=True)) if ours is not None else {}
        changed = {name for name, value in now.items() if name not in then or value != then[name]}
        self.args.check()
        if ours is not None and changed == {"objectives"} and _but_for_numbers(now) == _but_for_numbers(then):
            ratios = self.args.auto_ratios()  # these are measured
            ours.weights.update({key: one for key, one in self.args.weights().items() if key not in ratios})
        elif self._stepping:
            raise ValueError(_refused(changed))
        else:
            ours = self._distiller = self._built(then, now, changed)
            self._gradients = build_accumulator(self.args.build_rule(), ours)
        self._built_from = _of_trainer(self) + copy.deepcopy(args)  # a list that is edited in place must show

    def _built(self, then: dict[str, Any], now: dict[str, Any], changed: set[str]) -> Distiller:
        before = None if "model" in changed else self._distiller
        check_teacher_given(self.teacher, self.args)
        self._match_teacher()
        built = build_distiller(
            self.model,
            self.teacher,
            self.args,
            processing_class=self.processing_class,
            images=partial(training_sample, self),
            start=None if before is None or "start" in changed else before.start,
            kept={} if before is None or "teacher" in changed else _same_entries(before, then, now),
            task_loss=self.compute_loss_func,
            sharded=self.sharded,
            device=self.accelerator.device,
            place_student=self.place_model_on_device,
        )
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper around it
        if self._distiller is not None and changed & {"model", "layer_rates"} and optimizer is self._made_optimizer:
            self.optimizer = None  # it is of another student, or has other groups
        return built

    def _match_teacher(self) -> None:
        if self.teacher is None:
            return
        adopt_class_names(self.model, dataset_class_names(self.train_dataset))  # model_init makes new ones
        objectives = self.args.build_objectives().values()
        for name in match_teacher(self.teacher, self.model, self.processing_class, objectives, self.train_dataset):
            adopt_class_names(self.model, self.teacher.members()[name].provenance().class_names)
        for note in self.teacher.notes if self.is_world_process_zero() else ():
            logger.warning_once(note)

    @property
    def layer_rates(self) -> LayerRates | None:
        """The learning rates of the student's layers and their history; None where `args.layer_rates` is."""
        return self.distiller.rates

    @property
    def gradient_rule(self) -> GradientAccumulator | None:
        """The gradients of task and transfer and the history of their conflicts; None without a rule."""
        _ = self.distiller
        return self._gradients


def _but_for_numbers(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries, whose weight is None where it is a number."""
    return [{**entry, "weight": auto_ratio(entry)} for entry in settings["objectives"]]


def _same_entries(before: Distiller, then: dict[str, Any], now: dict[str, Any]) -> dict[str, Objective]:
    """{key: objective} of the entries that are the same but for their weight."""
    old, new = ({entry_key(entry): {**entry, "weight": None} for entry in s["objectives"]} for s in (then, now))
    return {key: before.objective(key) for key, entry in new.items() if old.get(key) == entry}


def _refused(changed: set[str]) -> str:
    names = ", ".join(f"trainer.{name}" if name in OF_TRAINER else f"args.{name}" for name in sorted(changed))
    return (
        f"{names} changed during training, where of such settings only the weights of objectives that are numbers can "
        "change. Leave it as it is until train() has returned: the next train() takes it up."
    )
