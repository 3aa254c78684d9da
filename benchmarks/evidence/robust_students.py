"""Table 4b: robustness by matched gradients. The plan stands in benchmarks/plan.md.

    python -m benchmarks.evidence.robust_students --dataset <tiny_imagenet100> --rate 0.003 --work <folder>

It trains its teacher, with noise, first (6 CPU minutes, <folder>/vgg_noise_teacher); a run is one CPU minute. Stopped
and started again it goes on where it was.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evidence.jacobian_vgg import KD_WEIGHTS, WEIGHTS, FewImages, kd, trained_teacher
from benchmarks.evidence.runs import Run, Table, arguments
from benchmarks.evidence.students import quiet
from benchmarks.evidence.views import Views
from hf_kdtl.models import Teacher

EACH, STEPS, TEST_IMAGES = 50, 600, 2000
NOISE = 0.2  # of pixels in [-1, 1]: 0.1 of those in [0, 1]
RADIUS, ATTACK_STEPS = 2 / 255, 10
NORM_WEIGHTS = (0.001, 0.01)


def attacked(model: Any, pixels: Tensor, labels: Tensor) -> Tensor:
    """Projected gradient descent within RADIUS of each pixel, from the image itself: signs of the loss's slope."""
    found = pixels.clone()
    for _ in range(ATTACK_STEPS):
        found.requires_grad_(True)
        (slope,) = torch.autograd.grad(F.cross_entropy(model(found).logits, labels), found)
        found = found.detach() + RADIUS / 4 * slope.sign()
        found = torch.maximum(torch.minimum(found, pixels + RADIUS), pixels - RADIUS).clamp(-1, 1)
    return found


def right(model: Any, pixels: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    with torch.inference_mode():
        return float((model(pixels).logits.argmax(-1) == labels).float().mean())


def spread_images(images: Views, number: int) -> tuple[Tensor, Tensor]:
    """So many images spread over all, and their labels."""
    places = torch.linspace(0, len(images) - 1, number).long().tolist()
    items = images.__getitems__(places)
    return torch.stack([item["pixel_values"] for item in items]), torch.tensor([item["labels"] for item in items])


class Robust(FewImages):
    """One run. `weight` is of logit_kd for `kd`, of noisy_kd for `kd_noise`, else of the arm's own further term."""

    def __init__(self, dataset: str, teacher: Teacher, rate: float):
        super().__init__(dataset, teacher)
        self.rate, self.kd, self.jacobian = rate, 0.9, 1.0
        self.shown = {name: spread_images(split, TEST_IMAGES) for name, split in self.held_out.items()}

    def __call__(self, run: Run) -> dict[str, Any]:
        if run.arm == "teacher":
            return self.scores(self.teacher.model)
        jacobian = {"name": "jacobian", "weight": run.weight if run.arm == "kd_jacobian" else self.jacobian}
        terms = {
            "kd": kd(run.weight),
            "kd_noise": kd(run.weight, "noisy_kd", noise=NOISE),
            "kd_jacobian": [*kd(self.kd), jacobian],
            "kd_jacobian_norm": [
                *kd(self.kd), jacobian, {"name": "jacobian_norm", "of": "logprob", "weight": run.weight},
            ],
        }[run.arm]  # fmt: skip
        return self.scores(self.student(EACH, run.seed, STEPS, self.rate, terms))

    def scores(self, model: Any) -> dict[str, Any]:
        """Accuracy on validation (the mean of clean and noisy), and on test: clean, with noise, and attacked."""
        model.eval()
        found = {name: self._clean_and_noisy(model, *images) for name, images in self.shown.items()}
        pixels, labels = self.shown["test"]
        pgd = [
            right(model, attacked(model, part, mine), mine) * len(mine)
            for part, mine in zip(pixels.split(250), labels.split(250), strict=True)
        ]
        clean, noisy = found["test"]
        return {
            "validation": sum(found["validation"]) / 2,
            "test": clean,
            "noise": noisy,
            "pgd": sum(pgd) / len(labels),
        }

    def _clean_and_noisy(self, model: Any, pixels: Tensor, labels: Tensor) -> tuple[float, float]:
        noise = NOISE * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
        return right(model, pixels, labels), right(model, pixels + noise, labels)


def main() -> None:
    parser = arguments(__doc__, "dataset")
    parser.add_argument("--rate", type=float, required=True)
    options = parser.parse_args()
    quiet()
    teacher = trained_teacher(options.dataset, options.work / "vgg_noise_teacher", NOISE)
    measure = Robust(options.dataset, teacher, options.rate)
    table, seeds, setting = Table("robust_students", measure), range(1, options.seeds + 1), "tiny_imagenet100_50"
    table.once(Run(setting, "teacher", 0.0, 0))
    measure.kd = table.chosen(setting, "kd", KD_WEIGHTS, seeds)
    measure.jacobian = table.chosen(setting, "kd_jacobian", WEIGHTS, seeds)
    for arm, tried in {
        "kd": KD_WEIGHTS, "kd_jacobian_norm": NORM_WEIGHTS, "kd_noise": KD_WEIGHTS, "kd_jacobian": WEIGHTS,
    }.items():  # fmt: skip
        table.taken(setting, arm, tried, seeds)


if __name__ == "__main__":
    main()
