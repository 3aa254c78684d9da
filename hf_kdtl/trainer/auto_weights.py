"""The weights that are "auto": measured on the first optimizer steps' images before training, and kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hf_kdtl.functional.derivatives import math_attention
from hf_kdtl.functional.random import Draws
from hf_kdtl.optim.auto_weights import MeanGradient, auto_weights, record
from hf_kdtl.trainer.data_errors import explain_data_errors
from hf_kdtl.trainer.distiller import Counts, Distiller
from hf_kdtl.trainer.learning import untouched
from hf_kdtl.utils.versions import CHECKPOINTING

logger = logging.get_logger(__name__)

STEPS = 16
FITTING = 50  # steps of what starts random in the objectives
RATE = 0.02  # of its first step, as a share of 1 for the root mean square of each tensor's change
Parameters = Mapping[str, Sequence[nn.Parameter]]


@dataclass(frozen=True)
class Window:
    """An optimizer step's images: its number, its micro-batches on this process, what they count on all processes, and
    how much of a pass over the data it ends."""

    step: int
    batches: list[dict[str, Any]]
    counts: Counts
    share: float


class AutoWeights:
    """What a trainer holds of its measured weights; a part of its checkpoints.

    Args:
        trainer: whose distiller they go to; it is built late.

    Attributes:
        found: {"reference", "steps", "ratios", "terms": {key: {"norm", "standard_error", "weight"}}}; None before
            anything was measured.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.found: dict[str, Any] | None = None

    @property
    def weights(self) -> dict[str, float]:
        """{key: weight} of the terms whose weight is auto."""
        terms = self.found["terms"] if self.found else {}
        return {key: terms[key]["weight"] for key in (self.found or {}).get("ratios", ())}

    def settle(self, resumed: bool) -> None:
        """Before the first step: measure what is auto, unless a resumed checkpoint holds it, and put it in use.

        Leaves the model, its statistics, the random streams and the order of the data as they were.

        Cost: a forward of 16 optimizer steps, at most one pass over the data, and a backward for each term and batch;
        50 forwards before, where an objective has parameters of its own.

        Raises:
            ValueError: for a term that is at its minimum (`hf_kdtl.optim.auto_weights.auto_weights`), and for data
                that can be read only once.
        """
        ratios = self.trainer.args.auto_ratios()
        if not resumed or (self.found or {}).get("ratios") != ratios:
            self.found = self._measured(ratios) if ratios else None
            if self.found and self.trainer.is_world_process_zero():
                logger.warning(self.sentence())
        self.trainer.distiller.weights.update(self.weights)

    def sentence(self) -> str:
        """What was measured, for the terminal."""
        assert self.found is not None
        shown = ", ".join(f"{key} {weight:.4g}" for key, weight in self.weights.items())
        return (
            f"weights measured before training: {shown}. Each makes the term's gradient as large as that of "
            f"{self.found['reference']!r}, times its ratio; the mean over the first {self.found['steps']} optimizer "
            f"steps.{self._stronger()}"
        )

    def _stronger(self) -> str:
        """A sentence where another term with a number pulls more strongly than the reference, at least twice."""
        assert self.found is not None
        reference, ratios = self.found["reference"], self.found["ratios"]
        pull = {key: one["weight"] * one["norm"] for key, one in self.found["terms"].items() if key not in ratios}
        strongest = max(pull, key=lambda key: pull[key])
        if pull[strongest] < 2 * pull[reference]:
            return ""
        times = pull[strongest] / pull[reference]
        return (
            f" {strongest!r} pulls {times:.2g} times as strongly as {reference!r}: to measure against it, put it "
            "first among the objectives."
        )

    def state_dict(self) -> dict[str, Any] | None:
        return self.found

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self.found = state

    def _measured(self, ratios: dict[str, float]) -> dict[str, Any]:
        config, distiller, data = self.trainer.args, self.trainer.distiller, self.trainer.train_dataset
        if isinstance(data, IterableDataset) and iter(data) is iter(data):
            raise ValueError(
                "weights that are auto are measured on images that training reads again, and train_dataset can be "
                "read once. Give numbers, or a dataset whose __iter__ begins again."
            )
        given = {key: weight for key, weight in config.weights().items() if key not in ratios and weight > 0}
        reference = next(iter(given))
        gradients = mean_gradients(self.trainer, distiller, [*given, *ratios])
        weights = auto_weights(gradients, ratios, reference, given[reference])
        terms = record(gradients, given | weights)
        return {"reference": reference, "steps": gradients[reference].steps, "ratios": ratios, "terms": terms}


