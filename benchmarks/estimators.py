"""How wrong each estimator's parameter gradient is, by its step and precision: what the default steps follow from.

    python benchmarks/estimators.py                       # ViTs with spread weights, 32 px: 2 minutes on one core
    python benchmarks/estimators.py --image 224 --images 2  # 49 times the pixels: 2 minutes
    python benchmarks/estimators.py --kind resnet         # ReLU: kinks; a minute
    python benchmarks/estimators.py --student <a saved model> --dataset <its images>

Error: || g - g64 || / || g64 || of the gradient of an objective by all of the student's parameters, where g64 is by
double backward in float64: same weights, images and draws. A finite difference along random directions is compared
with the exact derivatives along the same directions; what one direction deviates from all of them is reported apart,
and is no error: it has mean 0. bfloat16 is autocast over float32 weights.

Without `--student` the pair is that of step_cost.py, its weights scaled until the logits spread as a trained net's do.
With it, the teacher is the student with every weight times 1 + 0.1 N(0, 1). Prints a table; draws --plot.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

matplotlib.use("Agg")
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).parent))
from step_cost import CLASSES, vit

from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.functional.random import Draws
from hf_kdtl.models.forward.capture import Needs
from hf_kdtl.models.forward.perturbations import Direction
from hf_kdtl.models.run_context import RunContext
from hf_kdtl.models.teachers.teacher import Teacher
from hf_kdtl.objectives.base import Objective
from hf_kdtl.objectives.hessian import Hessian
from hf_kdtl.objectives.jacobian import Jacobian
from hf_kdtl.trainer.distiller import Distiller, micro_batch_counts

STEPS = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0]
PRECISIONS = ("float32", "bfloat16")


class ExactSlopes(Jacobian):
    """Along the directions of finite differences, exactly: what they converge to."""

    def needs(self, plan):
        return Needs(input_gradient=True, order=2, fraction=1.0), Needs(input_gradient=True, order=1, fraction=1.0)

    def slope(self, model, quantity, probe, batch):
        x = model.input_leaf()
        u = Direction("normal", 1.0, probe).draw(batch["draws"], x.detach())
        outputs = quantity(model.logits)
        columns = outputs.unbind(1) if outputs.ndim == 2 else (outputs,)
        slopes = [(model.input_gradient(o, torch.is_grad_enabled()) * u).flatten(1).sum(1) for o in columns]
        return torch.stack(slopes, 1) if outputs.ndim == 2 else slopes[0]


class Row(NamedTuple):
    """One estimator of one objective. `build` takes a step, which exact ones do not read."""

    build: Callable[[float], Objective]
    exact: bool = False


class Study(NamedTuple):
    """The estimators of one objective, and what they are measured against."""

    reference: Objective
    rows: dict[str, Row]
    kinks: bool = True  # whether it means anything for a net with kinks


def studies() -> dict[str, Study]:
    def split(distance):
        return {
            "vjp": Row(lambda s: Jacobian(distance=distance, estimator="vjp"), True),
            "split, forward mode": Row(lambda s: Jacobian(distance=distance, estimator="split"), True),
            "split, central": Row(lambda s: Jacobian(distance=distance, estimator="split", central=True, step=s)),
        }

    def along(**options):
        options |= {"estimator": "finite_difference"}
        return {
            "one-sided": Row(lambda s: Jacobian(**options, step=s)),
            "central": Row(lambda s: Jacobian(**options, step=s, central=True)),
        }

    top: dict[str, Any] = {"distance": "squared"}
    fisher: dict[str, Any] = {"distance": "fisher", "output": "all"}
    curvature: dict[str, Any] = {"what": "curvature", "estimator": "finite_difference"}
    return {
        "jacobian, normalized": Study(Jacobian(estimator="vjp"), split("normalized")),
        "jacobian, squared": Study(Jacobian(**top, estimator="vjp"), split("squared")),
        "jacobian, squared, along a direction": Study(ExactSlopes(**top, estimator="finite_difference"), along(**top)),
        "jacobian, fisher, along a direction": Study(ExactSlopes(**fisher), along(**fisher)),
        "hessian, hvp, normalized": Study(Hessian(), {"hvp": Row(lambda s: Hessian(), True)}, False),
        "hessian, hvp, squared": Study(
            Hessian(distance="squared"), {"hvp": Row(lambda s: Hessian(distance="squared"), True)}, False
        ),
        "hessian, curvature": Study(
            Hessian(what="curvature"),
            {
                "hvp": Row(lambda s: Hessian(what="curvature"), True),
                "second difference": Row(lambda s: Hessian(**curvature, step=s)),
            },
            False,
        ),
    }


class Bench:
    """Student, teacher and images, and the parameter gradient of an objective on them."""

    def __init__(self, student: nn.Module, teacher: nn.Module, images: Tensor):
        self.student, self.teacher, self.images = student, teacher, images

    def gradient(self, objective: Objective, precision: str, draw: int = 0) -> Tensor:
        dtype = torch.float64 if precision == "float64" else torch.float32
        student = copy.deepcopy(self.student).to(dtype).eval()
        teacher = Teacher(copy.deepcopy(self.teacher).to(dtype))
        name = str(objective.name)
        # A RunContext of nothing: here wrong steps are wanted.
        distiller = Distiller(student, {name: objective}, {name: 1.0}, {"teacher": teacher}, context=RunContext())
        inputs = {"pixel_values": self.images.to(dtype)}
        draws = Draws(0, draw, tuple(range(len(self.images))))
        autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext()
        with autocast:
            loss = distiller(inputs, draws, micro_batch_counts(inputs))["loss"]
        loss.backward()
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in student.parameters()])

    def deviation(self, exact: Objective, along: Objective, draws: int) -> float:
        """Root mean square over draws of what one direction's gradient deviates from that of all, relative to it."""
        target = self.gradient(exact, "float64")
        off = [self.gradient(along, "float64", k) - target for k in range(draws)]
        return float(torch.stack([o.square().sum() for o in off]).mean().sqrt() / target.norm())


