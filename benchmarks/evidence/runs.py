"""The runs of a table: one JSON line each, written as they end, so that an interruption loses at most one."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Run:
    """What names a run within its table."""

    setting: str
    arm: str
    weight: float
    seed: int


def arguments(doc: str | None, *required: str) -> argparse.ArgumentParser:
    """The options of a table's program: those required, the folder of what is made on first use, and the seeds."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in required:
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--seeds", type=int, default=10)
    return parser


class Table:
    """The runs of benchmarks/results/<name>.jsonl.

    Args:
        name: of the table, and of its file.
        measure: does a run and returns its measures, among them `validation`; `test` is never chosen by.
        folder: of the file.
    """

    def __init__(self, name: str, measure: Callable[[Run], dict[str, Any]] | None = None, folder: Path = RESULTS):
        self.name, self.measure, self.file = name, measure, folder / f"{name}.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)

    def lines(self) -> list[dict[str, Any]]:
        """All runs so far."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def found(self, run: Run) -> dict[str, Any] | None:
        """The line of a run, if it has been done."""
        wanted = {"setting": run.setting, "arm": run.arm, "weight": run.weight, "seed": run.seed}
        return next((line for line in self.lines() if wanted.items() <= line.items()), None)

    def once(self, run: Run) -> dict[str, Any]:
        """The line of a run, which is done now if it has not been."""
        if (line := self.found(run)) is not None:
            return line
        assert self.measure is not None, f"{run} has not been done"
        started = time.process_time()
        line = {"table": self.name, **vars(run), **self.measure(run)}
        line["cpu_seconds"] = round(time.process_time() - started, 1)
        with FileLock(self.file.with_suffix(".lock")), self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print({k: v for k, v in line.items() if k != "table"}, flush=True)
        return line

    def chosen(self, setting: str, arm: str, weights: Sequence[float], seeds: Sequence[int]) -> float:
        """The weight with the best mean validation accuracy over the first two seeds."""
        runs = {w: [self.once(Run(setting, arm, w, seed)) for seed in seeds[:2]] for w in weights}
        return max(weights, key=lambda weight: fmean(line["validation"] for line in runs[weight]))

    def taken(self, setting: str, arm: str, weights: Sequence[float], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """The runs of an arm at its chosen weight, one a seed."""
        weight = self.chosen(setting, arm, weights, seeds)
        return [self.once(Run(setting, arm, weight, seed)) for seed in seeds]
