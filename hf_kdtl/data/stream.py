"""Images that are read as they come, from shards of parquet or tar: of sets that are larger than a disk."""

from __future__ import annotations

import hashlib
import itertools
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_kdtl.data.columns import UNLABELLED
from hf_kdtl.data.decoding import decode_row
from hf_kdtl.data.rendering import Renderer, render
from hf_kdtl.data.webdataset import archive_samples
from hf_kdtl.utils.options import check_option, is_integer
from hf_kdtl.utils.text import some

if TYPE_CHECKING:
    import datasets

    from hf_kdtl.data.augmentation import Augmentation

ENDINGS = (".parquet", ".tar")
BUFFER = 1000
"""Images of which the next one is drawn; undecoded, so about 100 MB of photographs."""
ROWS_A_SHARD = 1 << 24
_READ = 64  # rows of a parquet file at a time


def find_shards(source: str) -> list[str]:
    """The shards of a source, sorted: a folder, a glob, a file, or a data set's name on the Hub.

    Any address that fsspec opens will do, such as hf://datasets/owner/name/train-*.parquet.

    Raises:
        ValueError: where there is none, or of both kinds.
    """
    from fsspec.core import url_to_fs

    address = str(Path(source).expanduser())
    if "://" in source or source.count("/") != 1 or Path(address).exists():
        address = source if "://" in source else address
    else:
        address = f"hf://datasets/{source}"
    files, root = url_to_fs(address)
    pattern = f"{root}/**" if files.isdir(root) else root
    found = sorted(files.unstrip_protocol(path) for path in files.glob(pattern) if str(path).endswith(ENDINGS))
    kinds = {Path(path).suffix for path in found}
    if len(kinds) != 1:
        raise ValueError(
            f"streaming reads shards of one kind, .parquet or .tar (WebDataset), and {source!r} has "
            f"{some([Path(path).name for path in found]) if found else 'none'}. Name a folder or a glob of them, or a "
            "data set on the Hub (owner/name, or hf://datasets/owner/name/train-*.parquet); a folder of images is "
            "read without --streaming."
        )
    return found


def open_stream(shards: Sequence[str], image_column: str | None = None) -> datasets.IterableDataset:
    """The images of shards as datasets' IterableDataset of {"image": {"bytes", "path"}, "shard", "row"}: undecoded,
    with the place of each. Every shard is one of the parts that datasets splits and shuffles."""
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(decode=False), "shard": datasets.Value("string"), "row": datasets.Value("int64")}
    )
    kwargs = {"shards": list(shards), "image_column": image_column}
    return datasets.IterableDataset.from_generator(_rows, features=features, gen_kwargs=kwargs)


def _rows(shards: list[str], image_column: str | None) -> Iterator[dict[str, Any]]:
    import fsspec

    for shard in shards:
        with fsspec.open(shard, "rb") as file:
            read = _parquet if shard.endswith(".parquet") else _archive
            for row, cell in enumerate(read(file, shard, image_column)):
                yield {"image": cell, "shard": shard, "row": row}


def _parquet(file: Any, name: str, image_column: str | None) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file)
    column = image_column or _image_column(table.schema_arrow, name)
    for batch in table.iter_batches(_READ, columns=[column]):
        for cell in batch.column(0).to_pylist():
            cell = cell if isinstance(cell, dict) else {"bytes": cell, "path": None}
            yield {"bytes": cell["bytes"], "path": cell.get("path")}


def _image_column(schema: Any, name: str) -> str:
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        return pa.types.is_binary(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)

    found = [field.name for field in schema if holds_bytes(field.type)]
    if len(found) != 1:
        raise ValueError(
            f"{name} has the columns {', '.join(schema.names)}, of which {some(found) if found else 'none'} hold "
            "images; expected one: type --image_column <name>."
        )
    return found[0]


def _archive(file: Any, name: str, image_column: str | None) -> Iterator[dict[str, Any]]:
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        for sample in archive_samples(archive, name):
            yield sample["image"]


