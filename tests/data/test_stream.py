"""Streams: every image once a pass, shared by processes, the same views, resumed exactly, in bounded memory."""

import io
import itertools
import tarfile
from functools import partial
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from hf_kdtl.data import ImageDataset
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.data.stream import ImageStream, find_shards, open_stream, view_key

SIZE = {"height": 8, "width": 8}
PROCESSOR = ViTImageProcessor(size=SIZE)


def png(value):
    """An image of one color, by which it is known."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder, kind="parquet", shards=4, rows=6):
    """Images of the colors 0, 1, 2, ... in shards; returns the folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        pictures = [png(shard * rows + row) for row in range(rows)]
        if kind == "parquet":
            cells = [{"bytes": one, "path": None} for one in pictures]
            table = datasets.Dataset.from_dict({"image": cells, "n": [*range(rows)]})
            table.to_parquet(f"{folder}/train-{shard}.parquet")
            continue
        with tarfile.open(f"{folder}/train-{shard}.tar", "w") as archive:
            for row, one in enumerate(pictures):
                member = tarfile.TarInfo(f"{row:03}.png")
                member.size = len(one)
                archive.addfile(member, io.BytesIO(one))
    return str(folder)


def stream(folder, buffer=5, **options):
    return ImageStream(open_stream(find_shards(folder)), PROCESSOR, buffer=buffer, **options)


def colors(items):
    """The color of each item, as it was written."""
    return [round(float(item["pixel_values"][0, 0, 0]) * 127.5 + 127.5) for item in items]


def taken(data, number):
    return list(itertools.islice(data, number))


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_pass_gives_every_image_once_in_another_order_each_time(tmp_path, kind):
    seen = colors(taken(stream(write_shards(tmp_path, kind)), 48))
    first, second = seen[:24], seen[24:]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second and first != list(range(24))
    assert seen == colors(taken(stream(str(tmp_path)), 48)), "drawn from the seed alone"
    assert seen != colors(taken(stream(str(tmp_path), seed=1), 48))


@pytest.mark.parametrize("shards", [4, 3])  # whole shards, or every second image
def test_processes_share_a_pass(tmp_path, shards):
    write_shards(tmp_path, shards=shards)
    seen = []
    for rank in range(2):
        data = stream(str(tmp_path), held_out={find_shards(str(tmp_path))[0]: 2})
        data.place(rank, 2)
        mine = [(row["shard"][-9], row["row"]) for row in data._pass(0, rank)]
        assert 6 < len(mine) <= 12
        seen += mine
    assert sorted(seen) == [(str(s), row) for s in range(shards) for row in range(6)][2:]


def test_images_that_are_passed_over_change_nothing_that_follows(tmp_path):
    data = stream(write_shards(tmp_path), augmentation=Augmentation({"flip": True, "resized_crop": [0.5, 1]}))
    whole = taken(data, 40)
    data.pass_over(6, 5)
    again = taken(data, 40)
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(whole[30:], again[30:], strict=True))
    assert len({item["pixel_values"].data_ptr() for item in again[:30]}) == 1, "not decoded"


def test_views_are_those_of_shard_and_row_on_any_number_of_processes(tmp_path):
    write_shards(tmp_path)
    given = {"augmentation": Augmentation({"color_jitter": 0.5})}

    def shown(rank, processes, number, **options):
        data = stream(str(tmp_path), **given, **options)
        data.place(rank, processes)
        rows = zip(data._pass(0, rank), data, strict=False)
        return {(row["shard"], row["row"]): item["pixel_values"] for row, item in itertools.islice(rows, number)}

    alone = shown(0, 1, 24)
    for rank in range(2):
        for place, pixels in shown(rank, 2, 12).items():
            assert torch.equal(pixels, alone[place])
    data = stream(str(tmp_path), **given, views=1)
    both = colors(taken(data, 48))
    assert sorted(both[:24]) == sorted(both[24:]), "one view alone"
    both = colors(taken(stream(str(tmp_path), **given), 48))
    assert sorted(both[:24]) != sorted(both[24:])
    assert view_key("x/a.tar", 1) != view_key("x/b.tar", 1)


def test_no_more_is_read_than_the_buffer_holds():
    read = []

    def rows(shards):
        for shard in shards:
            for row in range(10_000):
                read.append(row)
                yield {"image": {"bytes": png(1), "path": None}, "shard": shard, "row": row}

    data = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": ["a", "b"]})
    taken(ImageStream(data, PROCESSOR, buffer=20), 30)
    assert 30 <= len(read) <= 30 + 20 + 1


def test_any_address_that_fsspec_opens_will_do():
    files = fsspec.filesystem("memory")
    for number in range(2):
        buffer = io.BytesIO()
        datasets.Dataset.from_dict({"png": [png(2 * number), png(2 * number + 1)]}).to_parquet(buffer)
        files.pipe(f"/set/train-{number}.parquet", buffer.getvalue())
    assert sorted(colors(taken(stream("memory://set/train-*.parquet"), 4))) == [0, 1, 2, 3]


def test_workers_share_the_shards(tmp_path):
    data = stream(write_shards(tmp_path))
    loader = torch.utils.data.DataLoader(data, batch_size=3, num_workers=2, collate_fn=colors)
    seen = np.concatenate(taken(loader, 8)).tolist()
    assert sorted(seen) == list(range(24))


def test_what_is_no_stream_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    with pytest.raises(ValueError, match=r"reads shards of one kind.*has none"):
        find_shards(str(tmp_path))
    write_shards(tmp_path / "p", "parquet", 1)
    write_shards(tmp_path / "p", "tar", 1)
    with pytest.raises(ValueError, match=r"has train-0.parquet, train-0.tar"):
        find_shards(str(tmp_path / "p"))
    datasets.Dataset.from_dict({"a": [b"x"], "b": [b"y"]}).to_parquet(f"{tmp_path}/two.parquet")
    with pytest.raises(ValueError, match="of which a, b hold images; expected one: type --image_column"):
        taken(stream(f"{tmp_path}/two.parquet"), 1)
    with pytest.raises(ValueError, match="a stream has none; leave them out"):
        stream(write_shards(tmp_path / "q"), augmentation=Augmentation({"mixup": 0.2}))


@pytest.mark.parametrize("seed", [None, -1, 0.5])
@pytest.mark.parametrize("name", ["seed", "view_seed"])
def test_seeds_of_datasets_are_whole_numbers(tmp_path, name, seed):
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=["a"]))
    split = datasets.Dataset.from_dict({"image": [], "label": []}, features=features)
    for made in (partial(stream, write_shards(tmp_path)), partial(ImageDataset, split, None)):
        with pytest.raises(ValueError, match=rf"{name} is {seed}; expected a whole number from 0"):
            made(**{name: seed})
