"""What a run knows its images by: not by how their folder was typed, but by their names, places and labels."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from hf_kdtl.data import load_images
from hf_kdtl.data.digests import digests


def folder(where, numbers=range(20)):
    for label in "ab":
        Path(where, label).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(f"{where}/{label}/{number:02}.png")
    return where


def of(data):
    return digests({name: getattr(data, name) for name in ("train", "validation", "test")})


def test_the_same_images_are_the_same_however_they_are_typed():
    folder("photos")
    Path("link").symlink_to("photos")
    first = of(load_images("photos"))
    assert set(first) == {"train", "validation", "test", "labels"}
    for source in ("./photos/", str(Path("photos").absolute()), "link"):
        assert of(load_images(source)) == first
    Path("photos").rename("elsewhere")
    assert of(load_images("elsewhere")) == first


def test_other_cuts_images_and_labels_are_others():
    first = of(load_images(folder("photos")))
    other = of(load_images("photos", seed=7))
    assert all(other[name] != first[name] for name in ("train", "validation", "test"))
    folder("photos", [20])  # it grows
    assert of(load_images("photos"))["test"] != first["test"]
    Path("photos/a/20.png").unlink()
    Path("photos/b/20.png").unlink()
    assert of(load_images("photos")) == first
    Path("photos/a").rename("photos/c")  # another name of the first class, which comes last now
    found = of(load_images("photos"))
    assert found["labels"] != first["labels"]


def test_labels_are_compared_by_name_and_several_too():
    digits = load_images("digits").test.select(range(20))
    names, labels = digits.features["label"].names, digits["label"][:]

    def relabelled(names, labels):
        feature = type(digits.features["label"])(names=names)
        return digests({"test": digits.remove_columns("label").add_column("label", labels, feature=feature)})

    assert relabelled(names[::-1], [9 - label for label in labels]) == digests({"test": digits})
    assert relabelled(names, [-100, *labels[1:]])["labels"] != digests({"test": digits})["labels"]
    lines = [{"file_name": f"{label}/{i:02}.png", "label": f"{label};c"} for i in range(20) for label in "ab"]
    folder("photos")
    found = []
    for line in lines, [*lines[:-1], lines[-1] | {"label": "b"}]:
        Path("photos/labels.jsonl").write_text("\n".join(map(json.dumps, line)))
        found.append(of(load_images("photos/labels.jsonl", multi_label=True))["labels"])
    assert found[0] != found[1]


def test_files_of_one_name_are_known_by_their_folders():
    for shade, item in enumerate("abcdefgh"):
        Path("items", item).mkdir(parents=True)
        Image.fromarray(np.full((4, 4, 3), shade, np.uint8)).save(f"items/{item}/image.png")
    Path("items/labels.csv").write_text(
        "file_name,label\n" + "".join(f"{item}/image.png,{'xy'[n % 2]}\n" for n, item in enumerate("abcdefgh"))
    )
    train = load_images("items/labels.csv", validation_fraction=0.25, test_fraction=0.25).train
    rows = len(train)
    first, other = (digests({"test": train.select(part)}) for part in (range(rows - 1), range(1, rows)))
    assert first["test"] != other["test"]
