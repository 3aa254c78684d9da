"""The training images as a store knows them: their rows, their views, and what identifies them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
                "told apart. Join their splits: ImageDataset(datasets.concatenate_datasets([...]), image_processor)."
            )
        self.viewed = hasattr(self.data, "image_view")
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
        return np.array([_hash(self._content(i)) for i in self.items(rows)], np.uint64)

    def changed(self, rows: np.ndarray, digests: np.ndarray, most: int = 64) -> int | None:
        """The first of up to `most` of these rows, evenly spaced, whose image is another one; None where none is."""
        spaced = np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64))
        other = self.digests(rows[spaced]) != digests[spaced]
        return int(rows[spaced][other][0]) if other.any() else None

    def _content(self, i: int) -> bytes:
        split = getattr(self.data, "split", None)
        if split is None or isinstance(split, str):
            return torch.as_tensor(self.data[i]["pixel_values"]).contiguous().numpy().tobytes()
        image = split[i]["image"]
        return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
