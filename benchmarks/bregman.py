"""What Bregman representations explain, and whether a student that imports one learns more.

    python benchmarks/bregman.py explained --vit <cifar10 ViT> --resnet <cifar10 ResNet> --dataset <cifar10 folder>
    python benchmarks/bregman.py students --resnet <cifar10 ResNet> --dataset <cifar10 folder>     # about 30 minutes
    python benchmarks/bregman.py students ... --seeds 1 2 3 4 5 --steps 1000                       # a larger one

explained: the share of the divergence from the mean that k directions take away, on images that were not fitted, for
a teacher's class probabilities, pooled features and attention rows. Beside Bregman: ordinary PCA of the outputs (of
probabilities the reconstruction is clipped from below and divided by its sum; the floor, of 1e-1 to 1e-8, is the best
on the fitted images), and PCA of the pre-activations (log y, centred), its reconstruction sent through soft-max, with
its own coefficients and with those of least divergence. All are measured by the same divergence, against what the mean
output leaves. With the identity all of them are one.

students: KD, and beside it a hint at the last block, or an imported layer: the teacher's class probabilities, or what
its classifier reads. A small convolutional net (BiT with GELU) from random weights. All arms: the same initial
weights, images, order and steps; each weight is the better of two on validation with the first seed, and the added
terms stand beside KD at the weight that was taken for KD. A bregman term's weight is in units of 1 / the divergence
that the mean alone leaves. The test split is read once a run and never chosen by.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from transformers import BitConfig, BitForImageClassification, PrinterCallback, ViTImageProcessor, set_seed

sys.path.insert(0, str(Path(__file__).parent))
from few_labels import KD_WEIGHTS, STUDENT, kd
from study import Arm, Study, parse_quietly

import hf_kdtl
from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.data import ImageData, ImageDataset, load_images
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.evaluation.metrics import compute_metrics
from hf_kdtl.functional.bregman import fit
from hf_kdtl.functional.links import LINKS, Link, coefficients
from hf_kdtl.models import Teacher
from hf_kdtl.models.bregman.layer import BregmanLayer, Provenance
from hf_kdtl.models.bregman.outputs import LINKS_OF, needs_of, outputs_of

FLOORS = [10.0**-power for power in range(1, 9)]
TOLERANCE = 1e-5
LOOKS = {  # of each way to represent, in the order of `_curve`
    "Bregman": ("#0072B2", "-"), "PCA of the outputs": ("#E69F00", "--"), "PCA before f": ("#009E73", ":"),
    "PCA before f, best coefficients": ("#CC79A7", "-."),
}  # fmt: skip


@torch.no_grad()
def outputs(teacher: Teacher, split: Any, of: str, layer: int | None, images: int) -> Tensor:
    """The outputs of `images` of a split, drawn with seed 0, in float64, (n, d)."""
    shown = ImageDataset(split.shuffle(seed=0).select(range(images)), teacher.processing_class)
    rows = []
    for first in range(0, images, 250):
        batch = shown.__getitems__(list(range(first, min(first + 250, images))))
        pixels = torch.stack([row["pixel_values"] for row in batch])
        rows.append(outputs_of(teacher.capture(pixels, needs_of(of, layer)), of, layer).double())
    return torch.cat(rows)


# ---- Study A ----


def principal(y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mean and the first k principal directions of rows, (d,) and (d, k)."""
    mean = y.mean(0)
    return mean, torch.linalg.eigh((y - mean).T @ (y - mean)).eigenvectors[:, -k:]


def projected(y: Tensor, mean: Tensor, directions: Tensor) -> Tensor:
    """Rows brought to mean + span."""
    return mean + (y - mean) @ directions @ directions.T


def distributions(y: Tensor, floor: float) -> Tensor:
    """Rows clipped from below and divided by their sum."""
    clipped = y.clamp(min=floor)
    return clipped / clipped.sum(-1, keepdim=True)


