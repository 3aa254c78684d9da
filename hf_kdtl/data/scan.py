"""What lies in a folder of images: the images, and each file that is not read, with its cause."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from hf_kdtl.data.decoding import AVIF_MISSING, HEIF_MISSING, missing_reader, open_image, register_heif

_HEIF = {".heic", ".heif", ".hif"}
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".rar", ".7z", ".bz2", ".xz")
_IGNORED = {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN"}
_NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow opens these, and reads no pixels

ARCHIVE = "archives, which are not read (unpack them)"
DEAD_LINK = "links to files that do not exist"
HIDDEN = "hidden image files"
NO_IMAGE = "files that are no images"
CYCLE = "links to a folder that contains them"
TABLE = "tables, which are not read (a table of paths and labels is loaded by its own name)"
RUN = "folders of runs of hf-kdtl (with a results.json)"


@dataclass
class Folder:
    """A folder: its own images, its sub-folders, and its own files that are not read, by cause."""

    path: Path
    images: list[Path] = field(default_factory=list)
    subfolders: dict[str, Folder] = field(default_factory=dict)
    tables: dict[str, Path] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    def all_images(self) -> Iterator[Path]:
        """Of the folder and everything below it."""
        yield from self.images
        for folder in self.subfolders.values():
            yield from folder.all_images()

    def all_tables(self) -> Iterator[Path]:
        """Of the folder and everything below it."""
        yield from self.tables.values()
        for folder in self.subfolders.values():
            yield from folder.all_tables()

    def all_left_out(self) -> Counter[str]:
        """{cause: files}, of the folder and everything below it."""
        own = self.left_out + Counter({TABLE: len(self.tables)})
        return sum((folder.all_left_out() for folder in self.subfolders.values()), own)

    def alone(self) -> Folder:
        """Without its sub-folders and images: what of its own files is not read."""
        return Folder(self.path, tables=self.tables, left_out=self.left_out)

    def with_images(self) -> dict[str, Folder]:
        """The sub-folders that hold an image, at any depth."""
        return {name: folder for name, folder in self.subfolders.items() if next(folder.all_images(), None)}


def scan(path: Path, above: frozenset[str] = frozenset()) -> Folder:
    """Everything below a folder; links are followed, hidden folders are not entered.

    Cost: one listing of each folder; a file is opened (its header alone) only when its name does not say what it is.

    Raises:
        ValueError: for a folder that cannot be listed.
    """
    found, above = Folder(path), above | {os.path.realpath(path)}
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            f"The folder {str(path)!r} cannot be listed ({error.strerror}), expected to read all that is in it. Give "
            "yourself the right to read it, or move it out."
        ) from error
    for entry in entries:
        hidden = entry.name.startswith(".") or entry.name in _IGNORED
        if entry.is_dir():
            if not hidden and os.path.realpath(entry.path) in above:
                found.left_out[CYCLE] += 1
            elif not hidden and is_run(Path(entry.path)):
                found.left_out[RUN] += 1
            elif not hidden:
                found.subfolders[entry.name] = scan(Path(entry.path), above)
        elif hidden:
            found.left_out[HIDDEN] += Path(entry.name).suffix.lower() in image_suffixes()
        else:
            _add_file(found, entry)
    found.left_out = +found.left_out  # without the zeros
    return found


def _add_file(found: Folder, entry: os.DirEntry[str]) -> None:
    path = Path(entry.path)
    suffix = path.suffix.lower()
    if not entry.is_file():
        found.left_out[DEAD_LINK if entry.is_symlink() else NO_IMAGE] += 1
    elif suffix in image_suffixes():
        found.images.append(path)
    elif suffix in _HEIF:
        found.left_out[HEIF_MISSING] += 1
    elif suffix in (".avif", ".avifs"):
        found.left_out[AVIF_MISSING] += 1
    elif suffix in _ARCHIVES:
        found.left_out[ARCHIVE] += 1
    elif suffix in (".csv", ".tsv", ".jsonl", ".parquet"):
        found.tables[path.name] = path
    elif _is_image(path):
        found.images.append(path)
    elif kind := missing_reader(path):
        found.left_out[kind] += 1
    elif path.name.lower() not in ("thumbs.db", "desktop.ini"):
        found.left_out[NO_IMAGE] += 1


def is_run(path: Path) -> bool:
    """Whether a command of ours wrote the folder, whose figures are no images to train on."""
    try:
        results = json.loads((path / "results.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(results, dict) and isinstance(results.get("schema"), int)


@cache
def image_suffixes() -> frozenset[str]:
    """The endings of files that Pillow reads here, with pillow-heif's where it is installed."""
    register_heif()
    kinds = Image.registered_extensions()  # which loads all of Pillow's plugins
    return frozenset(suffix for suffix, kind in kinds.items() if kind in Image.OPEN and kind not in _NOT_DECODED)


def _is_image(path: Path) -> bool:
    try:
        with open_image(path):
            return True
    except Exception:  # PIL's readers raise OSError, SyntaxError, struct.error, ... for what is not an image
        return False
