"""What a store's precision does to the student: how far its weights are after 50 steps from those by a live teacher.

    python benchmarks/store_precision.py           # about a minute on one core

A small ViT learns 100 classes (a random pattern each, with noise), its outputs for 640 images are stored as float32,
float16, and the top 10 of the 100 classes, and a smaller ViT is trained from each by task and logit_kd (AdamW, rate
1e-3, batches of 32, one order). Distances are ||w - w_live|| as a share of ||w_live - w_start||, the way that the
weights went; as a yardstick, that of a live teacher with another order of the images.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from transformers import ViTConfig, ViTForImageClassification

from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.data.store import Request, StoreWriter
from hf_kdtl.models import Needs, Teacher
from hf_kdtl.models.teachers import StoredTeacher

CLASSES, IMAGES, STEPS, BATCH = 100, 640, 50, 32


class Patterns(torch.utils.data.Dataset):
    """A pattern for each class, of 8 x 8 cells, under noise."""

    def __init__(self):
        draws = torch.Generator().manual_seed(0)
        patterns = torch.randn(CLASSES, 3, 8, 8, generator=draws).repeat_interleave(4, -1).repeat_interleave(4, -2)
        self.labels = torch.arange(IMAGES) % CLASSES
        self.pixels = patterns[self.labels] + 2 * torch.randn(IMAGES, 3, 32, 32, generator=draws)

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[i], "labels": self.labels[i]}


def vit(layers: int, width: int) -> ViTForImageClassification:
    torch.manual_seed(layers)
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * width,
    }
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=CLASSES, **sizes))


def train(model: nn.Module, objectives: list[str], steps: int, source=None, seed: int = 0) -> Tensor:
    config = DistillationConfig(
        tempfile.mkdtemp(), objectives=objectives, max_steps=steps, per_device_train_batch_size=BATCH,
        learning_rate=1e-3, seed=seed, data_seed=seed, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    DistillationTrainer(model, config, teacher=source, train_dataset=Patterns()).train()
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def stored(teacher: Teacher, **options) -> StoredTeacher:
    folder = tempfile.mkdtemp()
    request = Request(Needs(logits=True), teacher_batch=BATCH, **options)
    writer = StoreWriter(folder, copy.deepcopy(teacher), Patterns(), request)
    writer.begin()
    writer.write()
    return StoredTeacher(folder)


def main() -> None:
    big, small = vit(4, 64), vit(2, 48)
    train(big, ["task"], 300)
    teacher = Teacher(big.eval(), teacher_batch=BATCH)
    z = teacher.capture(Patterns().pixels, Needs(logits=True)).logits
    top = z.softmax(-1).topk(10).values.sum(-1).mean()
    right = (z.argmax(-1) == Patterns().labels).float().mean()
    print(f"teacher: {right:.1%} right, {top:.1%} of the probability in its top 10")
    start = torch.cat([p.detach().flatten().double() for p in small.parameters()])
    runs = {
        "live": (teacher, 0), "store, float32": (stored(teacher), 0),
        "store, float16": (stored(teacher, precision="float16"), 0),
        "store, top 10 of 100": (stored(teacher, top_k=10), 0),
        "live, another order": (teacher, 1),
    }  # fmt: skip
    weights = {
        name: train(copy.deepcopy(small), ["task", "logit_kd"], STEPS, source, seed)
        for name, (source, seed) in runs.items()
    }
    way = (weights["live"] - start).norm()
    for name, found in weights.items():
        apart = found - weights["live"]
        print(f"{name:<24} {apart.norm() / way:.2e} of the way, largest {apart.abs().max():.1e}")


if __name__ == "__main__":
    main()
