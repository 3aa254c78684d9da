"""Is a weight that is "auto" as good as one that was tuned, and better than 1? The plan stands in benchmarks/plan.md.

    python benchmarks/auto_weight.py --set digits --teacher <the demo's teacher> --work runs/auto
    python benchmarks/auto_weight.py --set cifar10 --dataset <cifar10> --teacher <cifar10 ViT> --work runs/auto

Writes the teacher's outputs once (the training images as they are), then trains what benchmarks/results/
auto_weight.jsonl does not hold, and prints the table; python -m benchmarks.evidence.report writes its page.
Stopped and started again it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PrinterCallback, set_seed
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.evidence.small_pages import auto_weight
from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.commands.cache import main as cache
from hf_kdtl.commands.common.builders import from_config
from hf_kdtl.commands.common.trials import RunLog
from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.models.teachers import StoredTeacher
from hf_kdtl.models.teachers.store.manifest import is_store

OBJECTIVES = {name: {"name": name} for name in ("logit_kd", "attention_transfer", "hidden_states", "feature_kd")}
OBJECTIVES["jacobian"] = {"name": "jacobian", "sketch": 64}
WEIGHTS = (1.0, 10.0, 0.1, 100.0)  # in this order, so that of equals the one nearest to 1 is taken
RATES = (1e-3, 2e-3, 4e-3)
HELD_OUT = ("validation", "test")
TUNING, SEEDS = (11, 12), (1, 2, 3, 4, 5)
BATCH = 32
OUT = Path(__file__).parent / "results" / "auto_weight.jsonl"


@dataclass(frozen=True)
class Setting:
    """Labelled images a class, steps, and the student: a ViT of two blocks from random weights."""

    labels: int
    steps: int
    size: int
    width: int

    def student(self) -> dict[str, Any]:
        """The fields of its config."""
        return {"model_type": "vit", "hidden_size": self.width, "num_hidden_layers": 2, "num_attention_heads": 3,
                "intermediate_size": 2 * self.width, "image_size": self.size, "patch_size": 4,
                "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip


SETTINGS = {"digits": Setting(20, 300, 16, 48), "cifar10": Setting(100, 200, 32, 96)}
SETTINGS["digits_5"], SETTINGS["digits_20"] = Setting(5, 300, 16, 48), SETTINGS["digits"]


def subset(dataset: str, labels: int, folder: Path) -> str:
    """A dataset saved on disk: the first images of each class as train; of a small set the others are tested on."""
    if not folder.is_dir():
        data = load_images(dataset)
        found = np.array(data.train["label"][:])
        rows = np.sort(np.concatenate([np.flatnonzero(found == k)[:labels] for k in range(len(data.label_names))]))
        test = data.test
        if len(test) < 1000:
            test = datasets.concatenate_datasets([test, data.train.select(np.setdiff1d(np.arange(len(found)), rows))])
        splits = {"train": data.train.select(rows), "validation": data.validation, "test": test}
        datasets.DatasetDict(splits).save_to_disk(str(folder))
    return str(folder)


class Runs:
    """Trains one student for each (objective, weight, learning rate, seed) of a set."""

    def __init__(self, name: str, dataset: str, teacher: str, work: Path):
        self.name, self.setting, self.store = name, SETTINGS[name], str(work / f"{name}_teacher")
        saved = subset(dataset, self.setting.labels, work / f"{name}_data")
        data = load_images(saved)
        self.names = data.label_names
        if not is_store(self.store):
            cache(
                ["--teacher", teacher, "--dataset", saved, "--student_config", json.dumps(self.setting.student()),
                 "--objectives", json.dumps(["task", *OBJECTIVES.values()]), "--augmentation", "{}", "--views", "1",
                 "--teacher_batch", str(BATCH), "--output", self.store]
            )  # fmt: skip
        self.processor = StoredTeacher(self.store).processing_class
        self.train = ImageDataset(data.train, self.processor)
        self.held_out = {split: stacked(ImageDataset(getattr(data, split), self.processor)) for split in HELD_OUT}
        self.log, self.rate = RunLog(OUT), 0.0

    def __call__(self, term: str, weight: Any, seed: int, rate: float | None = None) -> dict[str, Any]:
        """The line of a run: accuracy on validation and test, and the weight that was measured."""
        rate = rate or self.rate
        facts = {"set": self.name, "term": term, "weight": weight, "learning_rate": rate, "seed": seed}
        named = f"{self.name} {term} {weight} rate {rate} seed {seed}"
        terms = [] if term == "none" else [OBJECTIVES[term] | {"weight": weight}]
        return self.log.once(named, facts, lambda: self.trained(terms, rate, seed))

    def trained(self, terms: list[dict[str, Any]], rate: float, seed: int) -> dict[str, Any]:
        """Train a student on the task and further terms; its accuracies, and the weight of the first if measured."""
        set_seed(seed)
        student = from_config(self.setting.student(), self.names, "the student")
        with tempfile.TemporaryDirectory() as folder:
            config = DistillationConfig(
                folder, objectives=[{"name": "task", "weight": 1.0}, *terms], max_steps=self.setting.steps,
                learning_rate=rate, per_device_train_batch_size=BATCH, lr_scheduler_type="cosine", warmup_steps=10,
                weight_decay=0.05, seed=seed, save_strategy="no", logging_strategy="no", report_to=[],
                disable_tqdm=True, use_cpu=True,
            )  # fmt: skip
            trainer = DistillationTrainer(
                student, config, teacher=StoredTeacher(self.store) if terms else None, train_dataset=self.train,
                processing_class=self.processor,
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        found = {split: accuracy(trainer.model, *images) for split, images in self.held_out.items()}
        return found | {"measured": trainer.auto_weights.weights.get(terms[0]["name"]) if terms else None}


def stacked(images: ImageDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixels, labels) of a split."""
    rows = images.__getitems__(list(range(len(images))))
    return torch.stack([row["pixel_values"] for row in rows]), torch.tensor([int(row["labels"]) for row in rows])


@torch.no_grad()
def accuracy(model: Any, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of right answers."""
    model.eval()
    answers = torch.cat([model(pixel_values=part).logits.argmax(-1) for part in pixels.split(256)])
    return float((answers == labels).float().mean())


def best(tried: dict[Any, float]) -> Any:
    """The first of the highest."""
    return max(tried, key=lambda key: tried[key])


def main() -> None:
    """Train what is not in the file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", required=True, choices=["digits", "cifar10"])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/auto"))
    options = parser.parse_args()
    logging.set_verbosity_error()
    runs = Runs(options.set, options.dataset, options.teacher, options.work)
    runs.rate = best({rate: fmean(runs("none", 0, s, rate)["validation"] for s in TUNING) for rate in RATES})
    for seed in SEEDS:
        runs("none", 0, seed)
    for term in OBJECTIVES:
        for weight in ("auto", 1.0):
            for seed in SEEDS:
                runs(term, weight, seed)
        chosen = best({weight: fmean(runs(term, weight, s)["validation"] for s in TUNING) for weight in WEIGHTS})
        for seed in SEEDS:
            runs(term, chosen, seed)
    print(auto_weight([line for line in runs.log.lines.values() if line["set"] == options.set]))
    print(f"learning rate {runs.rate:g}, {runs.log.seconds:.0f} s in all")


if __name__ == "__main__":
    sys.exit(main())
