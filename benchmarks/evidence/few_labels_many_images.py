"""Table 1: few labels, many images. The plan stands in benchmarks/plan.md.

    python -m benchmarks.evidence.few_labels_many_images --dataset <cifar10> --teacher <ResNet> --work <folder>
    python -m benchmarks.evidence.few_labels_many_images --dataset <tiny_imagenet100> --teacher <its ResNet> \\
        --work <folder> --teacher_size 64 --labels 10 4 50 --rates 0.003 0.01

A run is about one CPU minute. Stopped and started again it goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.evidence.runs import Run, Table, arguments
from benchmarks.evidence.students import accuracy, labelled_rows, quiet, settings, small_bit, train
from benchmarks.evidence.views import Answers, Views, plain_split, pool
from hf_kdtl.data import load_images

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
STEPS = 1500
KD: list[dict[str, Any]] = [{"name": "task", "weight": 0.1}, {"name": "logit_kd", "weight": 0.9, "temperature": 4.0}]
TASK = [{"name": "task"}]
CORE = ("alone", "kd_labelled", "kd_unlabelled")
CONTROLS = ("label_smoothing", "alone_twice_as_long", "kd_unlabelled_shuffled_teacher")
AUTO = "kd_unlabelled_auto"


class FewLabels:
    """One run: so many labels a class, an arm, a learning rate (the table's `weight`), a seed."""

    def __init__(self, dataset: str, teacher: str, work: Path, images: int, shown: int | None):
        data = load_images(dataset)
        self.pixels, self.labels, self.logits = pool(dataset, teacher, work, images, shown=shown)
        self.held_out = {name: plain_split(getattr(data, name), 32) for name in ("validation", "test")}

    def __call__(self, run: Run) -> dict[str, Any]:
        few = labelled_rows(self.labels, int(run.setting.split("_")[-1]), run.seed)
        rows, labels, share = few, self.labels[few], None
        if run.arm.startswith("kd_unlabelled"):
            rows, share = np.arange(len(self.labels)), 0.25
            labels = np.where(np.isin(rows, few), self.labels, -100)
        steps = STEPS * (2 if run.arm == "alone_twice_as_long" else 1)
        smoothing = 0.1 if run.arm == "label_smoothing" else 0.0
        config = settings(
            run.seed, steps, run.weight, objectives=objectives(run.arm), label_smoothing_factor=smoothing
        )
        student = small_bit(int(self.labels.max()) + 1, run.seed)
        images = Views(self.pixels, labels, rows, share, run.seed)
        train(student, config, images, self._teacher(run) if run.arm.startswith("kd") else None)
        return {name: accuracy(student, split) for name, split in self.held_out.items()}

    def _teacher(self, run: Run) -> Answers:
        known = not run.arm.endswith("shuffled_teacher")
        return Answers(self.logits if known else shuffled(self.logits, len(self.labels), run.seed))


def objectives(arm: str) -> list[dict[str, Any]]:
    """Labels alone, or a tenth of them and soft labels, whose weight may be measured."""
    if arm == AUTO:
        return [KD[0], KD[1] | {"weight": "auto"}]
    return KD if arm.startswith("kd") else TASK


def shuffled(logits: Tensor, images: int, seed: int) -> Tensor:
    """Each image has the answers to another image, view by view."""
    order = np.random.default_rng(seed).permutation(images)
    return logits.reshape(images, -1, logits.shape[1])[order].flatten(0, 1)


def main() -> None:
    parser = arguments(__doc__, "dataset", "teacher")
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 50, 4, 500])
    parser.add_argument("--arms", nargs="+", default=[*CORE], choices=[*CORE, *CONTROLS, AUTO])
    parser.add_argument("--rates", type=float, nargs="+", default=LEARNING_RATES)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--teacher_size", type=int, help="pixels that the teacher sees, if not the student's")
    options = parser.parse_args()
    quiet()
    measure = FewLabels(options.dataset, options.teacher, options.work, options.images, options.teacher_size)
    table = Table("few_labels_many_images", measure)
    for labels in options.labels:
        for arm in options.arms:
            table.taken(f"{Path(options.dataset).name}_{labels}", arm, options.rates, range(1, options.seeds + 1))


if __name__ == "__main__":
    main()
