"""What a store of the teacher's outputs costs and saves: paired steps with the data loader, rows a second, bytes.

    python benchmarks/cached_teacher.py            # about 3 minutes on one core
    python benchmarks/cached_teacher.py --steps 20 # rougher
    python benchmarks/cached_teacher.py --steps 0  # rows and bytes alone

The models of step_cost.py (teacher 12 layers, 192 wide; student 6 layers, 128 wide; 32 px, patch 8, batch 32) on 512
JPEGs of noise, crop and flip, 2 views. All runs render their views in the loop, so ratios are those of a real run.
Bounds: cached logit KD / fine-tuning <= 1.05; jacobian with a sketch / jacobian by vjp < 1; 50,000 rows a second.
"""

from __future__ import annotations

import argparse
import copy
import io
import sys
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from interleave import interleave, ratio
from step_cost import CLASSES, KD, by_trainer, settings, vit

from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.commands.common.builders import new_processor
from hf_kdtl.data import ImageDataset
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.data.store import Request, StoreWriter
from hf_kdtl.models import Needs, Teacher
from hf_kdtl.models.forward.perturbations import Sketch
from hf_kdtl.models.teachers import StoredTeacher

IMAGES, VIEWS = 512, 2
TASK = [{"name": "task"}]
JACOBIAN = [{"name": "task"}, {"name": "jacobian"}]
SKETCH = [{"name": "task"}, {"name": "jacobian", "sketch": 64}]
NEEDS = Needs(
    logits=True,
    pooled=True,
    hidden_states=frozenset({11}),
    attention_rows=frozenset({11}),
    sketches=frozenset({Sketch(64)}),
)


def images(processor) -> ImageDataset:
    draws, files = np.random.default_rng(0), []
    for _ in range(IMAGES):
        Image.fromarray(draws.integers(0, 256, (32, 32, 3), np.uint8)).save(file := io.BytesIO(), "JPEG")
        files.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features(
        image=datasets.Image(decode=False), label=datasets.ClassLabel(names=[f"c{k}" for k in range(CLASSES)])
    )
    labels = draws.integers(0, CLASSES, IMAGES).tolist()
    split = datasets.Dataset.from_dict({"image": files, "label": labels}, features=features)
    return ImageDataset(split, processor, augmentation=Augmentation({"crop": 4, "flip": True}), views=VIEWS)


def steps(teacher, store, student, data, number: int) -> dict[str, list[float]]:
    arms = {
        "fine-tuning": (TASK, None), "logit_kd, stored": (KD, store), "logit_kd, live": (KD, teacher),
        "jacobian vjp, live": (JACOBIAN, teacher), "jacobian sketch, stored": (SKETCH, store),
    }  # fmt: skip
    loops = {}
    for name, (objectives, source) in arms.items():
        config = settings(DistillationConfig, number, objectives=objectives)
        given = Teacher(copy.deepcopy(teacher)) if source is teacher else source and StoredTeacher(source)
        loops[name] = by_trainer(
            DistillationTrainer(copy.deepcopy(student), config, teacher=given, train_dataset=copy.copy(data))
        )
    return interleave(loops)


def rows_a_second(store: StoredTeacher, batch: int) -> float:
    draws = np.random.default_rng(0)
    asked = [(draws.integers(0, IMAGES, batch), draws.integers(0, VIEWS, batch)) for _ in range(20_000 // batch)]
    store.reader.read(["logits"], *asked[0])
    started = time.perf_counter()
    for rows, views in asked:
        store.reader.read(["logits"], rows, views)
    return len(asked) * batch / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=105)
    number = parser.parse_args().steps
    torch.manual_seed(0)
    teacher, student = vit(12, 192, 3).eval(), vit(6, 128, 2)
    data, folder = images(new_processor(teacher.config)), tempfile.mkdtemp()
    started = time.perf_counter()
    writer = StoreWriter(folder, Teacher(copy.deepcopy(teacher)), data, Request(NEEDS, views=VIEWS, teacher_batch=32))
    writer.begin()
    writer.write()
    store = StoredTeacher(folder)
    took = time.perf_counter() - started
    print(f"written: {IMAGES} x {VIEWS} in {took:.0f} s, {store.manifest.bytes / 1e6:.0f} MB\n")
    for name, kind in sorted(store.manifest.kinds.items()):
        print(f"{name:<24} {kind.bytes / 1e3:8.3f} MB a thousand views")
    for batch in (1, 64, 256):
        print(f"random rows a second, batches of {batch:>3}: {rows_a_second(store, batch):12,.0f}")
    if not number:
        return
    times = steps(teacher, folder, student, data, number)
    for of, to in (
        ("logit_kd, stored", "fine-tuning"), ("logit_kd, live", "fine-tuning"),
        ("logit_kd, stored", "logit_kd, live"), ("jacobian sketch, stored", "jacobian vjp, live"),
    ):  # fmt: skip
        middle, low, high = ratio(times, of, to)
        print(f"{of:>24} / {to:<20} {middle:.3f}  [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
