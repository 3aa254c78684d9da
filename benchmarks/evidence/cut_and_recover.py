"""Table 3: a student cut out of its teacher, and what it recovers. The plan stands in benchmarks/plan.md.

    python -m benchmarks.evidence.cut_and_recover --digits_teacher <the demo's teacher> --work <folder>
    python -m benchmarks.evidence.cut_and_recover --dataset <cifar10> --teacher <ViT> --work <folder> [--cuts C]

A run on the digits is ten CPU seconds, one on cifar10 three and a half minutes; the stored outputs are 2 and 4 GB.
Stopped and started again it goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PrinterCallback

from benchmarks.auto_weight import HELD_OUT, accuracy, stacked
from benchmarks.evidence.conv_guides_vit import KD, TASK
from benchmarks.evidence.runs import Run, Table, arguments
from benchmarks.evidence.stored import Curve, StoredSet
from benchmarks.evidence.students import labelled_rows, quiet, settings
from hf_kdtl import DistillationTrainer, make_student
from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.models import Teacher

TERMS = {
    "kd_hidden_states": {"name": "hidden_states"},
    "kd_attention_map": {"name": "attention_map", "layers": "last"},
    "kd_relation": {"name": "relation"},
}
RATE = 5e-4  # what hf-kdtl distill takes for a student cut out of its teacher
RATES, WEIGHTS = (5e-4, 1e-3), (1.0, 10.0)
AUTO = ("kd_hidden_states_auto", "kd_relation_auto")
DIGITS, DIGITS_MARKS = {"digits_20": 20, "digits_5": 5}, (10, 25, 50, 100, 150)
MARKS = (50, 100, 200, 300, 400, 500)
CUTS: dict[str, dict[str, Any]] = {"heads_and_mlp_half": {"layers": 1.0, "flops": 0.5}, "depth_half": {"layers": 0.5}}
CIFAR_ARMS = {"heads_and_mlp_half": ("labels", "kd", "kd_hidden_states"), "depth_half": ("kd", "kd_hidden_states")}


def objectives(arm: str, weight: float = 1.0) -> list[dict[str, Any]]:
    """Labels, soft labels, or soft labels and a term on layers, whose weight may be measured."""
    term = TERMS.get(arm.removesuffix("_auto"))
    further = [term | {"weight": "auto" if arm in AUTO else weight}] if term else []
    return [*(TASK if arm == "labels" else KD), *further]


class OnDigits:
    """Students cut out of the demo's teacher, every second block, that learn from a few labelled digits."""

    def __init__(self, teacher: str):
        self.teacher, self.data = Teacher.from_pretrained(teacher), load_images("digits")
        self.rates: dict[str, float] = {}

    def trained(
        self,
        seed: int,
        labels: int,
        rate: float,
        objectives: list[dict[str, Any]],
        teacher: Teacher | None,
        **further: Any,
    ) -> dict[str, Any]:
        """Accuracy of the last step and on the way, and weights that were measured."""
        images = self.images(labels, seed)
        held_out = {name: stacked(images[name]) for name in HELD_OUT}
        curve = Curve(held_out["validation"], DIGITS_MARKS)
        further |= {"per_device_train_batch_size": 32, "warmup_steps": 10, "objectives": objectives}
        trainer = DistillationTrainer(
            make_student(self.teacher, 0.5), settings(seed, DIGITS_MARKS[-1], rate, **further), callbacks=[curve],
            train_dataset=images["train"], teacher=teacher, processing_class=self.teacher.processing_class,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        found = {name: accuracy(trainer.model, *split) for name, split in held_out.items()}
        return {"learning_rate": rate} | found | {"curve": curve.found, "measured": trainer.auto_weights.weights}

    def images(self, labels: int, seed: int) -> dict[str, ImageDataset]:
        """Labelled images drawn by the seed, because the student is the same for all; tested on the others."""
        train = self.data.train
        found = np.array(train["label"][:])
        rows = labelled_rows(found, labels, seed)
        rest = train.select(np.setdiff1d(np.arange(len(found)), rows))
        test = datasets.concatenate_datasets([self.data.test, rest])
        splits = {"train": train.select(rows), "validation": self.data.validation, "test": test}
        return {name: ImageDataset(split, self.teacher.processing_class) for name, split in splits.items()}


class RecoveredOnDigits(OnDigits):
    """One run. The table's `weight` is the learning rate of `labels` and `kd`, and the weight of another's term."""

    def __call__(self, run: Run) -> dict[str, Any]:
        rate = self.rates[run.setting] if run.arm in (*TERMS, *AUTO) else run.weight
        teacher = None if run.arm == "labels" else self.teacher
        return self.trained(run.seed, DIGITS[run.setting], rate, objectives(run.arm, run.weight), teacher)


class Recovered:
    """One run on cifar10; every arm at the same learning rate, which is the table's `weight`."""

    def __init__(self, dataset: str, teacher: str, folder: Path, cut: str):
        self.cut, self.teacher = CUTS[cut], Teacher.from_pretrained(teacher).classifier()
        config = make_student(self.teacher, **self.cut).config.to_dict()
        student = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
        stored = [*TASK, {"name": "logit_kd"}, TERMS["kd_hidden_states"]]
        self.set = StoredSet(folder, dataset, teacher, student, stored, each=1000, views=2, on_the_way=5)

    def __call__(self, run: Run) -> dict[str, Any]:
        further = {"per_device_train_batch_size": 32, "warmup_steps": 25}
        config = settings(run.seed, MARKS[-1], run.weight, objectives=objectives(run.arm), **further)
        return self.set.trained(make_student(self.teacher, **self.cut), config, MARKS)


def main() -> None:
    parser = arguments(__doc__)
    for name in ("digits_teacher", "dataset", "teacher"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--cuts", nargs="+", default=[*CUTS], choices=[*CUTS])
    options = parser.parse_args()
    quiet()
    seeds = range(1, options.seeds + 1)
    if options.digits_teacher:
        digits = RecoveredOnDigits(options.digits_teacher)
        table = Table("cut_and_recover", digits)
        for setting in DIGITS:
            digits.rates[setting] = table.chosen(setting, "kd", RATES, seeds)
            for arm, tried in {"labels": RATES, "kd": RATES, **dict.fromkeys(TERMS, WEIGHTS)}.items():
                table.taken(setting, arm, tried, seeds)
            for arm in AUTO:  # nothing is tried; the weight of the line is none
                table.taken(setting, arm, (0.0,), seeds)
    for cut in options.cuts if options.dataset else ():
        folder = options.work / "cut_and_recover" / cut
        table = Table("cut_and_recover", Recovered(options.dataset, options.teacher, folder, cut))
        for seed in seeds:
            for arm in CIFAR_ARMS[cut]:
                table.once(Run(cut, arm, RATE, seed))


if __name__ == "__main__":
    main()
