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

from benchmarks.evidence.gradients import AnswersAndGradients, gradients_of
from benchmarks.evidence.maps import AnswersAndMaps, maps_of
from benchmarks.evidence.runs import Run, Table, arguments
from benchmarks.evidence.students import accuracy, labelled_rows, quiet, settings, small_bit, train
from benchmarks.evidence.views import Answers, Views, as_seen, plain_split, pool
from hf_kdtl.data import load_images
from hf_kdtl.models import Teacher

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
STEPS = 1500
KD: list[dict[str, Any]] = [{"name": "task", "weight": 0.1}, {"name": "logit_kd", "weight": 0.9, "temperature": 4.0}]
TASK = [{"name": "task"}]
CORE = ("alone", "kd_labelled", "kd_unlabelled")
CONTROLS = ("label_smoothing", "alone_twice_as_long", "kd_unlabelled_shuffled_teacher")
AUTO, MAPS, GRADIENTS = "kd_unlabelled_auto", "kd_unlabelled_attention_transfer", "kd_unlabelled_jacobian"
ADDED: dict[str, dict[str, Any]] = {
    MAPS: {"name": "attention_transfer", "layers": [[0, 3], [1, 5], [2, 6]]},
    GRADIENTS: {"name": "jacobian"},
}
"""What is added to `kd_unlabelled`. The pairs: the blocks of the student, and the last ones of the ResNet's last three
stages: 8, 4 and 2 cells a side."""
ADDED_WEIGHTS = {MAPS: (10.0, 100.0, 1000.0), GRADIENTS: (0.1, 1.0, 10.0)}


class FewLabels:
    """One run: so many labels a class, an arm, a learning rate (the table's `weight`), a seed. Of an added
    term the `weight` is its own, and the rate that of `kd_unlabelled`."""

    def __init__(self, dataset: str, teacher: str, work: Path, images: int, shown: int | None):
        data = load_images(dataset)
        self.pixels, self.labels, self.logits = pool(dataset, teacher, work, images, shown=shown)
        self.held_out = {name: plain_split(getattr(data, name), 32) for name in ("validation", "test")}
        self.model, self.work, self.name, self.rate = teacher, work, f"{Path(dataset).name}_{images}", 0.0
        self.with_more: dict[str, Answers] = {}

    def __call__(self, run: Run) -> dict[str, Any]:
        few = labelled_rows(self.labels, int(run.setting.split("_")[-1]), run.seed)
        rows, labels, share = few, self.labels[few], None
        if run.arm.startswith("kd_unlabelled"):
            rows, share = np.arange(len(self.labels)), 0.25
            labels = np.where(np.isin(rows, few), self.labels, -100)
        steps = STEPS * (2 if run.arm == "alone_twice_as_long" else 1)
        smoothing = 0.1 if run.arm == "label_smoothing" else 0.0
        rate = self.rate if run.arm in ADDED else run.weight
        config = settings(
            run.seed, steps, rate, objectives=objectives(run.arm, run.weight), label_smoothing_factor=smoothing
        )
        student = small_bit(int(self.labels.max()) + 1, run.seed)
        images = Views(self.pixels, labels, rows, share, run.seed)
        train(student, config, images, self._teacher(run) if run.arm.startswith("kd") else None)
        return {name: accuracy(student, split) for name, split in self.held_out.items()}

    def _teacher(self, run: Run) -> Answers:
        if run.arm in ADDED:
            if run.arm not in self.with_more:
                self.with_more[run.arm] = self._with_maps() if run.arm == MAPS else self._with_gradients()
            return self.with_more[run.arm]
        known = not run.arm.endswith("shuffled_teacher")
        return Answers(self.logits if known else shuffled(self.logits, len(self.labels), run.seed))

    def _with_maps(self) -> AnswersAndMaps:
        teacher, blocks = Teacher.from_pretrained(self.model), tuple(pair[1] for pair in ADDED[MAPS]["layers"])
        geometry = teacher.geometry(as_seen(teacher, self.pixels[:1, 0]))
        file = self.work / f"{self.name}_maps.npz"
        return AnswersAndMaps(self.logits, maps_of(teacher, self.pixels, blocks, file), geometry)

    def _with_gradients(self) -> AnswersAndGradients:
        file = self.work / f"{self.name}_gradients.npy"
        teacher = Teacher.from_pretrained(self.model)
        return AnswersAndGradients(self.logits, gradients_of(teacher, self.pixels, self.logits, file))


def objectives(arm: str, weight: float) -> list[dict[str, Any]]:
    """Labels alone, or a tenth of them and soft labels, whose weight may be measured, and a further term."""
    if arm == AUTO:
        return [KD[0], KD[1] | {"weight": "auto"}]
    further = [ADDED[arm] | {"weight": weight}] if arm in ADDED else []
    return [*KD, *further] if arm.startswith("kd") else TASK


def shuffled(logits: Tensor, images: int, seed: int) -> Tensor:
    """Each image has the answers to another image, view by view."""
    order = np.random.default_rng(seed).permutation(images)
    return logits.reshape(images, -1, logits.shape[1])[order].flatten(0, 1)


def main() -> None:
    parser = arguments(__doc__, "dataset", "teacher")
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 50, 4, 500])
    parser.add_argument("--arms", nargs="+", default=[*CORE], choices=[*CORE, *CONTROLS, AUTO, *ADDED])
    parser.add_argument("--rates", type=float, nargs="+", default=LEARNING_RATES)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--teacher_size", type=int, help="pixels that the teacher sees, if not the student's")
    options = parser.parse_args()
    quiet()
    measure = FewLabels(options.dataset, options.teacher, options.work, options.images, options.teacher_size)
    table = Table("few_labels_many_images", measure)
    for labels in options.labels:
        setting, seeds = f"{Path(options.dataset).name}_{labels}", range(1, options.seeds + 1)
        for arm in options.arms:
            if arm in ADDED:
                measure.rate = table.chosen(setting, "kd_unlabelled", options.rates, seeds)
            table.taken(setting, arm, ADDED_WEIGHTS.get(arm, options.rates), seeds)


if __name__ == "__main__":
    main()
