"""The settings of `layer_rates`: their values, and which are read together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from hf_kdtl.models.pairing import Layers
from hf_kdtl.utils.options import check_known, check_option, is_integer, is_number

MODES = ("discrepancy", "llrd", "uniform", "permuted", "frozen", "loss_weight")
SOURCES = ("attention", "jacobian", "hessian")
# Optimizer steps between measurements: what keeps the cost under 3 % (attention) and 5 % of training. At 100 steps,
# the first design, jacobian by parameters costs 1.06 (benchmarks/RESULTS.md).
EVERY = {"attention": 20, "jacobian": 150, "hessian": 200}
EPS = 1e-6 * math.log(2)
_MEASURED = ("source", "layers", "eps", "r_min", "r_max", "teacher")


@dataclass(frozen=True)
class RateOptions:
    """The settings of `layer_rates`, checked.

    Args:
        mode: "discrepancy"; "llrd" (a decay per layer, ELECTRA and BEiT); "uniform"; and for studies the controls
            "permuted" (the ratios shuffled over the blocks), "frozen" (measured once, at the first step),
            "loss_weight" (the multiplier weighs the pair's loss, and every rate stays 1).
        source: what is compared: "attention", "jacobian" or "hessian".
        map: of attention: "energy" (mean_d h^2 of each patch) or "class" (the class token's attention).
        wrt: of jacobian and hessian: derivatives by the block's "parameters" or by the "inputs" (pixels).
        layers: which blocks are paired: uniform | last | [[student, teacher], ...]. Two pairs at least.
        every: optimizer steps between measurements; 20 for attention, 150 for jacobian, 200 for hessian.
        momentum: of the ratio, in [0, 1).
        eps: added to each discrepancy, in nats.
        r_min, r_max: bounds of a multiplier, 0 < r_min < 1 < r_max.
        probes: directions of hessian that are averaged.
        decay: of llrd, in (0, 1]: from one block to the one before.
        normalize: of llrd: scale the multipliers to a mean of 1, as those of the other modes. False is BEiT's own
            schedule, for which decays are published: 1 for head and final norm, decay^(L - l) for block l of L (from
            0), decay^(L + 1) for the embeddings.
        blocks: of llrd and uniform: names of the student's blocks in order, where they cannot be found.
        teacher: of several teachers, by its name: the one that the student is compared with.
    """

    mode: str = "discrepancy"
    source: str = "attention"
    wrt: str = "parameters"
    map: str = "energy"
    layers: Layers = "uniform"
    every: int | None = None
    momentum: float = 0.9
    eps: float = EPS
    r_min: float = 0.25
    r_max: float = 4.0
    probes: int = 1
    decay: float = 0.75
    normalize: bool = True
    blocks: Sequence[str] | None = None
    teacher: str | None = None

    def __post_init__(self) -> None:
        self._check()

    @classmethod
    def of(cls, options: Any) -> RateOptions:
        """The options of a config's mapping; None is mode "uniform", and options are returned as they are.

        Raises:
            ValueError: for an unknown key or value (with the closest match), one out of its range, or one that the
                mode and source do not read.
        """
        if isinstance(options, RateOptions):
            return options
        if not isinstance(options, Mapping | None):
            raise ValueError(
                f"layer_rates is {options!r}; expected a mapping such as "
                '{"mode": "discrepancy", "source": "attention"}, or nothing.'
            )
        given = dict({"mode": "uniform"} if options is None else options)
        for key in given:
            check_known("key of layer_rates", key, [f.name for f in fields(cls)])
        made = cls(**given)
        if unread := [key for key in given if key not in ("mode", *made._reads())]:
            raise ValueError(
                f"layer_rates: {unread[0]} has no effect with mode {made.mode!r}"
                f"{f' and source {made.source!r}' if made.measured else ''}; leave it out."
            )
        return made

    @property
    def measured(self) -> bool:
        """Whether the discrepancy between student and teacher is measured."""
        return self.mode not in ("llrd", "uniform")

    @property
    def teacher_name(self) -> str:
        """The name of the source that the student is compared with."""
        return self.teacher or "teacher"

    @property
    def interval(self) -> int:
        """Optimizer steps between measurements."""
        return EVERY[self.source] if self.every is None else self.every

    def _reads(self) -> tuple[str, ...]:
        if not self.measured:
            return ("decay", "normalize", "blocks") if self.mode == "llrd" else ("blocks",)
        of_mode = () if self.mode == "frozen" else ("every", "momentum")
        of_source = {"attention": ("map",), "jacobian": ("wrt",), "hessian": ("wrt", "probes")}[self.source]
        return (*_MEASURED, *of_mode, *of_source)

    def _check(self) -> None:
        check_known("mode of layer_rates", self.mode, MODES)
        check_known("source of layer_rates", self.source, SOURCES)
        check_known("wrt of layer_rates", self.wrt, ("parameters", "inputs"))
        check_known("map of layer_rates", self.map, ("energy", "class"))
        bounds = [self.r_min, self.r_max]
        inside = is_number(self.r_min) and is_number(self.r_max) and 0 < self.r_min < 1 < self.r_max
        momentum = is_number(self.momentum) and 0 <= self.momentum < 1
        decay = is_number(self.decay) and 0 < self.decay <= 1
        for option, value, valid, expected in (
            ("every", self.every, self.every is None or is_integer(self.every), "a whole number of at least 1"),
            ("probes", self.probes, is_integer(self.probes), "a whole number of at least 1"),
            ("momentum", self.momentum, momentum, "a number in [0, 1)"),
            ("eps", self.eps, is_number(self.eps) and self.eps > 0, "a number above 0, in nats"),
            ("decay", self.decay, decay, "a number in (0, 1]"),
            ("teacher", self.teacher, self.teacher is None or isinstance(self.teacher, str), "a teacher's name"),
            ("normalize", self.normalize, isinstance(self.normalize, bool), "true or false"),
            ("[r_min, r_max]", bounds, inside, "0 < r_min < 1 < r_max, such as 0.25 and 4, for a mean of 1"),
        ):
            check_option("layer_rates", option, value, valid, expected)
