"""Table 6: learning rates that follow the layers' discrepancies. The plan stands in benchmarks/plan.md.

    python -m benchmarks.evidence.rates_of_layers --teacher <the demo's teacher> --work <folder>

A run is about ten CPU seconds. Stopped and started again it goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForImageClassification, PrinterCallback, set_seed

from benchmarks.auto_weight import HELD_OUT, accuracy, stacked, subset
from benchmarks.evidence.runs import Run, Table, arguments
from benchmarks.evidence.students import quiet, settings
from hf_kdtl import DistillationTrainer
from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.models import Teacher

OBJECTIVES = [
    {"name": "task", "weight": 0.1},
    {"name": "logit_kd", "weight": 0.9, "temperature": 4.0},
    {"name": "attention_transfer", "weight": 100.0},
]
STEPS, LABELS = 150, {"digits_100": 100, "digits_5": 5}
RATES, DECAYS = (5e-4, 1e-3, 2e-3), (0.65, 0.8, 0.9)
MEASURED = {
    "attention": {"mode": "discrepancy", "source": "attention", "every": 10},
    "permuted": {"mode": "permuted", "source": "attention", "every": 10},
    "jacobian": {"mode": "discrepancy", "source": "jacobian", "every": 15},
    "hessian": {"mode": "discrepancy", "source": "hessian", "every": 30},
    "frozen": {"mode": "frozen", "source": "attention"},
    "loss_weight": {"mode": "loss_weight", "source": "attention", "every": 10},
}


class Rated:
    """One run: an arm, its base learning rate or the decay of llrd (the table's `weight`), a seed."""

    def __init__(self, teacher: str, work: Path):
        self.path, self.teacher, self.work = teacher, Teacher.from_pretrained(teacher), work
        self.uniform: dict[str, float] = {}
        self.data: dict[str, tuple[ImageDataset, dict[str, Any]]] = {}

    def __call__(self, run: Run) -> dict[str, Any]:
        layer_rates = MEASURED.get(run.arm, {"mode": "uniform"})
        rate = run.weight
        if run.arm == "llrd":
            layer_rates, rate = {"mode": "llrd", "decay": run.weight}, self.uniform[run.setting]
        images, held_out = self.images(run.setting)
        further = {"per_device_train_batch_size": 32, "warmup_steps": 10}
        config = settings(run.seed, STEPS, rate, objectives=OBJECTIVES, layer_rates=layer_rates, **further)
        trainer = DistillationTrainer(
            self.student(run.seed), config, teacher=self.teacher, train_dataset=images,
            processing_class=self.teacher.processing_class,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        assert trainer.layer_rates is not None
        last = [round(value, 3) for value in trainer.layer_rates.rates.multipliers]
        return {name: accuracy(trainer.model, *split) for name, split in held_out.items()} | {"multipliers": last}

    def student(self, seed: int) -> Any:
        """The teacher with every second block and the head initialized at random."""
        student = AutoModelForImageClassification.from_pretrained(self.path)
        set_seed(seed)
        drawn = type(student)(student.config)
        blocks = dict(enumerate(zip(student.vit.layers, drawn.vit.layers, strict=True)))
        for number, (mine, new) in blocks.items():
            if number % 2:
                mine.load_state_dict(new.state_dict())
        student.classifier.load_state_dict(drawn.classifier.state_dict())
        return student

    def images(self, setting: str) -> tuple[ImageDataset, dict[str, Any]]:
        """The training images, and the held-out ones; of the digits the test set is all that was left out."""
        if setting not in self.data:
            data = load_images(subset("digits", LABELS[setting], self.work / setting))
            processor = self.teacher.processing_class
            held_out = {split: stacked(ImageDataset(getattr(data, split), processor)) for split in HELD_OUT}
            self.data[setting] = ImageDataset(data.train, processor), held_out
        return self.data[setting]


def main() -> None:
    options = arguments(__doc__, "teacher").parse_args()
    quiet()
    measure = Rated(options.teacher, options.work / "rates_of_layers")
    table, seeds = Table("rates_of_layers", measure), range(1, options.seeds + 1)
    for setting in LABELS:
        table.taken(setting, "uniform", RATES, seeds)
        measure.uniform[setting] = table.chosen(setting, "uniform", RATES, seeds)
        for arm in ("attention", "permuted", "llrd", "jacobian", "hessian", "frozen", "loss_weight"):
            table.taken(setting, arm, DECAYS if arm == "llrd" else RATES, seeds)


if __name__ == "__main__":
    main()
