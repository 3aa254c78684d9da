"""Images without labels: where they come from, and how many of them are in every batch."""

import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from PIL import Image

from hf_kdtl.commands.common.labels import fewer_labels
from hf_kdtl.data import load_images
from hf_kdtl.data.dataset import ImageDataset
from hf_kdtl.data.labelled_share import LabelledShareSampler, labelled_per_batch
from hf_kdtl.data.unlabelled import by_label, open_unlabelled


def sampler(labelled=3, unlabelled=20, batch_size=4, share=0.25, seed=0, epoch=0):
    has = np.array([True] * labelled + [False] * unlabelled)
    return LabelledShareSampler(has, batch_size, share, seed, lambda: epoch)


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "share"), [(3, 20, 0.25), (20, 3, 0.25), (5, 5, 0.75), (1, 1, 0.5)]
)
def test_every_batch_has_its_labelled_images_and_every_image_is_drawn(labelled, unlabelled, share):
    one = sampler(labelled, unlabelled, 4, share)
    rows = np.array(list(one))
    assert len(rows) == len(one) and len(rows) % 4 == 0
    assert ((rows.reshape(-1, 4) < labelled).sum(1) == round(4 * share)).all()
    assert set(rows.tolist()) == set(range(labelled + unlabelled))
    times = np.bincount(rows)
    for kind in (times[:labelled], times[labelled:]):
        assert kind.max() - kind.min() <= 1  # they recur in turns


def test_the_order_depends_on_seed_and_epoch_alone():
    first = list(sampler())
    assert first == list(sampler())
    assert first != list(sampler(epoch=1)) and first != list(sampler(seed=1))


def test_each_image_is_drawn_with_the_number_of_its_passes_before_in_all_epochs():
    passes = [[] for _ in range(23)]
    one = sampler()
    for epoch in (0, 1, 2):
        one.epoch = lambda epoch=epoch: epoch
        drawn = list(one)
        # As a resumed run, or a data-loading worker, has it.
        assert [(row, row.number) for row in sampler(epoch=epoch)] == [(row, row.number) for row in drawn]
        for row in pickle.loads(pickle.dumps(drawn)):
            passes[row].append(row.number)
    assert all(seen == list(range(len(seen))) for seen in passes) and len(passes[0]) > 5 > len(passes[22])
    one.epoch = lambda: 0
    assert [row.number for row in one] == [row.number for row in sampler()]


def test_rows_are_those_of_train_as_loaded_whatever_is_selected(data):
    everything = load_images(data.train)  # 28 images
    assert everything.train_rows == 28 and sorted(
        row for split in (everything.train, everything.validation, everything.test) for row in split["row"]
    ) == list(range(28))
    few = fewer_labels(everything, None, 3, seed=0)
    paths = data.train["image"][:]
    for split in (few.train, few.rest, everything.test):
        assert [paths[row] for row in split["row"]] == split["image"][:]
    more = open_unlabelled("images", few, notes=[])
    both = ImageDataset(datasets.concatenate_datasets([few.train, few.rest, more]), None)
    rows = [both.source_index(index) for index in range(len(both))]
    assert rows[-40:] == list(range(28, 68)) and len(set(rows)) == len(rows) == 20 + 40


def test_two_processes_get_full_batches():
    batches = torch.utils.data.BatchSampler(sampler(), 4, drop_last=False)
    shares = [BatchSamplerShard(batches, num_processes=2, process_index=index) for index in (0, 1)]
    for mine in shares:
        assert len(mine) and all(sum(row < 3 for row in batch) == 1 for batch in mine)
    assert next(iter(shares[0])) != next(iter(shares[1]))


@pytest.mark.parametrize("share", [0, 1, -0.5])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(ValueError, match="expected a share between 0 and 1"):
        labelled_per_batch(share, 8)
    with pytest.raises(ValueError, match="found 0 with and 20 without"):
        sampler(labelled=0)


def save(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 10, 200)).save(path)


@pytest.fixture
def data():
    for number in range(20):
        for name in ("a", "b"):
            save(Path("images", name, f"{number}.png"), number if name == "a" else 100 + number)
    return load_images("images")


@pytest.mark.parametrize("nested", [False, True])
def test_a_folder_of_images_flat_or_nested(data, nested):
    for number in range(5):
        save(Path("more", f"day {number}" if nested else "", "a" if nested else "", f"{number}.png"), 200 + number)
    notes = []
    found = open_unlabelled("more", data, notes=notes)
    assert found["label"][:] == [-100] * 5 and found.features == data.train.features
    assert notes == ["5 images without labels come from more."]


def test_a_parquet_file_a_saved_dataset_and_a_dataset_in_memory_whose_labels_do_not_count(data):
    images = data.train["image"][:]
    features = datasets.Features({"photo": datasets.Image(decode=False), "id": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"photo": images, "id": list(range(len(images)))}, features=features)
    table.to_parquet("images.parquet")
    table.save_to_disk("saved")
    for source in ("images.parquet", "saved", table):
        found = open_unlabelled(source, data, notes=[])
        assert found["label"][:] == [-100] * len(images) and found.column_names == ["image", "label", "row"]


def test_images_of_the_test_split_are_reported(data):
    copied = Path("more/copy.png")
    copied.parent.mkdir()
    copied.write_bytes(Path(data.test[0]["image"]["path"]).read_bytes())
    notes = []
    open_unlabelled("more", data, notes=notes)
    assert any("1 of 6 images of test are in unlabelled too" in note for note in notes)


def test_nothing_there_and_a_broken_image(data):
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        open_unlabelled("empty", data, notes=[])
    save(Path("more/good.png"), 250)
    Path("more/bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.png"):
        open_unlabelled("more", data, notes=[])
    assert len(open_unlabelled("more", data, on_bad_image="skip", notes=[])) == 1


def test_an_empty_label_in_metadata_csv_is_an_image_without_a_label(data):
    lines = ["file_name,label"]
    for number in range(24):
        save(Path("table", f"{number}.png"), number)
        lines.append(f"{number}.png,{'' if number < 4 else 'ab'[number % 2]}")
    Path("table/metadata.csv").write_text("\n".join(lines))
    labelled, unlabelled = by_label(load_images("table").train)
    assert len(unlabelled) == 4 and set(labelled["label"][:]) == {0, 1}


def test_the_dataset_offers_the_order_only_with_a_share(data):
    split = datasets.concatenate_datasets([data.train, open_unlabelled("images", data, notes=[])])
    assert ImageDataset(split, None).train_sampler(4) is None
    images = ImageDataset(split, None, labelled_share=0.5, seed=3)
    first = list(images.train_sampler(4))
    images.set_epoch(1)
    assert list(images.train_sampler(4)) != first


def test_every_part_of_a_source_without_labels_is_read(data):
    rows = data.train.select_columns(["image"])
    parts = {"unlabelled": rows.select(range(9)), "test": rows.select(range(9, 15))}
    assert len(open_unlabelled(parts, load_images(data.train), notes=[])) == 15
    divided = rows.select(range(15)).add_column("split", ["spare"] * 9 + ["train"] * 6)
    assert len(open_unlabelled(divided, load_images(data.train), notes=[])) == 15
