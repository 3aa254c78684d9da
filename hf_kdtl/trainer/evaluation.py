"""A Trainer that evaluates the student alone, and reports the objectives' terms where they are asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor
from transformers.utils import logging

from hf_kdtl.functional.divergences import cross_entropy, labelled
from hf_kdtl.functional.multi_label import binary_cross_entropy
from hf_kdtl.functional.random import Draws
from hf_kdtl.models.forward.attention_hooks import class_outputs
from hf_kdtl.models.forward.capture import Needs, capture
from hf_kdtl.models.forward.embedding import is_headless
from hf_kdtl.models.labels import class_problem, is_multi_label
from hf_kdtl.objectives import Objective
from hf_kdtl.trainer.batch import as_indices
from hf_kdtl.trainer.data_checks import evaluation_pixels_problem
from hf_kdtl.trainer.data_errors import data_problem
from hf_kdtl.trainer.distiller import Counts
from hf_kdtl.trainer.non_finite import unmeasured_weights
from hf_kdtl.trainer.publishing import PublishingTrainer

logger = logging.get_logger(__name__)


class EvaluatingTrainer(PublishingTrainer):
    """A Trainer whose `eval_loss` is the task loss, and whose `eval_objectives` adds eval_<key> for every term."""

    _eval_terms: EvaluationTerms | None = None
    _term_metrics: frozenset[str] = frozenset()
    """The names of metrics that are terms."""
    _eval_loss: LabelledMean | None = None
    _micro_step = 0
    _computed = True
    _counted: tuple[Tensor | None, Counts]
    """The labelled images of the last window as Trainer got them, and all that was counted in it."""
    _evaluated: tuple[tuple[dict[str, Any], Any], ...] = ()
    """(entry of the log, the dataset that it is of) of each evaluation."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        before = len(self.state.log_history)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        of = self.eval_dataset if eval_dataset is None else eval_dataset
        self._evaluated += tuple((entry, of) for entry in self.state.log_history[before:])
        return metrics

    def is_of_eval_dataset(self, entry: dict[str, Any]) -> bool:
        """Whether an entry of the log is of `eval_dataset`; one of a checkpoint is taken to be."""
        return all(of is self.eval_dataset for known, of in self._evaluated if known is entry)

    def objective_terms(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        raise NotImplementedError

    def _draws(self, inputs: dict[str, Any]) -> Draws:
        raise NotImplementedError

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        # Accelerate patched the container's forward for mixed precision, not the student's.
        with self._apart() as (mean_loss, terms), self.accelerator.autocast():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        assert output.metrics is not None
        mean_loss.correct(output.metrics, f"{metric_key_prefix}_loss", self.accelerator.gather)
        if description == "Evaluation" and f"{metric_key_prefix}_loss" not in output.metrics:
            why = unmeasured_weights(self.distiller.weights) if is_headless(self.model) else ""
            why = why or data_problem(dataloader.dataset, False) or "no image has a label."
            logger.warning(f"there is no {metric_key_prefix}_loss: {why}")
        if terms is not None:
            means = {f"{metric_key_prefix}_{key}": mean for key, mean in terms.means().items()}
            if taken := sorted(means.keys() & output.metrics.keys()):
                logger.warning(f"{taken} are of compute_metrics; give the objectives another key to see their terms.")
            self._term_metrics = (self._term_metrics | means.keys()) - output.metrics.keys()
            output.metrics.update({**means, **output.metrics})
        return output

    @contextmanager
    def _apart(self) -> Iterator[tuple[LabelledMean, EvaluationTerms | None]]:
        """What one evaluation collects. Afterwards all is as it was for the training step, or the evaluation, from
        inside of which it was called (on_step_begin, on_substep_end, compute_metrics)."""
        around = self._eval_loss, self._eval_terms, self._micro_step, self._counted
        mean_loss, terms = LabelledMean(), EvaluationTerms() if self.args.eval_objectives else None
        self._eval_loss, self._eval_terms, self._micro_step = mean_loss, terms, 0
        try:
            yield mean_loss, terms
        finally:
            self._eval_loss, self._eval_terms, self._micro_step, self._counted = around

    def get_eval_dataloader(self, eval_dataset=None):
        self._check_data(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        self._check_data(test_dataset)
        return super().get_test_dataloader(test_dataset)

    def _check_data(self, dataset: Any) -> None:
        """Refuse data whose label i is not the student's class i, or with other pixels; the constructor's was checked
        there."""
        if problem := class_problem(self.model, dataset) or evaluation_pixels_problem(self, dataset):
            raise ValueError(problem)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if is_headless(self.model):
            return self._embedding_step(self._prepare_inputs(inputs), prediction_loss_only)
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self._eval_loss is not None and result[0] is not None:
            self._eval_loss.add(result[0], self._counted[1])
        if self._eval_terms is not None:
            for key, value in self.objective_terms(inputs).items():
                value = per_image(self.distiller.objective(key), value.detach(), inputs)
                self._eval_terms.add(key, self.gather_function(value))
            self._micro_step += 1
        return result

    def _embedding_step(self, inputs: dict[str, Any], loss_only: bool) -> tuple[Any, Any, Any]:
        """(loss, embeddings, labels) of a student without a head: `eval_loss` is the weighted sum of the terms, where
        their weights are known, and the predictions are embeddings."""
        with torch.no_grad():
            student, terms = self.distiller.terms(inputs, self._draws(inputs))
            if student.pooled is None and not loss_only:
                student = capture(self.model, inputs["pixel_values"], Needs(pooled=True))
        weights = self.distiller.weights
        values = {key: per_image(self.distiller.objective(key), one.detach(), inputs) for key, one in terms.items()}
        total = torch.stack([weights[key] * value.mean() for key, value in values.items()]).sum()
        loss = None if unmeasured_weights(weights) else total
        if self._eval_terms is not None:
            for key, value in values.items():
                self._eval_terms.add(key, self.gather_function(value))
        self._micro_step += 1
        pooled = None if loss_only or student.pooled is None else student.pooled.detach().float()
        return loss, pooled, None if loss_only else inputs.get("labels")

    def _task_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool, counts: Counts) -> Any:
        """`eval_loss`: the task loss whatever the objectives, so that runs compare. As Trainer's, batch by batch."""
        inputs = dict(inputs)
        labels = as_indices(inputs.pop("labels"))
        outputs = convert_to_fp32(class_outputs(model(**inputs)))
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=counts["labelled"] / 1)
        else:
            smoothed = [getattr(o, "label_smoothing", None) for o in self.distiller.objectives.values()]
            smoothing = next((s for s in smoothed if s is not None), self.args.label_smoothing_factor)
            self.distiller.check_labels(labels, outputs["logits"].shape[-1])
            of_several = is_multi_label(self.model)
            values = (
                binary_cross_entropy(outputs["logits"], labels)
                if of_several
                else cross_entropy(outputs["logits"], labels, smoothing)
            )
            loss = values.sum() / counts["labelled"].clamp(min=1)
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


