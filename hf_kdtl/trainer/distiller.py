"""The one module that is trained: the student and the objectives, so that DDP, clipping and the optimizer see both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_kdtl.data.indexed import INDEX, TEACHER_PIXELS, VIEW
from hf_kdtl.functional.random import Draws, select_images
from hf_kdtl.models.forward.capture import Capture, Needs, capture
from hf_kdtl.models.forward.needs import NOTHING
from hf_kdtl.models.forward.partial_batch import capture_subset
from hf_kdtl.models.labels import is_multi_label
from hf_kdtl.models.pairing import PairingPlan
from hf_kdtl.models.run_context import RunContext
from hf_kdtl.models.teachers.chance import ChanceChecks
from hf_kdtl.models.teachers.source import Batch, SignalSource, called
from hf_kdtl.models.teachers.start import StartingPoint
from hf_kdtl.objectives.base import Objective
from hf_kdtl.objectives.building import build_objective, prepare_objective
from hf_kdtl.objectives.paired import PairedObjective, over_pairs
from hf_kdtl.optim.layer_rates import LayerRates
from hf_kdtl.trainer.around_student import AroundStudent
from hf_kdtl.trainer.batch import Counts, by_view, full_outputs, given, micro_batch_counts, of_student_alone
from hf_kdtl.trainer.headless import ZeroTouch, check_class_outputs, embedding_notes
from hf_kdtl.trainer.labels import LabelCheck
from hf_kdtl.trainer.own_loss import OwnLoss
from hf_kdtl.trainer.sample import Images, read_sample

Value = tuple[Tensor, list[Tensor]]
"""An objective's value, and that of each of its pairs of layers where a gradient rule reads them."""
Values = dict[str, Value]


