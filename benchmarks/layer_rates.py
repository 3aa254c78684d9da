"""Do learning rates per layer that follow the discrepancy beat their controls?

    python benchmarks/layer_rates.py --source <cifar10 ViT> --teacher <cifar10 ResNet> --dataset <cifar10 folder>
    python benchmarks/layer_rates.py ... --seeds 1 2 3 4 5 --steps 1000        # a larger one

The first takes about 40 minutes (28 runs) on one core. The student is pre-trained: `--layers` blocks of the
source (make_student), with a new head where the source's classes are others. It learns the target under a teacher of
another architecture, because layers cut out of their own teacher are all about equally far from it, and every
multiplier stays near 1. All arms: the same initial weights, images, order and steps, and the same total rate (the
parameter-weighted mean of the blocks' multipliers is 1). Each arm has two trials on the validation split with the
first seed: two base rates; for llrd two decays, at the base rate that uniform took (its "weight" in the table is the
decay). The test split is read once a run and never chosen by. The list of runs holds the last multipliers of each;
beside it lies a picture of each measured run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PrinterCallback, set_seed

sys.path.insert(0, str(Path(__file__).parent))
from study import Arm, Study, parse_quietly

from hf_kdtl import DistillationConfig, DistillationTrainer, make_student
from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.evaluation.metrics import compute_metrics
from hf_kdtl.models import Teacher
from hf_kdtl.reports.figures.layer_rates import layer_rates_figure

# A term for each pair of layers, so that loss_weight has something to weigh; the same in every arm.
OBJECTIVES = [
    {"name": "task", "weight": 0.1},
    {"name": "logit_kd", "weight": 0.9, "temperature": 4.0},
    {"name": "attention_transfer", "weight": 100.0},
]
MEASURED = {
    "discrepancy, attention": {"mode": "discrepancy", "source": "attention"},
    "discrepancy, jacobian": {"mode": "discrepancy", "source": "jacobian"},
    "permuted": {"mode": "permuted", "source": "attention"},
    "frozen": {"mode": "frozen", "source": "attention"},
    "loss_weight": {"mode": "loss_weight", "source": "attention"},
}


def entries(layer_rates: dict[str, Any], rate: float) -> list[dict[str, Any]]:
    """What a run is made of, as the study keeps it: the rates go beside the objectives."""
    return [*OBJECTIVES, {"layer_rates": layer_rates, "learning_rate": rate}]


def uniform(rates: tuple[float, ...]) -> Arm:
    """The reference. An arm's weight is its base learning rate."""
    return Arm("uniform", lambda rate: entries({"mode": "uniform"}, rate), rates)


def others(rates: tuple[float, ...], decays: tuple[float, ...], of_uniform: float) -> list[Arm]:
    """The other arms; `of_uniform` is the base rate that uniform took."""
    arms = [Arm("llrd", lambda decay: entries({"mode": "llrd", "decay": decay}, of_uniform), decays)]
    return arms + [
        Arm(name, lambda rate, layer_rates=layer_rates: entries(layer_rates, rate), rates)
        for name, layer_rates in MEASURED.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="the pre-trained model that the student is cut out of")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--file", type=Path, default=Path("runs/layer_rates.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=["llrd", *MEASURED], help="beside uniform")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--decays", type=float, nargs="+", default=[0.75, 0.9])
    parser.add_argument("--layers", type=int, default=4, help="blocks of the student")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--every", type=int, default=10, help="steps between measurements, short for short runs")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--test_images", type=int, default=2000)
    options = parse_quietly(parser)
    teacher = Teacher.from_pretrained(options.teacher)
    data = load_images(options.dataset)
    processor = AutoImageProcessor.from_pretrained(options.source)
    new_head = {}
    if set(AutoConfig.from_pretrained(options.source).id2label.values()) != set(data.label_names):
        new_head = {"id2label": dict(enumerate(data.label_names))}
        new_head |= {"label2id": {name: i for i, name in enumerate(data.label_names)}}
    held_out = {}
    for split, number in (("validation", options.test_images // 2), ("test", options.test_images)):
        images = getattr(data, split).shuffle(seed=0)
        held_out[split] = ImageDataset(images.select(range(min(number, len(images)))), processor)

    def student() -> Any:
        source = AutoModelForImageClassification.from_pretrained(
            options.source, ignore_mismatched_sizes=True, dtype=torch.float32, **new_head
        )
        return make_student(source, options.layers)

    def run(listed: list[dict[str, Any]], seed: int) -> dict[str, Any]:
        *objectives, rates = listed
        layer_rates = dict(rates["layer_rates"])
        if layer_rates["mode"] not in ("uniform", "llrd", "frozen"):
            layer_rates["every"] = options.every
        set_seed(seed)
        config = DistillationConfig(
            "runs/layer_rates", objectives=objectives, layer_rates=layer_rates, seed=seed, max_steps=options.steps,
            warmup_steps=options.steps // 20, per_device_train_batch_size=options.batch, use_cpu=True,
            per_device_eval_batch_size=250, learning_rate=rates["learning_rate"], lr_scheduler_type="cosine",
            save_strategy="no", report_to=[], logging_steps=options.steps, disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        images = ImageDataset(data.train, processor, augmentation=Augmentation({"crop": 4, "flip": True}), seed=seed)
        trainer = DistillationTrainer(
            student(), config, teacher=teacher, train_dataset=images, processing_class=processor,
            compute_metrics=compute_metrics,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        measured = trainer.layer_rates
        if measured.history:
            name = f"{rates['layer_rates']['mode']}-{rates['layer_rates']['source']}-{rates['learning_rate']:g}-{seed}"
            layer_rates_figure(measured.history, options.file.with_name(f"{options.file.stem}-{name}.png"))
        found = {split: trainer.evaluate(images)["eval_accuracy"] for split, images in held_out.items()}
        last = measured.history[-1:] or [{"multipliers": measured.rates.multipliers}]
        return found | {"last": last[0]}

    setting = {k: v for k, v in vars(options).items() if k not in ("file", "seeds", "arms")}
    study = Study(options.file, run, setting)
    reference = uniform(tuple(options.rates))
    study.complete([reference], options.seeds[:1])
    taken = study.chosen(reference, options.seeds[0])
    arms = [arm for arm in others(tuple(options.rates), tuple(options.decays), taken) if arm.name in options.arms]
    study.complete([reference, *arms], options.seeds)
    print(study.table([reference, *arms], options.seeds, "uniform"))


if __name__ == "__main__":
    main()
