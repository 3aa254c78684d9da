"""What a derivative objective adds to a logit-KD step: arithmetic, as torch counts it, and time, interleaved.

    python benchmarks/derivative_cost.py               # patch 8: both columns, 10 minutes on an idle core
    python benchmarks/derivative_cost.py --patch 4     # 65 tokens instead of 17, about four times as long
    python benchmarks/derivative_cost.py --batch 128   # fixed costs of a pass matter less
    python benchmarks/derivative_cost.py --steps 0     # the arithmetic alone, seconds
    python benchmarks/derivative_cost.py --profile "jacobian, vjp"  # where the time of one of them goes

The pair of step_cost.py. A step is forward and backward of `Distiller`, without the optimizer, whose part is the same
for all. Arithmetic is counted with every attention under the math kernel, since torch counts the CPU's fused kernel as
0; time is of the kernels that really run. `fraction` has exactly a quarter of the images take part. The row "in two
parts" is the logit-KD step alone, a quarter of the batch after the rest: what a fraction pays before any derivative.
"allowed" is the time of a step at both bounds, that of arithmetic and that of time over arithmetic.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
from interleave import interleave, ratio
from step_cost import BATCH, CLASSES, vit

from hf_kdtl.functional.derivatives import math_attention
from hf_kdtl.functional.random import Draws, select_images
from hf_kdtl.models.pairing import plan
from hf_kdtl.models.teachers.teacher import Teacher
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.trainer.distiller import Distiller, micro_batch_counts

Step = Callable[[], None]
QUARTER = 0.25
# name: (objective beside KD, its options, largest arithmetic ratio, largest time ratio over arithmetic ratio)
BESIDE_KD: dict[str, tuple[str, dict, float | None, float | None]] = {
    "jacobian, vjp": ("jacobian", {"estimator": "vjp"}, 2.2, 1.12),
    "jacobian, vjp, a quarter of the images": ("jacobian", {"estimator": "vjp", "fraction": QUARTER}, 1.35, 1.12),
    "jacobian, split, forward mode": ("jacobian", {"estimator": "split"}, 2.65, 1.12),
    "jacobian, split, central": ("jacobian", {"estimator": "split", "central": True}, 2.6, 1.12),
    "jacobian, finite_difference": (
        "jacobian", {"estimator": "finite_difference", "distance": "squared"}, 2.05, 1.12),
    "jacobian, finite_difference, central": (
        "jacobian", {"estimator": "finite_difference", "distance": "squared", "central": True}, None, None),
    "jacobian, fisher, all classes": ("jacobian", {"distance": "fisher", "output": "all"}, 2.05, 1.12),
    "attention_jacobian": ("attention_jacobian", {}, None, None),
    "jacobian_norm": ("jacobian_norm", {}, None, None),
    "noisy_kd": ("noisy_kd", {}, None, None),
    "hessian, hvp": ("hessian", {}, 4.7, 1.25),
    "hessian, curvature, finite_difference": (
        "hessian", {"what": "curvature", "estimator": "finite_difference"}, None, None),
}  # fmt: skip
EVERY_CLASS = "one backward a class, by hand"
IN_PARTS = "nothing, in two parts"


class _NoModules:
    """In place of FlopCounterMode's ModuleTracker, whose hooks raise on an autograd.grad inside the step."""

    parents = frozenset({"Global"})

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


