"""Does a larger fine-tuned teacher help a pre-trained student that is fine-tuned, by more than accuracy?

    python benchmarks/tl_kd.py --student <pre-trained ViT> --teacher <classifier fine-tuned on the target> \\
        --dataset <caltech99 parquet folder>                                   # 40 minutes on one core
    python benchmarks/tl_kd.py ... --seeds 1 2 3 4 5 --steps 1000 --degraded_images 2430    # a larger one

The question of arXiv 2210.09668. Four arms: TL (the pre-trained student fine-tuned alone), TL + KD (under the
teacher), KD (the same student from random weights under the teacher) and scratch (random weights, alone). All see the
same images in the same order, with the same augmentation and steps. Each arm has two trials on the validation split
with the first seed: TL and scratch two learning rates, TL + KD and KD two weights of logit_kd at the rate that their
counterpart without a teacher took. The test split is read once a run and never chosen by.

Beside the metrics of every run stand the agreement with the teacher, the teacher's divergence, and the accuracy on
degraded test images: the mean over nine degradations at five severities, and each of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PrinterCallback, set_seed

sys.path.insert(0, str(Path(__file__).parent))
from study import Arm, Study, parse_quietly

from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.data.degradations import DEGRADATIONS
from hf_kdtl.data.degraded import degraded
from hf_kdtl.evaluation.metrics import METRICS, paired_scores
from hf_kdtl.models import Teacher

RATES, WEIGHTS = (3e-4, 1e-3), (1.0, 4.0)
FIDELITY = ("agreement", "teacher_kl", "agreement_teacher_wrong")


def alone(name: str, pretrained: bool) -> Arm:
    """An arm without a teacher. Its weight is the learning rate."""
    return Arm(name, lambda rate: [{"name": "task"}, {"pretrained": pretrained, "learning_rate": rate}], RATES)


def taught(name: str, pretrained: bool, rate: float) -> Arm:
    """An arm under the teacher, at the learning rate of its counterpart. Its weight is that of logit_kd."""

    def listed(weight: float) -> list[dict[str, Any]]:
        objectives = [{"name": "task"}, {"name": "logit_kd", "weight": weight, "temperature": 4.0}]
        return [*objectives, {"pretrained": pretrained, "learning_rate": rate}]

    return Arm(name, listed, WEIGHTS)


class Transfer:
    """One run: what `Study` calls."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        student = AutoConfig.from_pretrained(options.student)
        self.processor = AutoImageProcessor.from_pretrained(options.student)
        self.teacher = Teacher.from_pretrained(options.teacher)
        config: Any = self.teacher.classifier().config
        names = [config.id2label[i] for i in range(config.num_labels)]
        self.classes = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        student.update(self.classes)
        self.config = student
        self.data = load_images(options.dataset).in_order(AutoModelForImageClassification.from_config(student))
        processors = self.processor, self.teacher.processing_class
        self.held_out = {
            split: [ImageDataset(getattr(self.data, split), p) for p in processors] for split in ("validation", "test")
        }
        part = self.data.test.shuffle(seed=0).select(range(min(options.degraded_images, len(self.data.test))))
        side = max(min(images[0]["pixel_values"].shape[-2:]) for images in self.held_out["test"])
        self.degraded = {
            (name, severity): degraded(part, self.processor, name, severity, side)
            for name in DEGRADATIONS
            for severity in range(1, 6)
        }
        self.taught: tuple[np.ndarray, np.ndarray] | None = None

    def student(self, pretrained: bool) -> Any:
        """The student before training; after `set_seed` the same."""
        if not pretrained:
            return AutoModelForImageClassification.from_config(self.config)
        return AutoModelForImageClassification.from_pretrained(
            self.options.student, ignore_mismatched_sizes=True, dtype=torch.float32, **self.classes
        )

    def trainer(self, model: Any, objectives: list[dict[str, Any]], rate: float, seed: int) -> DistillationTrainer:
        config = DistillationConfig(
            "runs/tl_kd", objectives=objectives, seed=seed, max_steps=self.options.steps,
            warmup_steps=self.options.steps // 20, per_device_train_batch_size=self.options.batch, use_cpu=True,
            per_device_eval_batch_size=250, learning_rate=rate, weight_decay=0.05, lr_scheduler_type="cosine",
            save_strategy="no", report_to=[], logging_steps=self.options.steps, disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        train = ImageDataset(
            self.data.train, self.processor, augmentation=Augmentation({"crop": 4, "flip": True}), seed=seed
        )
        teacher = self.teacher if len(objectives) > 1 else None
        trainer = DistillationTrainer(
            model, config, teacher=teacher, train_dataset=train, processing_class=self.processor
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def __call__(self, listed: list[dict[str, Any]], seed: int) -> dict[str, Any]:
        *objectives, beside = listed
        set_seed(seed)
        trainer = self.trainer(self.student(beside["pretrained"]), objectives, beside["learning_rate"], seed)
        trainer.train()
        validation = trainer.predict(self.held_out["validation"][0])
        test = trainer.predict(self.held_out["test"][0])
        logits, labels = np.asarray(test.predictions), np.asarray(test.label_ids)
        found: dict[str, Any] = {"validation": paired_scores(validation.predictions, validation.label_ids)["accuracy"]}
        metrics = paired_scores(logits, labels)
        found |= {"test": metrics["accuracy"], "metrics": metrics | self.fidelity(logits, labels)}
        return found | self.on_degraded(trainer)

    def on_degraded(self, trainer: DistillationTrainer) -> dict[str, Any]:
        """Accuracy on degraded images: of each degradation and severity, and the mean over all."""
        by_name: dict[str, list[float]] = {name: [] for name in DEGRADATIONS}
        for (name, _), images in self.degraded.items():
            output = trainer.predict(images)
            by_name[name].append(paired_scores(output.predictions, output.label_ids)["accuracy"])
        return {"degraded": fmean(a for values in by_name.values() for a in values), "by_degradation": by_name}

    def fidelity(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """How the student's answers on the test images compare with the teacher's."""
        if self.taught is None:
            model: Any = self.teacher.classifier()
            runner = self.trainer(model, [{"name": "task"}], 1e-3, 0)
            output = runner.predict(self.held_out["test"][1])
            self.taught = np.asarray(output.predictions), np.asarray(output.label_ids)
            print({"teacher": paired_scores(*self.taught)}, flush=True)
        theirs = self.taught[0]
        found = {}
        for name in FIDELITY:
            further = {"labels": labels} if name == "agreement_teacher_wrong" else {}
            found |= METRICS[name]().compute(predictions=logits, references=theirs, **further)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="a small model that was trained on other images")
    parser.add_argument("--teacher", required=True, help="a larger classifier, fine-tuned on the dataset")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--file", type=Path, default=Path("runs/tl_kd.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--degraded_images", type=int, default=250)
    options = parse_quietly(parser)
    run = Transfer(options)
    setting = {"dataset": run.data.source} | {k: getattr(options, k) for k in ("steps", "batch", "degraded_images")}
    study = Study(options.file, run, setting)
    plain = {"TL": alone("TL", True), "scratch": alone("scratch", False)}
    study.complete(plain.values(), options.seeds[:1])
    rates = {name: study.chosen(arm, options.seeds[0]) for name, arm in plain.items()}
    arms = [
        plain["TL"],
        taught("TL + KD", True, rates["TL"]),
        taught("KD", False, rates["scratch"]),
        plain["scratch"],
    ]
    study.complete(arms, options.seeds)
    print(study.table(arms, options.seeds, "TL", ("test", "degraded")) + "\n")
    taken = {arm.name: study.taken(arm, options.seeds) for arm in arms}
    names = list(taken["TL"][0]["metrics"])
    print("| arm | " + " | ".join(names) + " |\n| --- |" + " ---: |" * len(names))
    for arm, lines in taken.items():
        print(f"| {arm} | " + " | ".join(f"{fmean(line['metrics'][n] for line in lines):.3f}" for n in names) + " |")
    kinds = list(DEGRADATIONS)
    print("\n| arm | " + " | ".join(kinds) + " |\n| --- |" + " ---: |" * len(kinds))
    for arm, lines in taken.items():
        cells = [fmean(a for line in lines for a in line["by_degradation"][kind]) for kind in kinds]
        print(f"| {arm} | " + " | ".join(f"{100 * cell:.1f} %" for cell in cells) + " |")


if __name__ == "__main__":
    main()
