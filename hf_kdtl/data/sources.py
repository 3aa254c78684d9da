"""Opens whatever `load_images` is given: folders of images, parquet files, saved datasets, the Hub, the digits."""

from __future__ import annotations

import io
import re
from glob import glob, has_magic
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image
from sklearn.datasets import load_digits

from hf_kdtl.utils.options import closest

SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def open_source(source: str, notes: list[str]) -> dict[str, Dataset]:
    """{"train": ..., any of "validation" and "test"}, with the columns and features that the source has.

    What was decided on the way is appended to `notes`. The meaning of `source` is that of `load_images`.

    Raises:
        ValueError: when there is nothing at `source`, or no training split in it.
    """
    splits: dict[str, Dataset] = {}
    opened = _open(source, notes)
    for name, split in opened.items():
        if (known := SPLITS.get(str(name).lower())) is None:
            notes.append(f"The split {name!r} of {source} ({len(split)} images) was not used.")
        elif known in splits:
            raise ValueError(
                f"{source!r} has two {known} splits ({', '.join(map(str, opened))}), expected one of each."
            )
        else:
            splits[known] = split
    if "train" not in splits:
        raise ValueError(f"{source!r} has the splits {', '.join(map(str, opened))}, expected one called 'train'.")
    return splits


def _open(source: str, notes: list[str]) -> dict[str, Dataset]:
    if source == "digits":
        return {"train": _digits()}
    path = Path(source).expanduser()
    if has_magic(source):
        files = sorted(Path(name) for name in glob(str(path), recursive=True))
        return _open_parquet(files, source)
    if path.is_file():
        return _open_parquet([path], source)
    if path.is_dir():
        return _open_folder(path, notes)
    _refuse_missing_path(source, path)
    try:
        return dict(datasets.load_dataset(source))
    except Exception as error:
        raise ValueError(
            f"{source!r} is no file or folder here, and could not be loaded from the Hub ({type(error).__name__}: "
            f"{error}). Expected a path, the name of a dataset on the Hub, or 'digits'."
        ) from error


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


def _open_folder(folder: Path, notes: list[str]) -> dict[str, Dataset]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        saved = datasets.load_from_disk(str(folder))
        return dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
    if parquet := sorted(folder.rglob("*.parquet")):
        return _open_parquet(parquet, str(folder))
    extensions = set(ImageFolder.EXTENSIONS)
    if not any(file.suffix.lower() in extensions for file in folder.rglob("*")):
        raise ValueError(
            f"The folder {str(folder)!r} holds no images, expected a sub-folder of images (png, jpg, ...) for each "
            "class, parquet files, or a dataset written by save_to_disk."
        )
    return {name: _imagefolder(part) for name, part in _split_folders(folder, notes).items()}


def _split_folders(folder: Path, notes: list[str]) -> dict[str, Path]:
    """{split: folder}. Not left to `datasets`: it takes a class called "train" or "test tube" for a split, and drops
    the other classes without a word."""
    subfolders = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    splits = {SPLITS[entry.name.lower()]: entry for entry in subfolders if entry.name.lower() in SPLITS}
    others = [entry.name for entry in subfolders if entry.name.lower() not in SPLITS]
    holds_classes = "train" in splits and any(entry.is_dir() for entry in splits["train"].iterdir())
    if "train" not in splits or (others and not holds_classes):
        return {"train": folder}
    if others:
        notes.append(f"Folders beside {splits['train'].name} that are no splits were not used: {', '.join(others)}.")
    return splits


def _imagefolder(folder: Path) -> Dataset:
    return datasets.load_dataset("imagefolder", data_dir=str(folder), data_files={"train": "**"}, split="train")


def _open_parquet(files: list[Path], source: str) -> dict[str, Dataset]:
    if not files or any(file.suffix != ".parquet" for file in files):
        found = ", ".join(file.name for file in files[:5]) or "no file"
        raise ValueError(f"{source!r} matches {found}, expected parquet files or a folder of images.")
    groups: dict[str, list[Path]] = {}
    for file in files:
        prefix = re.match(r"[a-z]*", file.stem.lower())
        groups.setdefault(SPLITS.get(prefix[0] if prefix else "", ""), []).append(file)
    if "" in groups and len(groups) > 1:
        names = ", ".join(file.name for file in groups[""][:5])
        raise ValueError(f"The split of {names} is unknown, expected names that begin with train, validation or test.")
    return {name or "train": _read_parquet(group) for name, group in groups.items()}


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
