"""A store that is being filled row by row, in any order: which rows are there, and the way to complete shards."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from hf_kdtl.models.teachers.store.manifest import Manifest, Shard, disk_error, write_file
from hf_kdtl.models.teachers.store.shards import Reader, expected_size, header, incomplete

KNOWN, FILLING = "filled-*.npy", ".filling"
SECONDS = 20.0
"""So much work a run that is killed may lose."""


def filling(folder: Path, shard: Shard) -> Path:
    """The file of a shard that is not complete."""
    return folder / f"{shard.path}{FILLING}"


def reserve(folder: Path, manifest: Manifest, shard: Shard) -> None:
    """Make the file of a shard in its full size, where it is not there, so that no later write finds a full disk.

    Raises:
        OSError: where the disk is full now.
    """
    path, size = filling(folder, shard), expected_size(manifest, shard)
    if path.exists() and path.stat().st_size == size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = manifest.kinds[shard.kind]
    try:
        with path.open("wb") as file:
            file.write(header((manifest.blocks[shard.block], *kind.shape), kind.dtype))
            file.flush()
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise disk_error(error, path) from error


def forget(folder: Path) -> None:
    """Remove the rows of shards that are not complete."""
    for path in (*folder.glob(KNOWN), *folder.glob(f"*/*/*{FILLING}")):
        path.unlink(missing_ok=True)


class PartialReader(Reader):
    """A store whose rows are written as they come. After a kill what was written in the last seconds is written again.

    What a process knows to be there is in a file of its own; others take it over at their next `flush`. A row that two
    of them write is the same in both.

    Args:
        folder: of a store that was begun for filling.
        process: its number.
    """

    def __init__(self, folder: str | Path, process: int = 0):
        super().__init__(folder)
        self.mine = self.folder / KNOWN.replace("*", f"{process:04d}")
        self.filled = np.zeros((self.manifest.views, self.manifest.images), bool)
        """(V, n) whether the image at a place is there in a view."""
        self._touched: set[Shard] = set()
        self._flushed = time.monotonic()
        self._refresh()

    def _check_complete(self) -> None:
        """It need not be."""

    def _map(self, shard: Shard) -> np.ndarray:
        if shard not in self._maps:
            try:
                found = np.load(filling(self.folder, shard), mmap_mode="r+")
            except FileNotFoundError:  # complete, perhaps since a moment ago
                found = np.load(self.folder / shard.path, mmap_mode="r+")
            self._maps[shard] = found.view(np.ndarray)
        return self._maps[shard]

    def lacking(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Which of these images are not there yet."""
        self.check(rows, views)
        return np.flatnonzero(~self.filled[views, self.places(rows)])

    def write(self, arrays: dict[str, np.ndarray], rows: np.ndarray, views: np.ndarray) -> None:
        """Put in {kind: (n, *shape)} of images; now and then all of it goes to the disk."""
        for view, block, items, inner in self.groups(rows, views):
            for name, array in arrays.items():
                shard = Shard(name, view, block)
                self._map(shard)[inner] = array[items]
                self._touched.add(shard)
            self.filled[view, self._starts[block] + inner] = True
        if time.monotonic() - self._flushed > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Make what was written last, and name shards that are complete now."""
        if self._touched:
            for shard in self._touched:
                self._maps[shard].base.flush()  # type: ignore[union-attr]  # the memory map
            self._touched.clear()
            write_file(self.mine, header(self.filled.shape, "bool") + self.filled.tobytes())
        self._refresh()
        self._flushed = time.monotonic()
        missing = incomplete(self.folder, self.manifest)
        left = [shard for shard in missing if not self._finish(shard)]
        if not left:
            forget(self.folder)

    def _finish(self, shard: Shard) -> bool:
        first = self._starts[shard.block]
        if not self.filled[shard.view, first : first + self.manifest.blocks[shard.block]].all():
            return False
        with suppress(FileNotFoundError):  # another process has done so
            os.replace(filling(self.folder, shard), self.folder / shard.path)
        return True

    def _refresh(self) -> None:
        for path in self.folder.glob(KNOWN):
            try:
                known = np.load(path)
            except FileNotFoundError:  # all is complete
                continue
            if known.shape == self.filled.shape:
                self.filled |= known
        left = {(shard.view, shard.block) for shard in incomplete(self.folder, self.manifest)}
        for view in range(self.manifest.views):
            for block, (first, last) in enumerate(zip(self._starts, self._ends, strict=True)):
                if (view, block) not in left:
                    self.filled[view, first:last] = True
