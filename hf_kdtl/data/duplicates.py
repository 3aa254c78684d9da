"""Images that are in two splits, byte for byte: what is measured on them is memory."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

_BUDGET = 2**30
_LEAST = 2**14
"""A gigabyte is read at most, each image counted as 16 kB at least, for opening a file; and only files whose size
occurs in another split are read at all."""


PAIRS = (("validation", "train"), ("test", "train"), ("test", "validation"))
UNLABELLED_PAIRS = (("validation", "unlabelled"), ("test", "unlabelled"))


def check_duplicates(splits: dict[str, Dataset], notes: list[str]) -> None:
    """Note how many images of validation and test are also in train or in each other, or in `unlabelled`."""
    sizes = {name: list(_sizes(split)) for name, split in splits.items()}
    seen_in = Counter(size for own in sizes.values() for size in set(own))
    wanted = {name: [row for row, size in enumerate(own) if size and seen_in[size] > 1] for name, own in sizes.items()}
    left = _BUDGET
    digests: dict[str, Counter[bytes]] = {name: Counter() for name in splits}
    for name in sorted(wanted, key=lambda name: len(wanted[name])):  # train, the largest, last
        for content in _contents(splits[name].select(wanted[name])):
            if (left := left - max(len(content), _LEAST)) < 0:
                break
            digests[name][hashlib.blake2b(content, digest_size=16).digest()] += 1
    if left < 0:
        notes.append("Not all images were compared between the splits: too many have the same size.")
    for name, other in UNLABELLED_PAIRS if "unlabelled" in splits else PAIRS:
        both = sum(count for digest, count in digests[name].items() if digest in digests[other])
        if both:
            notes.append(
                f"{both} of {len(splits[name])} images of {name} are in {other} too, byte for byte: figures on them "
                "measure memory. Remove them from one of the two."
            )


def check_paths(train: Dataset, notes: list[str]) -> None:
    """Note the files that train names more than once with different labels."""
    labels: dict[str, set[int]] = {}
    counted = Counter[str]()
    for batch in train.select_columns(["image", "label"]).with_format("arrow").iter(10_000):
        paths = pc.struct_field(batch["image"].combine_chunks(), "path").to_pylist()
        stored = pc.is_valid(pc.struct_field(batch["image"].combine_chunks(), "bytes")).to_pylist()
        for path, label, inside in zip(paths, batch["label"].to_pylist(), stored, strict=True):
            if path and not inside:  # of images in a file of their own alone the path is a name
                labels.setdefault(path, set()).add(label)
                counted[path] += 1
    if doubtful := sorted(path for path, found in labels.items() if len(found) > 1):
        rows = sum(counted[path] for path in doubtful)
        notes.append(
            f"{rows} rows of train name {len(doubtful)} files with different labels, such as {doubtful[0]}: the model "
            "learns both. Leave one row of each."
        )


def _sizes(split: Dataset) -> Iterator[int]:
    for batch in split.select_columns("image").with_format("arrow").iter(1000):
        cells: Any = batch["image"].combine_chunks()
        lengths = pc.binary_length(pc.struct_field(cells, "bytes")).to_pylist()
        for length, path in zip(lengths, pc.struct_field(cells, "path").to_pylist(), strict=True):
            yield length if length is not None else _size_of(path)


def _size_of(path: str | None) -> int:
    try:
        return os.stat(path or "").st_size
    except OSError:  # a missing file is reported when it is decoded
        return 0


def _contents(split: Dataset) -> Iterator[bytes]:
    for image in split.with_format(None)["image"]:
        if image["bytes"] is not None:
            yield image["bytes"]
        else:
            with open(image["path"], "rb") as file:
                yield file.read()
