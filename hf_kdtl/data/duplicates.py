"""Images that are there twice, byte for byte: in two splits, where figures measure memory, or under two classes."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from hf_kdtl.data.several import SEVERAL, UNLABELLED

_BUDGET = 2**30
_LEAST = 2**14
"""A gigabyte is read at most, each image counted as 16 kB at least, for opening a file; and only files whose size
occurs in another split or under another class are read at all."""


PAIRS = (("validation", "train"), ("test", "train"), ("test", "validation"))
UNLABELLED_PAIRS = (("validation", "unlabelled"), ("test", "unlabelled"))


def check_duplicates(splits: dict[str, Dataset], notes: list[str]) -> None:
    """Note how many images of validation and test are also in train or in each other, or in `unlabelled`; and how many
    images have two classes."""
    labels = {name: _labels(split) for name, split in splits.items()}
    wanted, left = _candidates({name: list(_sizes(split)) for name, split in splits.items()}, labels), _BUDGET
    digests: dict[str, Counter[bytes]] = {name: Counter() for name in splits}
    classes: dict[bytes, set[int]] = {}
    for name in sorted(wanted, key=lambda name: len(wanted[name])):  # train, the largest, last
        for row, content in zip(wanted[name], _contents(splits[name].select(wanted[name])), strict=True):
            if (left := left - max(len(content), _LEAST)) < 0:
                break
            digest = hashlib.blake2b(content, digest_size=16).digest()
            digests[name][digest] += 1
            classes.setdefault(digest, set()).update(labels[name][row : row + 1])
    if left < 0:
        notes.append("Not all images were compared between the splits: too many have the same size.")
    for name, other in UNLABELLED_PAIRS if "unlabelled" in splits else PAIRS:
        both = sum(count for digest, count in digests[name].items() if digest in digests[other])
        if both:
            notes.append(
                f"{both} of {len(splits[name])} images of {name} are in {other} too, byte for byte: figures on them "
                "measure memory. Remove them from one of the two."
            )
    if doubtful := [digest for digest, found in classes.items() if len(found - {UNLABELLED}) > 1]:
        names = next(iter(splits.values())).features["label"].names
        pair = sorted(classes[doubtful[0]] - {UNLABELLED})[:2]
        notes.append(
            f"{len(doubtful)} images are there under two classes, byte for byte, one of them as {names[pair[0]]} and "
            f"as {names[pair[1]]}: the model learns both. Keep one of each."
        )


def _labels(split: Dataset) -> list[int]:
    """Class indices; of images with several labels none, for they may be there once a label."""
    one = "label" in split.features and SEVERAL not in split.features
    return split["label"][:] if one else []


def _candidates(sizes: dict[str, list[int]], labels: dict[str, list[int]]) -> dict[str, list[int]]:
    """{split: rows} whose size occurs in another split, or under another class."""
    seen_in = Counter(size for own in sizes.values() for size in set(own))
    classes: dict[int, set[int]] = {}
    for name, own in sizes.items():
        for size, label in zip(own, labels[name], strict=False):
            classes.setdefault(size, set()).add(label)
    return {
        name: [row for row, size in enumerate(own) if size and (seen_in[size] > 1 or len(classes.get(size, ())) > 1)]
        for name, own in sizes.items()
    }


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
