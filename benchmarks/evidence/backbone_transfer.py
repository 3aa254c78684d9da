"""Table 9: features of teachers without a head, on images without labels, then few labels.

The plan stands in benchmarks/plan.md.

    python -m benchmarks.evidence.backbone_transfer --dataset <cifar10> --unlabelled <half of tiny_imagenet100> \\
        --vit <headless ViT> --resnet <headless ResNet> --stores <folder of their stores> --work <folder>

Before it: the classifiers' backbones, saved by AutoModel.from_pretrained(<classifier>).save_pretrained(<folder>) with
the image processor (of the ViT with add_pooling_layer=False); every second training image of tiny_imagenet100 in a
folder of parquet files; and for each teacher, into <folder of their stores>/vit and /resnet,

    hf-kdtl cache --teacher <headless> --dataset <that half> --image_size 32 --views 2 --output <stores>/<name> \\
        --student_config '{"model_type": "bit", ... as SMALL_BIT}' --augmentation '{"crop": 4, "flip": true}' \\
        --objectives '[{"name": "feature_kd", "patch_weight": 0}]'

`--work` holds the views of table 1. A pre-training is 1.5 CPU minutes, a run of fine-tuning one, a probe seconds.
Stopped and started again it goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import BitConfig, BitForImageClassification, BitModel, PrinterCallback, set_seed

from benchmarks.evidence.few_labels_many_images import KD, LEARNING_RATES, STEPS, TASK
from benchmarks.evidence.runs import Run, Table
from benchmarks.evidence.students import SMALL_BIT, accuracy, labelled_rows, quiet, settings, train
from benchmarks.evidence.views import Answers, Views, plain_split, pool
from hf_kdtl import DistillationTrainer
from hf_kdtl.commands.common.builders import new_processor
from hf_kdtl.commands.common.embedding_scores import embeddings
from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.models import Teacher
from hf_kdtl.models.teachers import SeveralTeachers, StoredTeacher

PRETRAINING_STEPS, PRETRAINING_RATE = 1500, 3e-3
STRENGTHS = (0.01, 0.1, 1.0)  # C of a probe
TEACHERS = ("vit", "resnet")
PROBES = ("random_probe", "probe", "teachers_probe")
FINE_TUNED = ("fine_tuned", "fine_tuned_kd")
SETTING = "cifar10_10"
PROCESSOR = new_processor(None, 32)  # pixels in [-1, 1], as Views gives them


def features() -> list[dict[str, Any]]:
    """The terms of pre-training: embeddings of both teachers, by coordinates and by what they are like."""
    terms = {"feature_kd": {"patch_weight": 0}, "similarity": {"local_weight": 0, "bank": 1024}}
    return [
        {"name": name, "key": f"{name}_{one}", "teacher": one, **options}
        for one in TEACHERS
        for name, options in terms.items()
    ]


class Rendered(ImageDataset):
    """Keeps each view of an image in memory, once it was rendered: the runs of all seeds see the same ones."""

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        kept: dict[tuple[int, int], dict[str, Any]] = vars(self).setdefault("kept", {})
        keys = {(int(i), self.image_view(i)): i for i in indices}
        new = {key: i for key, i in keys.items() if key not in kept}
        kept |= zip(new, super().__getitems__([*new.values()]), strict=True) if new else ()
        return [dict(kept[int(i), self.image_view(i)]) for i in indices]


class Transfer:
    """One run: an arm, a learning rate or the C of a probe (the table's `weight`), a seed."""

    def __init__(self, options: argparse.Namespace):
        self.options, data = options, load_images(options.dataset)
        pixels, labels, self.logits = pool(options.dataset, "", options.work, 10_000)
        self.pixels, self.labels = pixels, labels
        self.held_out = {name: plain_split(getattr(data, name), 32) for name in ("validation", "test")}
        rows = labelled_rows(np.array(data.train["label"][:]), 1000, 0)  # of the pool
        self.train = data.train.select(rows)
        self.seen: dict[tuple[str, int], dict[str, np.ndarray]] = {}
        self.images: Rendered | None = None

    def __call__(self, run: Run) -> dict[str, Any]:
        if run.arm == "pretraining":
            return self.pretrain(run)
        few = labelled_rows(self.labels, 10, run.seed)
        return self._probe(run, few) if run.arm in PROBES else self._fine_tune(run, few)

    def folder(self, seed: int) -> Path:
        """Where the pre-trained student of a seed lies."""
        return Path(self.options.work) / "backbone" / f"pretrained_seed{seed}"

    def pretrain(self, run: Run) -> dict[str, Any]:
        """Both teachers, from their stores, teach the student without a head."""
        if self.images is None:
            split, augmentation = load_images(self.options.unlabelled).train, Augmentation({"crop": 4, "flip": True})
            self.images = Rendered(split, PROCESSOR, augmentation=augmentation)
        sources = {name: StoredTeacher(Path(self.options.stores) / name) for name in TEACHERS}
        set_seed(run.seed)
        config = settings(
            run.seed, PRETRAINING_STEPS, run.weight, objectives=features(), logging_steps=PRETRAINING_STEPS // 4
        )
        trainer = DistillationTrainer(
            BitModel(BitConfig(**SMALL_BIT)), config, train_dataset=self.images, teacher=SeveralTeachers(sources)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.model.save_pretrained(self.folder(run.seed))
        return {"loss": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]}

    def _fine_tune(self, run: Run, few: np.ndarray) -> dict[str, Any]:
        """As `alone` and `kd_labelled` of table 1, from the pre-trained student."""
        kd = run.arm == "fine_tuned_kd"
        set_seed(run.seed)
        student = BitForImageClassification.from_pretrained(self.folder(run.seed), num_labels=10)
        config = settings(run.seed, STEPS, run.weight, objectives=KD if kd else TASK)
        images = Views(self.pixels, self.labels[few], few, None, run.seed)
        train(student, config, images, Answers(self.logits) if kd else None)
        return {name: accuracy(student, split) for name, split in self.held_out.items()}

    def _probe(self, run: Run, few: np.ndarray) -> dict[str, Any]:
        """Logistic regression on standardised embeddings of the labelled images as they are."""
        models = self._models(run.arm, run.seed)
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=run.weight, max_iter=1000))
        probe.fit(embedded(models, plain_split(self.train.select(few), 32)), self.labels[few])
        seen = self._held_out(run.arm, run.seed if run.arm != "teachers_probe" else 0)
        return {name: probe.score(seen[name], split.labels) for name, split in self.held_out.items()}

    def _held_out(self, arm: str, seed: int) -> dict[str, np.ndarray]:
        if (arm, seed) not in self.seen:
            models = self._models(arm, seed)
            self.seen[arm, seed] = {name: embedded(models, images) for name, images in self.held_out.items()}
        return self.seen[arm, seed]

    def _models(self, arm: str, seed: int) -> list[Any]:
        """The student before or after pre-training, or both teachers."""
        if arm == "probe":
            return [BitModel.from_pretrained(self.folder(seed)).eval()]
        set_seed(seed)
        student = BitModel(BitConfig(**SMALL_BIT)).eval()
        if arm == "random_probe":
            return [student]
        teachers = [Teacher.from_pretrained(getattr(self.options, name)) for name in TEACHERS]
        for teacher in teachers:
            teacher.match(student, PROCESSOR, compare_classes=False)
        return teachers


def embedded(models: list[Any], images: Views) -> np.ndarray:
    """(n, D) of the models side by side."""
    return np.concatenate([embeddings(model, images, 250)[0] for model in models], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dataset", "unlabelled", *TEACHERS, "stores"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=[*PROBES, *FINE_TUNED], choices=[*PROBES, *FINE_TUNED])
    options = parser.parse_args()
    quiet()
    table, seeds = Table("backbone_transfer", Transfer(options)), range(1, options.seeds + 1)
    for seed in seeds:
        table.once(Run(SETTING, "pretraining", PRETRAINING_RATE, seed))
    for arm in options.arms:
        table.taken(SETTING, arm, STRENGTHS if arm in PROBES else LEARNING_RATES, seeds)


if __name__ == "__main__":
    main()
