"""Does matching attention or features help beside logit distillation? A cut student recovers under its teacher.

    python benchmarks/features.py --teacher <cifar10 ViT> --dataset <cifar10 parquet folder>     # about 60 minutes
    python benchmarks/features.py ... --seeds 1 2 3 4 5 --steps 500                               # a larger one

The student is the teacher with every second block (make_student). All arms: the same initial weights, images, order
and steps; each weight is the better of two on the validation split with the first seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parent))
from study import Arm, Study, parse_quietly

from hf_kdtl import DistillationConfig, DistillationTrainer, make_student
from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.evaluation.metrics import compute_metrics
from hf_kdtl.models import Teacher

KD = [{"name": "task", "weight": 0.1}, {"name": "logit_kd", "weight": 0.9, "temperature": 4.0}]


def beside(name: str, **options: Any):
    """logit KD, and beside it one more term."""
    return lambda weight: [*KD, {"name": name, "weight": weight, **options}]


def instead(name: str, **options: Any):
    """Another comparison of the class outputs, in the place of logit KD."""
    return lambda weight: [KD[0], {"name": name, "weight": weight, **options}]


ARMS = [
    Arm("logit_kd", lambda weight: [KD[0], KD[1] | {"weight": weight}], (0.9, 2.0)),
    Arm("+ attention_map", beside("attention_map"), (1.0, 10.0)),
    Arm("+ attention_transfer", beside("attention_transfer"), (100.0, 1000.0)),
    Arm("+ hidden_states", beside("hidden_states"), (0.3, 3.0)),
    Arm("+ relation", beside("relation"), (1.0, 10.0)),
    Arm("decoupled_kd", instead("decoupled_kd"), (0.1, 0.5)),
    Arm("dist", instead("dist", temperature=4.0), (0.3, 1.0)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--file", type=Path, default=Path("runs/features.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--test_images", type=int, default=2000)
    options = parse_quietly(parser)
    teacher = Teacher.from_pretrained(options.teacher)
    data = load_images(options.dataset)
    processor = teacher.processing_class
    held_out = {
        split: ImageDataset(getattr(data, split).shuffle(seed=0).select(range(number)), processor)
        for split, number in (("validation", options.test_images // 2), ("test", options.test_images))
    }

    def run(objectives: list[dict[str, Any]], seed: int) -> dict[str, Any]:
        set_seed(seed)
        student = make_student(teacher.classifier(), options.layers)
        config = DistillationConfig(
            "runs/features", objectives=objectives, seed=seed, max_steps=options.steps, warmup_steps=10,
            per_device_train_batch_size=options.batch, per_device_eval_batch_size=250, use_cpu=True,
            learning_rate=options.learning_rate, lr_scheduler_type="cosine", save_strategy="no", report_to=[],
            logging_steps=options.steps, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        images = ImageDataset(data.train, processor, augmentation=Augmentation({"crop": 4, "flip": True}), seed=seed)
        trainer = DistillationTrainer(
            student, config, teacher=teacher, train_dataset=images, processing_class=processor,
            compute_metrics=compute_metrics,
        )  # fmt: skip
        trainer.train()
        return {split: trainer.evaluate(images)["eval_accuracy"] for split, images in held_out.items()}

    setting = {k: v for k, v in vars(options).items() if k not in ("file", "seeds", "arms")}
    study = Study(options.file, run, setting)
    arms = [arm for arm in ARMS if arm.name in options.arms]
    study.complete(arms, options.seeds)
    print(study.table(arms, options.seeds, arms[0].name))


if __name__ == "__main__":
    main()
