"""Several labels an image: cells of tables, splits, orders, and images without a label."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessor

from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.data.several import cell_names
from hf_kdtl.data.unlabelled import open_unlabelled
from tests.support.tiny import build

CELLS = ["cat;dog", "cat", "none", "", "dog; emu", "emu", "cat;dog;emu", "dog"]


@pytest.fixture
def table(tmp_path):
    """80 images: eight kinds of cells, ten of each."""
    draw = np.random.default_rng(0)
    lines = ["file_name,label"]
    for i in range(80):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f'{i}.png,"{CELLS[i % 8]}"')
    path = tmp_path / "images.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def truth(data, split):
    names = {"cat": 0, "dog": 1, "emu": 2}
    for cell in [CELLS[row % 8] for row in split["row"][:]]:
        found = cell_names(cell)
        yield [-100] * 3 if found is None else [int(name in found) for name in sorted(names)]


def test_cells_become_rows_and_the_splits_keep_them(table):
    data = load_images(table, multi_label=True)
    assert data.multi_label and data.label_names == ["cat", "dog", "emu"]
    assert any("several labels an image, of 3 classes" in note for note in data.notes)
    assert data.train["labels"][:] == list(truth(data, data.train))
    assert sum(row == [-100] * 3 for row in data.train["labels"][:]) == 10  # they stay in train
    for split in (data.validation, data.test):
        # The row is the place in train as it was loaded, and stays through every cut.
        assert split["labels"][:] == list(truth(data, split)) and 8 <= len(split) <= 13
        assert [-100] * 3 not in split["labels"][:]
    assert all((label == -100) == (row == [-100] * 3) for label, row in zip(data.train["label"][:],
               data.train["labels"][:], strict=True))  # fmt: skip


def test_what_the_model_is_fed(table):
    data = load_images(table, multi_label=True)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    plain = ImageDataset(data.train, processor)[0]["labels"]
    flipped = ImageDataset(data.train, processor, augmentation=Augmentation({"flip": True}))[0]["labels"]
    assert plain.tolist() == data.train["labels"][0] == flipped.tolist() and plain.dtype.is_floating_point
    with pytest.raises(ValueError, match="mixup and cutmix mix one label an image"):
        ImageDataset(data.train, processor, augmentation=Augmentation({"mixup": 0.2}))


def test_another_order_of_classes_reorders_every_row(table):
    model = build("vit", num_labels=3)
    model.config.id2label = {0: "emu", 1: "cat", 2: "dog"}
    data = load_images(table, multi_label=True)
    turned = data.in_order(model)
    assert turned.train["labels"][:] == [[row[2], row[0], row[1]] for row in data.train["labels"][:]]
    assert turned.label_names == ["emu", "cat", "dog"]


def test_lists_in_a_jsonl_and_images_without_labels(table):
    cells = [cell_names(cell) for cell in CELLS]
    lines = [{"file_name": f"{i}.png", "label": cells[i % 8]} for i in range(80)]
    path = table.with_suffix(".jsonl")
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    data = load_images(path, multi_label=True)
    assert data.train["labels"][:] == list(truth(data, data.train))
    more = open_unlabelled(table, data, notes=[])
    assert more["labels"][:] == [[-100] * 3] * len(more)


def test_what_is_refused(table):
    plain = load_images(table.parent / "images.csv", validation_fraction=0.3, test_fraction=0.3)
    assert any("for several labels an image set multi_label" in note for note in plain.notes)
    with pytest.raises(ValueError, match="hold 'none' and classes"):
        cell_names("none;cat")
    text = table.read_text().replace("file_name,label", "file_name,label,split").splitlines()
    rows = [text[0], *(f"{line},{'test' if i % 9 == 0 else 'train'}" for i, line in enumerate(text[1:]))]
    table.write_text("\n".join(rows).replace('"cat;dog;emu",test', '"cat;yak",test') + "\n")
    if "yak" in table.read_text():
        with pytest.raises(ValueError, match="'yak'"):
            load_images(table, multi_label=True)
