"""Folders of images: which folders are splits, which are classes, and a note for each image that is not read."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset

from hf_kdtl.data.decoding import AVIF_MISSING, HEIF_MISSING
from hf_kdtl.data.scan import Folder, scan
from hf_kdtl.data.tables import METADATA, metadata_split
from hf_kdtl.utils.text import some

SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
}
_SPLIT = re.compile(rf"({'|'.join(SPLITS)})[-_ ]?(set|data|images|imgs|split)?")
_UNLABELLED = {"unlabelled", "unlabeled", "nolabel", "nolabels", "unannotated"}
_PART = re.compile(r"[\W\d_]*(images?|imgs?|photos?|pictures?|jpe?gs?|pngs?|part|batch|session|day|set|v)?[\W\d_]*")
"""Names of folders that divide a class (2023, images, part_1) rather than name one."""


def split_name(name: str) -> str | None:
    """The split that a folder or file is named after: train, validation, test or None.

    >>> [split_name(n) for n in ("Training", "val", "test_images", "test tube")]
    ['train', 'validation', 'test', None]
    """
    found = _SPLIT.fullmatch(name.lower())
    return SPLITS[found[1]] if found else None


def open_folder(root: Folder, label_column: str | None, notes: list[str]) -> dict[str, Dataset]:
    """Each split of a folder of images as columns `image` and `label` (or those of its metadata file).

    Raises:
        ValueError: when there are no images, or the folders can be read in more than one way.
    """
    if next(root.all_images(), None) is None:
        raise ValueError(
            f"The folder {str(root.path)!r} holds no images, expected a sub-folder of images (png, jpg, ...) for each "
            f"class, parquet files, or a dataset written by save_to_disk.{_found_instead(root)}"
        )
    folders = _splits(root, notes) or {"train": root}
    train = _split("train", folders["train"], None, label_column, notes)
    names = getattr(train.features.get("label"), "names", None)
    others = {name: f for name, f in folders.items() if name != "train"}
    return {"train": train} | {name: _split(name, f, names, label_column, notes) for name, f in others.items()}


def open_class_folders(paths: list[Path], pattern: str, notes: list[str]) -> dict[str, Dataset]:
    """Folders that a glob names, each a class; a part of the glob that names train and test divides them in splits.

    Raises:
        ValueError: when no image is in them.
    """
    depth = min(len(path.parts) for path in paths) - 1
    names = {i: {split_name(path.parts[i]) for path in paths} for i in range(depth)}
    places = [i for i, found in names.items() if "train" in found and None not in found]
    place = max(places, key=lambda i: len(names[i]), default=None)
    groups: dict[str, list[Folder]] = {}
    for path in paths:
        name = "train" if place is None else split_name(path.parts[place])
        groups.setdefault(str(name), []).append(scan(path.absolute()))
    splits = {}
    for name, folders in groups.items():
        classes: dict[str, list[Folder]] = {}
        for folder in folders:
            classes.setdefault(_nfc(folder.path.name), []).append(folder)
        splits[name] = _labelled(name, classes, notes)
        if not len(splits[name]):
            raise ValueError(f"The folders of {pattern!r} hold no images for {name}, expected images in each.")
    return splits


def _splits(root: Folder, notes: list[str]) -> dict[str, Folder] | None:
    """{split: folder}, from the folder or from the only one in it that has splits; None where there are none.

    Not left to `datasets`: it takes a class called "train" or "test tube" for a split, and drops the other classes
    without a word."""
    if (found := _split_subfolders(root, notes)) is not None:
        return found
    inner = {n: f for n, f in root.with_images().items() if _split_subfolders(f, []) is not None}
    if len(only := list(root.with_images().values())) == 1 and (inner or not root.images):
        if (found := _splits(only[0], notes)) is not None:
            _note_beside(root, notes)
        return found
    if not inner:
        return None
    listed = some([f"{name} ({', '.join(folder.with_images())})" for name, folder in inner.items()])
    rest = some([name for name in root.with_images() if name not in inner])
    one = str(root.path / next(iter(inner)))
    raise ValueError(
        f"{str(root.path)!r} has splits inside of {listed}{f', and other folders of images ({rest})' if rest else ''}"
        f"; expected one set of train, validation and test. Name the one to load: {one!r}; or, where these are "
        "classes, move the splits outside: train/<class>, test/<class>."
    )


def _split_subfolders(folder: Folder, notes: list[str]) -> dict[str, Folder] | None:
    named: dict[str, list[Folder]] = {}
    for name, sub in folder.with_images().items():
        named.setdefault(split_name(name) or "", []).append(sub)
    others = [sub.path.name for sub in named.pop("", [])]
    train = named.get("train", [])
    holds_classes = any(sub.with_images() or METADATA & set(sub.tables) for sub in train)
    if (
        not train
        and not others
        and len(named) > 1
        and all(sub.with_images() for subs in named.values() for sub in subs)
    ):
        raise ValueError(
            f"{str(folder.path)!r} has the splits {some(list(folder.with_images()))} and none called train. Name the "
            f"one to train on train, or load its folder alone: {str(next(iter(named.values()))[0].path)!r}."
        )
    if not train or (others and not holds_classes):
        return None
    if double := [subs for subs in named.values() if len(subs) > 1]:
        raise ValueError(
            f"{str(folder.path)!r} has two folders for one split ({', '.join(s.path.name for s in double[0])}), "
            "expected one of each. Merge them, or move one out."
        )
    if others:
        notes.append(f"Folders next to {train[0].path.name} that are no splits were not used: {', '.join(others)}.")
    _note_beside(folder, notes)
    empty = [n for n, s in folder.subfolders.items() if split_name(n) and s not in folder.with_images().values()]
    if empty:
        notes.append(f"The split folders {', '.join(empty)} hold no images and were not used.")
    return {name: subs[0] for name, subs in named.items()}


def _note_beside(folder: Folder, notes: list[str]) -> None:
    """What lies in a folder next to, or above, the folders of splits."""
    if folder.images:
        listed = some([path.name for path in folder.images], 3)
        notes.append(f"{len(folder.images)} images next to the splits belong to none and were left out: {listed}.")
    note_left_out("any split", [(folder.path.name, folder.alone())], notes)


def _split(name: str, folder: Folder, known: list[str] | None, label_column: str | None, notes: list[str]) -> Dataset:
    """The images of a split. `known`: the classes of train."""
    holder = folder
    while not METADATA & set(holder.tables) and not holder.images and len(holder.with_images()) == 1:
        holder = next(iter(holder.with_images().values()))
    if table := next((path for key, path in holder.tables.items() if key in METADATA), None):
        divided = holder.with_images()
        has_classes = len(divided) > 1 and not all(map(_is_part, divided))
        found = metadata_split(name, table, list(holder.all_images()), has_classes, label_column, notes)
        del holder.tables[table.name]  # it was read, or there is a note on its columns
        if found is not None:
            note_left_out(name, [(folder.path.name, folder)], notes)
            return found
    classes = _classes(name, folder, known, notes)
    if not classes:
        tables = some(list(folder.tables)) or some(list(holder.tables))
        raise ValueError(
            f"There is no column that could be the label column: {str(folder.path)!r} holds {len(folder.images)} "
            f"images and no class folders{f', next to {tables}' if tables else ''}. Expected the images of each of "
            "two or more classes in a sub-folder with the name of the class, or a csv file with columns file_name and "
            "label, which is loaded by its own name."
        )
    if folder.images:
        listed = some([path.name for path in folder.images], 3)
        notes.append(
            f"{len(folder.images)} images of {name} outside the class folders have no class and were left out: "
            f"{listed}."
        )
    note_left_out(name, [(folder.path.name, folder.alone())], notes)
    merged: dict[str, list[Folder]] = {}
    for key, sub in classes.items():
        merged.setdefault(_nfc(key), []).append(sub)
    return _labelled(name, merged, notes)


def _classes(split: str, folder: Folder, known: list[str] | None, notes: list[str]) -> dict[str, Folder]:
    """{class: folder}; {} for a folder of images without class folders."""
    groups = folder.with_images()
    if set(map(_nfc, groups)) <= set(known or ()):
        return folder.subfolders if groups else {}
    labelled = {name: sub for name, sub in groups.items() if not _is_unlabelled(name)}
    if folder.images or len(labelled) > 1 or not labelled:
        nested = [sub for sub in labelled.values() if not sub.images]
        if labelled and len(nested) == len(labelled):
            _check_nesting(folder, labelled, notes)
        return folder.subfolders if groups else {}
    (only,) = labelled.values()
    if only.images:
        return folder.subfolders
    if len(only.with_images()) > 1:
        notes.append(f"The classes of {split} are the folders in {only.path}.")
    note_left_out(split, [(only.path.name, only.alone())], notes)
    return _classes(split, only, known, notes)


def _check_nesting(folder: Folder, groups: dict[str, Folder], notes: list[str]) -> None:
    """All images lie two levels down or deeper: refuse where either level could be the classes.

    The upper level is, where the names below it name no classes (2023, images), or there is one below each."""
    below = [sub for group in groups.values() for sub in group.with_images().values()]
    names = sorted({sub.path.name for sub in below})
    deeper = any(not sub.images for sub in below)
    parts = all(map(_is_part, names)) and not all(map(_is_part, groups))
    if not deeper and (parts or len(below) == len(groups)):
        notes.append(
            f"The classes are {some(list(groups))}; the folders inside of them ({some(names)}) were read as parts of "
            f"a class. If these are the classes, load {str(folder.path / '*' / '*')!r}."
        )
        return
    shown = some([f"{s.path.relative_to(folder.path)} ({len(list(s.all_images()))} images)" for s in below], 6)
    glob = str(folder.path / "*")
    raise ValueError(
        f"The images in {str(folder.path)!r} lie two folders deep ({shown}), and either level could be the classes. "
        f"Load {glob!r} for the classes {some(list(groups), 4)}, or {glob + '/*'!r} for the classes {some(names, 4)}"
        f"{f', or {glob}/*/* for those inside of them' if deeper else ''}."
    )


def _labelled(split: str, classes: dict[str, list[Folder]], notes: list[str]) -> Dataset:
    """The images of the folders of each class, in the order of their paths; those of `unlabelled` have no label."""
    note_left_out(split, [(name, folder) for name, subs in classes.items() for folder in subs], notes)
    images = {name: [path for sub in subs for path in sub.all_images()] for name, subs in classes.items()}
    empty = [name for name, paths in images.items() if not paths and not _is_unlabelled(name)]
    causes = (HEIF_MISSING, AVIF_MISSING)
    for name in empty:
        lost = sum((sub.all_left_out() for sub in classes[name]), Counter())
        if cause := next((cause for cause in causes if lost[cause]), None):
            raise ValueError(
                f"The class {name!r} of {split} has only {cause}: {lost[cause]} files. Expected images of each class; "
                "install that, convert the files, or move the folder out."
            )
    if empty:
        notes.append(f"Folders of {split} without an image were not read as classes: {some(empty)}.")
    names = sorted(name for name, paths in images.items() if paths and not _is_unlabelled(name))
    rows = sorted((str(path), name) for name, paths in images.items() for path in paths)
    position = {name: index for index, name in enumerate(names)}
    features = datasets.Features({"image": datasets.Image(decode=False), "label": ClassLabel(names=names)})
    cells = [{"bytes": None, "path": path} for path, _ in rows]
    return Dataset.from_dict({"image": cells, "label": [position.get(name) for _, name in rows]}, features=features)


def note_left_out(split: str, folders: list[tuple[str, Folder]], notes: list[str]) -> None:
    """What is in the folders and was not read, a note for each cause."""
    by_cause: dict[str, Counter[str]] = {}
    for name, folder in folders:
        for cause, count in folder.all_left_out().items():
            by_cause.setdefault(cause, Counter())[name] += count
    for cause, counts in by_cause.items():
        places = some([f"{name} {count}" for name, count in counts.items()])
        notes.append(f"Not read in {split}, {cause}: {places} ({counts.total()} in all).")


def _found_instead(root: Folder) -> str:
    found = root.all_left_out()
    return f" Found {', '.join(f'{count} {cause}' for cause, count in found.items())}." if found else ""


def _is_part(name: str) -> bool:
    return _PART.fullmatch(name.lower()) is not None


def _is_unlabelled(name: str) -> bool:
    return re.sub(r"[-_ ]", "", name.lower()) in _UNLABELLED


def _nfc(name: str) -> str:
    """A name as most systems write it: macOS takes accents apart, and the same class would not be the same."""
    return unicodedata.normalize("NFC", name)
