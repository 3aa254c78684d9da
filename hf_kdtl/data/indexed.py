"""Training data whose batches carry the row of each image, for teacher signals that are looked up by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, IterableDataset

INDEX = "image_index"


class IndexedItem(NamedTuple):
    """An item of the data, and its row."""

    item: Any
    row: int


class IndexedDataset(Dataset):
    """A map-style dataset whose items come with their row.

    The row is that of the dataset, or what its `source_index(i)` gives: a subset can name the rows of the data that it
    was taken from.

    Raises:
        ValueError: for data that has no index.
    """

    def __init__(self, data: Any):
        if isinstance(data, IterableDataset) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise ValueError(
                f"the teacher's signals are looked up by the row of each image, and {type(data).__name__} has none. "
                "Use a train_dataset with a length and an index."
            )
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> IndexedItem:
        return IndexedItem(self.data[i], self._row(i))

    def __getitems__(self, rows: Sequence[int]) -> list[IndexedItem]:
        fetch: Any = getattr(self.data, "__getitems__", None)
        items = fetch(rows) if fetch else [self.data[i] for i in rows]
        return [IndexedItem(item, self._row(i)) for item, i in zip(items, rows, strict=True)]

    def set_epoch(self, epoch: int) -> None:
        """Pass on which epoch begins, to data that is augmented by it."""
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)

    def _row(self, i: int) -> int:
        return self.data.source_index(i) if hasattr(self.data, "source_index") else i


class IndexCollator:
    """A collator of `IndexedItem`s: the given one's batch, and `image_index` (B,) int64. Others pass unchanged."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        if not items or not isinstance(items[0], IndexedItem):
            return self.collate(items)
        batch = self.collate([one.item for one in items])
        return {**batch, INDEX: torch.tensor([one.row for one in items])}
