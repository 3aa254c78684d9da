"""The one module that is trained: the student and the objectives, so that DDP, clipping and the optimizer see both."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_kdtl.functional.divergences import labelled
from hf_kdtl.functional.random import Draws, select_images
from hf_kdtl.models.forward.capture import Capture, Needs, capture
from hf_kdtl.models.forward.partial_batch import capture_subset
from hf_kdtl.models.pairing import PairingPlan
from hf_kdtl.models.run_context import RunContext
from hf_kdtl.models.teachers.chance import ChanceCheck
from hf_kdtl.models.teachers.start import StartingPoint
from hf_kdtl.models.teachers.teacher import Teacher
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.objectives.base import Batch, Objective
from hf_kdtl.objectives.paired import PairedObjective
from hf_kdtl.optim.layer_rates import LayerRates
from hf_kdtl.trainer.labels import LabelCheck

Counts = dict[str, Tensor]
"""{"images": n, "labelled": m}: what a window of micro-batches holds, over all ranks. Tensors, so that a GPU need not
wait for the CPU to read them."""


class Distiller(nn.Module):
    """Student and objectives in one container, whose forward computes every term of the loss.

    Objectives prepared apart from the student would not be zeroed, clipped, synchronised or accumulated by Trainer,
    which knows one model. The teacher is referenced, not registered: it is in no state_dict and no parameter list.

    Args:
        student: the model being trained.
        objectives: key -> objective, in the order of the config.
        weights: key -> weight in the total.
        teacher: where teacher signals come from; None when no objective needs one.
        plan: what student and teacher give, for objectives that pair layers.
        task_loss: a user's own `compute_loss_func(outputs, labels, num_items_in_batch=)`, in place of `task`'s value.
        context: how the models are run, where it is known; by default what can be seen of them.
        rates: of the student's layers; measured in `forward` while its `measuring` is set.
        start: what the student started from; None when no objective compares with it.
        start_plan: what student and start give.
        split_terms: what a gradient rule reads: each of the "terms", or of their "pairs" of layers. None: the sum.
    """

    chance = ChanceCheck(images=0)  # none, until a trainer asks for it

    def __init__(
        self,
        student: nn.Module,
        objectives: dict[str, Objective],
        weights: dict[str, float],
        teacher: Teacher | None = None,
        plan: PairingPlan | None = None,
        task_loss: Callable[..., Tensor] | None = None,
        context: RunContext | None = None,
        rates: LayerRates | None = None,
        start: StartingPoint | None = None,
        start_plan: PairingPlan | None = None,
        split_terms: Literal["terms", "pairs"] | None = None,
    ):
        super().__init__()
        self.student = student
        self.objectives = nn.ModuleDict(objectives)
        self.weights = weights
        self.teacher = teacher
        self.plan = plan
        self.task_loss, self.check_labels = task_loss, LabelCheck(objectives, own_loss=task_loss is not None)
        self.rates = rates
        self.start, self.split_terms = start, split_terms
        self.plans = {"teacher": plan, "start": start_plan}
        self.student_needs, self.teacher_needs, self.start_needs = Needs(), Needs(), Needs()
        self.notes: list[str] = []
        context = context or RunContext.of(student, teacher)
        for key, objective in objectives.items():
            try:
                self.notes += [f"{key}: {note}" for note in objective.prepare(context)]
            except ValueError as error:
                raise ValueError(f"objective {key!r}: {error}") from error
            own = self.plans[objective.source]
            _build(key, objective, own)
            needs = objective.needs(own)
            self.student_needs = self.student_needs | needs[0]
            if objective.source == "start":
                self.start_needs = self.start_needs | needs[1]
            else:
                self.teacher_needs = self.teacher_needs | needs[1]

    # Each model is compiled as a graph of its own under torch_compile; what happens around them is bookkeeping.
    @torch.compiler.disable(recursive=False)
    def forward(self, inputs: dict[str, Any], draws: Draws, counts: Counts, world_size: int = 1) -> dict[str, Any]:
        """The micro-batch's part of the loss.

        Each term is summed over its images and divided by how many it counts in the whole window on all ranks, so
        that micro-batches and ranks may be added; times `world_size`, because DDP averages. A batch statistic counts
        once per image of its micro-batch.

        Returns:
            loss (scalar); `terms` {key: its part of the loss, or a list of the pairs' where these are wanted}; and
            detached, for the log: `sums` {key: sum over this micro-batch's images} and `counted` {key: their number}.

        Raises:
            ValueError: when an objective needs labels and the batch has none.
        """
        self.check_labels.present(inputs)
        measured = self.rates if self.rates and self.rates.measuring else None
        student, values, entries = self._values(inputs, draws, measured)
        here = micro_batch_counts(inputs)
        terms: dict[str, Tensor | list[Tensor]] = {}
        sums: dict[str, Tensor] = {}
        counted: dict[str, Tensor] = {}
        loss = student.logits.new_zeros((), dtype=torch.float32)
        for key, value in values.items():
            objective = self.objective(key)
            value = _over_pairs(value)
            if key == "task" and self.task_loss is not None:
                if student.outputs is None:
                    raise ValueError(
                        "compute_loss_func wants the model's outputs, and those of a part of the batch cannot be "
                        "joined to the rest: the model gives no ModelOutput. Use fraction=1."
                    )
                # Its contract: already divided by the items of the window.
                items = counts["labelled"].clamp(min=1)
                total = self.task_loss(student.outputs, inputs["labels"], num_items_in_batch=items) * items
            else:
                total = value * here["images"] if objective.reduction == "batch" else value.sum()
            share = self.weights[key] / counts[objective.counts].clamp(min=1)
            loss = loss + self.weights[key] * (total / counts[objective.counts].clamp(min=1))
            if key in entries:
                terms[key] = [share * world_size * entry.sum() / len(entries[key]) for entry in entries[key]]
            elif self.split_terms:
                terms[key] = share * world_size * total
            sums[key], counted[key] = total.detach(), here[objective.counts]
        if not self.student_needs.logits:
            # DDP waits for every parameter: a classifier that no term touches would leave the ranks unsynchronised.
            loss = loss + 0.0 * student.logits.sum()
        return {"loss": loss * world_size, "terms": terms, "sums": sums, "counted": counted}

    def terms(self, inputs: dict[str, Any], draws: Draws) -> tuple[Capture, dict[str, Tensor]]:
        """The student's capture, and {key: unweighted value}: (B,) per image, or a scalar for a batch statistic.

        One forward of the student, and at most one of the teacher and of the start, whatever the number of
        objectives. Objectives that need labels are left out where the data has none.
        """
        student, values, _ = self._values(inputs, draws)
        return student, {key: _over_pairs(value) for key, value in values.items()}

    def measure(self, inputs: dict[str, Any]) -> None:
        """Show the objectives that learn from a sample of the training images what their source makes of it."""
        for key in self.objectives:
            objective = self.objective(key)
            if not objective.sample:
                continue
            source = self.start if objective.source == "start" else self.teacher
            assert source is not None
            pixels, labels = (inputs.get(name) for name in ("pixel_values", "labels"))
            assert pixels is not None
            needs = objective.needs(self.plans[objective.source])[1] | Needs(pooled=True, input_gradient=True)
            with torch.enable_grad():
                seen = source(pixels[: objective.sample], needs)
                objective.observe(seen, labels if labels is None else labels[: objective.sample])

    @torch.compiler.disable(recursive=False)
    def _values(
        self, inputs: dict[str, Any], draws: Draws, measured: LayerRates | None = None
    ) -> tuple[Capture, dict[str, Tensor], dict[str, list[Tensor]]]:
        """The student's capture; {key: value}, (B,), (B, pairs), or a scalar for a batch statistic; and where pairs
        are wanted apart {key: each pair's value}.

        Args:
            measured: rates that take this batch in, from the same two forwards where they can.
        """
        labels = inputs.get("labels")
        rest = {k: v for k, v in inputs.items() if k not in ("labels", "pixel_values")}
        known = self.plan or self.plans["start"]
        geometry = known.student if known is not None else None
        pixels = inputs["pixel_values"]
        fraction = max(self.student_needs.fraction, self.teacher_needs.fraction)
        none = pixels.new_zeros(0, dtype=torch.long)
        rows = select_images(draws, fraction, pixels).nonzero()[:, 0] if fraction else none
        extra = measured.needs if measured else (Needs(), Needs())
        student_needs, teacher_needs = self.student_needs | extra[0], self.teacher_needs | extra[1]
        if measured and not any(extra):
            measured.add(self.student, self.teacher, pixels, draws)
        teacher = None
        if self.teacher is not None and teacher_needs:
            # First, while no graph of the student holds memory: measured 4 % of the step faster on a CPU.
            with torch.no_grad():
                run = partial(self.teacher, geometry=self.plan.teacher if self.plan else None)
                teacher = capture_subset(run, self.teacher.model, pixels, teacher_needs, rows)
        start = self._start(pixels)
        batch: Batch = {"draws": draws}
        if labels is not None:
            batch["labels"] = labels
        values, entries = {}, {}
        # Evaluation runs without gradients; a derivative by the pixels needs them all the same.
        with torch.enable_grad() if fraction else nullcontext():
            run = partial(capture, self.student, geometry=geometry)
            student = capture_subset(run, self.student, pixels, student_needs, rows, **rest)
            if self.check_labels.needing:
                self.check_labels(labels, student.logits.shape[-1])
            self.chance.add(teacher, labels)
            sources = {"teacher": teacher or Capture(logits=student.logits), "start": start}
            if measured and any(extra):
                measured.add(self.student, self.teacher, pixels, draws, (student, sources["teacher"]))
            for key in self.objectives:
                objective = self.objective(key)
                if labels is None and objective.needs_labels:
                    continue
                source = sources[objective.source]
                factors = self._factors(objective)
                if self.split_terms == "pairs" and isinstance(objective, PairedObjective):
                    both = zip(
                        factors or [1.0] * len(objective.pairs), objective.entries(student, source), strict=True
                    )
                    entries[key] = [factor * entry for factor, entry in both]
                    values[key] = torch.stack(entries[key], dim=1)
                    continue
                value = objective(student, source, batch)
                values[key] = value * value.new_tensor(factors) if factors and value.ndim == 2 else value
        return student, values, entries

    @torch.no_grad()
    def _start(self, pixels: Tensor) -> Capture:
        """What the start gives, and the student's weights beside its own; no forward for these alone."""
        needs = replace(self.start_needs, weights=False)
        plan = self.plans["start"]
        if self.start is not None and needs:
            start = self.start(pixels, needs, plan.teacher if plan else None)
        else:
            start = Capture(logits=pixels.new_zeros(0))
        if self.start is not None and self.start_needs.weights:
            with torch.enable_grad():
                start.weights = self.start.weights(self.student)
        return start

    def _factors(self, objective: Objective) -> list[float]:
        """A weight for each pair of layers where `layer_rates` has mode loss_weight; else none."""
        weights, pairs = self.rates.loss_weights if self.rates else None, getattr(objective, "pairs", None)
        return [weights[pair.student_layer] for pair in pairs] if weights and pairs else []

    def objective(self, key: str) -> Objective:
        """The objective of a key, typed."""
        found = self.objectives[key]
        assert isinstance(found, Objective)
        return found


def _over_pairs(value: Tensor) -> Tensor:
    """The mean over pairs of layers, where there are any."""
    return value.mean(1) if value.ndim == 2 else value


def _build(key: str, objective: Objective, plan: PairingPlan | None) -> None:
    """Give an objective its widths; where this pair of models cannot serve it, say what can.

    Raises:
        ValueError: with the objectives that work for this pair.
    """
    try:
        objective.build(plan)
    except ValueError as error:
        alike = {n: kind for n, kind in OBJECTIVES.items() if pairs_layers(kind) and kind.source == objective.source}
        serving = [name for name, kind in alike.items() if _serves(kind, plan)]
        others = ", ".join(serving) or "none that pairs layers"
        raise ValueError(f"objective {key!r}: {error} For this pair these work: {others}.") from error


def pairs_layers(kind: type[Objective]) -> bool:
    """Whether an objective has a choice of `layers`; others need a plan for its widths alone."""
    return "layers" in inspect.signature(kind).parameters


def _serves(kind: type[Objective], plan: PairingPlan | None) -> bool:
    try:
        kind().build(plan)
    except ValueError:
        return False
    return True


def micro_batch_counts(inputs: dict[str, Any]) -> Counts:
    """How many images a micro-batch holds, and how many of them have a label.

    Not `labels != -100` alone, as transformers counts: soft labels (B, K) would count K times, and an objective
    without labels counts images.
    """
    pixels, labels = inputs["pixel_values"], inputs.get("labels")
    images = torch.tensor(pixels.shape[0], device=pixels.device)
    return {"images": images, "labelled": torch.zeros_like(images) if labels is None else labelled(labels).sum()}
