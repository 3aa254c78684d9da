"""A student's run on views held in memory, and its accuracy on validation and test."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import BitConfig, BitForImageClassification, PrinterCallback, set_seed
from transformers.utils import logging

from benchmarks.evidence.views import Views
from hf_kdtl import DistillationConfig, DistillationTrainer

SMALL_BIT: dict[str, Any] = {
    "embedding_size": 32, "hidden_sizes": [64, 128, 256], "depths": [1, 1, 1], "layer_type": "preactivation",
    "hidden_act": "gelu", "num_groups": 8,
}  # fmt: skip
"""132,000 parameters with 10 classes; group norm, so that a batch's images do not depend on each other."""


def quiet() -> None:
    """One thread, so that runs are repeatable, and no progress bars."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def small_bit(classes: int, seed: int) -> Any:
    """The small convolutional student with random weights."""
    set_seed(seed)
    return BitForImageClassification(BitConfig(**SMALL_BIT, num_labels=classes))


def labelled_rows(labels: np.ndarray, each: int, seed: int) -> np.ndarray:
    """So many rows of each class, drawn by the seed."""
    draw = np.random.default_rng(seed)
    return np.sort(np.concatenate([draw.permutation(np.flatnonzero(labels == k))[:each] for k in np.unique(labels)]))


def settings(seed: int, steps: int, learning_rate: float, **further: Any) -> DistillationConfig:
    """AdamW with a warm-up and a cosine, batches of 64; no evaluation on the way, so that nothing is chosen by it."""
    shared: dict[str, Any] = {
        "per_device_train_batch_size": 64, "per_device_eval_batch_size": 250, "max_steps": steps, "warmup_steps": 100,
        "lr_scheduler_type": "cosine", "weight_decay": 0.05, "use_cpu": True, "save_strategy": "no", "report_to": [],
        "logging_steps": 100_000, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return DistillationConfig("runs/evidence", seed=seed, learning_rate=learning_rate, **shared | further)


def train(student: Any, config: DistillationConfig, images: Views, teacher: Any = None) -> None:
    """The student after its last step."""
    trainer = DistillationTrainer(student, config, train_dataset=images, teacher=teacher)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


@torch.inference_mode()
def accuracy(student: Any, images: Views) -> float:
    """On all images, as a share."""
    student.eval()
    right = 0
    for part in np.array_split(np.arange(len(images)), max(1, len(images) // 250)):
        items = images.__getitems__(part.tolist())
        logits = student(torch.stack([item["pixel_values"] for item in items])).logits
        right += int((logits.argmax(-1).numpy() == images.labels[part]).sum())
    return right / len(images)
