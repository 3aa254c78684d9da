"""WebDataset archives: a tar whose files `key.jpg` and `key.cls` (or `key.json`) are an image and its label."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
from datasets import Dataset, Value

from hf_kdtl.data.cells import is_unlabelled, whole_numbers
from hf_kdtl.data.scan import image_suffixes

_LABELS = ("label", "cls", "class", "class_name")


def open_webdataset(files: list[Path], notes: list[str]) -> Dataset:
    """The samples of the archives as columns `image` (bytes) and `label`; a sample without a label is unlabelled, and
    one with a label and no image that Pillow opens is left out, with a note.

    Raises:
        ValueError: for an archive that cannot be read, has two images of one key, or none of whose images has a label.
    """
    stamps = [(str(file), file.stat().st_mtime_ns) for file in files]  # the cache must not outlive the file
    features = datasets.Features({"image": datasets.Image(decode=False), "label": Value("string")})
    try:
        found: Any = Dataset.from_generator(_samples, features=features, gen_kwargs={"files": stamps})
    except (tarfile.TarError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{files[0]} could not be read ({cause}), expected WebDataset archives (tar).") from error
    empty = pc.is_null(found.data.column("image"), nan_is_null=False).to_pylist()
    if lost := [row for row, one in enumerate(empty) if one]:
        notes.append(
            f"{len(lost)} labels in {', '.join(file.name for file in files[:3])} have no image of their key that is "
            "read here, and were left out: expected key.jpg (png, ...) next to key.cls, one after the other."
        )
        found = found.select([row for row, one in enumerate(empty) if not one])
    labels = [None if is_unlabelled(label) else label for label in found["label"][:]]
    if not any(label is not None for label in labels):
        raise ValueError(
            f"{len(found)} images in {files[0]} have no label, expected a WebDataset archive: with each key.jpg a "
            'key.cls with its class, or a key.json with {"label": ...}.'
        )
    if (numbers := whole_numbers(labels)) is not None:
        return found.map(
            lambda _, rows: {"label": [numbers[row] for row in rows]}, input_columns=["label"], with_indices=True,
            batched=True, features=datasets.Features(found.features | {"label": Value("int64")}),
        )  # fmt: skip
    return found


def _samples(files: list[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    for file, _ in files:
        with tarfile.open(file) as archive:
            yield from archive_samples(archive, file)


def archive_samples(archive: tarfile.TarFile, file: str) -> Iterator[dict[str, Any]]:
    """{"image": {"bytes", "path"}, "label": str or None} of each image of an archive, in one reading of it."""
    key, sample = None, _empty()
    for member in archive:
        if not member.isfile():
            continue
        folder, name = os.path.split(member.name)
        stem, _, ending = name.partition(".")
        if (folder, stem) != key:
            yield from _complete(sample)
            key, sample = (folder, stem), _empty()
        content = archive.extractfile(member)
        assert content is not None
        _add(sample, ending.lower(), content.read(), f"{file}/{member.name}")
    yield from _complete(sample)


def _empty() -> dict[str, Any]:
    return {"image": None, "label": None}


def _complete(sample: dict[str, Any]) -> list[dict[str, Any]]:
    return [sample] if sample["image"] is not None or sample["label"] is not None else []


def _add(sample: dict[str, Any], ending: str, content: bytes, name: str) -> None:
    if ending in ("cls", "cls.txt"):
        sample["label"] = content.decode("utf-8").strip()
    elif ending == "json":
        fields = json.loads(content)
        label = next((fields[key] for key in _LABELS if key in fields), None) if isinstance(fields, dict) else None
        sample["label"] = sample["label"] if label is None else str(label)
    elif f".{ending.rpartition('.')[2]}" in image_suffixes():
        if sample["image"] is not None:
            raise ValueError(
                f"{name} is the second image of its key (the name up to its first point), after "
                f"{sample['image']['path']}; expected one. Rename the files so that each image has a key of its own."
            )
        sample["image"] = {"bytes": content, "path": name}
