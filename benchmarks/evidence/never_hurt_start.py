"""Table 5 for L2-SP: a student held to weights that know nothing of the task. The plan stands in benchmarks/plan.md.

    python -m benchmarks.evidence.never_hurt_start --dataset <cifar10> --teacher <ResNet> --work <folder>

A run is under half a CPU minute. The teacher is read where the file of table 1's images has to be made.
Stopped and started again it goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.evidence.never_hurt_rules import LABELS, LEARNING_RATES, RULES, STEPS
from benchmarks.evidence.runs import Run, Table, arguments
from benchmarks.evidence.students import accuracy, labelled_rows, quiet, settings, small_bit, train
from benchmarks.evidence.views import Views, plain_split, pool
from hf_kdtl.data import load_images

WEIGHT = 1.0  # ten times the largest that is usual


class HeldToItsStart:
    """One run. The table's `weight` is the learning rate of `alone`, and l2_sp's weight of the other arms."""

    def __init__(self, dataset: str, teacher: str, work: Path, images: int = 10_000):
        data = load_images(dataset)
        self.pixels, self.labels, _ = pool(dataset, teacher, work, images)
        self.held_out = {name: plain_split(getattr(data, name), 32) for name in ("validation", "test")}
        self.start, self.rate = self._source(), 0.0

    def _source(self) -> dict[str, torch.Tensor]:
        """Weights of a student that learned all images with the labels of other images."""
        source = small_bit(int(self.labels.max()) + 1, 0)
        mixed = np.random.default_rng(0).permutation(self.labels)
        images = Views(self.pixels, mixed, np.arange(len(mixed)), None, 0)
        train(source, settings(0, STEPS, 3e-3, objectives=[{"name": "task"}], warmup_steps=50), images)
        return source.state_dict()

    def __call__(self, run: Run) -> dict[str, Any]:
        rate = run.weight if run.arm == "alone" else self.rate
        held = [] if run.arm == "alone" else [{"name": "l2_sp", "weight": run.weight}]
        rows = labelled_rows(self.labels, LABELS, run.seed)
        student = small_bit(int(self.labels.max()) + 1, run.seed)
        student.load_state_dict(self.start)
        config = settings(
            run.seed, STEPS, rate, objectives=[{"name": "task"}, *held], warmup_steps=50, weight_decay=0.0,
            gradient_rule=RULES.get(run.arm),
        )  # fmt: skip
        train(student, config, Views(self.pixels, self.labels[rows], rows, None, run.seed))
        return {"learning_rate": rate} | {name: accuracy(student, split) for name, split in self.held_out.items()}


def main() -> None:
    parser = arguments(__doc__, "dataset", "teacher")
    parser.add_argument("--arms", nargs="+", default=[*RULES], choices=[*RULES])
    options = parser.parse_args()
    quiet()
    measure = HeldToItsStart(options.dataset, options.teacher, options.work)
    table, seeds = Table("never_hurt_rules", measure), range(1, options.seeds + 1)
    measure.rate = table.chosen("l2sp", "alone", LEARNING_RATES["adamw"], seeds)
    for seed in seeds:
        table.once(Run("l2sp", "alone", measure.rate, seed))
        for arm in options.arms:
            table.once(Run("l2sp_shuffled", arm, WEIGHT, seed))


if __name__ == "__main__":
    main()