def flops(step: Step) -> int:
    """Floating-point operations of one step's matrix products and convolutions, every attention counted."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter, math_attention():
        step()
    return counter.get_total_flops()


class Steps:
    """The pair, one batch, and steps to run on it. Each has a copy of the student of its own."""

    def __init__(self, patch: int, batch: int):
        torch.manual_seed(0)
        self.student, self.teacher = vit(6, 128, 2, patch=patch), vit(12, 192, 3, patch=patch).eval()
        self.inputs = {"pixel_values": torch.randn(batch, 3, 32, 32), "labels": torch.arange(batch) % CLASSES}
        self.draws = next(d for step in range(1000) if self._quarter(d := Draws(0, step, tuple(range(batch)))))

    def _quarter(self, draws: Draws) -> bool:
        return int(select_images(draws, QUARTER, self.inputs["pixel_values"]).sum()) == QUARTER * len(
            self.inputs["labels"]
        )

    def kd_and(self, name: str = "", options: dict | None = None, parts: tuple[float, ...] = (1.0,)) -> Step:
        """Forward and backward of task + logit_kd, and an objective beside them; of parts of the batch in turn."""
        student, teacher = copy.deepcopy(self.student).train(), Teacher(self.teacher)
        objectives = {"task": OBJECTIVES["task"](), "logit_kd": OBJECTIVES["logit_kd"](temperature=4.0)}
        if name:
            objectives[name] = OBJECTIVES[name](**(options or {}))
        weights = dict.fromkeys(objectives, 1.0)
        distiller = Distiller(student, objectives, weights, {"teacher": teacher}, {"teacher": plan(student, teacher)})
        counts = micro_batch_counts(self.inputs)
        sizes = [int(part * len(self.inputs["labels"])) for part in parts]
        micro_batches = [
            dict(zip(self.inputs, v, strict=True))
            for v in zip(*(t.split(sizes) for t in self.inputs.values()), strict=True)
        ]

        def step() -> None:
            for inputs in micro_batches:
                distiller(inputs, self.draws, counts)["loss"].backward()
            distiller.zero_grad()

        return step

    def every_class(self) -> Step:
        """KD and the full Jacobian as public code takes it: for each class a backward of each model."""
        student, teacher = copy.deepcopy(self.student).train(), copy.deepcopy(self.teacher)

        def jacobian(logits, x):
            rows = [torch.autograd.grad(z.sum(), x, create_graph=True)[0].flatten(1) for z in logits.unbind(1)]
            return torch.stack(rows, dim=1)

        def step() -> None:
            x = self.inputs["pixel_values"].clone().requires_grad_()
            with math_attention():
                z_s, z_t = student(pixel_values=x).logits, teacher(pixel_values=x).logits
            log_s, log_t = F.log_softmax(z_s / 4, -1), F.log_softmax(z_t.detach() / 4, -1)
            loss = F.cross_entropy(z_s, self.inputs["labels"])
            loss = loss + 16 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
            difference = F.normalize(jacobian(z_s, x), dim=-1) - F.normalize(jacobian(z_t, x).detach(), dim=-1)
            (loss + difference.square().sum((1, 2)).mean()).backward()
            student.zero_grad()

        return step


def repeated(step: Step, times: int):
    def loop(done):
        for _ in range(times):
            step()
            done()

    return loop


def show_profile(name: str, step: Step, baseline: Step) -> None:
    """The operations by their own time, of ten steps, beside those of the logit-KD step."""
    found = {}
    for key, one in (("KD", baseline), (name, step)):
        one()
        with profile(activities=[ProfilerActivity.CPU]) as run:
            for _ in range(10):
                one()
        found[key] = {e.key: (e.self_cpu_time_total / 1e4, e.count // 10) for e in run.key_averages()}
    print(f"| operation | KD, ms a step (calls) | {name} | more |\n| --- | ---: | ---: | ---: |")
    none = (0.0, 0)
    more = {op: t - found["KD"].get(op, none)[0] for op, (t, _) in found[name].items()}
    for op in sorted(more, key=lambda op: -more[op])[:25]:
        cells = [f"{t:.2f} ({n})" for t, n in (found["KD"].get(op, none), found[name][op])]
        print(f"| {op} | {' | '.join(cells)} | {more[op]:.2f} |")
    print(f"all: {sum(t for t, _ in found['KD'].values()):.1f} and {sum(t for t, _ in found[name].values()):.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--batch", type=int, default=BATCH, help="a multiple of 4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="names of rows, as the table has them")
    parser.add_argument("--profile", help="the name of a row")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    made = Steps(options.patch, options.batch)
    steps = {IN_PARTS: made.kd_and(parts=(1 - QUARTER, QUARTER))}
    steps |= {name: made.kd_and(*row[:2]) for name, row in BESIDE_KD.items()} | {EVERY_CLASS: made.every_class()}
    baseline = made.kd_and()
    if options.profile:
        return show_profile(options.profile, steps[options.profile], baseline)
    if options.only:
        steps = {name: steps[name] for name in options.only}
    kd = flops(baseline)
    times = {}
    if options.steps:
        loops = {name: repeated(step, options.steps) for name, step in {"KD": baseline, **steps}.items()}
        times = interleave(loops)
    size = f"patch {options.patch}, batch {options.batch}, {options.steps} steps"
    print(f"torch {torch.__version__}, {size}, KD step {kd / 1e9:.2f} GFLOP")
    print("| KD and | arithmetic / KD | bound | time / KD (95 % interval) | allowed | time / arithmetic | bound |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, step in steps.items():
        arithmetic = flops(step) / kd
        most, slowest = BESIDE_KD.get(name, (None,) * 4)[2:]
        bounds = [f"{b:g}" if b else "" for b in (most, slowest)]
        allowed = f"{most * slowest:.2f}" if most and slowest else ""
        cells = ["", ""]
        if times:
            middle, low, high = ratio(times, name, "KD")
            cells = [f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{middle / arithmetic:.3f}"]
        row = [f"{arithmetic:.2f}", bounds[0], cells[0], allowed, cells[1], bounds[1]]
        print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
