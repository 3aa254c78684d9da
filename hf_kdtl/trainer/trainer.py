"""transformers' Trainer with a teacher and objectives; each step calls the module that does the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import default_compute_objective
from transformers.utils import logging

from hf_kdtl.checkpoints.plain import plain_trainer_lacks
from hf_kdtl.checkpoints.state import (
    START,
    TENSORS,
    CheckpointPart,
    GradientRuleState,
    LayerRatesState,
    ObjectiveEntries,
    ObjectiveTensors,
    StartState,
    load_parts,
)
from hf_kdtl.checkpoints.student import load_student
from hf_kdtl.config import DistillationConfig
from hf_kdtl.data.indexed import IndexCollator, IndexedDataset
from hf_kdtl.models.adapters import adapted, load_adapters
from hf_kdtl.optim import create_layerwise_optimizer
from hf_kdtl.trainer import auto_weights, checks, contracts
from hf_kdtl.trainer.callbacks import MeasureTaskStep, SetDatasetEpoch, StopOnSignal
from hf_kdtl.trainer.changes import ChangeableTrainer
from hf_kdtl.trainer.data_errors import explain_data_errors
from hf_kdtl.trainer.distiller import Counts, Distiller
from hf_kdtl.trainer.learning import check_learning
from hf_kdtl.trainer.loss_meter import TermMeter
from hf_kdtl.trainer.optimizer_check import check_optimizer
from hf_kdtl.trainer.process_checks import check_ranks
from hf_kdtl.trainer.sample import carries_rows, item_checks, without_unused_columns
from hf_kdtl.trainer.teacher_checks import check_teacher_usage

logger = logging.get_logger(__name__)


class DistillationTrainer(ChangeableTrainer):
    """transformers' Trainer, whose loss is made of objectives between a student and a teacher.

    Every argument of Trainer keeps its meaning and place. `model` is the student; only the student is saved,
    evaluated and used for predictions. With `objectives=[{"name": "task"}]` and no teacher it is the plain Trainer,
    bit for bit; under gradient accumulation so for models that pass `num_items_in_batch` on to their loss (ViT, DeiT,
    DINOv2, MSN, I-JEPA, Swin, SegFormer) and ConvNeXt. Of others (ResNet, BEiT, LeViT, MobileNetV2, CLIP) Trainer 5.23
    takes the loss and gradient as many times too large as there are steps to accumulate; here they are right.

    Where it differs on purpose:

    - the loss is averaged over all images of an optimizer step (all micro-batches and ranks);
    - float labels (B, K) are class distributions, not multi-label targets;
    - resuming and `load_best_model_at_end` load every tensor of the student, or fail (Trainer 5.23 leaves the blocks
      of a ViT untrained there);
    - a loss or gradient that turns nan or infinite stops the run, naming the term; Ctrl-C and SIGTERM save first.

    Args:
        model: the student.
        args: a `DistillationConfig`.
        processing_class: the student's image processor. All other arguments are Trainer's.
        teacher: a model, a `hf_kdtl.models.Teacher`, or a path or Hub name (which brings its own image processor).
            Several by name: {"a": ..., "b": ...}; every objective with a teacher, and layer_rates, say `teacher` then.
            None when neither an objective nor `layer_rates` needs one.

    Raises:
        ValueError: for a teacher that is missing or unused, classes that do not match by name, a student that is not
            a single-label classifier, or a setting of Trainer's that cannot keep its meaning here.

    Example:
        >>> config = DistillationConfig("out", objectives=[{"name": "task", "weight": 0.1},
        ...                                                {"name": "logit_kd", "weight": 0.9}])  # doctest: +SKIP
        >>> DistillationTrainer(student, config, teacher=teacher, train_dataset=images).train()  # doctest: +SKIP
    """

    args: DistillationConfig
    model: Any

    def __init__(
        self, model=None, args: DistillationConfig | None = None, data_collator=None, train_dataset=None,
        eval_dataset=None, processing_class=None, model_init=None, compute_loss_func=None, compute_metrics=None,
        callbacks=None, optimizers=(None, None), optimizer_cls_and_kwargs=None, preprocess_logits_for_metrics=None,
        *, teacher=None,
    ):  # fmt: skip
        args = DistillationConfig("tmp_trainer") if args is None else args
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        contracts.check_arguments(args, model, data, processing_class)
        check_teacher_usage(teacher, args)
        self.args = args  # which the teacher's setter reads
        self.teacher = teacher
        self._distiller: Distiller | None = None
        self.auto_weights = auto_weights.AutoWeights(self)
        self._counted: tuple[Tensor | None, Counts] = None, {}
        self._term_losses, self._gradients = {}, None
        self._meter, self._stop = TermMeter(), StopOnSignal()
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func,
            compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics,
        )  # fmt: skip
        self._given_optimizer = self.optimizer is not None
        self._check()
        # Trainer reads it off forward's signature, and a student whose forward takes no labels would lose them.
        self.label_names = ["labels"]
        self._trainers_rule = self.model_accepts_loss_kwargs
        self.model_accepts_loss_kwargs = True  # what `loss_is_scaled_for_ga` says, before transformers 5.19
        self.add_callback(SetDatasetEpoch())
        self.add_callback(self._stop)
        self.add_callback(MeasureTaskStep(self))
        self._match_teacher()

    def _check(self) -> None:
        """Refuse what does not fit: at construction, and before each training, as attributes may be assigned to."""
        checks.check_setting(self)
        contracts.check(self, self._own_compute_loss)

    # ---- What is trained ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As Trainer's, of the student under its own names; the objectives' parameters are added as a group."""
        ours, making = self.distiller, self.optimizer is None
        foreign = not making or self.optimizer_cls_and_kwargs is not None
        if ours.rates is not None and not foreign:
            names = self.get_decay_parameter_names(ours.student)
            self.optimizer = create_layerwise_optimizer(ours.student, self.args, ours.objectives, ours.rates, names)
        optimizer = super().create_optimizer(ours.student if model is None else model)
        self._made_optimizer = optimizer if making else self._made_optimizer
        if not self._given_optimizer:
            contracts.add_objectives(optimizer, ours.objectives, self.args)
        return optimizer

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        self._meter = TermMeter()
        student = self.model
        self._check()
        for source in self.teacher.members().values() if self.teacher and self.train_dataset is not None else ():
            source.check_data(self.train_dataset)
        with explain_data_errors(self):
            check_learning(self)
        if self.sharded:
            self._shard()  # before the optimizer is made; Trainer leaves alone what is wrapped
        else:
            self.model_wrapped = self.distiller
        try:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        finally:
            self.model = student
        self.callback_handler.model = student
        check_optimizer(self.optimizer, self.distiller, self.args)
        self.auto_weights.settle(resumed=resume_from_checkpoint is not None)
        self._stepping = True
        return prepared

    def _wrap_model(self, model, training=True, dataloader=None):
        if training and not self._given_optimizer:  # create_optimizer may be the user's
            contracts.add_objectives(self.optimizer, self.distiller.objectives, self.args)
        if training and not self.sharded:
            self.model = model  # the container is prepared, clipped and zeroed; the optimizer is made of the student
        return super()._wrap_model(model, training, dataloader)

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        if is_training and self._indexed:
            later = self.args.augment_on_device and dataset.finishes_later
            dataset = IndexedDataset(without_unused_columns(self, dataset), later, item_checks(self))
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)

    def _get_train_sampler(self, train_dataset=None):
        data = self.train_dataset if train_dataset is None else train_dataset
        make = getattr(getattr(data, "data", data), "train_sampler", None)  # an IndexedDataset holds the data
        sampler = make(self._train_batch_size) if callable(make) else None
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        collate = super()._get_collator_with_removed_columns(data_collator, description)
        return IndexCollator(collate) if self._indexed else collate

    @property
    def _indexed(self) -> bool:
        """Whether training batches carry the row of each image."""
        return carries_rows(self)

    # ---- Logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._meter.flush(self.distiller.weights, self.accelerator.gather))
            logs.update(self.layer_rates.log() if self.layer_rates is not None else {})
            logs.update(self.gradient_rule.log(self.state.global_step) if self.gradient_rule is not None else {})
        super().log(logs, start_time)

    # ---- Hyperparameter search: values inside objectives, layer_rates and gradient_rule, by dotted names ----

    def hyperparameter_search(self, hp_space=None, compute_objective=None, *args, **kwargs):
        """As Trainer's. A name such as `objectives.logit_kd.temperature` reaches into a setting; the terms that
        `eval_objectives` reports are no part of the default `compute_objective`."""

        def space(trial: Any) -> dict[str, Any]:
            values = hp_space(trial)
            return values if trial is None else self.args.with_dotted(values)  # None: a backend asks for the space

        def objective(metrics: dict[str, float]) -> float:
            return default_compute_objective({k: v for k, v in metrics.items() if k not in self._term_metrics})

        space_of_settings = None if hp_space is None else space
        return super().hyperparameter_search(space_of_settings, compute_objective or objective, *args, **kwargs)

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(self.args.with_dotted(trial) if isinstance(trial, dict) else trial)

    # ---- Checkpoints ----

    def train(self, *args, **kwargs):
        check_ranks(self)
        try:
            with self._stop.listening():
                output = super().train(*args, **kwargs)
        finally:
            self._stepping = False
        self._stop.raise_if_late(self.args)
        return output

    def _checkpoint_parts(self, folder: Path) -> dict[str, CheckpointPart]:
        return {
            "objectives": ObjectiveEntries(self.args.entries),
            "start": StartState(self, folder.parent / START),
            "auto_weights": self.auto_weights,
            TENSORS: ObjectiveTensors(self, self._full_state.get("objectives")),
            "layer_rates": LayerRatesState(self),
            "gradient_rule": GradientRuleState(self),
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        parts, trainers_own = self._checkpoint_parts(Path(resume_from_checkpoint)), super()._load_from_checkpoint
        if plain_trainer_lacks(resume_from_checkpoint) is not None:
            contracts.check_plain_checkpoint(self.distiller, resume_from_checkpoint)
            parts = {}
        # While the student has its first weights.
        load_parts(resume_from_checkpoint, {name: parts.pop(name) for name in ("objectives", "start") if parts})
        self._load_weights(resume_from_checkpoint, lambda: trainers_own(resume_from_checkpoint, model))
        load_parts(resume_from_checkpoint, parts)

    def _load_best_model(self) -> None:
        best = self._best()
        self._load_weights(best, super()._load_best_model)
        if plain_trainer_lacks(best) is None:
            load_parts(best, {TENSORS: ObjectiveTensors(self)})

    def _load_weights(self, folder: str, otherwise: Callable[[], None]) -> None:
        if isinstance(self.model, PreTrainedModel):
            load_student(self.model, folder)
        elif adapted(self.model):
            load_adapters(self.model, folder)
        else:
            otherwise()
