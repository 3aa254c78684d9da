"""How long training will take, from a few steps of it that leave no trace; and the steps that a time allows."""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import Subset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common.chosen import Chosen
from hf_kdtl.commands.common.defaults import EVALUATIONS, steps_a_pass
from hf_kdtl.commands.common.runs import untracked

MEASURED = 4  # steps; the first, which also allocates, is left out
WORTH_MEASURING = 100  # steps of a run
SPARE = 0.9  # of a budget: the rest is for checkpoints and the start
UNITS = {"h": 3600, "min": 60, "s": 1}


@dataclass(frozen=True)
class Pace:
    """Seconds of an optimizer step, and of an evaluation on all of validation."""

    step: float
    evaluation: float


def seconds(text: str, name: str = "time_budget") -> float:
    """A time such as "20min", "1h30min" or "90s".

    >>> seconds("1h30min"), seconds("90 s")
    (5400.0, 90.0)

    Raises:
        ValueError: for anything else, 0 too.
    """
    compact = text.replace(" ", "")
    parts = re.findall(r"(\d+(?:\.\d+)?)(h|min|s)", compact)
    total = sum(float(number) * UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != compact or not total:
        raise ValueError(f"{name} is {text!r}; expected a time such as 20min, 1h30min or 90s.")
    return total


class _Clock(TrainerCallback):
    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def pace(make: Callable[[DistillationConfig], Any], config: DistillationConfig) -> Pace:
    """Train a few steps with a trainer of its own, which is thrown away, and evaluate a batch.

    Args:
        make: a trainer with these settings and new weights. It and the run begin with `set_seed`, so that measuring
            does not change the run.
    """
    with tempfile.TemporaryDirectory() as own:
        (folder,) = broadcast_object_list([own])  # the processes check that their settings are the same
        settings = untracked(config)
        settings.output_dir, settings.max_steps = folder, MEASURED
        trainer, clock = make(settings), _Clock()
        trainer.add_callback(clock)
        for printing in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(printing)
        trainer.compute_metrics = None  # a batch may lack classes, and its accuracy is of no interest
        trainer.train()
        number = min(len(trainer.eval_dataset), config.per_device_eval_batch_size * config.world_size)
        began = time.perf_counter()
        trainer.evaluate(Subset(trainer.eval_dataset, range(number)))
        batch = time.perf_counter() - began
        found = (clock.times[-1] - clock.times[0]) / (MEASURED - 1), batch * len(trainer.eval_dataset) / number
    return Pace(*broadcast_object_list(list(found)))


def fitting_steps(budget: float, paces: list[Pace], steps_a_pass: int, evaluates: bool = True) -> int:
    """The steps of each of several runs, one for each pace, that take `budget` seconds together with evaluations.

    There is an evaluation for each pass, at most EVALUATIONS. At least one step.
    """
    step, evaluation = sum(pace.step for pace in paces), sum(pace.evaluation for pace in paces)
    for number in range(1, EVALUATIONS + 1) if evaluates else [0]:
        steps = int((SPARE * budget - number * evaluation) / step)
        if not number or min(EVALUATIONS, steps // steps_a_pass) <= number:
            break
    return max(1, steps)


def steps_within(budget: float, a_step: float, evaluations: float, least: int) -> int:
    """The steps of each of several runs that take `budget` seconds together with their evaluations.

    Args:
        a_step: seconds of one step of every run.
        evaluations: seconds of all evaluations.

    Raises:
        ValueError: where fewer than `least` fit, with the budget that would hold so many, and ten times as many.
    """
    steps = int((SPARE * budget - evaluations) / a_step)
    if steps < least:
        hold, enough = (math.ceil((evaluations + n * least * a_step) / SPARE / UNITS["min"]) for n in (1, 10))
        raise ValueError(
            f"--budget is {words(budget)}, and with {words(evaluations)} for scoring {max(0, steps)} steps of each "
            f"run fit into it; expected at least {least}. Type --budget {hold}min for so many, {enough}min for "
            f"{10 * least}."
        )
    return steps


def expected(paces: list[Pace], steps: int, evaluations: int) -> float:
    """Seconds of all runs."""
    return sum(steps * pace.step + evaluations * pace.evaluation for pace in paces)


def words(duration: float) -> str:
    """A duration for the terminal.

    >>> words(42), words(750), words(9000)
    ('42 s', '12 min', '2.5 h')
    """
    if duration < 100:
        return f"{max(1, round(duration))} s"
    return f"{duration / 60:.0f} min" if duration < 6000 else f"{duration / 3600:.1f} h"


def check_budget(time_budget: str | None, typed: Iterable[str]) -> float | None:
    """The seconds of `--time_budget`.

    Raises:
        ValueError: for what is no time, or beside --max_steps or --num_train_epochs.
    """
    if time_budget is None:
        return None
    if both := sorted({"max_steps", "num_train_epochs"} & {*typed}):
        raise ValueError(f"found time_budget and {' and '.join(both)}; the budget picks the steps, so keep one.")
    return seconds(time_budget)


def settle_steps(
    chosen: Chosen, makers: Sequence[Callable[[DistillationConfig], Any]], runs: int, budget: float | None
) -> list[str]:
    """Set the steps that a budget allows, if there is one; returns how long training will take, for the terminal.

    Args:
        makers: one for each arm, as `pace` takes it.
        runs: of each arm.
    """
    if chosen.continued or (budget is None and chosen.steps < WORTH_MEASURING):
        return []
    config = chosen.config
    paces = [pace(make, config) for make in makers]
    evaluates = config.eval_strategy != IntervalStrategy.NO
    if budget is not None:
        a_pass = steps_a_pass(chosen.case, chosen.known)
        chosen.set(fitting_steps(budget / runs, paces, a_pass, evaluates))
    evaluations = chosen.steps // config.eval_steps if evaluates and config.eval_steps else int(evaluates)
    return [f"Training will take about {words(runs * expected(paces, chosen.steps, int(evaluations)))}: "
            f"{runs * len(makers)} x {chosen.steps:,} steps, measured on {MEASURED}."]  # fmt: skip
