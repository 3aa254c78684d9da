"""Images and the teacher's answers to fixed views of them, held in memory: a run then costs the student's step alone.

The views are made once and shared by all arms and seeds, so that arms differ in what they learn from and in nothing
else. The files lie under --work and are made on first use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.data.labelled_share import LabelledShareSampler
from hf_kdtl.models import Capture, Teacher
from hf_kdtl.models.teachers.source import SignalSource, SourceInfo

VIEWS = 20


class Plain:
    """Pixels in [0, 1] at one size, as ImageDataset asks an image processor for them."""

    do_normalize, image_mean, image_std = False, None, None

    def __init__(self, size: int):
        self.size = size

    def __call__(self, images: list[Any], **_: Any) -> dict[str, Tensor]:
        size = (self.size, self.size)
        pixels = np.stack([np.asarray(image.resize(size), np.float32).transpose(2, 0, 1) for image in images])
        return {"pixel_values": torch.from_numpy(pixels / 255)}


class Views(torch.utils.data.Dataset):
    """Fixed views of images, normalised to [-1, 1]; each batch takes the next view of its images.

    Args:
        pixels: (n, V, 3, h, w) uint8.
        labels: (n,), -100 for an image without one.
        rows: of these images in the table of the teacher's answers.
        share: of labelled images in a batch; None: as they come.
        seed: of the order.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, rows: np.ndarray, share: float | None, seed: int):
        self.pixels, self.labels, self.rows, self.share, self.seed = pixels, labels, rows, share, seed
        self.epoch, self.batches = 0, 0

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def train_sampler(self, batch_size: int) -> LabelledShareSampler | None:
        """Where both kinds are there, so many of each in a batch."""
        if self.share is None:
            return None
        return LabelledShareSampler(self.labels >= 0, batch_size, self.share, self.seed, lambda: self.epoch)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.__getitems__([i])[0]

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]]:
        self.batches += 1
        return [
            {"pixel_values": normalised(self.pixels[self.rows[i], self._view(i)]), "labels": int(self.labels[i])}
            for i in places
        ]

    def _view(self, i: int) -> int:
        return int(self.batches + self.rows[i]) % self.pixels.shape[1]

    def source_index(self, i: int) -> int:
        """The row of the answer to the view that the last batch showed."""
        return int(self.rows[i]) * self.pixels.shape[1] + self._view(i)


class Answers(SignalSource):
    """The teacher's logits, one row a view."""

    needs_index = True

    def __init__(self, logits: Tensor):
        self.logits, self.notes = logits, []

    def match(self, student: Any, processing_class: Any, compare_classes: bool) -> None:
        """Classes are in the data's order on both sides."""

    def unserved(self, needs: Any) -> str:
        only = type(needs)(logits=True)
        return "" if needs | only == only else f"only logits are held, and this reads {needs}."

    def capture(self, pixel_values: Tensor, needs: Any, batch: Any = None) -> Capture:
        return Capture(logits=self.logits[batch["image_index"]])

    def provenance(self) -> SourceInfo:
        return SourceInfo("stored logits", num_labels=self.logits.shape[1])

    fingerprint = "stored logits"


def normalised(pixels: np.ndarray) -> Tensor:
    """uint8 to floats in [-1, 1]."""
    return torch.from_numpy(pixels).float() / 127.5 - 1


def plain_split(split: Any, size: int) -> Views:
    """All images of a split without augmentation."""
    return views_of(ImageDataset(split, Plain(size)), np.array(split["label"][:]), 1, 0)


def views_of(data: ImageDataset, labels: np.ndarray, views: int, seed: int) -> Views:
    """So many views of all images, each with its label."""
    pixels = []
    for view in range(views):
        data.set_epoch(view)
        pixels.append(np.concatenate([_bytes(data.__getitems__(part.tolist())) for part in _parts(len(data))]))
    return Views(np.stack(pixels, 1), labels, np.arange(len(labels)), None, seed)


def pool(
    dataset: str, teacher: str, work: Path, images: int, size: int = 32, shown: int | None = None
) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """(n, V, 3, h, w) uint8 views of a balanced pool of training images, labels, the teacher's logits (n V, K).

    The teacher sees what the student does, or each view before it was made smaller: `shown` pixels.
    """
    file = work / f"{Path(dataset).name}_{images}.npz"
    if not file.exists():
        _make_pool(dataset, teacher, file, images, size, shown or size)
    held = np.load(file)
    return held["pixels"], held["labels"], torch.from_numpy(held["logits"])


def _make_pool(dataset: str, teacher: str, file: Path, images: int, size: int, shown: int) -> None:
    train = load_images(dataset).train
    labels = np.array(train["label"][:])
    draw, classes = np.random.default_rng(0), train.features["label"].num_classes
    each = images // classes
    rows = np.sort(np.concatenate([draw.permutation(np.flatnonzero(labels == k))[:each] for k in range(classes)]))
    data = ImageDataset(
        train.select(rows), Plain(shown), augmentation=Augmentation({"crop": shown // 8, "flip": True}), seed=0
    )
    pixels, model = np.empty((len(rows), VIEWS, 3, size, size), np.uint8), Teacher.from_pretrained(teacher)
    logits = np.empty((len(rows), VIEWS, classes), np.float32)
    for view in tqdm(range(VIEWS), "views"):
        data.set_epoch(view)
        for part in _parts(len(rows)):
            seen = _bytes(data.__getitems__(part.tolist()))
            pixels[part, view], logits[part, view] = resized(seen, size), answers(model, seen)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, pixels=pixels, labels=labels[rows], logits=logits.reshape(-1, classes))


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """(n, 3, h, w) uint8 at another size, as PIL's bicubic filter makes it."""
    if pixels.shape[-1] == size:
        return pixels
    smaller = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).float(), (size, size), mode="bicubic", antialias=True
    )
    return smaller.round().clamp(0, 255).byte().numpy()


@torch.inference_mode()
def answers(teacher: Teacher, pixels: np.ndarray) -> np.ndarray:
    """The teacher's logits for (n, 3, h, w) uint8 pixels."""
    model = teacher.classifier()
    found = [model(as_seen(teacher, pixels[part])).logits.numpy() for part in _parts(len(pixels))]
    return np.concatenate(found)


def as_seen(teacher: Teacher, pixels: np.ndarray) -> Tensor:
    """(n, 3, h, w) uint8 pixels through the teacher's own processor's size, mean and std."""
    return shown_to(teacher, torch.from_numpy(pixels) / 255)


def shown_to(teacher: Teacher, pixels: Tensor) -> Tensor:
    """The same for pixels in [0, 1], by which can be differentiated."""
    processor = teacher.processing_class
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    size = (processor.size["height"], processor.size["width"])
    return (torch.nn.functional.interpolate(pixels, size, mode="bilinear") - mean) / std


def _parts(number: int, size: int = 250) -> list[np.ndarray]:
    return np.array_split(np.arange(number), max(1, number // size))


def _bytes(items: list[dict[str, Any]]) -> np.ndarray:
    return np.rint(255 * np.stack([item["pixel_values"].numpy() for item in items])).astype(np.uint8)