def by_pca(link: Link, fitted: Tensor, others: Tensor, k: int) -> float:
    """Mean divergence that k principal components of the outputs leave on the other images."""
    mean, directions = principal(fitted, k)
    if not link.coupled:
        return link.divergence(projected(others, mean, directions), others).mean().item()

    def left(y: Tensor, floor: float) -> float:
        return link.divergence(distributions(projected(y, mean, directions), floor).log(), y).mean().item()

    return left(others, min(FLOORS, key=lambda floor: left(fitted, floor)))


def by_pca_before(link: Link, fitted: Tensor, others: Tensor, k: int) -> tuple[float, float]:
    """Mean divergence that k principal components of the pre-activations leave on the other images: with the
    coefficients of PCA, and with those of least divergence."""
    before, other = (link.inverse(y.clamp(min=1e-30) if link.coupled else y) for y in (fitted, others))
    mean, directions = principal(before, k)
    best = coefficients(link, directions, mean, others) @ directions.T + mean
    left = [link.divergence(a, others).mean().item() for a in (projected(other, mean, directions), best)]
    return left[0], left[1]


def explained(options: argparse.Namespace) -> None:
    data = load_images(options.dataset)
    cases = [
        ("ResNet", options.resnet, "probabilities", None), ("ResNet", options.resnet, "pooled", None),
        ("ViT", options.vit, "probabilities", None), ("ViT", options.vit, "pooled", None),
        ("ViT", options.vit, "attention", 3), ("ViT", options.vit, "attention", 7),
    ]  # fmt: skip
    table = [f"| outputs | k | {' | '.join(LOOKS)} | divergence from the mean |", f"| --- |{' ---: |' * 6}"]
    curves = {}
    for name, path, of, layer in cases:
        teacher, link = Teacher.from_pretrained(path), LINKS[LINKS_OF[of][0]]
        fitted = outputs(teacher, data.train, of, layer, options.images)
        others = outputs(teacher, data.validation, of, layer, options.images // 2)
        title = f"{name}, {of}" + (f" of block {layer}" if layer is not None else "")
        curves[title] = _curve(link, fitted, others)
        for k, base, *shares in curves[title]:
            table.append(f"| {title} | {k} | " + " | ".join(f"{100 * s:.2f} %" for s in shares) + f" | {base:.4f} |")
            print(table[-1], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".md").write_text("\n".join(table) + "\n")
    plot(curves, options.out.with_suffix(".png"))


def _curve(link: Link, fitted: Tensor, others: Tensor) -> list[tuple[float, ...]]:
    """(k, divergence from the mean, the shares explained by Bregman and the others) for rising k."""
    found = []
    for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        if k > fitted.shape[1] - link.coupled:
            break
        rep = fit(fitted, k, link, tolerance=TOLERANCE)
        base = link.divergence(rep.mean, others).mean().item()
        left = link.divergence(rep.encode(others) @ rep.directions.T + rep.mean, others).mean().item()
        all_left = left, by_pca(link, fitted, others, k), *by_pca_before(link, fitted, others, k)
        found.append((k, base, *(1 - value / base for value in all_left)))
    return found


def plot(curves: dict[str, list[tuple[float, ...]]], path: Path) -> None:
    """Share explained against k: one panel for each kind of outputs."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, points) in zip(figure.subplots(2, 3).flat, curves.items(), strict=True):
        for column, (name, (colour, line)) in enumerate(LOOKS.items(), start=2):
            shares = [100 * point[column] for point in points]
            axes.plot([point[0] for point in points], shares, line, color=colour, label=name, marker="o", markersize=3)
        axes.set(title=title, xlabel="directions k", ylabel="divergence explained, %", ylim=(0, 102))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].legend(frameon=False, loc="lower right")  # its lines are one, at the upper left
    figure.savefig(path, dpi=150)


# ---- Study B ----


def layer_of(teacher: Teacher, data: ImageData, of: str, k: int, options: argparse.Namespace) -> tuple[str, float]:
    """The folder of a fitted representation, made if it is not there, and the divergence that its mean leaves."""
    folder = options.out.parent / f"bregman-{of}-{k}-{options.images}"
    if not Path(folder, "representation.json").is_file():
        y = outputs(teacher, data.train, of, None, options.images)
        facts = {"width": y.shape[1], "dataset": "train, drawn with seed 0", "images": len(y)}
        provenance = Provenance.of_source(teacher, of, None, version=hf_kdtl.__version__, **facts)
        BregmanLayer(fit(y, k, LINKS_OF[of][0], tolerance=TOLERANCE), provenance).save(folder)
    found = BregmanLayer.load(folder).representation
    print(f"{of}: k = {k} explains {100 * found.explained:.2f} % of {found.baseline:.4f} on the fitted images")
    return str(folder), found.baseline


def arms(kd_weight: float, layers: dict[str, tuple[str, float]]) -> list[Arm]:
    """All arms; the added terms stand beside KD at this weight. `layers`: {of: folder, divergence from the mean}."""

    def beside(entry: dict[str, Any], unit: float = 1.0) -> Any:
        return lambda weight: [*kd(kd_weight), entry | {"weight": weight * unit}]

    hint = {"name": "hidden_states", "layers": "last"}
    found = [Arm("KD", kd, KD_WEIGHTS), Arm("KD + hint", beside(hint), (0.3, 3.0))]
    for of, (folder, baseline) in layers.items():
        entry = {"name": "bregman", "representation": folder}
        found.append(Arm(f"KD + bregman, {of}", beside(entry, 1 / baseline), (0.3, 3.0)))
    return found


def students(options: argparse.Namespace) -> None:
    teacher, data = Teacher.from_pretrained(options.resnet), load_images(options.dataset)
    numbers = {"probabilities": options.k_probabilities, "pooled": options.k_pooled}
    layers = {of: layer_of(teacher, data, of, k, options) for of, k in numbers.items()}
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    held_out = {
        split: ImageDataset(getattr(data, split).shuffle(seed=0).select(range(number)), processor)
        for split, number in (("validation", options.test_images // 2), ("test", options.test_images))
    }

    def run(objectives: list[dict[str, Any]], seed: int) -> dict[str, Any]:
        set_seed(seed)
        student = BitForImageClassification(BitConfig(**STUDENT, id2label=dict(enumerate(data.label_names))))
        config = DistillationConfig(
            "runs/bregman", objectives=objectives, seed=seed, max_steps=options.steps,
            warmup_steps=options.steps // 20, per_device_train_batch_size=options.batch, use_cpu=True,
            per_device_eval_batch_size=250, learning_rate=options.learning_rate, weight_decay=0.05,
            lr_scheduler_type="cosine", save_strategy="no", report_to=[], logging_steps=options.steps,
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        images = ImageDataset(data.train, processor, augmentation=Augmentation({"crop": 4, "flip": True}), seed=seed)
        trainer = DistillationTrainer(
            student, config, teacher=teacher, train_dataset=images, processing_class=processor,
            compute_metrics=compute_metrics,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return {split: trainer.evaluate(images)["eval_accuracy"] for split, images in held_out.items()}

    setting = {k: v for k, v in vars(options).items() if k not in ("out", "seeds", "arms", "study", "vit")}
    study = Study(options.out.with_suffix(".jsonl"), run, setting | {"student": STUDENT})
    first = arms(1.0, layers)[0]
    study.complete([first], options.seeds[:1])
    chosen = [arm for arm in arms(study.chosen(first, options.seeds[0]), layers) if arm.name in (*options.arms, "KD")]
    study.complete(chosen, options.seeds)
    print(study.table(chosen, options.seeds, "KD"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("explained", "students"))
    parser.add_argument("--resnet", required=True)
    parser.add_argument("--vit", help="for explained")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/bregman/study"))
    parser.add_argument("--images", type=int, default=4000, help="that the representations are fitted on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    names = [arm.name for arm in arms(1.0, dict.fromkeys(("probabilities", "pooled"), ("", 1.0)))]
    parser.add_argument("--arms", nargs="+", default=names)
    parser.add_argument("--k_probabilities", type=int, default=4)
    parser.add_argument("--k_pooled", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--test_images", type=int, default=2000)
    options = parse_quietly(parser)
    if options.study == "explained" and not options.vit:
        parser.error("explained compares two teachers: type --vit <cifar10 ViT> too.")
    explained(options) if options.study == "explained" else students(options)


if __name__ == "__main__":
    main()
