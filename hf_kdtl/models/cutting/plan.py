"""What a cut takes away and what is left, as a table, before anything is built."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.models.cutting.families import Sizes
from hf_kdtl.models.cutting.importance import MLP_OUT
from hf_kdtl.models.measure import flops, parameters


@dataclass(frozen=True)
class Cost:
    """Parameters, and floating-point operations of one image (a multiply-add counted as 2)."""

    parameters: int
    flops: int


@dataclass(frozen=True)
class CutPlan:
    """A student before it is built. `str(plan)` is a table.

    Args:
        config: of the student.
        blocks: the teacher's blocks that it keeps, from 0.
        full: the teacher's sizes.
        sizes: the student's.
        before: what the teacher costs.
        after: what the student will cost.
        neurons: of the MLP of the teacher's and of the student's blocks; the first block's where they differ.
        importance: how heads, neurons and blocks are chosen.
        latency_ms: measured of a forward of one image, where a latency was asked for: the teacher's, the student's.
    """

    config: Any
    blocks: list[int]
    full: Sizes
    sizes: Sizes
    before: Cost
    after: Cost
    neurons: tuple[int, int]
    importance: str = "uniform"
    latency_ms: tuple[float, float] | None = None

    def __str__(self) -> str:
        gone = [i for i in range(sum(self.full.depths)) if i not in self.blocks]
        which = "those of least importance" if self.importance == "first_order" else "evenly spaced ones"
        rows = [("", "teacher", "student", "share", "what goes")]
        goes = f"blocks {_ranges(gone)}" if gone else "nothing"
        rows.append(("blocks", *_pair(_number(self.full.depths), _number(self.sizes.depths)), goes))
        chosen = [("heads of a block", self.full.heads, self.sizes.heads, which)]
        chosen += [("neurons of a block", *self.neurons, which)]
        chosen += [("width", self.full.width, self.sizes.width, "evenly spaced channels")]
        for name, before, after, what in chosen:
            if before:
                rows.append((name, *_pair(before, after), "nothing" if before == after else what))
        rows.append(("parameters", *_pair(self.before.parameters, self.after.parameters), ""))
        rows.append(("FLOPs of an image", *_pair(self.before.flops, self.after.flops), ""))
        if self.latency_ms is not None:
            was, now = self.latency_ms
            rows.append(("ms of an image", f"{was:.2f}", f"{now:.2f}", f"{now / was:.0%}", "measured, random weights"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]).rstrip()
            for row in rows
        ]
        return "\n".join(lines)

    def in_words(self) -> str:
        """What is kept, in a line: "6 of 12 blocks, 2 of 3 heads, 50% of the FLOPs"."""
        mine, its = self.sizes, self.full
        pairs = [
            (sum(mine.depths), sum(its.depths), "blocks"),
            (mine.heads, its.heads, "heads"),
            (self.neurons[1], self.neurons[0], "neurons of a block"),
            (mine.width, its.width, "channels"),
        ]
        kept = [f"{left} of {of} {what}" for left, of, what in pairs if left != of]
        return ", ".join([*kept, f"{self.after.flops / self.before.flops:.0%} of the FLOPs"])


def like(model: Any, config: Any) -> Any:
    """A new model of the class of `model`; without a pooler where it has none (ViTModel inside a classifier)."""
    kind = type(model)
    pools = "add_pooling_layer" in inspect.signature(kind).parameters and getattr(model, "pooler", None) is None
    return kind(config, add_pooling_layer=False) if pools else kind(config)


def on_meta(model: Any, config: Any) -> Any:
    """A model of the class of `model` without memory, for its shapes."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return like(model, config).eval()


def cost_of(model: nn.Module, pixels: torch.Tensor) -> Cost:
    """What a model on the meta device costs."""
    return Cost(parameters(model), flops(model, pixels.to("meta")))


def neurons_of(model: nn.Module) -> int:
    """Neurons of the first block's MLP; 0 where it is none that is known."""
    _, block = find_blocks(model)[0]
    ends = [m for name, m in block.named_modules() if name.endswith(MLP_OUT) and "attention" not in name]
    return ends[0].in_features if ends and isinstance(ends[0], nn.Linear) else 0


def _pair(before: Any, after: Any) -> tuple[str, str, str]:
    was, now = (sum(x) if isinstance(x, tuple) else x for x in (before, after))
    return _text(before), _text(after), f"{now / was:.0%}"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else f"{value:,}"


def _number(depths: tuple[int, ...]) -> Any:
    return depths[0] if len(depths) == 1 else depths


def _ranges(numbers: list[int]) -> str:
    """
    >>> _ranges([0, 2, 3, 4, 9])
    '0, 2-4, 9'
    """
    runs = [list(run) for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)
