"""transformers' Trainer with a teacher and objectives; each step calls the module that does the work."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_kdtl.checkpoints.state import (
    START,
    check_objectives,
    load_distillation_state,
    load_gradient_rule,
    load_layer_rates,
    load_start,
    load_student,
    save_distillation_state,
)
from hf_kdtl.config import DistillationConfig
from hf_kdtl.functional.derivatives import math_attention
from hf_kdtl.functional.divergences import cross_entropy, labelled
from hf_kdtl.functional.random import Draws
from hf_kdtl.gradient_rules import GradientAccumulator
from hf_kdtl.models.adapters import adapted, load_adapters
from hf_kdtl.models.teachers import as_source
from hf_kdtl.optim import LayerRates, create_layerwise_optimizer
from hf_kdtl.trainer import checks
from hf_kdtl.trainer.build import assemble
from hf_kdtl.trainer.callbacks import MeasureTaskStep, SetDatasetEpoch, StopOnSignal
from hf_kdtl.trainer.distiller import Counts, Distiller, micro_batch_counts
from hf_kdtl.trainer.gradient_rule_step import Parts, build_accumulator, separate_backward
from hf_kdtl.trainer.loss_meter import TermMeter
from hf_kdtl.trainer.process_checks import check_ranks
from hf_kdtl.trainer.publishing import PublishingTrainer

logger = logging.get_logger(__name__)


class DistillationTrainer(PublishingTrainer):
    """transformers' Trainer, whose loss is made of objectives between a student and a teacher.

    Every argument of Trainer keeps its meaning and place. `model` is the student; what is saved, evaluated and
    predicted is the student alone. With `objectives=[{"name": "task"}]` and no teacher it is the plain Trainer.

    Where it differs on purpose:

    - the loss is averaged over the images of the whole batch (all micro-batches and ranks), so how the batch is
      split changes nothing;
    - float labels (B, K) are class distributions, not multi-label targets;
    - resuming and `load_best_model_at_end` load every tensor of the student, or fail (Trainer 5.23 leaves the blocks
      of a ViT untrained there);
    - a loss or gradient that turns nan or infinite stops the run, naming the term; Ctrl-C and SIGTERM save first.

    Args:
        model, args, ...: as Trainer's; `args` is a `DistillationConfig`, `processing_class` the student's image
            processor.
        teacher: a model, a `hf_kdtl.models.Teacher`, or a path or Hub name (which brings its own image processor).
            None when neither an objective nor `layer_rates` needs one.

    Raises:
        ValueError: for a teacher that is missing or unused, classes that do not match by name, a student that is not
            a single-label classifier, or a setting of Trainer's that cannot keep its meaning here.

    Example:
        >>> config = DistillationConfig("out", objectives=[{"name": "task", "weight": 0.1},
        ...                                                {"name": "logit_kd", "weight": 0.9}])  # doctest: +SKIP
        >>> DistillationTrainer(student, config, teacher=teacher, train_dataset=images).train()  # doctest: +SKIP
    """

    # The loss is divided by the images of the whole accumulated batch, so Trainer must not divide it again.
    loss_is_scaled_for_ga = True
    args: DistillationConfig
    model: Any

    def __init__(self, model=None, args: DistillationConfig | None = None, *positional, teacher=None, **keywords):
        args = DistillationConfig("tmp_trainer") if args is None else args
        if not isinstance(args, DistillationConfig):
            raise TypeError(
                f"args is {type(args).__name__}; expected DistillationConfig, which takes the same arguments and "
                "objectives: DistillationConfig(output_dir, ..., objectives=[...])."
            )
        checks.check_teacher_usage(teacher, args)
        self.teacher = None if teacher is None else as_source(teacher)
        self._distiller: Distiller | None = None
        self._built_from: tuple[Any, ...] = ()
        self._gradients: GradientAccumulator | None = None
        self._micro_step = 0
        self._term_losses: Parts = {}
        self._meter = TermMeter()
        self._eval_terms: dict[str, list[Tensor]] | None = None
        self._stop = StopOnSignal()
        super().__init__(model, args, *positional, **keywords)
        checks.check_setting(self)
        # Trainer reads it off forward's signature, and a student whose forward takes no labels would lose them.
        self.label_names = ["labels"]
        self.add_callback(SetDatasetEpoch())
        self.add_callback(self._stop)
        self.add_callback(MeasureTaskStep(self))
        if self.teacher is not None:
            self._match_teacher()

    # ---- What is trained ----

    @property
    def distiller(self) -> Distiller:
        """Student and objectives as one module, built when first asked for: `model_init` makes the student late."""
        if self._distiller is not None and self.model is self._distiller:  # inside _prepare_for_training
            return self._distiller
        stale = self._distiller is None or self._distiller.student is not self.model
        if stale or self._built_from != self._settings():
            self._built_from = copy.deepcopy(self._settings())  # a list that is edited in place must show
            self._distiller = assemble(self)
            self._gradients = build_accumulator(self.args.build_rule(), self._distiller)
        assert self._distiller is not None
        return self._distiller

    @property
    def layer_rates(self) -> LayerRates | None:
        """The learning rates of the student's layers and their history; None where `args.layer_rates` is."""
        return self.distiller.rates

    @property
    def gradient_rule(self) -> GradientAccumulator | None:
        """The gradients of task and transfer and the history of their conflicts; None without a rule."""
        _ = self.distiller
        return self._gradients

    def _settings(self) -> tuple[Any, ...]:
        return self.args.objectives, self.args.layer_rates, self.args.gradient_rule, self.args.start

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        ours, foreign = self.distiller, self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        if ours.rates is not None and not foreign:
            self.optimizer = create_layerwise_optimizer(ours.student, self.args, ours.objectives, ours.rates)
        return super().create_optimizer(ours if model is None else model)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        # Trainer prepares, clips, zeroes and accumulates self.model: for the while of this call that is the container.
        self._meter = TermMeter()
        student = self.model
        if self.sharded:
            self._shard()  # before the optimizer is made; Trainer leaves alone what is wrapped
        else:
            self.model = self.model_wrapped = self.distiller
        try:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        finally:
            self.model = student
        self.callback_handler.model = student
        checks.check_optimizer(self.optimizer, self.distiller.objectives, self.layer_rates)
        return prepared

    # ---- The loss ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._micro_step = 0
        if self._gradients is not None:
            self._gradients.clear()  # of a window that was broken off
        if self.layer_rates is not None:
            self.layer_rates.begin(self.state.global_step)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_num_items_in_batch(  # type: ignore[override]
        self, batch_samples: list, device: torch.device
    ) -> Counts | None:
        """Images and labelled images of the window, over all ranks."""
        if not batch_samples:
            return None
        here = [torch.stack([*micro_batch_counts(batch).values()]) for batch in batch_samples]
        both = torch.stack(here).sum(0).to(device)
        if self.args.world_size > 1:
            both = self.accelerator.gather(both).view(-1, 2).sum(0)
        return {"images": both[0], "labelled": both[1]}

    def training_step(self, model, *args, **kwargs) -> Tensor:
        # Blocks that are recomputed in the backward pass must meet the kernel that their forward ran.
        recomputed = getattr(self.model, "is_activation_checkpointing", False)
        math = recomputed and self.distiller.student_needs.order >= 2
        with math_attention() if math else nullcontext(), separate_backward(self, model, self._gradients):
            loss = super().training_step(model, *args, **kwargs)
        if self.layer_rates is not None and self.accelerator.sync_gradients:  # the window's last micro-batch
            self.layer_rates.end(self.optimizer, self.accelerator.gather)
        return loss

    def compute_loss(  # type: ignore[override]
        self, model, inputs, return_outputs=False, num_items_in_batch: Counts | None = None
    ):
        """The training loss of a micro-batch where `model` is the container; the task loss where it is the student."""
        counts = num_items_in_batch or micro_batch_counts(inputs)
        if self.accelerator.unwrap_model(model, keep_torch_compile=False) is not self._distiller:
            return self._task_loss(model, inputs, return_outputs, counts)
        if self._gradients is not None and isinstance(model, DistributedDataParallel):
            model = model.module  # it is not to synchronise here, and would tie all terms together
        result = model(inputs, self._draws(inputs), counts, self.accelerator.num_processes)
        self._micro_step += 1
        self._term_losses = result.pop("terms")
        self._check_finite(result)
        self._meter.add(result["sums"], result["counted"])
        return (result["loss"], result) if return_outputs else result["loss"]

    def _task_loss(self, model, inputs, return_outputs, counts: Counts):
        """`eval_loss`: the task loss whatever the objectives, so that runs compare. As Trainer's, batch by batch."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = convert_to_fp32(model(**inputs))
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=counts["labelled"])
        else:
            values = cross_entropy(outputs["logits"], labels, self._task_smoothing())
            loss = values.sum() / counts["labelled"].clamp(min=1)
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _task_smoothing(self) -> float:
        smoothed = [getattr(o, "label_smoothing", None) for o in self.distiller.objectives.values()]
        return next((s for s in smoothed if s is not None), self.args.label_smoothing_factor)

    def _draws(self, inputs: dict[str, Any]) -> Draws:
        """Randomness by the image's place in the whole batch (in evaluation: in the data set), so that micro-batches
        and ranks change nothing. In evaluation every image takes part."""
        evaluating = not self.model.training
        first = self._micro_step * self.accelerator.num_processes + self.accelerator.process_index
        first *= self.args.eval_batch_size if evaluating else self._train_batch_size
        images = inputs["pixel_values"].shape[0]
        return Draws(self.args.seed, self.state.global_step, tuple(range(first, first + images)), evaluating)

    def objective_terms(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """{key: unweighted value} of a batch: (B,) per image, or a scalar for a batch statistic.

        What the training loss is made of, with its gradient, in the student's present mode (train or eval).
        Objectives that need labels are left out where the batch has none.
        """
        inputs = self._prepare_inputs(inputs)
        with self.accelerator.autocast():
            return self.distiller.terms(inputs, self._draws(inputs))[1]

    # ---- Never silently wrong ----

    def _check_finite(self, result: dict[str, Any]) -> None:
        if not torch.isfinite(result["loss"]):
            counted, weights = result["counted"], self.distiller.weights
            terms = {k: (weights[k] * s / counted[k].clamp(min=1)).item() for k, s in result["sums"].items()}
            raise checks.non_finite_loss_error(
                self.state.global_step, result["loss"].item(), terms, self.args.output_dir
            )

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # With fp16 the scaler meets infinite gradients on purpose, and skips the step.
        if self.accelerator.scaler is None and not torch.isfinite(torch.as_tensor(norm)):
            raise checks.non_finite_gradient_error(self.state.global_step, float(norm), self.args.output_dir)
        return norm

    def _match_teacher(self) -> None:
        assert self.teacher is not None
        compare = any(objective.compares_classes for objective in self.args.build_objectives().values())
        self.teacher.match(self.model, self.processing_class, compare)
        for note in self.teacher.notes if self.is_world_process_zero() else ():
            logger.warning_once(note)

    # ---- Logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._meter.flush(self.distiller.weights, self.accelerator.gather))
            logs.update(self.layer_rates.log() if self.layer_rates is not None else {})
            logs.update(self.gradient_rule.log(self.state.global_step) if self.gradient_rule is not None else {})
        super().log(logs, start_time)

    # ---- Evaluation: the student alone, as Trainer does it ----

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._eval_terms = defaultdict(list) if self.args.eval_objectives else None
        self._micro_step = 0
        # Accelerate patched the container's forward for mixed precision, not the student's.
        with self.accelerator.autocast():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        for key, values in (self._eval_terms or {}).items():
            terms = torch.cat(values)
            assert output.metrics is not None
            output.metrics[f"{metric_key_prefix}_{key}"] = terms[~terms.isnan()].mean().item()
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self._eval_terms is not None:
            for key, value in self.objective_terms(inputs).items():
                self._eval_terms[key].append(self.gather_function(self._per_image(key, value.detach(), inputs)).cpu())
            self._micro_step += 1
        return result

    def _per_image(self, key: str, value: Tensor, inputs: dict[str, Any]) -> Tensor:
        """A term as one number an image; nan marks an image it does not count."""
        labels = inputs.get("labels")
        value = value.float().expand(inputs["pixel_values"].shape[0])
        if self.distiller.objective(key).counts == "labelled" and labels is not None:
            value = torch.where(labelled(labels).to(value.device), value, torch.nan)
        return value

    # ---- Checkpoints ----

    def train(self, *args, **kwargs):
        check_ranks(self)
        with self._stop.listening():
            output = super().train(*args, **kwargs)
        self._stop.raise_if_told_late(self.args)
        return output

    def _save_beside(self, folder: Path) -> None:
        start, rates = self.distiller.start, self.layer_rates
        tensors = self._full_state.get("objectives", self.distiller.objectives.state_dict())
        save_distillation_state(folder, tensors, self._built_from[0], rates, self.gradient_rule, start)
        if start is not None:
            start.save(folder.parent / START)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        plain = super()._load_from_checkpoint
        check_objectives(resume_from_checkpoint, self.args.entries)
        if self.distiller.start is not None:
            # As it was when the run began: the student has moved on since.
            self.distiller.start = load_start(self, resume_from_checkpoint)
        self._load_weights(resume_from_checkpoint, lambda: plain(resume_from_checkpoint, model))
        load_layer_rates(resume_from_checkpoint, self.layer_rates)
        load_gradient_rule(resume_from_checkpoint, self.args.gradient_rule, self.gradient_rule)

    def _load_best_model(self) -> None:
        self._load_weights(self._best(), super()._load_best_model)

    def _load_weights(self, folder: str, otherwise: Callable[[], None]) -> None:
        if isinstance(self.model, PreTrainedModel):
            load_student(self.model, folder)
        elif adapted(self.model):
            load_adapters(self.model, folder)
        else:
            otherwise()
        load_distillation_state(folder, self.distiller.objectives, self._built_from[0])
