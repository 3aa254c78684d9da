"""Table 4: Jacobian matching with few images of 100 classes. The plan stands in benchmarks/plan.md.

    python -m benchmarks.evidence.jacobian_vgg --dataset <tiny_imagenet100> --work <folder> --images 5

It trains its teacher first (6 CPU minutes, <folder>/vgg_teacher); a run is half a CPU minute, with 50 images
of each class up to three and a half. Stopped and started again it goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from benchmarks.evidence.runs import Run, Table, arguments
from benchmarks.evidence.small_vgg import SmallVGGConfig, SmallVGGForImageClassification
from benchmarks.evidence.students import accuracy, labelled_rows, quiet, settings, train
from benchmarks.evidence.views import Plain, Views, plain_split, views_of
from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.models import Teacher

TEACHER: dict[str, Any] = {"hidden_sizes": [32, 64, 128, 128], "depths": [1, 2, 2, 2], "norm": "batch"}
TEACHER_STEPS, TEACHER_RATE, VIEWS = 2000, 3e-3, 4
LEARNING_RATES, KD_WEIGHTS, WEIGHTS = (1e-3, 3e-3), (0.9, 3.0), (1.0, 10.0)
STEPS = {1: 600, 5: 600, 10: 600, 50: 2000}
TASK = {"name": "task"}


def kd(weight: float, name: str = "logit_kd", **options: Any) -> list[dict[str, Any]]:
    """A tenth of the task, and soft labels."""
    return [TASK | {"weight": 0.1}, {"name": name, "weight": weight, "temperature": 4.0, **options}]


class Noisy(Views):
    """Views, every second one with Gaussian noise, of a standard deviation in units of the normalised pixels: clean
    ones beside, because statistics of batches that are all noisy do not fit a clean image."""

    noise = 0.0

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]]:
        items = super().__getitems__(places)
        draw = torch.Generator().manual_seed(self.batches)
        for item in items[::2]:
            item["pixel_values"] = item["pixel_values"] + self.noise * torch.randn(3, 32, 32, generator=draw)
        return items


def trained_teacher(dataset: str, folder: Path, noise: float = 0.0) -> Teacher:
    """The teacher, trained with all labels on first use."""
    if not folder.is_dir():
        split = load_images(dataset).train
        labels = np.array(split["label"][:])
        data = ImageDataset(split, Plain(32), augmentation=Augmentation({"crop": 4, "flip": True}), seed=0)
        images = views_of(data, labels, VIEWS, 0)
        noisy = Noisy(images.pixels, labels, images.rows, None, 0)
        noisy.noise = noise
        set_seed(0)
        model = SmallVGGForImageClassification(SmallVGGConfig(**TEACHER, num_labels=int(labels.max()) + 1))
        train(model, settings(0, TEACHER_STEPS, TEACHER_RATE, objectives=[TASK]), noisy)
        model.save_pretrained(folder)
    return Teacher(SmallVGGForImageClassification.from_pretrained(folder))


class FewImages:
    """A student that learns from so many images of each class as they are."""

    def __init__(self, dataset: str, teacher: Teacher):
        data = load_images(dataset)
        self.images, self.teacher = plain_split(data.train, 32), teacher
        self.held_out = {name: plain_split(getattr(data, name), 32) for name in ("validation", "test")}

    def student(self, each: int, seed: int, steps: int, rate: float, objectives: list[dict[str, Any]]) -> Any:
        """After its last step."""
        rows = labelled_rows(self.images.labels, each, seed)
        set_seed(seed)
        student = SmallVGGForImageClassification(SmallVGGConfig(num_labels=int(self.images.labels.max()) + 1))
        config = settings(seed, steps, rate, objectives=objectives, per_device_train_batch_size=32, warmup_steps=50)
        taught = any(entry["name"] != "task" for entry in objectives)
        images = Views(self.images.pixels, self.images.labels[rows], rows, None, seed)
        train(student, config, images, self.teacher if taught else None)
        return student


class Matched(FewImages):
    """One run. The table's `weight` is the rate of `alone`, of others the weight of the arm's own term."""

    def __init__(self, dataset: str, teacher: Teacher):
        super().__init__(dataset, teacher)
        self.rates: dict[str, float] = {}
        self.kd: dict[str, float] = {}

    def __call__(self, run: Run) -> dict[str, Any]:
        each, rate = int(run.setting.split("_")[-1]), self.rates.get(run.setting, 0.0)
        objectives = [TASK]
        if run.arm == "alone":
            rate = run.weight
        elif run.arm == "kd":
            objectives = kd(run.weight)
        else:
            objectives = [*kd(self.kd[run.setting]), {"name": "jacobian", "weight": run.weight}]
        student = self.student(each, run.seed, STEPS[each], rate, objectives)
        return {"learning_rate": rate} | {name: accuracy(student, split) for name, split in self.held_out.items()}


def main() -> None:
    parser = arguments(__doc__, "dataset")
    parser.add_argument("--images", type=int, nargs="+", default=[5, 10, 1, 50], choices=[*STEPS])
    options = parser.parse_args()
    quiet()
    measure = Matched(options.dataset, trained_teacher(options.dataset, options.work / "vgg_teacher"))
    table, seeds = Table("jacobian_vgg", measure), range(1, options.seeds + 1)
    for each in options.images:
        setting = f"tiny_imagenet100_{each}"
        table.taken(setting, "alone", LEARNING_RATES, seeds)
        measure.rates[setting] = table.chosen(setting, "alone", LEARNING_RATES, seeds)
        table.taken(setting, "kd", KD_WEIGHTS, seeds)
        measure.kd[setting] = table.chosen(setting, "kd", KD_WEIGHTS, seeds)
        table.taken(setting, "kd_jacobian", WEIGHTS, seeds)


if __name__ == "__main__":
    main()