class ImageStream(torch.utils.data.IterableDataset):
    """Images without labels as what Trainer feeds a model, without end: {"pixel_values": (3, H, W), "labels": -100}.

    Pass p over the data reads the shards in an order drawn from (seed, p), and each image out of a buffer, as
    datasets' `shuffle` does. Several processes share it by datasets' `split_dataset_by_node`: whole shards where their
    number is a multiple of the processes', else every n-th image. DataLoader workers share a process's shards.

    An image's view is p (mod `views`), drawn from (view_seed, view, its shard's name and row): the same on any number
    of processes. Memory is that of the buffer and a batch, whatever the size of the data.

    A resumed run reads again what was trained on, without decoding it, and goes on bitwise as if it had not stopped.

    Args:
        data: of `open_stream`.
        image_processor: of the student.
        augmentation: as of `ImageDataset`; without mixup and cutmix, for there is no partner to be drawn.
        buffer: images, undecoded, of which the next is drawn.
        held_out: {shard: number of its first images that are left out}, for validation.
        seed, view_seed, views: as of `ImageDataset`.

    Example:
        >>> stream = ImageStream(open_stream(find_shards("shards/*.parquet")), processor)  # doctest: +SKIP
    """

    def __init__(
        self,
        data: datasets.IterableDataset,
        image_processor: Any,
        *,
        augmentation: Augmentation | None = None,
        buffer: int = BUFFER,
        held_out: dict[str, int] | None = None,
        seed: int = 0,
        view_seed: int = 0,
        views: int | None = None,
    ):
        if augmentation is not None and augmentation.mixes:
            raise ValueError(
                "mixup and cutmix draw a partner among all images, and a stream has none; leave them out."
            )
        for name, given in (("view_seed", view_seed), ("seed", seed)):  # None would be another order in every pass
            check_option("ImageStream", name, given, is_integer(given, 0), "a whole number from 0")
        self.data, self.image_processor, self.augmentation = data, image_processor, augmentation
        self.buffer, self.held_out, self.seed = buffer, held_out or {}, seed
        self.view_seed, self.views = view_seed, views
        self.renderer = None if augmentation is None else Renderer(image_processor)
        self.rank, self.processes = 0, 1
        self.passed_over, self.batch_size = 0, 1

    def place(self, rank: int, processes: int) -> None:
        """Which of several processes reads here."""
        self.rank, self.processes = rank, processes

    def pass_over(self, batches: int, batch_size: int) -> None:
        """Give the first batches of the next iteration without decoding: they are dropped, for a run that resumes."""
        self.passed_over, self.batch_size = batches, batch_size

    def first(self, number: int) -> Iterator[dict[str, Any]]:
        """The first images of process 0 as it trains on them, on any process."""
        return itertools.islice((self._item(row, 0) for row in self._pass(0, 0)), number)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        mine, of = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        left = len(range(mine, self.passed_over, of)) * self.batch_size  # batches come from the workers in turn
        dropped: dict[str, Any] | None = None
        for number in itertools.count():
            row = None
            for row in self._pass(number, self.rank):
                if left > 0:
                    left, dropped = left - 1, dropped or self._item(row, number)
                    yield dropped
                else:
                    yield self._item(row, number)
            if row is None:
                return  # a worker without a shard, or no image at all

    def _pass(self, number: int, rank: int) -> Iterator[dict[str, Any]]:
        from datasets.distributed import split_dataset_by_node

        shuffled = split_dataset_by_node(self.data.shuffle(self.seed, buffer_size=self.buffer), rank, self.processes)
        shuffled.set_epoch(number)
        for row in shuffled:
            if row["row"] >= self.held_out.get(row["shard"], 0):
                yield row

    def _item(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        where = f"Image {row['row']} of {row['shard']}"
        cell = {"bytes": row["image"]["bytes"], "path": row["image"]["path"] or where}
        if self.renderer is None or self.augmentation is None:
            pixels = self.image_processor([decode_row(cell, 0, 1)])["pixel_values"][0]
            return {"pixel_values": torch.as_tensor(pixels, dtype=torch.float32), "labels": UNLABELLED}
        view = number if self.views is None else number % self.views
        changes = self.augmentation.draw(self.view_seed, view, view_key(row["shard"], row["row"]))
        (shown,) = render(cell, 0, 1, [self.renderer], changes)
        return {"pixel_values": self.renderer.values(shown), "labels": UNLABELLED}


def view_key(shard: str, row: int) -> int:
    """The number by which an image's views are drawn, from its shard's file name and its row in it.

    >>> view_key("a/train-0.parquet", 5) - view_key("b/train-0.parquet", 0)
    5
    """
    name = hashlib.blake2b(Path(shard).name.encode(), digest_size=5).digest()
    return int.from_bytes(name, "big") * ROWS_A_SHARD + row % ROWS_A_SHARD