def mean_gradients(trainer: Any, distiller: Distiller, keys: list[str]) -> dict[str, MeanGradient]:
    """The mean gradient of each unweighted term over the first optimizer steps, in train mode.

    Each is divided by what it counts in the step on all processes, as in training, so that the split of a step into
    micro-batches and processes changes nothing. What starts random in these objectives is fitted before, and put back:
    the gradient through a random projector is several times as large as through one that is trained.
    """
    means = {key: MeanGradient() for key in keys}
    trained = [p for p in distiller.student.parameters() if p.requires_grad]
    parameters = {key: trained for key in keys}
    projectors = {key: [p for p in distiller.objectives[key].parameters() if p.requires_grad] for key in keys}
    before = distiller.weights, distiller.split_terms, trainer._counted
    recomputed = getattr(trainer.model, f"is_{CHECKPOINTING}", False)
    twice = recomputed and distiller.student_needs.order >= 2
    # A compiled graph gives its buffers away in its first backward pass.
    with untouched(distiller), functorch.patch(donated_buffer=False), math_attention() if twice else nullcontext():
        distiller.weights, distiller.split_terms = dict.fromkeys(before[0], 1.0), "terms"
        distiller.train()
        try:
            with _fitted(trainer, distiller, {key: found for key, found in projectors.items() if found}):
                for window in _windows(trainer):
                    for key, gradient in _of_window(trainer, distiller, window, parameters).items():
                        means[key].add(gradient)
                        means[key].share = window.share
        finally:
            distiller.weights, distiller.split_terms, trainer._counted = before
    return means


@contextmanager
def _fitted(trainer: Any, distiller: Distiller, projectors: Parameters) -> Iterator[None]:
    """Within it the objectives' own parameters are fitted alone for 50 steps; afterwards they are as before."""
    every = [p for parameters in projectors.values() for p in parameters]
    before = [p.detach().clone() for p in every]
    try:
        if every:
            _fit(trainer, distiller, projectors, torch.optim.SGD(every, RATE, momentum=0.9, dampening=0.9))
        yield
    finally:
        with torch.no_grad():
            for p, start in zip(every, before, strict=True):
                p.copy_(start)


def _fit(trainer: Any, distiller: Distiller, projectors: Parameters, optimizer: torch.optim.Optimizer) -> None:
    """Steps of momentum on gradients that are scaled tensor by tensor, not coordinate by coordinate as Adam's: there
    the sign of a gradient that is 0 but for rounding would depend on how a step is split."""
    done = 0
    while done < FITTING:
        for window in _windows(trainer, FITTING - done):
            for key, gradient in _of_window(trainer, distiller, window, projectors).items():
                parts = gradient.split([p.numel() for p in projectors[key]])
                for p, part in zip(projectors[key], parts, strict=True):
                    p.grad = (part / part.square().mean().sqrt().clamp(min=1e-30)).view_as(p).to(p.dtype)
            optimizer.param_groups[0]["lr"] = RATE * (1 - done / FITTING)
            optimizer.step()
            done += 1


def _windows(trainer: Any, most: int = STEPS) -> Iterator[Window]:
    """The first optimizer steps, at most 16, from a loader of its own."""
    loader, steps = trainer.get_train_dataloader(), trainer.args.gradient_accumulation_steps
    in_a_pass = math.ceil(len(loader) / steps) if has_length(loader) else math.inf
    with explain_data_errors(trainer):
        batches = iter(loader)
        try:
            for step in range(min(most, STEPS)):
                window = list(islice(batches, steps))
                if not window:
                    return
                trainer._get_num_items_in_batch(window, trainer.args.device)
                yield Window(step, window, trainer._counted[1], min(1.0, (step + 1) / in_a_pass))
        finally:
            if hasattr(loader, "end"):
                loader.end()  # accelerate would take it for the loader that training reads
            held = trainer.accelerator._dataloaders
            held[:] = [other for other in held if other is not loader]


def _of_window(trainer: Any, distiller: Distiller, window: Window, parameters: Parameters) -> dict[str, Tensor]:
    """{key: the gradient (n,) of its term by its parameters} in one optimizer step, on all processes."""
    sums: dict[str, Tensor] = {}
    for micro_step, batch in enumerate(window.batches):
        inputs = trainer._prepare_inputs(batch)
        first = micro_step * trainer.accelerator.num_processes + trainer.accelerator.process_index
        first *= trainer._train_batch_size
        draws = Draws(trainer.args.seed, window.step, tuple(range(first, first + len(inputs["pixel_values"]))))
        with _precision(trainer):
            terms = distiller(inputs, draws, window.counts)["terms"]
        left = list(parameters)
        while left:
            key = left.pop(0)
            gradient = _gradient(terms.get(key), parameters[key], keep=bool(left))
            sums[key] = gradient if key not in sums else sums[key] + gradient
    if dist.is_initialized() and dist.get_world_size() > 1:
        for gradient in sums.values():
            dist.all_reduce(gradient)
    return sums


def _gradient(term: Tensor | None, parameters: Sequence[Tensor], keep: bool) -> Tensor:
    """One backward pass; 0 for a batch without labels where the term needs them, and where nothing leads."""
    if term is None or not term.requires_grad:
        return torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    found = torch.autograd.grad(term, parameters, retain_graph=keep, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs]).float()


def _precision(trainer: Any) -> Any:
    """As training computes; with fp16, whose gradients underflow without a scaled loss, in float32."""
    return nullcontext() if trainer.accelerator.scaler is not None else trainer.compute_loss_context_manager()
