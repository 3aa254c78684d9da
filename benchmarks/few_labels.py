"""Does matching input gradients help when there are few labels (the claim of arXiv 1803.00443)?

    python benchmarks/few_labels.py --teacher <cifar10 ResNet> --dataset <cifar10 parquet folder>  # 90 minutes
    python benchmarks/few_labels.py ... --seeds 1 2 3 4 5 --arms task KD "KD + jacobian"             # a larger one

A small convolutional net (BiT: group norm, here with GELU) from random weights sees 10, 50 and 500 images a class.
All arms: the same initial weights, images, order, augmentation and steps; each weight is the better of two on
validation with the first seed, and the added terms stand beside KD at the weight that was taken for KD. Accuracy is on
clean test images and on the same images with noise. Each number of images has its own list of runs,
<out>_<number>.jsonl; the tables go to stdout and <out>.md, the plot to <out>.png.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from datasets import Dataset
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from sklearn.model_selection import train_test_split
from transformers import BitConfig, BitForImageClassification, PrinterCallback, ViTImageProcessor, set_seed

sys.path.insert(0, str(Path(__file__).parent))
from study import Arm, Study, parse_quietly

from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.data import ImageData, ImageDataset, load_images
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.data.decoding import decode
from hf_kdtl.evaluation.metrics import compute_metrics
from hf_kdtl.models import Teacher

STEPS = {10: 300, 50: 500, 500: 800}  # optimizer steps for so many images a class
NOISE = (0.05, 0.1, 0.2, 0.3)  # standard deviations, of a range of 0 to 1
STUDENT: dict[str, Any] = {
    "embedding_size": 32, "hidden_sizes": [64, 128, 256], "depths": [1, 1, 1], "layer_type": "preactivation",
    "hidden_act": "gelu", "num_groups": 8,
}  # fmt: skip
KD_WEIGHTS = (0.9, 3.0)


def kd(weight: float) -> list[dict[str, Any]]:
    """Labels, and the teacher's logits."""
    return [{"name": "task", "weight": 0.1}, {"name": "logit_kd", "weight": weight, "temperature": 4.0}]


def arms(kd_weight: float) -> list[Arm]:
    """All arms; the added terms stand beside KD at this weight."""
    return [
        Arm("task", lambda weight: [{"name": "task", "weight": weight}]),
        Arm("KD", kd, KD_WEIGHTS),
        Arm("KD + jacobian", lambda w: [*kd(kd_weight), {"name": "jacobian", "weight": w}], (0.3, 3.0)),
        Arm(
            "KD + attention_transfer",
            lambda w: [*kd(kd_weight), {"name": "attention_transfer", "weight": w}],
            (10.0, 100.0),
        ),
    ]


def few(split: Dataset, images: int, seed: int) -> Dataset:
    """So many images of each class."""
    labels = split["label"][:]
    size = images * split.features["label"].num_classes
    rows, _ = train_test_split(np.arange(len(labels)), train_size=size, stratify=labels, random_state=seed)
    return split.select(np.sort(rows))


