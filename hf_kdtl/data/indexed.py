"""Training data whose batches carry the row and the view of each image, for signals that are looked up by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from hf_kdtl.data.on_device import CHANGES, PARTNERS
from hf_kdtl.utils.wrapped import holders, item_of, source_of

INDEX, VIEW, TEACHER_PIXELS = "image_index", "image_view", "teacher_pixel_values"
NOT_THE_STUDENTS = (INDEX, VIEW, TEACHER_PIXELS)
"""What a batch holds that is no argument of the student's forward."""
_ASIDE = (TEACHER_PIXELS, CHANGES, PARTNERS)
"""Of an item: kept from Trainer's collator, which leaves only what the student's forward takes."""


class RowPass(int):
    """A row of a dataset, and which pass over it this is: an int that samplers yield where a row recurs in an epoch.

    `ImageDataset` shows that pass's view: `images[RowPass(3, 7)]` is view 7 of item 3 (7 mod V with `views=V`).

    >>> one = RowPass(3, 7)
    >>> one + 1, one.number
    (4, 7)
    """

    number: int

    def __new__(cls, row: int, number: int) -> RowPass:
        made = super().__new__(cls, row)
        made.number = int(number)
        return made

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]  # pickled to data-loading workers
        return int(self), self.number


class IndexedItem(NamedTuple):
    """An item of the data, its row, its view (None where the data does not know it), and tensors of it that are no
    argument of the student's, by the name they have in a batch."""

    item: Any
    row: int
    view: int | None
    aside: dict[str, Tensor]


class IndexedDataset(Dataset):
    """A map-style dataset whose items come with their row and view.

    The row is that of the dataset, or what its `source_index(i)` gives: a subset can name the rows of the data that it
    was taken from. The view is what its `image_view(i)` gives, where it has this method. Of torch's Subset and
    ConcatDataset the dataset inside is asked; where they join several datasets, the row is the item's number.

    Args:
        unfinished: of an `ImageDataset`: leave colors, erasing and mixing to the trainer.
        checks: called with the row and the item of each, where it is read (`SignalSource.item_checks`).

    Raises:
        ValueError: for data that has no index.
    """

    def __init__(self, data: Any, unfinished: bool = False, checks: Sequence[Callable[[int, Any], None]] = ()):
        if isinstance(data, IterableDataset) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise ValueError(
                f"the teacher's signals are looked up by the row of each image, and {type(data).__name__} has none. "
                "Use a train_dataset with a length and an index."
            )
        self.data, self.unfinished, self.checks = data, unfinished, checks
        self._one_source, self._viewed = source_of(data) is not None, bool(holders(data, "image_view"))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> IndexedItem:
        return self.__getitems__([i])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[IndexedItem]:
        fetch: Any = self.data.unfinished_items if self.unfinished else getattr(self.data, "__getitems__", None)
        items = fetch(rows) if fetch else [self.data[i] for i in rows]
        return [self._indexed(item, i) for item, i in zip(items, rows, strict=True)]

    def set_epoch(self, epoch: int) -> None:
        """Pass on which epoch begins, to data that is augmented by it."""
        for one in holders(self.data, "set_epoch"):
            one.set_epoch(epoch)

    def _indexed(self, item: Any, i: int) -> IndexedItem:
        data, at = item_of(self.data, i)
        row = getattr(data, "source_index", int)(at) if self._one_source else int(i)
        view = data.image_view(at) if hasattr(data, "image_view") else 0 if self._viewed else None
        for check in self.checks:
            check(row, item)
        aside = {key: item.pop(key) for key in _ASIDE if key in item} if isinstance(item, dict) else {}
        return IndexedItem(item, row, view, aside)


class IndexCollator:
    """A collator of `IndexedItem`s: the given one's batch, `image_index` (B,) int64 and, where the data has them,
    `image_view` (B,) int64, and what is kept aside of the items. Others pass unchanged."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        if not items or not isinstance(items[0], IndexedItem):
            return self.collate(items)
        batch = self.collate([one.item for one in items]) | {INDEX: torch.tensor([one.row for one in items])}
        if items[0].view is not None:
            batch[VIEW] = torch.tensor([one.view for one in items])
        return batch | {key: torch.stack([one.aside[key] for one in items]) for key in items[0].aside}
