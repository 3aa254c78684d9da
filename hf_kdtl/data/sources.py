"""Opens whatever `load_images` is given: folders of images, parquet files, saved datasets, the Hub, the digits."""

from __future__ import annotations

import io
import re
from glob import glob, has_magic
from pathlib import Path
from typing import TypeAlias

import datasets
import numpy as np
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image

from hf_kdtl.data.folders import SPLITS, open_class_folders, open_folder, split_name
from hf_kdtl.data.scan import Folder, is_run, scan
from hf_kdtl.data.tables import METADATA, open_table
from hf_kdtl.data.webdataset import open_webdataset
from hf_kdtl.utils.options import closest, suggestion
from hf_kdtl.utils.text import some

Source: TypeAlias = str | Path | Dataset | DatasetDict


def open_source(
    source: Source, notes: list[str], image_column: str | None = None, label_column: str | None = None
) -> dict[str, Dataset]:
    """{"train": ..., any of "validation" and "test"}, with the columns and features that the source has.

    What was decided on the way is appended to `notes`. The meaning of `source` is that of `load_images`.

    Raises:
        ValueError: when there is nothing at `source`, or no training split in it.
    """
    splits: dict[str, Dataset] = {}
    name_of = source_name(source)
    opened = _divided(open_parts(source, notes, image_column, label_column), (image_column, label_column), notes)
    for name, split in opened.items():
        if (known := split_name(str(name))) is None:
            notes.append(f"The split {name!r} of {name_of} ({len(split)} images) was not used.")
        elif known in splits:
            raise ValueError(
                f"{name_of!r} has two {known} splits ({', '.join(map(str, opened))}), expected one of each."
            )
        else:
            splits[known] = split
    if "train" not in splits:
        raise ValueError(f"{name_of!r} has the splits {', '.join(map(str, opened))}, expected one called 'train'.")
    return splits


def open_parts(
    source: Source, notes: list[str], image_column: str | None = None, label_column: str | None = None
) -> dict[str, Dataset]:
    """All that a source has, under the names that it has there."""
    if isinstance(source, Dataset | DatasetDict | dict):
        return _given(source, notes)
    if isinstance(source, str | Path):
        return _open(str(source), notes, image_column, label_column)
    raise ValueError(
        f"The source is a {type(source).__name__}, expected a path, a name, a datasets.Dataset or a DatasetDict."
    )


def source_name(source: Source) -> str:
    """The source in a few words, for notes and reports."""
    return str(source) if isinstance(source, str | Path) else f"a {type(source).__name__} in memory"


def _divided(opened: dict[str, Dataset], used: tuple[str | None, ...], notes: list[str]) -> dict[str, Dataset]:
    """What was opened, a single part divided by its column `split`; a note where such a column decides nothing."""
    found: dict[str, Dataset] = {}
    for part, split in opened.items():
        column = next((name for name in split.column_names if name.lower() == "split" and name not in used), None)
        rows: dict[str, list[int]] = {}
        for row, value in enumerate(_texts(split, column) if column else ()):
            rows.setdefault(split_name(value) or value, []).append(row)
        known = [name for name in rows if split_name(name)]
        if column and not known:
            notes.append(
                f"The column {column!r} of {part} does not divide the images: none of its values ({some([*rows])}) is "
                "train, validation or test."
            )
        if column is None or not known:
            found[part] = split
        elif len(opened) == 1 and split_name(part) in ("train", None):
            notes.append(f"The splits are those of the column {column!r}: {', '.join(known)}.")
            found |= {name: split.select(own).remove_columns(column) for name, own in rows.items()}
        else:
            found[part] = split.remove_columns(column)
            if known != [split_name(part)]:
                notes.append(
                    f"The column {column!r} of {part} ({', '.join(known)}) was not used: the splits are "
                    f"{', '.join(opened)}. To divide by the column, load that part alone."
                )
    return found


def _texts(split: Dataset, column: str) -> list[str]:
    names = getattr(split.features[column], "names", None)
    values = (value if names is None or value is None else names[value] for value in split[column][:])
    return ["(empty)" if value is None else str(value).strip() for value in values]


def _given(source: Dataset | DatasetDict | dict[str, Dataset], notes: list[str]) -> dict[str, Dataset]:
    splits = {"train": source} if isinstance(source, Dataset) else dict(source)
    if odd := [name for name, split in splits.items() if not isinstance(split, Dataset)]:
        raise ValueError(
            f"The split {odd[0]!r} is a {type(splits[odd[0]]).__name__}, expected a datasets.Dataset (a stream has no "
            "length: load it without streaming=True)."
        )
    if any(split.format["type"] == "custom" for split in splits.values()):
        notes.append("The transform of the dataset (set_transform) is not applied: ImageDataset makes the pixels.")
    return {name: split.with_format(None) for name, split in splits.items()}