def noisy(split: Dataset, std: float) -> Dataset:
    """The images with Gaussian noise on their 8-bit values, rounded and clipped, the same at every call."""
    draws = np.random.default_rng(round(1000 * std))

    def image(index: int, row: dict[str, Any]) -> dict[str, Any]:
        pixels = np.asarray(decode(row["bytes"] or row["path"], f"image {index}"), np.float64)
        pixels = np.clip(np.rint(pixels + draws.normal(0, 255 * std, pixels.shape)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(file := io.BytesIO(), "png")
        return {"bytes": file.getvalue(), "path": None}

    images = [image(index, row) for index, row in enumerate(split["image"])]
    return Dataset.from_dict({name: split[name][:] for name in split.column_names} | {"image": images}, split.features)


class FewLabels:
    """Runs on so many images of each class: what `Study` calls."""

    def __init__(self, options: argparse.Namespace, images: int, data: ImageData, teacher: Teacher):
        self.options, self.images, self.data, self.teacher = options, images, data, teacher
        self.processor = ViTImageProcessor(size={"height": 32, "width": 32})
        test = data.test.shuffle(seed=0).select(range(options.test_images))
        splits = {"validation": data.validation.shuffle(seed=0).select(range(options.test_images // 2)), "test": test}
        splits |= {f"noise {std}": noisy(test, std) for std in NOISE}
        self.held_out = {name: ImageDataset(split, self.processor) for name, split in splits.items()}

    def __call__(self, objectives: list[dict[str, Any]], seed: int) -> dict[str, Any]:
        set_seed(seed)
        names = dict(enumerate(self.data.label_names))
        student = BitForImageClassification(BitConfig(**STUDENT, id2label=names))
        config = DistillationConfig(
            "runs/few_labels", objectives=objectives, seed=seed, max_steps=STEPS[self.images], warmup_steps=30,
            per_device_train_batch_size=self.options.batch, per_device_eval_batch_size=250, use_cpu=True,
            learning_rate=self.options.learning_rate, weight_decay=0.05, lr_scheduler_type="cosine",
            save_strategy="no", report_to=[], logging_steps=10_000, disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        augmentation = Augmentation({"crop": 4, "flip": True})
        train = few(self.data.train, self.images, seed)
        trainer = DistillationTrainer(
            student, config, train_dataset=ImageDataset(train, self.processor, augmentation=augmentation, seed=seed),
            teacher=self.teacher if len(objectives) > 1 else None, processing_class=self.processor,
            compute_metrics=compute_metrics,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        found = {name: trainer.evaluate(images)["eval_accuracy"] for name, images in self.held_out.items()}
        return found | {"noisy": mean(found[f"noise {std}"] for std in NOISE)}


def plot(lines: dict[int, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Accuracy against images a class: mean over seeds and its standard deviation, clean beside noisy."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {"test": "clean test images", "noisy": f"Gaussian noise, mean over {', '.join(map(str, NOISE))}"}
    for axes, (measure, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        names = list(next(iter(lines.values())))
        for place, (name, colour) in enumerate(zip(names, ("#7f7f7f", "#E69F00", "#0072B2", "#009E73"), strict=False)):
            values = [[100 * line[measure] for line in by_arm[name]] for by_arm in lines.values()]
            spread = [stdev(found) if len(found) > 1 else 0.0 for found in values]
            places = [images * 1.06 ** (place - 1.5) for images in lines]  # beside each other, to be seen
            axes.errorbar(places, [mean(v) for v in values], spread, label=name, color=colour, marker="o", capsize=3)
        axes.set(xscale="log", xlabel="images a class", title=title)
        axes.set_xticks(list(lines), [str(images) for images in lines], minor=False)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.minorticks_off()
    figure.axes[0].set_ylabel("test accuracy, %")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/few_labels"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--images", type=int, nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in arms(1.0)])
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--test_images", type=int, default=2000)
    options = parse_quietly(parser)
    teacher, data = Teacher.from_pretrained(options.teacher), load_images(options.dataset)
    shared = {k: v for k, v in vars(options).items() if k not in ("out", "seeds", "arms", "images")}
    lines, tables = {}, []
    for images in options.images:
        setting = shared | {"images": images, "steps": STEPS[images], "student": STUDENT, "noise": NOISE}
        file = options.out.with_name(f"{options.out.name}_{images}.jsonl")
        study = Study(file, FewLabels(options, images, data, teacher), setting)
        reference = arms(1.0)[1]
        beside = arms(study.chosen(reference, options.seeds[0]))
        wanted = [arm for arm in beside if arm.name in (*options.arms, "KD")]
        study.complete(wanted, options.seeds)
        tables.append(f"### {images} images a class, {STEPS[images]} steps\n")
        tables.append(study.table(wanted, options.seeds, "KD", ("test", "noisy")) + "\n")
        lines[images] = {arm.name: study.taken(arm, options.seeds) for arm in wanted}
    options.out.with_suffix(".md").write_text("\n".join(tables))
    print("\n".join(tables))
    plot(lines, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
