"""A study: arms compared on equal terms, as a resumable list of runs.

Each run is one JSON line. The list is in complete seeds: first each arm's weights are tried with the first seed and
the best on the validation split is taken, then every arm is run with the next seed, and so on; a study that stopped
goes on where it was, and the same command with more seeds or arms enlarges it. The test split is read once a run and
never chosen by.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers.utils import logging

from hf_kdtl.evaluation.statistics import paired_difference


def parse_quietly(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a study; its runs use one thread, so that they are repeatable, and print no progress."""
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return options


@dataclass(frozen=True)
class Arm:
    """One method. `objectives(weight)` is its list; `weights` are those tried on validation."""

    name: str
    objectives: Callable[[float], list[dict[str, Any]]]
    weights: tuple[float, ...] = (1.0,)


class Study:
    """Runs of arms x seeds, kept in a file.

    Args:
        file: where the JSON lines are.
        run: (objectives, seed) -> {"validation": accuracy, "test": accuracy, ...}.
        setting: what every run has in common; a file made under another one is refused.
    """

    def __init__(
        self, file: Path, run: Callable[[list[dict[str, Any]], int], dict[str, Any]], setting: dict[str, Any]
    ):
        self.file, self.run, self.setting = file, run, json.loads(json.dumps(setting))
        file.parent.mkdir(parents=True, exist_ok=True)
        self.lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        if any(line["setting"] != self.setting for line in self.lines):
            raise ValueError(f"{file} holds runs of another setting; give --file another name.")

    def complete(self, arms: Iterable[Arm], seeds: list[int]) -> None:
        """Do every run that is not there yet."""
        arms = list(arms)
        for arm in arms:
            for weight in arm.weights:
                self.once(arm, weight, seeds[0])
        for seed in seeds[1:]:
            for arm in arms:
                self.once(arm, self.chosen(arm, seeds[0]), seed)

    def once(self, arm: Arm, weight: float, seed: int) -> dict[str, Any]:
        """One run, from the file if it is there with the same objectives (older files do not name them)."""
        objectives = arm.objectives(weight)
        for line in self.lines:
            same = line.get("objectives", objectives) == objectives
            if same and (line["arm"], line["weight"], line["seed"]) == (arm.name, weight, seed):
                return line
        started = time.perf_counter()
        found = self.run(objectives, seed)
        line = {"arm": arm.name, "weight": weight, "seed": seed, **found, "objectives": objectives}
        line |= {"seconds": round(time.perf_counter() - started), "setting": self.setting}
        self.lines.append(line)
        with self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print({k: v for k, v in line.items() if k not in ("setting", "objectives")}, flush=True)
        return line

    def chosen(self, arm: Arm, seed: int) -> float:
        """The weight with the best validation accuracy at the first seed."""
        return max(arm.weights, key=lambda weight: self.once(arm, weight, seed)["validation"])

    def taken(self, arm: Arm, seeds: list[int]) -> list[dict[str, Any]]:
        """The runs of an arm at its chosen weight, one a seed."""
        return [self.once(arm, self.chosen(arm, seeds[0]), seed) for seed in seeds]

    def table(
        self, arms: Iterable[Arm], seeds: list[int], reference: str, measures: tuple[str, ...] = ("test",)
    ) -> str:
        """Markdown: each measure as mean and spread over seeds, and the paired difference to the reference arm."""
        by_arm = {arm.name: self.taken(arm, seeds) for arm in arms}
        titles, rules = "| arm | weight |", "| --- | ---: |"
        for measure in measures:
            titles += f" {measure} accuracy, mean of {len(seeds)} | sd | minus {reference}, 95 % t interval |"
            rules += " ---: | ---: | ---: |"
        rows = [titles, rules]
        for name, lines in by_arm.items():
            cells = [name, f"{lines[0]['weight']:g}"]
            for measure in measures:
                values, others = ([line[measure] for line in runs] for runs in (lines, by_arm[reference]))
                spread = f"{100 * stdev(values):.2f}" if len(values) > 1 else "-"
                difference = self._difference(values, others, name == reference)
                cells += [f"{100 * mean(values):.2f} %", spread, difference]
            rows.append("| " + " | ".join(cells) + " |")
        return "\n".join(rows)

    @staticmethod
    def _difference(values: list[float], reference: list[float], same: bool) -> str:
        if same:
            return "-"
        found = paired_difference([100 * v for v in values], [100 * v for v in reference])
        if found["interval"] is None:
            return f"{found['mean']:+.2f} ({found['note']})"
        low, high = found["interval"]
        return f"{found['mean']:+.2f} ({low:+.2f} to {high:+.2f})"