class Distiller(AroundStudent):
    """Student and objectives in one container, whose forward computes every term of the loss; else it is the student.

    Objectives prepared apart from the student would not be zeroed, clipped, synchronised or accumulated by Trainer,
    which knows one model. Sources are referenced, not registered: they are in no state_dict and no parameter list.

    Args:
        student: the model being trained.
        objectives: key -> objective, in the order of the config.
        weights: key -> weight in the total.
        sources: name -> where its signals come from: "teacher" or those of several, and "start".
        plans: name -> what student and source give, for objectives that pair layers.
        task_loss: a user's own `compute_loss_func(outputs, labels, num_items_in_batch=)`, in place of `task`'s value.
        context: how the models are run; by default what can be read off them.
        rates: of the student's layers; while its `measuring` is set, `forward` passes it what it needs.
        split_terms: what a gradient rule reads: each of the "terms", or of their "pairs" of layers. None: the sum.

    Raises:
        ValueError: where an objective does not fit the models, or its source does not give what it needs; naming it.
    """

    view_seed = 0
    chance = ChanceChecks()  # none, until a trainer asks for them

    def __init__(
        self,
        student: nn.Module,
        objectives: dict[str, Objective],
        weights: dict[str, float],
        sources: Mapping[str, SignalSource | None] | None = None,
        plans: Mapping[str, PairingPlan | None] | None = None,
        task_loss: Callable[..., Tensor] | None = None,
        context: RunContext | None = None,
        rates: LayerRates | None = None,
        split_terms: Literal["terms", "pairs"] | None = None,
    ):
        super().__init__(student)
        self.objectives = nn.ModuleDict(objectives)
        self.weights = weights
        self.sources = {name: source for name, source in (sources or {}).items() if source is not None}
        self.plans = {name: plan for name, plan in (plans or {}).items() if plan is not None}
        self.own_loss, self.rates, self.split_terms = OwnLoss(task_loss), rates, split_terms
        self.check_labels = LabelCheck(objectives, task_loss is not None, is_multi_label(student))
        self.student_needs, self.source_needs = Needs(), dict.fromkeys(self.sources, Needs())
        self.notes: list[str] = []
        self._touch = ZeroTouch()
        context = context or RunContext.of(student, {k: v for k, v in self.sources.items() if k != "start"})
        for key, objective in objectives.items():
            try:
                self.notes += [f"{key}: {note}" for note in self._add(objective, context)]
            except ValueError as error:
                raise ValueError(f"objective {key!r}: {error}") from error
        wanted = rates.source_needs[1] if rates else Needs()
        measured = self.sources.get(rates.options.teacher_name) if rates and wanted else None
        if measured is not None and (reason := measured.unserved(wanted)):
            raise ValueError(f"layer_rates: {reason}")

    @property
    def teacher(self) -> SignalSource | None:
        """The source named "teacher"; None of several."""
        return self.sources.get("teacher")

    @property
    def start(self) -> StartingPoint | None:
        """What the student started from, where an objective compares with it."""
        found = self.sources.get("start")
        assert found is None or isinstance(found, StartingPoint)
        return found

    @torch.compiler.disable(recursive=False)
    def loss_of(
        self, inputs: dict[str, Any], draws: Draws, counts: Counts, world_size: int = 1, with_outputs: bool = False
    ) -> dict[str, Any]:
        """The micro-batch's part of the loss.

        Each term is summed over its images and divided by how many it counts in the optimizer step on all ranks, so
        that micro-batches and ranks may be added; times `world_size`, because DDP averages. A batch statistic counts
        once per image of its micro-batch.

        Returns:
            loss (scalar); `terms` {key: its part of the loss, or a list of the pairs' where these are wanted}; and
            detached, for the log: `sums` {key: sum over this micro-batch's images} and `counted` {key: their number}.
            `with_outputs`, also the student's `outputs`.

        Raises:
            ValueError: when an objective needs labels and the batch has none.
        """
        self.check_labels.present(inputs)
        student, values = self._values(inputs, draws, measuring=self.rates is not None and self.rates.measuring)
        here, sums, counted = micro_batch_counts(inputs), {}, {}
        terms: dict[str, Tensor | list[Tensor]] = {}
        loss = inputs["pixel_values"].new_zeros((), dtype=torch.float32)
        for key, (value, pairs) in values.items():
            total = self._total(key, over_pairs(value), student, inputs, counts, here)
            own = self.own_loss.gives(key)
            counting = self.own_loss.counted(inputs) if own else self.objective(key).counts
            divisor = counts[counting].clamp(min=1)
            loss = loss + self.weights[key] * (total / divisor)
            if self.split_terms:
                share = self.weights[key] / divisor * world_size
                terms[key] = [share * pair.sum() / len(pairs) for pair in pairs] if pairs else share * total
            sums[key], counted[key] = total.detach(), here[counting]
        # DDP waits for every parameter: a classifier that no term touches would leave the ranks unsynchronised.
        if student.logits is None:
            loss = self._touch(loss, self)
        elif not self.student_needs.logits:
            loss = loss + 0.0 * student.logits.sum()
        result = {"loss": loss * world_size, "terms": terms, "sums": sums, "counted": counted}
        return result | {"outputs": full_outputs(student)} if with_outputs else result

    def terms(self, inputs: dict[str, Any], draws: Draws) -> tuple[Capture, dict[str, Tensor]]:
        """The student's capture, and {key: unweighted value}: (B,) per image, or a scalar for a batch statistic.

        One forward of the student, and at most one of each source, whatever the number of objectives. Objectives that
        need labels are left out where the data has none.
        """
        student, values = self._values(inputs, draws)
        terms = {key: over_pairs(value) for key, (value, _) in values.items()}
        if "task" in terms and self.own_loss.gives("task"):
            terms["task"] = self.own_loss(student, inputs, micro_batch_counts(inputs))
        return student, terms

    def observe(self, images: Images, known: Collection[str] = ()) -> None:
        """Let the objectives that learn from training images read them, before training, but for those whose keys are
        `known`; see `read_sample`."""
        for key in self.objectives:
            if (objective := self.objective(key)).sample and key not in known:
                needs = objective.sample_needs(self.plans.get(objective.source))
                read_sample(key, objective, self.sources[objective.source], needs, images)

    @torch.compiler.disable(recursive=False)
    def _values(
        self, inputs: dict[str, Any], draws: Draws, measuring: bool = False
    ) -> tuple[Capture, dict[str, Value]]:
        """The student's capture, and of each objective its value, (B,), (B, pairs), or a scalar for a batch statistic,
        with each pair's where a gradient rule reads them."""
        pixels, further = inputs["pixel_values"], of_student_alone(inputs, self.sources)
        fraction = max(one.fraction for one in [self.student_needs, *self.source_needs.values()])
        batch = self._batch(inputs, draws, fraction)
        rates = self.rates if measuring else None
        if rates is not None:
            rates.observe_models(self.student, self.sources[rates.options.teacher_name], pixels, draws)
        # First, while no graph of the student holds memory: measured 4 % of the step faster on a CPU.
        captures = self._capture_sources(pixels, batch, {rates.options.teacher_name: rates.needs[1]} if rates else {})
        # Evaluation runs without gradients; a derivative by the pixels needs them all the same.
        with torch.enable_grad() if fraction else nullcontext():
            student = self._capture_student(pixels, further, batch, rates.needs[0] if rates else NOTHING)
            if self.check_labels.needing:
                self.check_labels(batch.get("labels"), student.logits.shape[-1])
            self.chance.add(captures, batch.get("labels"))
            if rates is not None:
                rates.observe(student, captures[rates.options.teacher_name])
            values = {
                key: self._value(key, student, captures.get(self.objective(key).source, Capture()), batch)
                for key in self.objectives
                if not self.objective(key).needs_labels or "labels" in batch or self.own_loss.gives(key)
            }
        return student, values

    def _batch(self, inputs: dict[str, Any], draws: Draws, fraction: float) -> Batch:
        """What objectives and sources may know of the images."""
        pixels = inputs["pixel_values"]
        none = pixels.new_zeros(0, dtype=torch.long)
        rows = select_images(draws, fraction, pixels).nonzero()[:, 0] if fraction else none
        names = ("labels", INDEX, VIEW, TEACHER_PIXELS)
        known: Any = given(inputs, names)
        indexed = [name for name, source in self.sources.items() if source.needs_index and INDEX not in known]
        if indexed and not all(self.sources[name].answers_without_index for name in indexed):
            raise ValueError(
                f"{called(indexed[0])} looks its signals up by {INDEX!r}, and the batch has only {sorted(inputs)}. "
                "DistillationTrainer adds it to the training data; an evaluation's has none."
            )
        known |= by_view(known, self.view_seed, self.source_needs.values())
        return Batch(draws=draws, differentiated_rows=rows, **known)

    @torch.no_grad()
    @torch.compiler.disable(recursive=False)
    def _capture_sources(self, pixels: Tensor, batch: Batch, extra: dict[str, Needs]) -> dict[str, Capture]:
        """One capture of each source that is needed. The start's weights need no forward."""
        found = {}
        for name, source in self.sources.items():
            needs = self.source_needs[name] | extra.get(name, NOTHING)
            forward = replace(needs, weights=False) if needs.weights else needs
            found[name] = source.capture(pixels, forward, batch) if forward else Capture()
            if needs.weights and self.start is not None:
                with torch.enable_grad():
                    found[name].weights = self.start.weights(self.student)
        return found

    @torch.compiler.disable(recursive=False)
    def _capture_student(self, pixels: Tensor, further: dict[str, Any], batch: Batch, extra: Needs) -> Capture:
        geometry = next((plan.student for plan in self.plans.values()), None)
        run = partial(capture, self.student, geometry=geometry)
        rows = batch["differentiated_rows"]
        return capture_subset(run, self.student, pixels, self.student_needs | extra, rows, **further)

    def _value(self, key: str, student: Capture, source: Capture, batch: Batch) -> Value:
        """An objective's value, with the layer rates' weights of pairs where mode is loss_weight."""
        objective = self.objective(key)
        factors = self._factors(objective)
        if self.own_loss.gives(key):
            return student.logits.new_zeros(len(student.logits)), []
        if self.split_terms == "pairs" and isinstance(objective, PairedObjective):
            both = zip(factors or [1.0] * len(objective.pairs), objective.entries(student, source), strict=True)
            pairs = [factor * entry for factor, entry in both]
            return torch.stack(pairs, dim=1), pairs
        value = objective(student, source, batch)
        return value * value.new_tensor(factors) if factors and value.ndim == 2 else value, []

    def _factors(self, objective: Objective) -> list[float]:
        """A weight for each pair of layers where `layer_rates` has mode loss_weight; else none."""
        weights, pairs = self.rates.loss_weights if self.rates else None, getattr(objective, "pairs", None)
        return [weights[pair.student_layer] for pair in pairs] if weights and pairs else []

    def _total(
        self, key: str, value: Tensor, student: Capture, inputs: dict[str, Any], counts: Counts, here: Counts
    ) -> Tensor:
        """The sum of a term over the micro-batch's images."""
        if not self.own_loss.gives(key):
            return value * here["images"] if self.objective(key).reduction == "batch" else value.sum()
        return self.own_loss.total(student, inputs, counts, here)

    def _add(self, objective: Objective, context: RunContext) -> list[str]:
        """Prepare and build an objective, and collect what it needs; its notes."""
        name, teachers = objective.source, [name for name in self.sources if name != "start"]
        if objective.needs_teacher and teachers and name not in teachers:
            raise ValueError(f"it takes its signals from {name!r}; expected one of {teachers}: set its 'teacher'.")
        source, plan = self.sources.get(name), self.plans.get(name)
        notes = prepare_objective(objective, context.of_source(name, source))
        build_objective(objective, plan, next(self.student.parameters()).dtype)
        student, needs = objective.needs(plan)
        check_class_outputs(objective, self.student, student)
        self.student_needs |= student
        notes += embedding_notes(name, plan, student, needs)
        if source is not None:
            needs = needs | Needs(logits=objective.compares_classes)
            wanted = needs | (objective.sample_needs(plan) if objective.sample else Needs())
            if reason := source.unserved(wanted):
                raise ValueError(reason)
            self.source_needs[name] |= needs
        return notes

    def objective(self, key: str) -> Objective:
        """The objective of a key, typed."""
        found = self.objectives[key]
        assert isinstance(found, Objective)
        return found
