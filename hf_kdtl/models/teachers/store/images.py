"""The training images as a store knows them: their rows, their views, and what identifies them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_kdtl.models.teachers.store.manifest import DIGESTS, is_store, read_manifest
from hf_kdtl.utils.wrapped import item_of, source_of


class TrainingImages:
    """Any training data with an index. `ImageDataset` also has views; other data has one, its items as they are. Of a
    Subset `data` is what it was taken from.

    Raises:
        ValueError: for data without a length and an index, and for several datasets that are joined.
    """

    def __init__(self, data: Any):
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise ValueError(
                f"a store is looked up by the row of each image, and {type(data).__name__} has none. Use a "
                "train_dataset with a length and an index, such as hf_kdtl.data.ImageDataset."
            )
        self.data = source_of(data)
        if self.data is None:
            raise ValueError(
                "a store is looked up by the row of each image, and train_dataset joins datasets whose rows are not "
                "distinguished. Join their splits: "
                "ImageDataset(datasets.concatenate_datasets([...]), image_processor)."
            )
        self.viewed = hasattr(self.data, "image_view")
        self.has_files = not isinstance(getattr(self.data, "split", None), str | None)
        row, items = getattr(self.data, "source_index", int), [item_of(data, i)[1] for i in range(len(data))]
        self.rows = np.array([row(i) for i in items], np.int64)
        """(n,) the row of the source split that each item is."""
        self._item = dict(zip(self.rows.tolist(), items, strict=True))

    def record(self, own: bool = False) -> dict[str, Any]:
        """What the pixels of a view depend on besides the image, field by field; empty where the data does not say.

        Args:
            own: of the pixels that the teacher's image processor makes: that of the student is not among it then.
        """
        if not self.viewed:
            return {}
        if own:
            return self.data.view_facts() | {"view_seed": self.data.view_seed, "teacher_pixels": "own"}
        processor = json.loads(self.data.image_processor.to_json_string())
        seed = self.data.view_seed  # of sketches too, where nothing is augmented
        return self.data.view_facts() | {"view_seed": seed, "image_processor": processor}

    def items(self, rows: np.ndarray) -> list[int]:
        """Where in the data the images of these rows are."""
        return [self._item[row] for row in rows.tolist()]

    def digests(self, rows: np.ndarray) -> np.ndarray:
        """(n,) a hash of the file of each image, or of its pixels where the data has no files."""
        return np.array([self.digest(i) for i in self.items(rows)], np.uint64)

    def check(self, rows: np.ndarray, digests: np.ndarray, store: str | Path, most: int = 64) -> None:
        """Look at up to `most` of these rows, evenly spaced: what can be known without reading all files.

        Raises:
            ValueError: for one whose image is another one.
        """
        spaced = np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64))
        refuse_changed(rows[spaced], self.digests(rows[spaced]) != digests[spaced], store)

    def digests_for(self, folder: Path, rows: np.ndarray) -> np.ndarray:
        """`digests` of a store that is written or grown in this folder.

        Args:
            rows: those that are there, in their order, and more.

        Raises:
            ValueError: where the image of one that is there is another one.
        """
        digests = self.digests(rows)
        if is_store(folder):
            old = np.load(folder / DIGESTS)[: read_manifest(folder).images]
            refuse_changed(rows[: len(old)], digests[: len(old)] != old, folder)
        return digests

    def digest(self, i: int, item: Any = None) -> int:
        """Of the image at a place of the data; `item` is what the data gives there, where it is known."""
        if not self.has_files:
            item = self.data[i] if item is None else item
            return _hash(torch.as_tensor(item["pixel_values"]).contiguous().numpy().tobytes())
        image = self.data.split[i]["image"]
        return _hash(Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"])


class FirstReads:
    """Compares each image with the one that a store was written from when a run reads it for the first time, in the
    process that reads it: hashing all files beforehand would read the whole data once more.

    Args:
        rows, digests: of the training images, as the store has them.
        store: its name, for the error.
    """

    def __init__(self, images: TrainingImages, rows: np.ndarray, digests: np.ndarray, store: str):
        self.images, self.store = images, store
        self.expected = np.zeros(int(rows.max()) + 1, np.uint64)
        self.expected[rows] = digests
        self.seen = torch.zeros(len(self.expected), dtype=torch.bool).share_memory_()  # by all workers

    def __call__(self, row: int, item: Any) -> None:
        """Raises ValueError for the row's item where its image is another one."""
        if not self.seen[row]:
            other = self.images.digest(self.images.items(np.array([row]))[0], item) != int(self.expected[row])
            refuse_changed(np.array([row]), np.array([other]), self.store)
            self.seen[row] = True


def refuse_changed(rows: np.ndarray, other: np.ndarray, store: str | Path) -> None:
    """Raises ValueError where the images of some rows are other ones than in the store."""
    if other.any():
        raise ValueError(
            f"image {rows[other][0]} of the training data is another one than in the store {store}: the data was "
            "changed, or its rows were. Use the data that the store was written from, or write another store: "
            "hf-kdtl cache --output <another folder>."
        )


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
