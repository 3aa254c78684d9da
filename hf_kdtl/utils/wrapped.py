"""What lies inside torch's Subset (of random_split, too), ConcatDataset, and a user's wrapper around a dataset."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from torch.utils.data import ConcatDataset, Dataset, Subset


def inside(data: Any) -> list[Any]:
    """The datasets that a dataset holds, and takes its items from."""
    if isinstance(data, Subset):
        return [data.dataset]
    if isinstance(data, ConcatDataset):
        return list(data.datasets)
    return [one for name in ("dataset", "data") if isinstance(one := getattr(data, name, None), Dataset)]


def holders(data: Any, name: str) -> list[Any]:
    """The datasets, from outside, that have an attribute: it is asked of them, and not of what lies around them."""
    return [data] if hasattr(data, name) else [one for inner in inside(data) for one in holders(inner, name)]


def item_of(data: Any, i: int) -> tuple[Any, int]:
    """The dataset inside Subset and ConcatDataset that item `i` is of, and its number there."""
    if isinstance(data, Subset):
        return item_of(data.dataset, int(data.indices[i]))
    if isinstance(data, ConcatDataset):
        part = bisect_right(data.cumulative_sizes, i)
        return item_of(data.datasets[part], i - (data.cumulative_sizes[part - 1] if part else 0))
    return data, i


def source_of(data: Any) -> Any:
    """The one dataset that all items are of (`item_of`); None where there are several."""
    if not isinstance(data, Subset | ConcatDataset):
        return data
    found = {id(one): one for one in map(source_of, inside(data))}
    return next(iter(found.values())) if len(found) == 1 else None