def _open(
    source: str, notes: list[str], image_column: str | None = None, label_column: str | None = None
) -> dict[str, Dataset]:
    if source == "digits":
        return {"train": _digits()}
    path = Path(source).expanduser()
    if has_magic(source) and not path.exists():
        found = sorted(Path(name) for name in glob(str(path), recursive=True))
        folders = [entry for entry in found if entry.is_dir() and not is_run(entry)]
        if folders and (len(folders) == len(found) or not any(entry.suffix == ".parquet" for entry in found)):
            if others := [entry.name for entry in found if entry not in folders]:
                notes.append(f"{len(others)} files or runs that {source!r} matches were not read: {some(others, 3)}.")
            return open_class_folders(folders, source, notes)
        return _open_files(found, source, notes)
    if path.suffix.lower() in (".csv", ".tsv", ".jsonl") and path.is_file():
        return {"train": open_table(path, image_column, label_column, notes)}
    if path.is_file():
        return _open_files([path], source, notes)
    if path.is_dir():
        return _open_folder(path, label_column, notes)
    _refuse_missing_path(source, path)
    try:
        return dict(datasets.load_dataset(source))
    except Exception as error:
        raise ValueError(
            f"{source!r} is no file or folder here, and could not be loaded from the Hub ({type(error).__name__}: "
            f"{error}). Expected a path, the name of a dataset on the Hub, or 'digits'.{_near(source)}"
        ) from error


def _near(source: str) -> str:
    here = [entry.name for entry in Path().iterdir() if not entry.name.startswith(".")]
    return suggestion(source, ["digits", *here])


def _refuse_missing_path(source: str, path: Path) -> None:
    # "owner/name" may be either: it is a path when the folder `owner` is here.
    is_path = (
        source.startswith(("/", ".", "~")) or "\\" in source or source.count("/") > 1 or path.suffix == ".parquet"
    )
    if not is_path and not ("/" in source and path.parent.is_dir()):
        return
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    missing = path.absolute().relative_to(parent).parts[0]
    here = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    close = closest(missing, here, most=3, cutoff=0.5)
    found = f"close matches in {parent}: {', '.join(close)}" if close else f"nothing like it is in {parent}"
    raise ValueError(f"The path {source!r} does not exist ({found}). Expected a folder or file of images.")


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [{"bytes": _png(np.rint(image * (255 / 16)).astype(np.uint8)), "path": None} for image in digits.images]
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": ClassLabel(names=list("0123456789"))}
    )
    return Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _open_folder(folder: Path, label_column: str | None, notes: list[str]) -> dict[str, Dataset]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        saved = datasets.load_from_disk(str(folder))
        return dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
    root = scan(folder.absolute())
    if files := files_to_read(root, notes):
        return _open_files(files, str(folder), notes)
    return open_folder(root, label_column, notes)


def files_to_read(root: Folder, notes: list[str]) -> list[Path]:
    """The parquet files or WebDataset archives of a folder; none where it is a folder of images.

    Raises:
        ValueError: where it may be either.
    """
    tables = sorted(path for path in root.all_tables() if path.suffix == ".parquet" and path.name not in METADATA)
    holders = dict.fromkeys(path.parent for path in root.all_images())
    if tables and len(holders) > 1:
        inside = [str(path.relative_to(root.path)) for path in (*tables, *holders)]
        raise ValueError(
            f"{str(root.path)!r} holds parquet files ({some(inside[: len(tables)], 3)}) and folders of images "
            f"({some(inside[len(tables) :], 3)}), expected one of the two. For the images move the parquet files out; "
            f"for the tables load {str(root.path / '**' / '*.parquet')!r}."
        )
    archives = sorted(root.path.glob("*.tar"))
    read = tables or ([] if root.with_images() else archives)
    if read and (rest := len([*root.all_images(), *(archives if tables else ())])):
        notes.append(f"{rest} images and archives next to {some([path.name for path in read], 3)} were not read.")
    return read


def _open_files(files: list[Path], source: str, notes: list[str]) -> dict[str, Dataset]:
    parquet = bool(files) and all(file.suffix == ".parquet" for file in files)
    if not parquet and not (files and all(file.name.endswith((".tar", ".tar.gz", ".tgz")) for file in files)):
        found = ", ".join(file.name for file in files[:5]) or "no file"
        unpack = " Unpack it first, and name the folder." if any(file.suffix == ".zip" for file in files) else ""
        raise ValueError(
            f"{source!r} matches {found}, expected parquet files or a folder of images; or WebDataset archives "
            f"(.tar), or one table of paths and labels (.csv, .tsv, .jsonl).{unpack}{'' if files else _near(source)}"
        )
    groups: dict[str, list[Path]] = {}
    for file in files:
        prefix = re.match(r"[a-z]*", file.stem.lower())
        groups.setdefault(SPLITS.get(prefix[0] if prefix else "", ""), []).append(file)
    if "" in groups and len(groups) > 1:
        names = ", ".join(file.name for file in groups[""][:5])
        raise ValueError(f"The split of {names} is unknown, expected names that begin with train, validation or test.")
    if parquet:
        return {name or "train": _read_parquet(group) for name, group in groups.items()}
    return {name or "train": open_webdataset(group, notes) for name, group in groups.items()}


def _read_parquet(files: list[Path]) -> Dataset:
    # One split at a time, and checked: files read together all take the class names of the first one.
    try:
        features = [datasets.Features.from_arrow_schema(pq.read_schema(file)) for file in files]
        odd = [file.name for file, columns in zip(files, features, strict=True) if columns != features[0]]
        if not odd:
            return Dataset.from_parquet([str(file) for file in files], features=features[0])
    except Exception as error:
        names = ", ".join(str(file) for file in files[:5])
        raise ValueError(f"{names} could not be read, expected parquet files ({error}).") from error
    raise ValueError(
        f"{odd[0]} has other columns or class names than {files[0].name}, expected the same in all files of a split; "
        "name the files that belong together, by a glob."
    )
