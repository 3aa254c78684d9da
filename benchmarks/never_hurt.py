"""Does a regulariser drawn from a bad source hurt, and does the rule take the harm away without taking the gain?

    python benchmarks/never_hurt.py --good <ViT> --bad <ViT> --dataset <caltech99 parquet folder>     # 40 minutes
    python benchmarks/never_hurt.py ... --methods l2_sp delta lwf --rules plain one_sided orthogonal pcgrad \\
        --sources good bad random --seeds 1 2 3 4 5                                                   # a larger one

The claim of arXiv 1911.07489. A student begins with the weights of a source and learns the target with a new head,
alone (fine-tuning) or held to the source by a regulariser, whose gradient is added as it is (plain) or by a gradient
rule. All arms of a source: the same initial weights, images, order, augmentation and steps. Each arm has two trials on
the validation split with the first seed: fine-tuning two learning rates; a regulariser two weights, at the rate that
fine-tuning of the same source took. The test split is read once a run and never chosen by.

The good source was trained on another data set of photographs, the bad one on the same with shuffled labels; random is
no source at all. The regularisers: l2_sp (weights), delta (features), lwf (answers of the source's own head).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PrinterCallback, set_seed

sys.path.insert(0, str(Path(__file__).parent))
from study import Arm, Study, parse_quietly

from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.evaluation.metrics import compute_metrics
from hf_kdtl.reports.figures.gradient_rule import gradient_rule_figure

RATES = (3e-4, 1e-3)
REGULARISERS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "l2_sp": ({"name": "l2_sp"}, (0.003, 0.03)),
    "delta": ({"name": "delta"}, (0.1, 1.0)),
    "lwf": ({"name": "lwf", "source": "start"}, (0.3, 1.0)),
}
RULES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "one_sided": {"name": "never_hurt", "form": "one_sided"},
    "orthogonal": {"name": "never_hurt", "form": "orthogonal"},
    "pcgrad": {"name": "pcgrad"},
    "layer_local": {"name": "layer_local"},  # with delta alone, which has a term for each block
}


def fine_tuning(source: str) -> Arm:
    """The reference of a source. Its weight is the learning rate."""
    return Arm(f"fine-tuning, {source}", lambda rate: entries(source, None, None, rate), RATES)


def regularised(source: str, method: str, rule: str, rate: float) -> Arm:
    """A regulariser under a rule, at the learning rate that fine-tuning took."""
    entry, weights = REGULARISERS[method]
    return Arm(
        f"{method} {rule}, {source}",
        lambda weight: entries(source, entry | {"weight": weight}, RULES[rule], rate),
        weights,
    )


def entries(source: str, regulariser: dict[str, Any] | None, rule: dict[str, Any] | None, rate: float) -> list[dict]:
    """What a run is made of, as the study keeps it: source, rule and rate go beside the objectives."""
    beside = {"source": source, "gradient_rule": rule, "learning_rate": rate}
    return [{"name": "task"}, *([regulariser] if regulariser else []), beside]


class NeverHurt:
    """One run: what `Study` calls."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.data = options, load_images(options.dataset)
        self.paths = {"good": options.good, "bad": options.bad, "random": None}
        self.processor = AutoImageProcessor.from_pretrained(options.good)
        self.held_out = {
            split: ImageDataset(getattr(self.data, split), self.processor) for split in ("validation", "test")
        }

    def student(self, source: str) -> Any:
        """The source with a new head; after `set_seed` the same."""
        names = dict(enumerate(self.data.label_names))
        classes = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
        if self.paths[source] is None:
            config = AutoConfig.from_pretrained(self.options.good, **classes)
            return AutoModelForImageClassification.from_config(config)
        return AutoModelForImageClassification.from_pretrained(
            self.paths[source], ignore_mismatched_sizes=True, dtype=torch.float32, **classes
        )

    def __call__(self, listed: list[dict[str, Any]], seed: int) -> dict[str, Any]:
        *objectives, beside = listed
        source, rule = beside["source"], beside["gradient_rule"]
        set_seed(seed)
        student = self.student(source)
        held = any(entry["name"] in REGULARISERS for entry in objectives)
        config = DistillationConfig(
            "runs/never_hurt", objectives=objectives, gradient_rule=rule, seed=seed, max_steps=self.options.steps,
            start=self.paths[source] if held else None,
            warmup_steps=self.options.steps // 20, per_device_train_batch_size=self.options.batch, use_cpu=True,
            per_device_eval_batch_size=250, learning_rate=beside["learning_rate"], weight_decay=0.0,
            lr_scheduler_type="cosine", save_strategy="no", report_to=[], logging_steps=10, disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        augmentation = Augmentation({"crop": 4, "flip": True})
        trainer = DistillationTrainer(
            student, config, processing_class=self.processor, compute_metrics=compute_metrics,
            train_dataset=ImageDataset(self.data.train, self.processor, augmentation=augmentation, seed=seed),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        found: dict[str, Any] = {
            split: trainer.evaluate(images)["eval_accuracy"] for split, images in self.held_out.items()
        }
        if (gradients := trainer.gradient_rule) is not None:
            name = f"{source}-{objectives[-1]['name']}-{'-'.join(map(str, rule.values()))}-{seed}.png"
            gradient_rule_figure(gradients.history, self.options.file.with_name(f"never_hurt-{name}"))
            found["conflict"] = summary(gradients.history)
        return found


def summary(history: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the run of what the rule met."""
    known = {key: [entry[key] for entry in history if entry[key] is not None] for key in ("removed", "task_step")}
    cosines = [e["all_layers"]["cosine"] for e in history if e["all_layers"]["cosine"] is not None]
    against = [step < 0 for step in known["task_step"]]
    return {
        "cosine": fmean(cosines or [0.0]),
        "removed": fmean(known["removed"] or [0.0]),
        "steps against the task": fmean(against or [0.0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--good", required=True, help="a model that was trained on other images")
    parser.add_argument("--bad", required=True, help="the same architecture, trained on shuffled labels")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--file", type=Path, default=Path("runs/never_hurt.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--sources", nargs="+", default=["good", "bad"], choices=["good", "bad", "random"])
    parser.add_argument("--methods", nargs="+", default=["l2_sp"], choices=list(REGULARISERS))
    parser.add_argument("--rules", nargs="+", default=["plain", "one_sided", "orthogonal"], choices=list(RULES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    options = parse_quietly(parser)
    run = NeverHurt(options)
    setting = {"dataset": run.data.source, "steps": options.steps, "batch": options.batch}
    study = Study(options.file, run, setting)
    tables: list[str] = []
    arms: dict[str, list[Arm]] = {}
    for source in options.sources:
        reference = fine_tuning(source)
        study.complete([reference], options.seeds[:1])
        rate = study.chosen(reference, options.seeds[0])
        arms[source] = [
            reference,
            *(regularised(source, method, rule, rate) for method in options.methods for rule in options.rules),
        ]
    study.complete([arm for some in arms.values() for arm in some], options.seeds)
    for some in arms.values():
        tables += [study.table(some, options.seeds, some[0].name), ""]
        for arm in some:
            met = [line["conflict"] for line in study.taken(arm, options.seeds) if "conflict" in line]
            if met:
                means = ", ".join(f"{key} {fmean(line[key] for line in met):.2f}" for key in met[0])
                tables.append(f"- {arm.name}: {means}")
        tables.append("")
    print("\n".join(tables))


if __name__ == "__main__":
    main()
