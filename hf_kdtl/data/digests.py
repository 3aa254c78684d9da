"""What identifies the images and the labels of splits: by it one sees that a folder has grown, or is cut otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import PurePath

from datasets import Dataset

from hf_kdtl.data.columns import source_rows
from hf_kdtl.data.several import SEVERAL


def digests(splits: Mapping[str, Dataset]) -> dict[str, str]:
    """{split: a hash of its images, in their order; "labels": one of all their labels}. No image is read: each is
    known by its file's name below the folder that all share, because that one may be typed in several ways; one
    without a name by its row."""
    found = {name: _hash(_names(split)) for name, split in splits.items()}
    return found | {"labels": _hash(label for split in splits.values() for label in _labels(split))}


def _names(split: Dataset) -> Iterator[str]:
    cells = split.with_format(None).select_columns("image").flatten()  # the bytes beside the paths stay unread
    paths = cells["image.path"][:]
    parts = [PurePath(path).parts if path else () for path in paths]
    folders = [found[:-1] for found in parts if found] or [()]
    ends = zip(min(folders), max(folders), strict=False)  # what the first and the last share all do
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    for found, row in zip(parts, source_rows(split).tolist(), strict=True):
        yield "/".join(found[shared:]) or str(row)


def _labels(split: Dataset) -> Iterator[str]:
    """By name: a model may list the classes in another order than the data."""
    names = split.features["label"].names
    if SEVERAL not in split.features:
        return (names[label] if label >= 0 else "" for label in split["label"][:])
    return (str(sorted(zip(names, row, strict=True))) for row in split[SEVERAL][:])


def _hash(words: Iterable[str]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for word in words:
        found.update(f"{len(word)} {word}".encode())
    return found.hexdigest()
