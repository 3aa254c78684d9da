"""Which column holds the images and which the labels, and the labels of all splits as indices of train's classes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Value

from hf_kdtl.data.cells import UNLABELLED, is_unlabelled
from hf_kdtl.data.several import cell_names, class_names_of, is_list, names_of, with_labels
from hf_kdtl.data.tables import LABELS
from hf_kdtl.utils.options import suggestion
from hf_kdtl.utils.text import some


def with_two_columns(
    raw: dict[str, Dataset], image: str | None, label: str | None, notes: list[str], multi_label: bool = False
) -> dict[str, Dataset]:
    """Each split as the columns `image`, `label`, with the class names of train, and `row`; see `load_images`. Of
    several labels an image also `labels`.

    Raises:
        ValueError: when a column cannot be identified, or a split holds a label that train does not know.
    """
    features = raw["train"].features
    image = _column(features, "image", image, [name for name in features if _is_image(features[name])])
    others = [name for name in features if name != image]
    classes = [name for name in others if isinstance(features[name], ClassLabel)]
    lists = [name for name in others if is_list(features[name])] if multi_label else []
    whole = [name for name in others if name == label or name.lower() in LABELS if _is_whole(raw["train"], name)]
    kinds = lists or classes or [name for name in others if name in whole or _is_category(features[name])]
    label = _column(features, "label", label, kinds)
    if not (_is_image(features[image]) or _dtype(features[image]) in ("binary", "large_binary", "string")):
        raise ValueError(
            f"Column {image!r} is of type {_type(features[image])}, expected images, their bytes or paths."
        )
    if not (label in whole or _is_category(features[label]) or (multi_label and is_list(features[label]))):
        raise ValueError(f"Column {label!r} is of type {_type(features[label])}, expected ClassLabel, string or int.")
    cells = {name: _cells(split, label, name) for name, split in raw.items()} if multi_label else {}
    names = class_names_of(cells["train"]) if multi_label else _class_names(raw["train"], label, notes)
    if multi_label:
        notes.append(f"Column {label!r} was read as several labels an image, of {len(names)} classes: {some(names)}.")
    splits = {}
    for name, split in raw.items():
        if absent := {image, label} - set(split.column_names):
            raise ValueError(f"The split {name!r} has no column {absent.pop()!r}, only {_columns(split.features)}.")
        pixels = split.select_columns(image).rename_columns({image: "image"})
        pixels = pixels.cast_column("image", datasets.Image(decode=False))
        if len(there := _with_image(pixels)) < len(pixels):
            notes.append(
                f"{len(pixels) - len(there)} of {len(pixels)} rows of {name} have no image and were left out."
            )
            pixels, split = pixels.select(there), split.select(there)
            cells[name] = [cells[name][i] for i in there] if multi_label else []
        if multi_label:
            refuse_unseen(name, Counter(n for cell in cells[name] for n in cell or () if n not in names))
            splits[name] = with_rows(with_labels(pixels, cells[name], names))
            continue
        indices = _class_indices(split, name, label, names, notes)
        splits[name] = with_rows(pixels.add_column("label", indices, feature=ClassLabel(names=names)))
    return splits


def _is_whole(split: Dataset, name: str) -> bool:
    """Whether a column of floats holds whole numbers, as pandas writes integers in a column with empty cells."""
    is_float = _dtype(split.features[name]).startswith(("float", "double"))
    return is_float and all(v is None or isinstance(v, int) for v in _values(split, name))


def _values(split: Dataset, label: str) -> list[Any]:
    """The labels of a split: None where there is none, whole numbers as integers."""
    values = (None if is_unlabelled(v) or v != v else v for v in split[label][:])
    return [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]


def _with_image(pixels: Dataset) -> list[int]:
    """The rows whose cell is not empty."""
    found, first = [], 0
    for batch in pixels.with_format("arrow").iter(10_000):
        cells = batch["image"].combine_chunks()
        there = pc.or_(*(pc.fill_null(pc.not_equal(pc.binary_length(pc.struct_field(cells, key)), 0), False)
                         for key in ("bytes", "path")))  # fmt: skip
        found += [first + i for i, one in enumerate(there.to_pylist()) if one]
        first += len(cells)
    return found


def _cells(split: Dataset, label: str, name: str) -> list[list[str] | None]:
    if label not in split.features:
        raise ValueError(f"The split {name!r} has no column {label!r}, only {_columns(split.features)}.")
    names = names_of(split.features[label])
    return [cell_names(cell, names) for cell in _values(split, label)]


def with_rows(split: Dataset, first: int = 0) -> Dataset:
    """The split with the column `row`, counted from `first`, which stays with the images in every selection."""
    return split.add_column("row", list(range(first, first + len(split))), feature=Value("int64"))


def source_rows(split: Any) -> np.ndarray:
    """The row of each image in the split that it was loaded from, int64; its place here where there is no `row`."""
    return np.array(split["row"][:]) if "row" in split.features else np.arange(len(split))


def as_split(split: Any, num_labels: int | None = None) -> Any:
    """A split of `load_images`, or what is one but for the decoding of its images.

    Args:
        num_labels: the number of classes, without which the labels must be a ClassLabel.

    Raises:
        ValueError: for anything else.
    """
    features = getattr(split, "features", None) or {}
    image, label = (features.get(name) for name in ("image", "label"))
    right = _is_image(image) and getattr(split, "format", {}).get("type") != "custom"
    classes = isinstance(label, ClassLabel) or (num_labels and _dtype(label).startswith(("int", "uint")))
    if not right or not classes or not hasattr(split, "__len__"):
        found = f"{type(split).__name__}{f' of the columns {_columns(features)}' if features else ''}"
        raise ValueError(
            f"ImageDataset got a {found}, expected a split of images and class indices, as load_images makes it: "
            "load_images(source).train, whose source may be a path, a name or a Dataset."
        )
    # datasets would decode the images itself, other than a pipeline does.
    return split.cast_column("image", datasets.Image(decode=False)) if getattr(image, "decode", False) else split


def images_alone(split: Dataset, image: str | None = None) -> Dataset:
    """The column of images of a split, as `image`, whatever else it has. Raises ValueError as `with_two_columns`."""
    features = split.features
    name = _column(features, "image", image, [key for key in features if _is_image(features[key])])
    return (
        split.select_columns(name).rename_columns({name: "image"}).cast_column("image", datasets.Image(decode=False))
    )


def _column(features: datasets.Features, kind: str, named: str | None, candidates: list[str]) -> str:
    if named is not None and named not in features:
        hint = suggestion(named, features)
        raise ValueError(f"There is no column {named!r}, the columns are {_columns(features)}.{hint}")
    if named is not None:
        return named
    if len(candidates) == 1:
        return candidates[0]
    found = f"are {len(candidates)} columns" if candidates else "is no column"
    hint = " In a folder, the images of each of two or more classes go into a sub-folder with the name of the class."
    raise ValueError(
        f"There {found} that could be the {kind} column; the columns are {_columns(features)}. Expected one: "
        f"name it with {kind}_column=...{hint if kind == 'label' and not candidates else ''}"
    )


def _is_image(feature: Any) -> bool:
    # A struct of bytes and path is what an Image column is in a parquet file that `datasets` did not write.
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _is_category(feature: Any) -> bool:
    kinds = ("string", "large_string", "int", "uint", "bool")
    return isinstance(feature, ClassLabel) or _dtype(feature).startswith(kinds)


def _dtype(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else ""


def _type(feature: Any) -> str:
    if isinstance(feature, ClassLabel):
        return f"ClassLabel of {feature.num_classes}"
    return _dtype(feature) or type(feature).__name__


def _columns(features: datasets.Features) -> str:
    return ", ".join(f"{name!r} ({_type(feature)})" for name, feature in features.items())


def _class_names(train: Dataset, label: str, notes: list[str]) -> list[str]:
    feature = train.features[label]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = sorted({value for value in _values(train, label) if value is not None})
    notes.append(f"Column {label!r} ({_type(feature)}) was read as {len(values)} classes: {some(values)}.")
    if several := [value for value in values if isinstance(value, str) and ";" in value]:
        notes.append(f"Classes such as {several[0]!r} hold ';': for several labels an image set multi_label.")
    return [str(value) for value in values]


def _class_indices(split: Dataset, name: str, label: str, names: list[str], notes: list[str]) -> list[int]:
    """The labels of a split as indices into `names`, matched by the name of the class; -100 if unlabelled."""
    feature, values = split.features[label], _values(split, label)
    if negative := sorted({v for v in values if isinstance(v, int) and v < 0}):
        raise ValueError(
            f"Column {label!r} of {name} holds the labels {some(negative)}, expected class indices from 0; write "
            "-100 for an unlabelled image of train, and leave unlabelled images out of validation and test."
        )
    own = feature.names if isinstance(feature, ClassLabel) else None
    if own is not None and own != names:
        if set(own) - set(names):
            raise ValueError(
                f"The classes of {name} ({some(own)}) are not those of train ({some(names)}): training never sees "
                f"{some(sorted(set(own) - set(names)))}. Expected the same names; remove or rename these."
            )
        if own != [n for n in names if n in own]:
            notes.append(f"The classes of {name} are listed as {some(own)}: re-ordered by name to those of train.")
    position = {class_name: index for index, class_name in enumerate(names)}
    known = [None if v is None else str(v if own is None else own[v]) for v in values]
    refuse_unseen(name, Counter(v for v in known if v is not None and v not in position))
    return [UNLABELLED if v is None else position[v] for v in known]


def refuse_unseen(name: str, unseen: Counter[str]) -> None:
    """Raises ValueError when split `name` has images of classes, {class: count}, that are not in train."""
    if unseen:
        listed = some([f"{class_name!r} ({count} images)" for class_name, count in sorted(unseen.items())])
        raise ValueError(
            f"The split {name!r} has images of classes that training never saw: {listed}. Expected only classes of "
            "train; move images of them to train, or remove them."
        )
