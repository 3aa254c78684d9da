"""What is best left out of a teacher at half and at a quarter of its arithmetic, before and after some distillation?

    python benchmarks/cut.py --teacher <cifar10 ViT> --dataset <cifar10 parquet folder>          # 60 steps, one seed
    python benchmarks/cut.py ... --steps 500 --seeds 1 2 3 --train_images 10000   # the table of RESULTS.md

Arms: depth (every k-th block), heads and MLP (evenly spaced, or by first-order importance), width (evenly spaced
channels), all of depth, heads and MLP as `flops=` chooses, and random weights of the shape of heads and MLP. Each
learns from the teacher's stored logits of unaugmented training images, one line of JSON a run. Stopped and started
again it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import get_cosine_schedule_with_warmup, set_seed

sys.path.insert(0, str(Path(__file__).parent))
from study import parse_quietly

from hf_kdtl import make_student
from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.evaluation.cost import flops, parameters
from hf_kdtl.functional.divergences import kl
from hf_kdtl.models import Teacher

ARMS = ("depth", "heads + MLP", "heads + MLP, first order", "width", "depth + heads + MLP", "random weights")
RATES = {True: 5e-4, False: 1e-3}  # of a cut student and of random weights: hf_kdtl/commands/common/defaults.py


def student_of(arm: str, teacher: Any, share: float, train: Any) -> Any:
    """The student of an arm at about a share of the teacher's arithmetic."""
    if arm == "depth":
        return make_student(teacher, float(share))
    if arm == "width":
        return make_student(teacher, width=float(share))
    if arm == "depth + heads + MLP":
        return make_student(teacher, flops=share)
    if arm == "heads + MLP, first order":
        return make_student(teacher, 1.0, flops=share, importance="first_order", data=train)
    student = make_student(teacher, 1.0, flops=share)
    return type(student)(student.config) if arm == "random weights" else student


@torch.no_grad()
def logits_of(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Logits of all images."""
    model.eval()
    return torch.cat([model(pixel_values=part).logits for part in pixels.split(250)])


def stack(dataset: Any, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixels, labels) of the first images."""
    rows = dataset.__getitems__(list(range(number)))
    return torch.stack([row["pixel_values"] for row in rows]), torch.tensor([row["labels"] for row in rows])


def learn(student: Any, data: tuple[torch.Tensor, ...], steps: int, batch: int, rate: float) -> None:
    """KD at temperature 4 (weight 0.9) and cross-entropy (0.1); AdamW, cosine, passes over the same images."""
    pixels, labels, taught = data
    optimizer = torch.optim.AdamW(student.parameters(), rate, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(10, steps // 5), steps)
    order = torch.cat([torch.randperm(len(pixels)) for _ in range(1 + steps * batch // len(pixels))])
    student.train()
    for chosen in order[: steps * batch].split(batch):
        mine = student(pixel_values=pixels[chosen]).logits
        softened = (F.log_softmax(logits / 4, -1) for logits in (taught[chosen], mine))
        loss = 0.9 * 16 * kl(*softened).mean() + 0.1 * F.cross_entropy(mine, labels[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--file", type=Path, default=Path("runs/cut.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--train_images", type=int, default=1920)
    parser.add_argument("--test_images", type=int, default=2000)
    options = parse_quietly(parser)
    teacher = Teacher.from_pretrained(options.teacher)
    model, data = teacher.classifier(), load_images(options.dataset).in_order(teacher.classifier())
    train = ImageDataset(data.train.shuffle(seed=0), teacher.processing_class)
    pixels, labels = stack(train, options.train_images)
    shown, truth = stack(ImageDataset(data.test.shuffle(seed=0), teacher.processing_class), options.test_images)
    taught = logits_of(model, pixels)
    whole = flops(model, shown)
    options.file.parent.mkdir(parents=True, exist_ok=True)

    def score(student: Any) -> float:
        return float((logits_of(student, shown).argmax(1) == truth).double().mean())

    sizes = {key: getattr(options, key) for key in ("steps", "batch", "train_images", "test_images")}
    lines = [json.loads(line) for line in options.file.read_text().splitlines()] if options.file.exists() else []

    def done(**key: Any) -> bool:
        return any((key | sizes).items() <= line.items() for line in lines)

    def write(**line: Any) -> None:
        line |= sizes | {"threads": torch.get_num_threads(), "torch": torch.__version__}
        with options.file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    if not done(arm="teacher"):
        write(arm="teacher", before=score(model), flops=1.0, parameters=parameters(model))
    for seed in options.seeds:
        for share in options.shares:
            for arm in options.arms:
                if done(arm=arm, share=share, seed=seed):
                    continue
                set_seed(seed)
                student, begun = student_of(arm, model, share, train), time.time()
                line = {"arm": arm, "share": share, "seed": seed, "flops": round(flops(student, shown) / whole, 4)}
                line |= {"parameters": parameters(student), "before": score(student)}
                learn(student, (pixels, labels, taught), options.steps, options.batch, RATES[arm != ARMS[-1]])
                write(**line, after=score(student), seconds=round(time.time() - begun))


if __name__ == "__main__":
    main()
