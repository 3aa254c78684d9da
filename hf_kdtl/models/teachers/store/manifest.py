"""What a store holds, as `store.json` says it: kinds of output, images, views, and what they were made from."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_kdtl.models.forward.geometry import LayerGeometry, ModelGeometry
from hf_kdtl.models.teachers.source import SourceInfo

FILE, ROWS, DIGESTS = "store.json", "rows.npy", "digests.npy"
FORMAT = 1
GB = 1e9


class Kind(NamedTuple):
    """One kind of output: an array of this shape and dtype for each image and view."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Of one image in one view."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class Shard(NamedTuple):
    """The file of one kind of output, of the images of a block in one view."""

    kind: str
    view: int
    block: int

    @property
    def path(self) -> str:
        """Inside the store's folder."""
        return f"{self.kind}/view-{self.view:04d}/{self.block:06d}.npy"


@dataclass(frozen=True)
class Manifest:
    """The plan of a store: what it holds once every shard is written.

    Args:
        kinds: {name: shape and dtype}.
        views: V; the views 0 to V - 1 of each image.
        blocks: the numbers of images in the blocks, in order; a block is a shard of each kind and view.
        block: the most images in a block.
        teacher_batch: the number of images in each of the teacher's forwards.
        precision: float32 | float16, of what is stored as a float.
        top_k: class outputs are those of so many classes, and the rest's log-sum-exp; None: all.
        fingerprint: {field: value} of what the signals depend on (`differences`).
        teacher: which model they are of.
        geometry: what it gives, block by block, for these images; None where no objective reads blocks.
        settings: the command's settings, by which it is grown.
        patch_grid: of the patch tokens, where they are stored.
    """

    kinds: dict[str, Kind]
    views: int
    blocks: list[int]
    block: int
    teacher_batch: int
    precision: str = "float32"
    top_k: int | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    teacher: SourceInfo = field(default_factory=lambda: SourceInfo("unknown"))
    geometry: ModelGeometry | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    patch_grid: tuple[int, int] | None = None

    @property
    def images(self) -> int:
        """The number of images."""
        return sum(self.blocks)

    @property
    def bytes(self) -> int:
        """Of all arrays."""
        return sum(kind.bytes for kind in self.kinds.values()) * self.images * self.views

    def shards(self) -> list[Shard]:
        """Every shard, in the order of writing: the kinds of a block together."""
        return [
            Shard(kind, view, block)
            for view in range(self.views)
            for block in range(len(self.blocks))
            for kind in sorted(self.kinds)
        ]

    def to_json(self) -> str:
        """As text; equal manifests give equal text."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data |= {"format": FORMAT, "teacher": asdict(self.teacher), "geometry": None}
        data["kinds"] = {name: [list(kind.shape), kind.dtype] for name, kind in sorted(self.kinds.items())}
        if self.geometry is not None:
            plain = replace(self.geometry, classifier=None, norm=None)
            data["geometry"] = {
                name: value for name, value in asdict(plain).items() if name not in ("classifier", "norm")
            }
        return json.dumps(data, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a store.

    Raises:
        ValueError: where there is none, or it is of another format.
    """
    path = Path(folder, FILE)
    try:
        data = json.loads(path.read_text("utf-8"))
        if data.pop("format") != FORMAT:
            raise ValueError(f"another version of the format is expected, {FORMAT}")
        geometry = data.pop("geometry")
        data["kinds"] = {name: Kind(tuple(shape), dtype) for name, (shape, dtype) in data["kinds"].items()}
        data["teacher"] = SourceInfo(**data["teacher"])
        data["patch_grid"] = data["patch_grid"] and tuple(data["patch_grid"])
        return Manifest(**data, geometry=None if geometry is None else _geometry(geometry))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the manifest of a store of teacher outputs ({type(error).__name__}: {error}). Write the "
            f"store again: hf-kdtl cache --output <another folder> ..."
        ) from error


def _geometry(data: dict[str, Any]) -> ModelGeometry:
    def tuples(entry: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}

    layers = tuple(LayerGeometry(**tuples(layer)) for layer in data.pop("layers"))
    patches = (found := data.pop("patches")) and LayerGeometry(**tuples(found))
    return ModelGeometry(**tuples(data), layers=layers, patches=patches)


def is_store(folder: str | Path) -> bool:
    """Whether a folder holds a store."""
    return Path(folder).expanduser().joinpath(FILE).is_file()


def write_file(path: Path, content: bytes) -> None:
    """A file that is there complete or not at all.

    Raises:
        OSError: where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(error, path) from error
    os.replace(part, path)


def disk_error(error: OSError, path: Path) -> OSError:
    """The error of a write; of a full disk with what to do."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    return OSError(
        error.errno,
        f"the disk is full at {path}. What is complete is kept: free some space and type the same command again, or "
        "name another disk with --output (move the folder there to continue it)",
    )


def differences(stored: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The fields of two fingerprints that differ, each as a sentence with both values; fields that `here` lacks are
    not compared.

    >>> differences({"view_seed": 0, "size": {"height": 32}}, {"size": {"height": 64}})
    ['size.height is 32 in the store and 64 here']
    """
    found = []
    for name, value in here.items():
        other = stored.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            both = {key: value.get(key) for key in {**other, **value}}
            found += [f"{name}.{text}" for text in differences(other, both)]
        elif value != other:
            found.append(f"{name} is {_shown(other)} in the store and {_shown(value)} here")
    return found


def _shown(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