def error(got: Tensor, target: Tensor) -> float:
    return float((got.double() - target).norm() / target.norm())


def smooth_images(number: int, size: int) -> Tensor:
    """Random pictures of deviation 1 with the spectrum of natural ones: coarse and fine noise, added up."""
    layers = [F.interpolate(torch.randn(number, 3, k, k), size=size, mode="bicubic") / k for k in (4, 8, 16, 32)]
    pictures = torch.stack(layers).sum(0)
    return (pictures - pictures.mean()) / pictures.std()


def spread(model: nn.Module, images: Tensor, factor: float) -> nn.Module:
    """Scale the weights as training does: attention that selects, and logits of deviation 3 over the images."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(factor)
        if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
            model.train()  # its running statistics from the images
            for _ in range(50):
                model(pixel_values=images)
        model.eval()
        logits = model(pixel_values=images).logits
        last = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))
        last.weight.mul_(3 / logits.std(0).mean())
    return model


def resnet(depth: int, width: int) -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=width,
            hidden_sizes=[width, 2 * width, 4 * width],
            depths=[depth] * 3,
            layer_type="basic",
            num_labels=CLASSES,  # type: ignore[call-arg]
        )
    )


def bench(options: argparse.Namespace) -> Bench:
    torch.manual_seed(0)
    if options.student:
        student = AutoModelForImageClassification.from_pretrained(options.student)
        teacher = copy.deepcopy(student)
        with torch.no_grad():
            for p in teacher.parameters():
                p.mul_(1 + 0.1 * torch.randn_like(p))
        processor = Teacher.from_pretrained(options.student).processing_class
        data = ImageDataset(load_images(options.dataset).validation.select(range(options.images)), processor)
        images = torch.stack([data[i]["pixel_values"] for i in range(options.images)])
        return Bench(student, teacher, images)
    images = smooth_images(options.images, options.image)
    if options.kind == "resnet":
        return Bench(spread(resnet(1, 16), images, 1.0), spread(resnet(2, 24), images, 1.0), images)
    patch = options.image // 4
    models = (vit(*size, image=options.image, patch=patch) for size in ((6, 128, 2), (12, 192, 3)))
    student, teacher = (spread(m, images, 2.5) for m in models)
    return Bench(student, teacher, images)


Curve = list[float]


def measure(found: Bench, study: Study, steps: list[float]) -> dict[tuple[str, str], Curve]:
    """{(estimator, precision): an error for each step, or one alone}."""
    target = found.gradient(study.reference, "float64")
    curves = {}
    for name, row in study.rows.items():
        for precision in PRECISIONS:
            tried = steps[:1] if row.exact else steps
            try:
                curves[name, precision] = [error(found.gradient(row.build(s), precision), target) for s in tried]
            except RuntimeError as raised:
                print(f"{name}, {precision} raises: {str(raised)[:100]}")
    return curves


def show(results: dict[str, dict[tuple[str, str], Curve]], steps: list[float]) -> None:
    print("| objective | estimator | precision | " + " | ".join(f"{s:g}" for s in steps) + " |")
    print("| --- | --- | --- |" + " ---: |" * len(steps))
    for objective, curves in results.items():
        for (name, precision), curve in curves.items():
            best = min(curve)
            cells = [f"**{e:.0e}**" if e == best and len(curve) > 1 else f"{e:.0e}" for e in curve]
            cells = cells if len(curve) > 1 else [f"{best:.0e} (no step)"] + [""] * (len(steps) - 1)
            print(f"| {objective} | {name} | {precision} | {' | '.join(cells)} |")


def draw(results: dict[str, dict[tuple[str, str], Curve]], steps: list[float], title: str, path: Path) -> None:
    shown = {objective: curves for objective, curves in results.items() if any(len(c) > 1 for c in curves.values())}
    rows = -(-len(shown) // 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(12, 3.8 * rows), sharey=True, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (objective, curves) in zip(axes.flat, shown.items(), strict=False):
        colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(name for name, _ in curves))}
        for (name, precision), curve in curves.items():
            style = {"color": colors[name], "linestyle": "-" if precision == "float32" else "--"}
            label = f"{name}, {precision}"
            if len(curve) == 1:
                axis.axhline(curve[0], label=label, linewidth=0.8, **style)
            else:
                axis.loglog(steps, curve, marker=".", label=label, **style)
        axis.set(title=objective, xlabel="step", xscale="log", yscale="log")
        axis.legend(fontsize=6)
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error of the gradient")
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("vit", "resnet"), default="vit")
    parser.add_argument("--image", type=int, default=32, help="pixels a side of the random pictures")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--student", help="a saved model's folder, in place of --kind")
    parser.add_argument("--dataset", help="its images")
    parser.add_argument("--steps", type=float, nargs="+", default=STEPS)
    parser.add_argument("--draws", type=int, default=8, help="of the deviation of one direction; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, default=Path("runs/estimators.png"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = bench(options)
    kinks = options.kind == "resnet" or any(isinstance(m, nn.ReLU | nn.MaxPool2d) for m in found.student.modules())
    what = Path(options.student).name if options.student else options.kind
    size = "x".join(map(str, found.images.shape))
    print(f"torch {torch.__version__}, {what}, images {size}, {len(options.steps)} steps", flush=True)
    studied = {name: study for name, study in studies().items() if study.kinks or not kinks}
    results = {name: measure(found, study, options.steps) for name, study in studied.items()}
    show(results, options.steps)
    if options.draws:
        of_one: list[dict[str, Any]] = [{"distance": "squared"}, {"distance": "fisher", "output": "all"}]
        for chosen in of_one:
            exact = Jacobian(**chosen, estimator="vjp")
            along = ExactSlopes(**chosen, estimator="finite_difference")
            deviation = found.deviation(exact, along, options.draws)
            print(
                f"{exact.distance}, {exact.output}: one direction deviates by {deviation:.2f} of the gradient of all"
            )
    draw(results, options.steps, f"{what}, {size}", options.plot)


if __name__ == "__main__":
    main()
