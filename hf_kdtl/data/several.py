"""Several labels an image: a cell such as "cat;dog", or a list, as a row of one number a class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import torch
from datasets import ClassLabel, Dataset, Value

from hf_kdtl.data.cells import UNLABELLED, is_unlabelled

SEPARATOR, NONE = ";", "none"
SEVERAL = "labels"
"""The column (K,) of 1, 0 and -100, in addition to `label`."""


def cell_names(cell: Any, names: Sequence[str] | None = None) -> list[str] | None:
    """The class names of a cell; None for an unlabelled image.

    >>> cell_names("cat; dog"), cell_names("none"), cell_names(""), cell_names(["cat"])
    (['cat', 'dog'], [], None, ['cat'])
    """
    if is_unlabelled(cell):
        return None
    parts: Any = cell if isinstance(cell, list | tuple) else str(cell).split(SEPARATOR)
    found = [str(part if names is None else names[part]).strip() for part in parts]
    found = [name for name in found if name]
    if NONE in found and len(found) > 1:
        raise ValueError(f"the labels {cell!r} hold {NONE!r} and classes; {NONE!r} alone means that none is there.")
    return [] if found == [NONE] else list(dict.fromkeys(found))


def names_of(feature: Any) -> list[str] | None:
    """The class names of a list of ClassLabels; None of text."""
    return getattr(getattr(feature, "feature", None), "names", None)


def is_list(feature: Any) -> bool:
    """Whether a column holds lists."""
    return isinstance(feature, datasets.List | datasets.LargeList)


def class_names_of(cells: Iterable[list[str] | None]) -> list[str]:
    """The names in all cells, sorted."""
    return sorted({name for cell in cells for name in cell or ()})


def with_labels(split: Dataset, cells: Sequence[list[str] | None], names: Sequence[str]) -> Dataset:
    """The split with the column `labels`, and `label`: the rarest of an image's classes, by which splits are cut and
    images are shown (the first class where none is there); -100 for an unlabelled image."""
    position = {name: index for index, name in enumerate(names)}
    counts = Counter(name for cell in cells for name in cell or ())
    rows, rarest = [], []
    for cell in cells:
        row = [UNLABELLED] * len(names) if cell is None else [0] * len(names)
        for name in cell or ():
            row[position[name]] = 1
        rows.append(row)
        chosen = min(cell, key=lambda name: (counts[name], name)) if cell else None
        rarest.append(UNLABELLED if cell is None else position[chosen] if chosen else 0)
    split = split.add_column("label", rarest, feature=ClassLabel(names=list(names)))
    return split.add_column(SEVERAL, rows, feature=datasets.List(Value("int64")))


def unlabelled_rows(number: int, classes: int) -> list[list[int]]:
    """The column `labels` of images without a label."""
    return [[UNLABELLED] * classes] * number


def labels_of(rows: dict[str, Any]) -> list[Any]:
    """The labels of a batch of rows: class indices, or (K,) float32 of several labels an image."""
    if SEVERAL not in rows:
        return rows["label"]
    return list(torch.tensor(rows[SEVERAL], dtype=torch.float32).unbind())