class LabelledMean:
    """The evaluation loss over the labelled images.

    Trainer weighs the loss of a batch by all of its images, so that a batch without labels would count as loss 0.
    """

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def add(self, loss: Tensor, counts: Counts) -> None:
        """Add one batch: its loss on this rank, and the images that all ranks have in it."""
        images, labelled_images = counts["images"].to(loss.device), counts["labelled"].to(loss.device)
        self._batches.append(torch.stack([loss.double() * labelled_images, labelled_images, images]))

    def correct(self, metrics: dict[str, float], key: str, gather: Callable[[Tensor], Tensor]) -> None:
        """Replace Trainer's mean where some image has no label; without any label there is no loss to report."""
        if key not in metrics or not self._batches:
            return
        total, labelled_images, images = gather(torch.stack(self._batches).sum(0)).view(-1, 3).mean(0).tolist()
        if labelled_images == 0:
            del metrics[key]
        elif labelled_images < images:
            metrics[key] = total / labelled_images


class EvaluationTerms:
    """The mean of each objective over the evaluation data, for `eval_objectives`."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, key: str, values: Tensor) -> None:
        """Add one batch: a value per image, nan where the term does not count the image."""
        self._values[key].append(values.cpu())

    def means(self) -> dict[str, float]:
        """{key: mean over the images that it counts}."""
        terms = {key: torch.cat(values) for key, values in self._values.items()}
        return {key: values[~values.isnan()].mean().item() for key, values in terms.items()}


def per_image(objective: Objective, value: Tensor, inputs: dict[str, Any]) -> Tensor:
    """A term as one number per image; nan marks an image that it does not count."""
    labels = inputs.get("labels")
    value = value.float().expand(inputs["pixel_values"].shape[0])
    if objective.counts == "labelled" and labels is not None:
        value = torch.where(labelled(labels).to(value.device), value, torch.nan)
    return value
