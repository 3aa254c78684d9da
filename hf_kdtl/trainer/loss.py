"""A Trainer whose training loss is that of the container: averaged over all images of an optimizer step."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hf_kdtl.data.on_device import CHANGES
from hf_kdtl.functional.derivatives import math_attention
from hf_kdtl.functional.random import Draws
from hf_kdtl.gradient_rules import GradientAccumulator
from hf_kdtl.optim import LayerRates
from hf_kdtl.trainer import contracts
from hf_kdtl.trainer.batch import Counts, micro_batch_counts
from hf_kdtl.trainer.data_errors import explain_data_errors
from hf_kdtl.trainer.distiller import Distiller
from hf_kdtl.trainer.evaluation import EvaluatingTrainer
from hf_kdtl.trainer.gradient_rule_step import Parts, separate_backward
from hf_kdtl.trainer.loss_meter import TermMeter
from hf_kdtl.trainer.non_finite import check_finite, non_finite_gradient_error
from hf_kdtl.utils.versions import CHECKPOINTING


class LossTrainer(EvaluatingTrainer):
    """A Trainer whose steps train student and objectives as one, under a gradient rule where there is one."""

    model: Any
    _distiller: Distiller | None
    _gradients: GradientAccumulator | None
    _term_losses: Parts
    _meter: TermMeter
    _scaled: bool | None = None
    _trainers_rule = True
    _stepped = False
    """Whether the gradient of this optimizer step is that of our training_step."""

    @property
    def layer_rates(self) -> LayerRates | None:
        raise NotImplementedError

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._micro_step, self._stepped, self._computed = 0, False, False
        if self._gradients is not None:
            self._gradients.clear()  # of an interrupted window
        if self.layer_rates is not None:
            self.layer_rates.begin(self.state.global_step)
        with explain_data_errors(self):
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Labelled images of the window over all ranks, as Trainer gives them; kept with the number of all images."""
        if not batch_samples:
            return None
        here = [torch.stack([*micro_batch_counts(batch).values()]) for batch in batch_samples]
        both = torch.stack(here).sum(0).to(device)
        if self.args.world_size > 1:
            both = self.accelerator.gather(both).view(-1, 2).sum(0)
        self._counted = both[1] / 1, {"images": both[0], "labelled": both[1]}  # a float, as Trainer's
        return self._counted[0]

    def _counts(self, inputs: dict[str, Any], items: Tensor | float | None) -> Counts:
        """What a window holds, by the number that `_get_num_items_in_batch` gave for it; or of a batch that the user
        gives a number for, or none."""
        given, counts = self._counted
        if items is not None and items is given:
            return counts
        here = micro_batch_counts(inputs)
        if items is None:
            return here
        number = torch.as_tensor(items, device=here["images"].device)
        unlabelled = here["images"] - here["labelled"] if inputs.get("labels") is not None else 0
        return {"images": number + unlabelled, "labelled": number}

    @property
    def loss_is_scaled_for_ga(self) -> bool | None:
        """Ours is divided by all images of the accumulated batch, so Trainer must not divide it again. For the loss of
        a `compute_loss` that does not call ours Trainer's rule holds, or what a subclass sets."""
        if self._scaled is not None:
            return self._scaled
        return self._computed or self._trainers_rule or self.compute_loss_func is not None

    @loss_is_scaled_for_ga.setter
    def loss_is_scaled_for_ga(self, value: bool | None) -> None:
        self._scaled = value

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        # Blocks that are recomputed in the backward pass must use the kernel that their forward pass used. The order
        # first: transformers walks over all modules to answer the other question, 0.2 % of a step.
        plain_kernel = self.distiller.student_needs.order >= 2 and getattr(self.model, f"is_{CHECKPOINTING}", False)
        if self._unwrapped(model) is self.model:  # trainer.model, by a user
            model = self.distiller
        contracts.check_rule(self.args, self._own_compute_loss)
        self._computed = False
        with explain_data_errors(self), math_attention() if plain_kernel else nullcontext():
            if self._gradients is None:
                loss = super().training_step(model, inputs, num_items_in_batch)
            else:
                loss = separate_backward(self, model, inputs, num_items_in_batch, self._gradients)
        if not self._computed:
            contracts.check_replaced_loss(self.args)
        if self.layer_rates is not None and self.accelerator.sync_gradients:  # the window's last micro-batch
            self.layer_rates.end(self.optimizer, self.accelerator.gather)
        self._stepped = True
        return loss

    def check_step(self) -> None:
        """Before the optimizer's step. Raises ValueError where a user's `training_step` left out what is set."""
        if not self._stepped:
            contracts.check_replaced_step(self.args)
        if not self._computed:
            contracts.check_replaced_loss(self.args)

    @property
    def _own_compute_loss(self) -> bool:
        """Whether `compute_loss` is the user's, of a class or of this trainer alone."""
        return getattr(self.compute_loss, "__func__", None) is not LossTrainer.compute_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch: Tensor | float | None = None):
        """The training loss of a micro-batch where `model` is the container; the task loss where it is the student.

        An override may call this one, or `model(**inputs)`, which is the student's own forward in both cases.
        """
        counts = self._counts(inputs, num_items_in_batch)
        if self._unwrapped(model) is not self._distiller:
            return self._task_loss(model, inputs, return_outputs, counts)
        if self._gradients is not None and isinstance(model, DistributedDataParallel):
            model = model.module  # it must not synchronize here, and would tie all terms together
        result = model(inputs, self._draws(inputs), counts, self.accelerator.num_processes, return_outputs)
        self._micro_step += 1
        self._computed = True
        self._term_losses = result.pop("terms")
        check_finite(self, result, inputs["pixel_values"])
        self._meter.add(result["sums"], result["counted"])
        return (result["loss"], result["outputs"]) if return_outputs else result["loss"]

    def _save_checkpoint(self, model, trial):
        for source in self.distiller.sources.values():
            source.keep()
        super()._save_checkpoint(model, trial)

    def _prepare_inputs(self, inputs):
        inputs, data = super()._prepare_inputs(inputs), cast(Any, self.train_dataset)
        return data.finish(inputs) if CHANGES in inputs else inputs

    def _unwrapped(self, model):
        """The model inside of DDP's and torch.compile's wrappers. accelerate is asked only where there may be one: it
        looks for packages on the disk at each call, which takes 0.3 ms."""
        if model is self._distiller or model is self.model:
            return model
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def _draws(self, inputs: dict[str, Any]) -> Draws:
        """Randomness by the image's position in the accumulated batch (in evaluation: in the dataset), so that
        micro-batches and ranks change nothing. In evaluation every image is included."""
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

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # With fp16 the scaler expects infinite gradients, and skips the step.
        if self.accelerator.scaler is None and not math.isfinite(value := float(norm)):
            raise non_finite_gradient_error(self.state.global_step, value, self.args.output_dir)
        return norm
