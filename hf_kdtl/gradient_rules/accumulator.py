"""The two gradients of an optimizer step: accumulated over micro-batches and processes, combined, and logged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_kdtl.functional.surgery import dot, inner_products
from hf_kdtl.gradient_rules.base import GradientRule
from hf_kdtl.gradient_rules.conflicts import ConflictLog

Reduce = Callable[[Tensor], None]
"""Puts the mean over all processes into a tensor. Every process calls it for the same tensors in the same order."""


Term = Tensor | Sequence[Tensor]


class GradientAccumulator:
    """The gradient of the task and that of the transfer, kept apart until an optimizer step is due.

    `add` each micro-batch, `write` after the last one; then clip, `before_step`, the optimizer's step,
    `after_step`; `log` when it is time. Between micro-batches `p.grad` is None. Nothing here synchronises processes
    but `write`: run the forward without DDP's synchronisation (`no_sync`), in the last micro-batch too.

    Args:
        rule: what combines the two gradients.
        parameters: (name, parameter) of student and objectives. What is frozen gets no gradient, while it is.
        layers: the layer of each parameter, in their order, for the log.
        blocks: names of the parameters of each block; only a local rule reads it.
        own: names of the parameters of each objective; only a local rule reads it.

    Cost: one set of gradients beyond the one that training holds anyway, from the first `add` to `write` (to
    `after_step` while `watch` is set).

    Raises:
        ValueError: for layers that are not one a parameter, or a local rule whose blocks hold nothing that is trained.
    """

    def __init__(
        self,
        rule: GradientRule,
        parameters: Sequence[tuple[str, nn.Parameter]],
        layers: Sequence[str],
        blocks: Mapping[int, Collection[str]],
        own: Mapping[str, Collection[str]],
    ):
        self.rule, self.watch = rule, False
        self.parameters = [parameter for _, parameter in parameters]
        if len(layers) != len(parameters):
            raise ValueError(f"{len(layers)} layers of {len(parameters)} parameters; expected one each.")
        self._log = ConflictLog(layers)
        place = {name: i for i, (name, _) in enumerate(parameters)}
        self._blocks = {block: [place[n] for n in names if n in place] for block, names in blocks.items()}
        self._own = {key: [place[n] for n in names if n in place] for key, names in own.items()}
        if rule.local and not any(self._trained(places) for places in self._blocks.values()):
            raise ValueError(
                f"gradient_rule {rule.name!r}: none of the blocks' parameters is trained; expected names such as "
                f"{[name for name, _ in parameters][:2]}. Unfreeze a block, or take the rule 'never_hurt'."
            )
        self.clear()

    def clear(self) -> None:
        """Drop both gradients: of a window that was interrupted, before the next begins."""
        self._task: list[Tensor | None] = [None] * len(self.parameters)
        self._transfer: list[Tensor | None] = [None] * len(self.parameters)
        self._before: float | None = None

    # ---- Accumulating ----

    def add(self, task: Tensor | None, transfer: Mapping[str, Term], pairs: Mapping[str, Sequence[int]]) -> None:
        """The backward passes of one micro-batch. A term without a gradient adds nothing.

        Args:
            task: a scalar; None where there is none.
            transfer: key of an objective -> its term: a scalar, or one entry for each of its pairs of layers, of which
                the term is the sum.
            pairs: key -> the student's block of each entry; only a local rule reads it.

        Cost: a backward of the task and one of the transfer. A local rule: one through a single block a pair, where
        entries are a list of scalars; those of one vector send zeros through one another's blocks.

        Raises:
            ValueError: by a local rule, for a term that has not one entry a pair.
        """
        terms = {key: _entries(term) for key, term in transfer.items()}
        learned = [entry for entries in terms.values() for entry in entries if entry.requires_grad]
        if task is not None and task.requires_grad:
            # The two graphs may share the student's forward.
            self._backward(self._task, task, range(len(self.parameters)), retain_graph=bool(learned))
        if self.rule.local:
            self._add_local(terms, pairs)
        elif learned:
            self._backward(self._transfer, torch.stack(learned).sum(), range(len(self.parameters)))

    def _add_local(self, terms: Mapping[str, Sequence[Tensor]], pairs: Mapping[str, Sequence[int]]) -> None:
        for key, entries in terms.items():
            if len(entries) != len(pairs[key]):
                raise ValueError(
                    f"gradient_rule {self.rule.name!r}: the term {key!r} has {len(entries)} entries and "
                    f"{len(pairs[key])} pairs of layers; expected one entry a pair."
                )
            for entry, block in zip(entries, pairs[key], strict=True):
                if entry.requires_grad:
                    self._backward(self._transfer, entry, [*self._blocks[block], *self._own[key]], retain_graph=True)

    def _trained(self, places: Sequence[int]) -> list[int]:
        """Those of the places whose parameter is trained now: layers may be frozen and unfrozen during a run."""
        return [i for i in places if self.parameters[i].requires_grad]

    def _backward(
        self, gradient: list[Tensor | None], loss: Tensor, places: Sequence[int], retain_graph: bool = False
    ) -> None:
        """Add a gradient, for the parameters at these places: torch adds in place to `p.grad`, tensor by tensor, so
        that no second set exists."""
        if not (places := self._trained(places)):
            return
        reached = [self.parameters[i] for i in places]
        for i, parameter in zip(places, reached, strict=True):
            parameter.grad = gradient[i]
        try:
            torch.autograd.backward(loss, retain_graph=retain_graph, inputs=reached)
        finally:
            for i, parameter in zip(places, reached, strict=True):
                gradient[i], parameter.grad = parameter.grad, None

    # ---- Combining ----

    @torch.no_grad()
    def write(self, epoch: int, reduce: Reduce | None = None) -> None:
        """Put the rule's gradient into `p.grad`. `watch` must be set by now where the step shall be measured.

        Args:
            epoch: epochs that are finished.
            reduce: with several processes, their mean; every process calls `write`.

        Cost: two readings of both gradients, and with `reduce` an exchange of both.
        """
        if reduce is not None:
            self._average(reduce)
        products = inner_products(self._task, self._transfer)
        self._log.add(self.rule.conflict(products, epoch), products)
        result = self.rule.combine(self._task, self._transfer, products, epoch)
        for parameter, g, combined in zip(self.parameters, self._task, result, strict=True):
            # What is measured later must not be clipped.
            parameter.grad = combined.clone() if combined is not None and combined is g and self.watch else combined
        kept = self._task
        self.clear()
        if self.watch:
            self._task = kept

    def _average(self, reduce: Reduce) -> None:
        """The mean over processes of both gradients, where any of them has one."""
        buffers = (self._task, self._transfer)
        # Of all ranks first: a tensor that only some ranks would exchange leaves these waiting forever.
        held = torch.tensor([[g is not None for g in buffer] for buffer in buffers], dtype=torch.float32)
        held = held.to(self.parameters[0].device)
        reduce(held)
        for buffer, somewhere in zip(buffers, held.tolist(), strict=True):
            for i, parameter in enumerate(self.parameters):
                if somewhere[i] > 0:
                    g = buffer[i]
                    buffer[i] = g = torch.zeros_like(parameter) if g is None else g
                    reduce(g)

    # ---- What the optimizer's step did ----

    def before_step(self) -> None:
        """Before the optimizer's step: <g, w>, where `watch` was set when the gradient was written."""
        if any(g is not None for g in self._task):
            self._before = self._along()

    def after_step(self) -> None:
        """After it: <g, w> before less <g, w> after, which is <g, step>. Frees g.

        Cost: one reading of g and of the weights, as in `before_step`.
        """
        if self._before is not None:
            self._log.task_step = self._before - self._along()
        self.clear()

    def _along(self) -> float:
        return dot(self._task, [parameter.detach() for parameter in self.parameters])

    # ---- Log and state ----

    @property
    def history(self) -> list[dict[str, Any]]:
        """An entry for each `log`; see `ConflictLog`."""
        return self._log.history

    def log(self, step: int) -> dict[str, float]:
        """Means over the optimizer steps since the last call; see `ConflictLog.log`."""
        return self._log.log(step)

    @property
    def options(self) -> dict[str, Any]:
        """The rule's name and every option, with its defaults."""
        return {"name": self.rule.name, **vars(self.rule)}

    def state_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: options and history. A rule has no other state: what decays, decays by epochs."""
        return {"options": self.options, "history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        # Until 0.1 the figures of all layers were under another key.
        self._log.history = [{"all_layers" if k == "whole" else k: v for k, v in e.items()} for e in state["history"]]


def _entries(term: Term) -> list[Tensor]:
    return list(term.reshape(-1)) if isinstance(term, Tensor) else list(term)
