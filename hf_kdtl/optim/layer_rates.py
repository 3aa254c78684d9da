"""The learning rates of a run's layers: when they are measured, what of, and which param groups they go to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_kdtl.functional.discrepancy import discrepancy, distribution
from hf_kdtl.functional.random import Draws
from hf_kdtl.models.forward.capture import Capture, Needs, capture
from hf_kdtl.models.forward.modes import evaluating
from hf_kdtl.models.pairing import PairingPlan
from hf_kdtl.models.teachers.source import SignalSource
from hf_kdtl.models.teachers.teacher import Teacher
from hf_kdtl.optim.discrepancies import (
    attention_discrepancies,
    input_discrepancies,
    needs,
    parameter_energies,
    rated_pairs,
)
from hf_kdtl.optim.groups import layer_groups, named_blocks
from hf_kdtl.optim.layerwise import check_layerwise
from hf_kdtl.optim.multipliers import Rates
from hf_kdtl.optim.options import RateOptions

logger = logging.get_logger(__name__)

Gather = Callable[[Tensor], Tensor]
"""(n, ...) of this rank -> (sum of n, ...) of all ranks, where every rank gives the same shape."""


class LayerRates:
    """What a trainer holds: measures, keeps and applies the multipliers of the layers.

    A measurement is `add` for every micro-batch of an optimizer step and then one `finish`; or `measure`, which does
    both. A trainer calls `begin` before each step, while `measuring` `observe_models` before and `observe` after its
    captures, and `end` before the optimizer's step.
    The rule is in `Rates`, the settings in `RateOptions`.

    Derivatives are taken in eval mode: no dropout or stochastic depth, batch norms by their running statistics.

    Args:
        options: of the config's `layer_rates`.
        student: the model that is trained.
        plan: of student and teacher (`hf_kdtl.models.plan`); needed by every mode but "llrd" and "uniform".
        blocks: names of the student's blocks, where they cannot be found.
        seed: of the shuffle of mode "permuted", and of the directions where no `draws` are given.

    Raises:
        ValueError: for options that do not fit (as `RateOptions`), a plan that is missing, pairs that the source
            cannot compare, or a pair named by hand whose student block is frozen.
    """

    def __init__(
        self,
        options: Mapping[str, Any] | RateOptions,
        student: nn.Module,
        plan: PairingPlan | None = None,
        *,
        blocks: Sequence[str] | None = None,
        seed: int = 0,
    ):
        self.options, self.plan, self.seed = RateOptions.of(options), plan, seed
        self.blocks = blocks = self.options.blocks if blocks is None else blocks
        if self.options.measured and blocks is not None:
            raise ValueError(
                f"layer_rates: mode {self.options.mode!r} pairs the blocks that are found; blocks=[...] "
                "may name others for the modes 'llrd' and 'uniform' alone."
            )
        sizes = [0] * len(named_blocks(student, blocks))
        for group in layer_groups(student, blocks=blocks):
            if isinstance(group["layer"], int):
                sizes[group["layer"]] += sum(p.numel() for p in group["params"])
        self.pairs = rated_pairs(self.options, plan, sizes)
        self._sizes = sizes
        self.restart()

    def restart(self) -> None:
        """Every rate as at the start of a run, and no history."""
        self.rates = Rates(self.options, self._sizes, [pair.student_layer for pair in self.pairs], self.seed)
        self.history: list[dict[str, Any]] = []
        self.measuring = False
        self._step = 0
        self._rows: list[Tensor] = []

    # ---- Measuring ----

    def begin(self, step: int) -> None:
        """Before an optimizer step: set `measuring` where it is due. Step 0 begins a new run; what a step that was
        broken off had added is dropped."""
        if step == 0:
            self.restart()
        self._rows, self._step, self.measuring = [], step, self.due(step)

    def end(self, optimizer: Any, gather: Gather | None = None) -> None:
        """After the last micro-batch of a step and before the optimizer's: the new multipliers, if any are due."""
        if self.measuring:
            self.measuring = False
            self.finish(self._step, gather)
            self.apply(optimizer)

    def due(self, step: int) -> bool:
        """Whether the step that comes (optimizer steps, from 0) measures: the first, and every `every`-th."""
        if not self.options.measured or (self.options.mode == "frozen" and self.rates.measured):
            return False
        return step % self.options.interval == 0

    @property
    def needs(self) -> tuple[Needs, Needs]:
        """What `observe` reads of the captures of (student, teacher) that a training step makes; empty for sources
        that take derivatives of their own."""
        return self.source_needs if self.options.source == "attention" else (Needs(), Needs())

    @property
    def source_needs(self) -> tuple[Needs, Needs]:
        """What a measurement needs of (student, teacher), by whatever pass."""
        return needs(self.options, self.pairs)

    @torch.compiler.disable
    def observe(self, student: Capture, teacher: Capture) -> None:
        """Take in a micro-batch that was captured with `needs`. In train mode the student's capture has its dropout,
        so equal models are no longer at 0. Nothing for sources that take derivatives of their own."""
        if self.options.source == "attention":
            # Half precision would round the differences away.
            with torch.autocast(student.pixel_values.device.type, enabled=False):
                self._rows.append(attention_discrepancies(self.options, self.pairs, student, teacher).detach())

    @torch.compiler.disable  # torch.func and hooks on blocks, for which a compiled step has no graph
    def observe_models(
        self, student: nn.Module, teacher: SignalSource, pixel_values: Tensor, draws: Draws | None = None
    ) -> None:
        """Take in a micro-batch (B, C, h, w) by derivatives in eval mode; nothing for source "attention".

        Leaves every weight, gradient, buffer and mode as it was.

        Args:
            draws: the directions of source "hessian".
        """
        options, x = self.options, pixel_values.detach()
        if options.source == "attention":
            return
        assert self.plan is not None
        draws = draws or Draws(self.seed, 0, tuple(range(len(x))))
        with torch.autocast(x.device.type, enabled=False):
            geometry = self.plan.student
            if options.wrt == "inputs":
                rows = input_discrepancies(options, self.pairs, geometry, student, teacher, x, draws)
            else:
                rows = parameter_energies(options, self.pairs, geometry, student, teacher, x, draws)
        self._rows.append(rows.detach())

    def add(
        self, student: nn.Module, teacher: nn.Module | SignalSource, pixel_values: Tensor, draws: Draws | None = None
    ) -> None:
        """Take in a micro-batch (B, C, h, w) of the student's pixels, by passes of both models in eval mode.

        Args:
            teacher: a `Teacher` or another source of signals, or a model.
            draws: the directions of source "hessian".
        """
        source = Teacher(teacher) if isinstance(teacher, nn.Module) else teacher
        if self.options.source == "attention":
            assert self.plan is not None
            x, (mine, its) = pixel_values.detach(), self.needs
            with torch.autocast(x.device.type, enabled=False), torch.no_grad(), evaluating(student):
                captures = capture(student, x, mine, self.plan.student), source.capture(x, its)
            self.observe(*captures)
        else:
            self.observe_models(student, source, pixel_values, draws)

    def finish(self, step: int, gather: Gather | None = None) -> list[float]:
        """Make discrepancies of what was added on all ranks, move the multipliers, and return them by block.

        Every rank must call it; all get the same numbers.

        Raises:
            RuntimeError: when nothing was added.
        """
        if not self._rows:
            raise RuntimeError("layer_rates: finish without a measurement; call add for each micro-batch first.")
        rows = _all_ranks(torch.cat(self._rows), gather)
        self._rows = []
        if rows.ndim == 3:
            # A distribution over all images of the window, so only now.
            p, q = distribution(rows[..., 0].T), distribution(rows[..., 1].T)
            found = discrepancy(p, q).tolist()
        else:
            found = rows.mean(0).tolist()
        self.rates.update(found)
        by_layer = {
            str(pair.student_layer): _short(d) if math.isfinite(d) else None
            for pair, d in zip(self.pairs, found, strict=True)
        }
        multipliers = [_short(m) for m in self.rates.multipliers]
        self.history.append({"step": step, "discrepancies": by_layer, "multipliers": multipliers})
        return self.rates.multipliers

    def measure(
        self,
        student: nn.Module,
        teacher: Any,
        batches: Iterable[Tensor],
        step: int = 0,
        gather: Gather | None = None,
    ) -> list[float]:
        """`add` every batch of pixels, then `finish`."""
        first = 0
        for pixel_values in batches:
            positions = tuple(range(first, first + len(pixel_values)))
            self.add(student, teacher, pixel_values, Draws(self.seed, step, positions))
            first += len(pixel_values)
        return self.finish(step, gather)

    # ---- Using ----

    def apply(self, optimizer: Any) -> None:
        """Write the multipliers into an optimizer's param groups.

        Raises:
            ValueError: for an optimizer that would not obey them, with the call that makes one that does.
        """
        check_layerwise(optimizer)
        for group in optimizer.param_groups:
            if "layer" in group:
                group["lr_multiplier"] = self.rates.of_layer(group["layer"])

    @property
    def loss_weights(self) -> list[float] | None:
        """Weight of a pair's loss, by student block, of mode "loss_weight"; otherwise None."""
        return self.rates.loss_weights

    def log(self) -> dict[str, float]:
        """For Trainer's log: the multiplier of every block, and the discrepancies last measured."""
        name = "loss_weight" if self.options.mode == "loss_weight" else "lr_multiplier"
        logs = {f"{name}/{i}": _short(m) for i, m in enumerate(self.rates.multipliers)}
        last = self.history[-1]["discrepancies"] if self.history else {}
        logs |= {f"lr_discrepancy/{layer}": d for layer, d in last.items() if d is not None}
        if self.rates.skipped:
            logs["lr_discrepancies_skipped"] = self.rates.skipped
        return logs

    def table(self, student: nn.Module) -> str:
        """Layer by layer: how much is trained, the multiplier now, and the teacher's block it is compared with."""
        sizes: dict[str, int] = {}
        multipliers: dict[str, float] = {}
        for group in layer_groups(student, blocks=self.blocks):
            name = group["name"].removesuffix(" (no decay)")
            sizes[name] = sizes.get(name, 0) + sum(p.numel() for p in group["params"])
            multipliers[name] = self.rates.of_layer(group["layer"])
        compared = {f"block {pair.student_layer}": f"teacher block {pair.teacher_layer}" for pair in self.pairs}
        rows = [("layer", "parameters", "rate x", "compared with")]
        rows += [(name, f"{n:,}", f"{multipliers[name]:.3f}", compared.get(name, "-")) for name, n in sizes.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c.rjust(widths[2])}  {d}" for a, b, c, d in rows
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: the settings, the rule's state and the history."""
        return {"options": asdict(self.options), "rates": self.rates.state_dict(), "history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. Raises ValueError when it is of other layers or another mode."""
        before, now = state["options"], asdict(self.options)
        for key in ("mode", "decay"):  # what the multipliers that are resumed were made by
            if before[key] != now[key]:
                raise ValueError(
                    f"layer_rates: the state is of {key} {before[key]!r} and this run has {now[key]!r}. Resume with "
                    f"the same {key}, or start a new run."
                )
        if changed := [key for key in now if before.get(key) != now[key]]:
            logger.warning(
                f"layer_rates used { ({key: before.get(key) for key in changed}) }; they go on with "
                f"{ ({key: now[key] for key in changed}) }."
            )
        self.rates.load_state_dict(state["rates"])
        self.history = list(state["history"])


def _short(number: float) -> float:
    return float(f"{number:.6g}")


def _all_ranks(rows: Tensor, gather: Gather | None) -> Tensor:
    """The rows of all ranks; ranks may have different numbers of images, and gather wants one shape."""
    if gather is None:
        return rows
    counts = gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = gather(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
