"""The class that a trained model predicted for each image of a split, saved with the model: a few bytes per image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def save_predictions(folder: str | Path, split: str, logits: np.ndarray, labels: np.ndarray) -> None:
    """Write predictions_<split>.safetensors: `predicted` (n,), the largest logit of (n, K), and `labels` (n,)."""
    tensors = {"predicted": logits.argmax(1).astype(np.int32), "labels": np.asarray(labels).astype(np.int32)}
    save_file(tensors, _path(folder, split))


def read_predictions(folder: str | Path, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(predicted, labels) of a run's folder, None where they were not kept."""
    path = _path(folder, split)
    if not path.is_file():
        return None
    found = load_file(path)
    return found["predicted"], found["labels"]


def _path(folder: str | Path, split: str) -> Path:
    return Path(folder, f"predictions_{split}.safetensors")
