"""Writing a store of a teacher's outputs: the teacher runs over every image and view, once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_kdtl.data.indexed import TEACHER_PIXELS, RowPass
from hf_kdtl.functional.random import Draws
from hf_kdtl.models.forward.capture import Capture
from hf_kdtl.models.forward.needs import Needs
from hf_kdtl.models.teachers.own_pixels import OwnPixels
from hf_kdtl.models.teachers.source import Batch
from hf_kdtl.models.teachers.store import signals
from hf_kdtl.models.teachers.store.facts import save_facts, teacher_record
from hf_kdtl.models.teachers.store.images import TrainingImages
from hf_kdtl.models.teachers.store.manifest import (
    DIGESTS,
    FILE,
    ROWS,
    Kind,
    Manifest,
    Shard,
    differences,
    is_store,
    read_manifest,
    write_file,
)
from hf_kdtl.models.teachers.store.partial import forget, reserve
from hf_kdtl.models.teachers.store.shards import ShardFile, header, incomplete
from hf_kdtl.models.teachers.teacher import Teacher

SHARD_BYTES, MOST_IMAGES = 64e6, 4096


@dataclass(frozen=True)
class Request:
    """What to store.

    Args:
        needs: of the objectives.
        views, teacher_batch, precision, top_k: as in `Manifest`.
        settings: the command's, kept in the store.
        license: of the teacher, kept in the store; None where it is not known.
    """

    needs: Needs
    views: int = 1
    teacher_batch: int = 64
    precision: str = "float32"
    top_k: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    license: str | None = None


class StoreWriter:
    """Writes a store, or what an existing one lacks: after an interruption, or to grow it.

    Args:
        folder: of the store.
        teacher: matched to the student whose pixels it is shown; its `teacher_batch` is set. With `OwnPixels` it sees
            the files at its own size, and `data` renders them.
        data: the training images, as the student will be given them.
        request: what to store. Of an existing store it adds to what is there.

    Raises:
        ValueError: where these needs cannot be stored; where an existing store was made from something else, naming
            the fields that differ.
    """

    def __init__(self, folder: str | Path, teacher: Teacher | OwnPixels, data: Any, request: Request):
        if reason := signals.unstorable(request.needs):
            raise ValueError(f"this cannot be stored, because {reason}.")
        if reason := teacher.unserved(request.needs):
            raise ValueError(f"this cannot be stored: {reason}")
        self.folder, self.teacher, self.images = Path(folder).expanduser(), teacher, TrainingImages(data)
        teacher.teacher_batch = request.teacher_batch
        order = np.unique(self.images.rows)
        self.own = isinstance(teacher, OwnPixels)
        if self.own:
            teacher.check_data(data)
        fingerprint = {"data": self.images.record(self.own), **teacher_record(teacher)}
        pixels = render(self.images, order[: request.teacher_batch], 0, self.own)
        if is_store(self.folder):
            self.manifest, self.rows = self._grown(read_manifest(self.folder), order, request, fingerprint, pixels)
        else:
            self.manifest, self.rows = self._new(order, request, fingerprint, pixels), order
        self.needs = signals.needs_of(self.manifest.kinds)
        self._starts = np.concatenate([[0], np.cumsum(self.manifest.blocks)])

    # ---- The plan ----

    def _new(self, rows: np.ndarray, request: Request, fingerprint: dict[str, Any], pixels: Tensor) -> Manifest:
        kinds = self._kinds(request.needs, pixels, request)
        largest = max(kind.bytes for kind in kinds.values())
        chunks = max(1, int(min(SHARD_BYTES // largest, MOST_IMAGES) // request.teacher_batch))
        block = chunks * request.teacher_batch
        try:
            geometry = self.teacher.geometry(pixels)
        except ValueError:  # its blocks are not known: no objective that pairs them can be served
            geometry = None
        batch = self.batch(rows[:1], 0)
        grid = self._capture(pixels[:1], Needs(patches=True), batch).patch_grid if request.needs.patches else None
        return Manifest(
            kinds, request.views, _blocks(len(rows), block), block, request.teacher_batch, request.precision,
            request.top_k, fingerprint, replace(self.teacher.provenance(), license=request.license), geometry,
            request.settings, grid,
        )  # fmt: skip

    def _grown(
        self, old: Manifest, rows: np.ndarray, request: Request, fingerprint: dict[str, Any], pixels: Tensor
    ) -> tuple[Manifest, np.ndarray]:
        found = differences(old.fingerprint, fingerprint)
        same = ("teacher_batch", "precision", "top_k")
        found += differences({n: getattr(old, n) for n in same}, {n: getattr(request, n) for n in same})
        if found:
            raise ValueError(
                f"the store {self.folder} was made from something else: {'; '.join(found)}. Set it back, or name "
                "another folder."
            )
        there, digests = (np.load(self.folder / name)[: old.images] for name in (ROWS, DIGESTS))
        if len(lacking := np.setdiff1d(there, rows)):
            raise ValueError(
                f"the store {self.folder} holds {len(there)} images, and the data lacks {len(lacking)} of them. Grow "
                "it with the data it was made from, or more."
            )
        added = np.setdiff1d(rows, there)
        self.images.check(there, digests, self.folder)
        kinds = old.kinds | self._kinds(request.needs, pixels, request)
        views, blocks = max(old.views, request.views), [*old.blocks, *_blocks(len(added), old.block)]
        settings = old.settings | request.settings
        teacher = replace(old.teacher, license=old.teacher.license or request.license)
        grown = replace(old, kinds=kinds, views=views, blocks=blocks, settings=settings, teacher=teacher)
        return grown, np.concatenate([there, added])

    def _kinds(self, needs: Needs, pixels: Tensor, request: Request) -> dict[str, Kind]:
        if not signals.signals(needs):
            return {}
        batch = self.batch(np.arange(len(pixels)), 0)
        return signals.kinds_of(self._arrays(pixels, needs, batch, request.precision, request.top_k))

    # ---- What it will take ----

    @property
    def missing(self) -> list[Shard]:
        """The shards that are still to be written."""
        return incomplete(self.folder, self.manifest)

    def bytes_to_write(self) -> int:
        """Of the shards that are missing."""
        sizes = self.manifest.kinds
        return sum(sizes[shard.kind].bytes * self.manifest.blocks[shard.block] for shard in self.missing)

    def images_to_write(self, rank: int = 0, processes: int = 1) -> int:
        """How many images a process renders and shows to the teacher, each view counted."""
        return sum(self.manifest.blocks[block] for _, block, _ in self._tasks()[rank::processes])

    def seconds_to_write(self) -> float:
        """By one chunk of images, rendered and shown to the teacher on this machine; of one process."""
        rows = self.rows[: self.manifest.teacher_batch]
        started = time.perf_counter()
        self._chunk(render(self.images, rows, 0, self.own), self.needs, rows, 0)
        each = (time.perf_counter() - started) / len(rows)
        return each * self.images_to_write()

    # ---- Writing ----

    def begin(self, filling: bool = False) -> None:
        """Write what says what the store will hold. One process does, before any writes shards.

        Args:
            filling: rows are written as a run meets them (`hf_kdtl.data.filling`), which may have begun before.

        Raises:
            ValueError: where an image is another one than in what is there.
        """
        path, text = self.folder / FILE, self.manifest.to_json()
        digests = self.images.digests_for(self.folder, self.rows)
        if not filling or not path.exists() or path.read_text("utf-8") != text:
            forget(self.folder)
        for part in self.folder.rglob("*.part"):
            part.unlink()
        self._write_array(ROWS, self.rows)
        self._write_array(DIGESTS, digests)
        save_facts(self.teacher, self.manifest, self.folder / "teacher")
        write_file(path, text.encode())
        for shard in self.missing if filling else ():
            reserve(self.folder, self.manifest, shard)

    def write(
        self, rank: int = 0, processes: int = 1, workers: int = 0, done: Callable[[int], Any] = lambda images: None
    ) -> None:
        """Write the missing shards that are this process's, after `begin`.

        Args:
            rank, processes: which of how many processes this is.
            workers: processes that render images.
            done: called with the number of images that were written.
        """
        tasks = self._tasks()[rank::processes]
        chunks = [(view, rows) for view, block, _ in tasks for rows in self._chunks(block)]
        rendered = iter(_rendering(self, chunks, workers))
        for view, block, kinds in tasks:
            files = {kind: ShardFile(self.folder, self.manifest, Shard(kind, view, block)) for kind in kinds}
            needs = signals.needs_of(kinds)
            for rows in self._chunks(block):
                arrays = self._chunk(next(rendered), needs, rows, view)
                for kind, file in files.items():
                    file.add(arrays[kind])
                done(len(rows))
            for file in files.values():
                file.close()

    def _tasks(self) -> list[tuple[int, int, list[str]]]:
        """(view, block, the kinds that are missing of it)."""
        alike = groupby(self.missing, key=lambda shard: (shard.view, shard.block))
        return [(view, block, [shard.kind for shard in shards]) for (view, block), shards in alike]

    def _chunks(self, block: int) -> Iterator[np.ndarray]:
        rows = self.rows[self._starts[block] : self._starts[block + 1]]
        size = self.manifest.teacher_batch
        return (rows[first : first + size] for first in range(0, len(rows), size))

    def _chunk(self, pixels: Tensor, needs: Needs, rows: np.ndarray, view: int) -> dict[str, np.ndarray]:
        manifest = self.manifest
        return self._arrays(pixels, needs, self.batch(rows, view), manifest.precision, manifest.top_k)

    @torch.no_grad()
    def _arrays(
        self, pixels: Tensor, needs: Needs, batch: Batch, precision: str, top_k: int | None
    ) -> dict[str, np.ndarray]:
        return signals.pack(self._capture(pixels, needs, batch), needs, precision, top_k)

    def _capture(self, pixels: Tensor, needs: Needs, batch: Batch) -> Capture:
        pixels = pixels.to(_device(self.teacher))
        given: Batch = {**batch, "teacher_pixel_values": pixels} if self.own else batch
        return self.teacher.capture(pixels, needs, given)

    def batch(self, rows: np.ndarray, view: int | np.ndarray) -> Batch:
        """What a source may know of these images, in a view or in one each."""
        views = np.broadcast_to(np.asarray(view), rows.shape).copy()
        places = tuple(zip(views.tolist(), rows.tolist(), strict=True))
        draws = Draws(getattr(self.images.data, "view_seed", 0), 0, places)
        return {"image_index": torch.from_numpy(rows), "image_view": torch.from_numpy(views), "view_draws": draws}

    def _write_array(self, name: str, array: np.ndarray) -> None:
        write_file(self.folder / name, header(array.shape, str(array.dtype)) + array.tobytes())


def render(images: TrainingImages, rows: np.ndarray, view: int, own: bool = False) -> Tensor:
    """(n, C, h, w): the images of these rows in one view, as the student sees them or the teacher (`own`).

    Raises:
        ValueError: for another view than 0 of data that has one.
    """
    if images.viewed:
        items = images.data.__getitems__([RowPass(i, view) for i in images.items(rows)])
    elif view:
        raise ValueError(
            f"{type(images.data).__name__} has one view of an image, and view {view} is asked for. Type --views 1, or "
            "use hf_kdtl.data.ImageDataset with an augmentation."
        )
    else:
        items = [images.data[i] for i in images.items(rows)]
    return torch.stack([torch.as_tensor(item[TEACHER_PIXELS if own else "pixel_values"]) for item in items])


class _Chunks(torch.utils.data.Dataset):
    """The pixels of chunk after chunk, which worker processes may render."""

    def __init__(self, writer: StoreWriter, chunks: list[tuple[int, np.ndarray]]):
        self.images, self.own, self.chunks = writer.images, writer.own, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, i: int) -> Tensor:
        view, rows = self.chunks[i]
        return render(self.images, rows, view, self.own)


def _rendering(writer: StoreWriter, chunks: list[tuple[int, np.ndarray]], workers: int) -> Any:
    data: Any = _Chunks(writer, chunks)
    return torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers)


def _blocks(images: int, block: int) -> list[int]:
    return [min(block, images - first) for first in range(0, images, block)]


def _device(teacher: Teacher | OwnPixels) -> torch.device:
    return next(teacher.modules()[0].parameters()).device
