"""Images without labels, to be trained on beside a labelled set."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, concatenate_datasets
from tqdm.auto import tqdm

from hf_kdtl.data.bit_depth import check_bit_depths
from hf_kdtl.data.columns import UNLABELLED, images_alone, source_rows, with_rows
from hf_kdtl.data.decoding import decode_row
from hf_kdtl.data.duplicates import check_duplicates
from hf_kdtl.data.folders import note_left_out
from hf_kdtl.data.loading import ImageData, readable
from hf_kdtl.data.scan import scan
from hf_kdtl.data.several import SEVERAL, unlabelled_rows
from hf_kdtl.data.sources import Source, files_to_read, open_parts, source_name


def open_unlabelled(
    source: Source,
    data: ImageData,
    *,
    image_column: str | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    notes: list[str],
) -> Dataset:
    """Images of a source as a training split of `data` in which no image has a label (-100); their rows come after
    those of train as it was loaded.

    Args:
        source: a folder of images, in any sub-folders (their names mean nothing), or whatever `load_images` takes; the
            labels and splits that it may have are ignored.
        data: the labelled images, whose classes the split gets. Images that are in its validation or test split too
            are reported in `notes`, and images of more than 8 bits treated as there.
        image_column: of `source`; by default its only column of images.
        on_bad_image: as in `load_images`.
        notes: sentences are appended to it.

    Raises:
        ValueError: when there are no images at `source`, or one cannot be read.
    """
    split = _opened(source, image_column, on_bad_image, notes)
    split = check_bit_depths({"unlabelled": split}, data.high_bit_depth, notes)["unlabelled"]
    check_duplicates({"unlabelled": split, "validation": data.validation, "test": data.test}, notes)
    notes.append(f"{len(split)} images without labels come from {source_name(source)}.")
    splits = [one for one in (data.train, data.validation, data.test, data.rest) if one is not None]
    first = max([data.train_rows, *(int(source_rows(one).max()) + 1 for one in splits)])  # rows that train has not
    return without_labels(with_rows(split, first), data.label_names, data.multi_label)


def open_images(
    source: Source,
    *,
    image_column: str | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    high_bit_depth: Literal["clip", "scale"] = "clip",
    notes: list[str],
) -> Dataset:
    """Images of a source as a split in which no image has a label (-100), without any labelled set; see
    `open_unlabelled`."""
    split = _opened(source, image_column, on_bad_image, notes)
    split = check_bit_depths({"unlabelled": split}, high_bit_depth, notes)["unlabelled"]
    notes.append(f"{len(split)} images without labels come from {source_name(source)}.")
    return without_labels(with_rows(split), ["unlabelled"])


def _opened(source: Source, image_column: str | None, on_bad_image: str, notes: list[str]) -> Dataset:
    name = source_name(source)
    split = _folder(source, notes)
    if split is None:
        opened = open_parts(source, notes, image_column)
        split = concatenate_datasets([images_alone(found, image_column) for found in opened.values()])
    if not len(split):
        raise ValueError(f"the unlabelled source {name!r} holds no images, expected one or more.")
    if on_bad_image == "skip":
        split = readable(split, "unlabelled", notes)
    else:
        bar = tqdm(split["image"], desc="Reading unlabelled", leave=False, delay=2, disable=None)
        for index, image in enumerate(bar):
            decode_row(image, index, len(split))
    return split


def without_labels(split: Dataset, names: list[str], several: bool = False) -> Dataset:
    """The images of a split, each with the label -100."""
    images = split.remove_columns("label") if "label" in split.features else split
    labelled = images.add_column("label", [UNLABELLED] * len(images), feature=ClassLabel(names=names))
    if SEVERAL in split.features or several:
        rows = unlabelled_rows(len(images), len(names))
        labelled = labelled.remove_columns([SEVERAL] if SEVERAL in labelled.features else [])
        labelled = labelled.add_column(SEVERAL, rows, feature=datasets.List(datasets.Value("int64")))
        return labelled.select_columns(["image", "label", "row", SEVERAL])
    return labelled.select_columns(["image", "label", "row"])


def by_label(split: Dataset) -> tuple[Dataset, Dataset]:
    """(labelled images, unlabelled images) of a split."""
    has = np.array(split["label"][:]) != UNLABELLED
    return (split, split.select([])) if has.all() else (
        split.select(np.flatnonzero(has)), split.select(np.flatnonzero(~has)))  # fmt: skip


def _folder(source: Any, notes: list[str]) -> Dataset | None:
    """The images of a folder, sorted by path; None where `source` is none, or its tables are read."""
    if not isinstance(source, str | Path) or not (path := Path(source).expanduser()).is_dir():
        return None
    root = scan(path.absolute())
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists() or files_to_read(root, []):
        return None
    note_left_out("the images without labels", [(path.name, root)], notes)
    images = sorted(str(image) for image in root.all_images())
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return Dataset.from_dict({"image": [{"bytes": None, "path": image} for image in images]}, features=features)
