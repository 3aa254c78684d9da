"""The arrays of a store: written shard by shard, each complete or not there, and read by position and view."""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from shlex import quote

import numpy as np
from numpy.lib import format as npy

from hf_kdtl.models.teachers.store.manifest import ROWS, Manifest, Shard, disk_error, read_manifest


def header(shape: tuple[int, ...], dtype: str) -> bytes:
    """What a numpy file of this shape begins with."""
    text = io.BytesIO()
    npy.write_array_header_1_0(text, {"descr": npy.dtype_to_descr(np.dtype(dtype)), "fortran_order": False,
                                      "shape": shape})  # fmt: skip
    return text.getvalue()


class ShardFile:
    """One shard while it is written, chunk by chunk; `close` gives it its name.

    Raises:
        OSError: where the disk is full, saying what to do.
    """

    def __init__(self, folder: Path, manifest: Manifest, shard: Shard):
        kind = manifest.kinds[shard.kind]
        self.path, self.kind = folder / shard.path, kind
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        self.file = self.part.open("wb")
        self._write(header((manifest.blocks[shard.block], *kind.shape), kind.dtype))

    def add(self, rows: np.ndarray) -> None:
        """Further rows (n, *shape)."""
        assert rows.shape[1:] == self.kind.shape, (rows.shape, self.kind)
        self._write(np.ascontiguousarray(rows, dtype=self.kind.dtype).data)

    def close(self) -> None:
        """Finish it."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        except OSError as error:
            raise disk_error(error, self.path) from error
        os.replace(self.part, self.path)

    def _write(self, content: bytes | memoryview) -> None:
        try:
            self.file.write(content)
        except OSError as error:
            raise disk_error(error, self.path) from error


def incomplete(folder: Path, manifest: Manifest) -> list[Shard]:
    """The shards that are not there yet, in the order of writing.

    Raises:
        ValueError: for one that is there with another size than it was written with.
    """
    missing = []
    for shard in manifest.shards():
        path = folder / shard.path
        if not path.exists():
            missing.append(shard)
        elif path.stat().st_size != expected_size(manifest, shard):
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, expected {expected_size(manifest, shard)}: it was truncated "
                "or changed after it was written. Remove this file and type the command that wrote the store again: "
                f"hf-kdtl cache --output {quote(str(folder))}."
            )
    return missing


def expected_size(manifest: Manifest, shard: Shard) -> int:
    """Bytes of a complete shard."""
    kind, rows = manifest.kinds[shard.kind], manifest.blocks[shard.block]
    return len(header((rows, *kind.shape), kind.dtype)) + rows * kind.bytes


class Reader:
    """Rows of a complete store by image and view; shards are memory-mapped when first read.

    Raises:
        ValueError: for a store that is not complete or was damaged; when read, for an image or a view that it lacks.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(self.folder)
        self._check_complete()
        self.rows = np.load(self.folder / ROWS)[: self.manifest.images]
        self._place = np.full(int(self.rows.max()) + 1, -1, np.int64)
        self._place[self.rows] = np.arange(len(self.rows))
        self._ends = np.cumsum(self.manifest.blocks)
        self._ends_list = self._ends.tolist()
        self._starts = self._ends - np.asarray(self.manifest.blocks)
        self._maps: dict[Shard, np.ndarray] = {}

    def _check_complete(self) -> None:
        if missing := incomplete(self.folder, self.manifest):
            every = len(self.manifest.shards())
            raise ValueError(
                f"the store {self.folder} is not complete: {every - len(missing)} of {every} shards are written. "
                f"Continue it: hf-kdtl cache --output {quote(str(self.folder))}."
            )

    def has(self, rows: np.ndarray) -> np.ndarray:
        """(n,) whether each image, by the row of the source split, is there."""
        inside = (rows >= 0) & (rows < len(self._place))
        return inside & (self._place[np.where(inside, rows, 0)] >= 0)

    def places(self, rows: np.ndarray) -> np.ndarray:
        """(n,) where in the store each image is."""
        return self._place[rows]

    def read(self, kinds: Iterable[str], rows: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
        """{kind: (n, *shape)} of the images `rows` in the views `views`, both (n,)."""
        if len(rows) == 1:
            view, block, at = self._one(int(rows[0]), int(views[0]))
            return {name: self._map(Shard(name, view, block))[at : at + 1].copy() for name in kinds}
        groups = self.groups(rows, views)
        found = {}
        for name in kinds:
            kind = self.manifest.kinds[name]
            found[name] = out = np.empty((len(rows), *kind.shape), kind.dtype)
            for view, block, items, inner in groups:
                out[items] = self._map(Shard(name, view, block))[inner]
        return found

    def groups(self, rows: np.ndarray, views: np.ndarray) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
        """(view, block, which of the images, where they are in its shards) for each of the shards that hold them.

        Raises:
            ValueError: for an image or a view that is not there.
        """
        self.check(rows, views)
        places = self._place[rows]
        blocks = np.searchsorted(self._ends, places, side="right")
        inner = places - self._starts[blocks]
        shards = views * len(self._ends) + blocks
        order = np.argsort(shards, kind="stable")
        cuts = np.flatnonzero(np.diff(shards[order])) + 1
        groups = np.split(order, cuts) if len(order) else []
        return [(int(views[g[0]]), int(blocks[g[0]]), g, inner[g]) for g in groups]

    def _one(self, row: int, view: int) -> tuple[int, int, int]:
        """(view, block, where) of one image: what `groups` finds, without arrays."""
        place = int(self._place[row]) if 0 <= row < len(self._place) else -1
        if place < 0 or not 0 <= view < self.manifest.views:
            self.check(np.array([row]), np.array([view]))
        block = bisect_right(self._ends_list, place)
        return view, block, place - (self._ends_list[block - 1] if block else 0)

    def check(self, rows: np.ndarray, views: np.ndarray) -> None:
        """Raises ValueError for an image or a view that is not there, saying what to type."""
        if not self.has(rows).all():
            absent = rows[~self.has(rows)]
            raise ValueError(
                f"the store {self.folder} has {self.manifest.images} images and not the rows {absent[:5].tolist()} of "
                f"the data. Add them: hf-kdtl cache --output {quote(str(self.folder))} with the data that has them."
            )
        if len(views) and not (views.min() >= 0 and views.max() < self.manifest.views):
            raise ValueError(
                f"the store {self.folder} has the views 0 to {self.manifest.views - 1}, and view {views.max()} is "
                f"asked for. Set the data's views to {self.manifest.views} (ImageDataset(views=...)), or add views: "
                f"hf-kdtl cache --output {quote(str(self.folder))} --views {views.max() + 1}."
            )

    def _map(self, shard: Shard) -> np.ndarray:
        found = self._maps.get(shard)
        if found is None:
            # The map's memory as a plain array: numpy's class for it costs 10 times an access.
            found = self._maps[shard] = np.load(self.folder / shard.path, mmap_mode="r").view(np.ndarray)
        return found
