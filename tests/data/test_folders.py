import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image
from transformers import ViTImageProcessor
from transformers.image_utils import load_image

from hf_kdtl.data import ImageData, ImageDataset, load_images, scan
from hf_kdtl.data.folders import split_name
from hf_kdtl.data.unlabelled import open_unlabelled


def folder(root: Path, counts: dict[str, int], **extra: str) -> Path:
    """{"train/cat": 3} writes train/cat/0.png ... of noise, each image another one."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            noise = np.random.default_rng([number, i]).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / name / f"{i}.png")
    return root


def sizes(data: ImageData) -> list[int]:
    return [len(split) for split in (data.train, data.validation, data.test)]


def total(data: ImageData) -> dict[str, int]:
    """How many images each class has, over all splits."""
    labels = [label for split in (data.train, data.validation, data.test) for label in split["label"]]
    return {name: labels.count(i) for i, name in enumerate(data.label_names)}


def noted(data: ImageData, *words: str) -> bool:
    return any(all(word in note for word in words) for note in data.notes)


TWO = {"cats": 20, "dogs": 20}


# ---- Which folders are classes ----


def test_the_order_of_the_images_is_that_of_datasets_imagefolder(tmp_path, monkeypatch):
    # A seed must go on giving the splits it gave when `datasets` listed the folders.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = folder(tmp_path / "r", {"cat": 11, "cat.b": 3, "Dog": 4, "cat b": 2})
    builder = ImageFolder(data_dir=str(root), data_files={"train": "**"}, cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    theirs = builder.as_dataset("train").cast_column("image", builder.info.features["image"].__class__(decode=False))
    ours = scan.scan(root)
    from hf_kdtl.data.folders import open_folder

    split = open_folder(ours, None, [])["train"]
    assert [image["path"] for image in split["image"]] == [image["path"] for image in theirs["image"]]
    assert split.features["label"].names == theirs.features["label"].names
    assert split["label"][:] == theirs["label"][:]
    assert len(list(ours.all_images())) == 20


@pytest.mark.parametrize("parts", [("2023", "2024"), ("images",), ("part_1", "part-2")])
def test_folders_that_divide_a_class_are_not_classes(tmp_path, parts):
    data = load_images(str(folder(tmp_path, {f"{c}/{p}": 20 for c in ("cats", "dogs") for p in parts})))
    assert total(data) == {"cats": 20 * len(parts), "dogs": 20 * len(parts)}
    assert noted(data, "classes are cats, dogs", "/*/*")


def test_images_at_two_levels_belong_to_the_upper_class(tmp_path):
    data = load_images(str(folder(tmp_path, {"cats": 10, "cats/more": 10, "dogs/a": 10, "dogs/b": 10})))
    assert total(data) == {"cats": 20, "dogs": 20}


@pytest.mark.parametrize(
    "tree",
    [
        {"animals/cat": 9, "animals/dog": 9, "vehicles/car": 9},  # groups of classes
        {"amazon/mug": 9, "amazon/pen": 9, "dslr/mug": 9, "dslr/pen": 9},  # domains
        {"fold1/cats": 9, "fold1/dogs": 9, "fold2/cats": 9, "fold2/dogs": 9},
        {"amazon/images/mug": 9, "amazon/images/pen": 9, "dslr/images/mug": 9, "dslr/images/pen": 9},
        {"training_v2/cats": 9, "training_v2/dogs": 9, "holdout/cats": 9, "holdout/dogs": 9},
    ],
)
def test_two_readings_are_refused_and_a_glob_decides(tmp_path, tree):
    root = folder(tmp_path / "r", tree)
    with pytest.raises(
        ValueError, match=r"lie two folders deep.*\(\d+ images\).*Load '.*/\*' for .*, or '.*/\*/\*' for"
    ):
        load_images(str(root))
    upper, names = load_images(f"{root}/*"), {name.split("/")[0] for name in tree}
    assert set(upper.label_names) == names
    assert sum(total(upper).values()) == 9 * len(tree)
    deepest = load_images(str(root / "/".join("*" * (1 + next(iter(tree)).count("/")))))
    assert set(deepest.label_names) == {name.split("/")[-1] for name in tree}


def test_a_glob_through_split_folders_keeps_the_splits(tmp_path):
    tree = {"train/pets/cat": 20, "train/farm/cow": 20, "test/pets/cat": 3, "test/farm/cow": 2}
    data = load_images(str(folder(tmp_path / "train", tree) / "*" / "*" / "*"))
    assert data.label_names == ["cat", "cow"]
    assert sizes(data) == [34, 6, 5]


def test_classes_inside_of_a_single_folder(tmp_path):
    data = load_images(str(folder(tmp_path, {"photos/cats": 20, "photos/dogs": 20})))
    assert total(data) == TWO
    assert noted(data, "classes of train are the folders in", "photos")


@pytest.mark.parametrize("name", ["unlabelled", "Unlabeled", "no_label"])
def test_unlabelled_is_not_a_class(tmp_path, name):
    data = load_images(str(folder(tmp_path, TWO | {name: 7})))
    assert data.label_names == ["cats", "dogs"]
    assert data.train["label"][:].count(-100) == 7
    assert noted(data, "7 of 35 images of train are unlabelled")


def test_names_are_the_same_in_either_unicode_form(tmp_path):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    data = load_images(str(folder(tmp_path, {f"train/{composed}": 9, "train/tea": 9, f"test/{apart}": 2})))
    assert data.label_names == [composed, "tea"]
    assert data.test["label"][:] == [0, 0]


def test_names_that_differ_in_case_alone_are_noted(tmp_path):
    assert noted(load_images(str(folder(tmp_path, {"Cat": 20, "cat": 20}))), "accents alone: 'Cat', 'cat'")


# ---- Which folders are splits ----


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((n, "train") for n in ("train", "Training", "TRAIN", "trainset", "train_images")),
        *((n, "validation") for n in ("val", "valid", "validation", "dev", "val-set")),
        *((n, "test") for n in ("test", "testing", "test_data", "Test Images")),
        *((n, None) for n in ("trainer", "test tube", "devil", "valve", "latest", "pre-train")),
    ],
)
def test_names_of_splits(name, split):
    assert split_name(name) == split


@pytest.mark.parametrize("above", ["", "data/", "a/b/"])
@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "dev", "testing"), ("train_set", "valid", "test")]
)
def test_splits_are_found_further_down_and_by_their_usual_names(tmp_path, above, names):
    tree = {f"{above}{split}/{c}": n for split, n in zip(names, (9, 3, 2), strict=True) for c in ("a", "b")}
    assert sizes(load_images(str(folder(tmp_path, tree)))) == [18, 6, 4]


def test_a_split_of_one_class_keeps_its_name(tmp_path):
    data = load_images(
        str(folder(tmp_path, {"train/a": 9, "train/b": 9, "val/b": 2, "test/a/2023": 2, "test/a/2024": 1}))
    )
    assert (data.validation["label"][:], data.test["label"][:]) == ([1, 1], [0, 0, 0])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {f"{c}/{s}": 9 for c in "ab" for s in ("train", "test")},
            r"splits inside of a \(test, train\), b \(test, train\).*Name the one to load: '.*/a'.*train/<class>",
        ),
        (
            {"new/train/a": 9, "new/train/b": 9, "raw/a": 9},
            r"splits inside of new \(train\), and other folders of images \(raw\)",
        ),
        (
            {"train/a": 9, "train/b": 9, "val/a": 2, "valid/a": 2},
            r"two folders for one split \(val, valid\).*Merge them",
        ),
        ({"val/a": 9, "val/b": 9, "test/a": 9, "test/b": 9}, r"the splits test, val and none called train"),
        ({"train/a": 9, "train/b": 9, "val": 9}, r"val' holds 9 images and no class folders.*file_name and label"),
    ],
)
def test_splits_that_cannot_be_distinguished_are_refused(tmp_path, tree, message):
    with pytest.raises(ValueError, match=message):
        load_images(str(folder(tmp_path, tree)))


def test_an_empty_split_folder_is_noted(tmp_path):
    root = folder(tmp_path, {"train/a": 20, "train/b": 20, "val": 0})
    data = load_images(str(root))
    assert noted(data, "split folders val hold no images")
    assert len(data.validation) == 6


# ---- What is not read ----


def test_a_class_of_files_that_need_a_plugin_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "image_suffixes", lambda: frozenset({".png"}))
    root = folder(tmp_path, TWO | {"birds": 0})
    (root / "birds" / "1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(
        ValueError, match=r"'birds' of train has only HEIC files.*pillow-heif.*hf_kdtl\[heif\].*1 files"
    ):
        load_images(str(root))
    (root / "birds" / "1.HEIC").rename(root / "cats" / "1.heic")
    (root / "dogs" / "1.avif").write_bytes(b"\0\0\0\x18ftypavif")
    data = load_images(str(root))
    assert total(data) == TWO
    assert noted(data, "Not read in train", "HEIC", "cats 1 (1 in all)")
    assert noted(data, "Not read in train", "AVIF", "dogs 1 (1 in all)")
    assert noted(data, "Folders of train without an image were not read as classes: birds")


def test_images_are_known_by_their_content_where_the_name_does_not_tell(tmp_path):
    root = folder(tmp_path, TWO)
    for name in ("noext", "photo.jpg_large", "x.img"):
        (root / "cats" / name).write_bytes((root / "cats" / "0.png").read_bytes())
    if ".avif" in scan.image_suffixes():
        Image.new("RGB", (4, 4)).save(root / "dogs" / "a.avif")
    data = load_images(str(root))
    assert total(data) == {"cats": 23, "dogs": 20 + (".avif" in scan.image_suffixes())}


def test_links_are_followed_and_dead_or_circular_ones_are_counted(tmp_path):
    root = folder(tmp_path / "r", TWO)
    (root / "birds").symlink_to(folder(tmp_path / "elsewhere", {"b": 20}) / "b")
    (root / "cats" / "dead.png").symlink_to(tmp_path / "nothing.png")
    (root / "dogs" / "up").symlink_to(root)
    (root / "gone").symlink_to(tmp_path / "nothing")
    data = load_images(str(root))
    assert total(data) == TWO | {"birds": 20}
    assert noted(data, "links to files that do not exist", "cats 1")
    assert noted(data, "links to files that do not exist", "r 1")
    assert noted(data, "links to a folder that contains them", "dogs 1")


def test_what_lies_about_is_ignored_or_counted(tmp_path):
    root = folder(tmp_path / "r", TWO | {"": 1, "__MACOSX/cats": 2, ".thumbs": 3, "empty": 0, "docs": 0})
    (root / "cats" / "._0.png").write_bytes(b"resource fork")
    (root / "cats" / ".DS_Store").write_bytes(b"x")
    (root / "cats" / "Thumbs.db").write_bytes(b"x")
    (root / "dogs" / "0.xml").write_text("<annotation/>")
    (root / "docs" / "read.txt").write_text("hello")
    (root / "backup.zip").write_bytes(b"PK")
    data = load_images(str(root))
    assert total(data) == TWO
    assert noted(data, "1 images of train outside the class folders have no class", "0.png")
    assert noted(data, "hidden image files: cats 1 (1 in all)")
    assert noted(data, "files that are no images: docs 1, dogs 1 (2 in all)")
    assert noted(data, "archives", "unpack them", "r 1")
    assert noted(data, "not read as classes: docs, empty")


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    root = folder(tmp_path, TWO)
    real = scan.os.scandir

    def scandir(path):
        if Path(path).name == "dogs":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(scan.os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"dogs' cannot be listed \(Permission denied\)"):
        load_images(str(root))


def test_a_folder_without_images_says_what_it_has(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"holds no images.*Found 1 archives, which are not read \(unpack them\)"):
        load_images(str(tmp_path))


def test_identical_images_in_two_splits_are_counted(tmp_path):
    root = folder(tmp_path, {"train/a": 9, "train/b": 9, "val/a": 3, "test/b": 4})
    (root / "val/a/0.png").write_bytes((root / "train/b/3.png").read_bytes())
    for i in (1, 2):
        (root / f"test/b/{i}.png").write_bytes((root / "val/a/1.png").read_bytes())
    assert [note for note in load_images(str(root)).notes if "measure memory" in note] == [
        "1 of 3 images of validation are in train too, byte for byte: figures on them measure memory. Remove them "
        "from one of the two.",
        "2 of 4 images of test are in validation too, byte for byte: figures on them measure memory. Remove them "
        "from one of the two.",
    ]


def test_an_image_under_two_classes_is_noted(tmp_path):
    root = folder(tmp_path, TWO)
    for i in range(3):
        shutil.copy(root / "cats" / f"{i}.png", root / "dogs" / f"copy{i}.png")
    shutil.copy(root / "cats" / "4.png", root / "cats" / "copy4.png")  # of its own class: of no consequence here
    assert noted(load_images(str(root)), "3 images are there under two classes, byte for byte", "as cats and as dogs")


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    """Colors, grey, transparency and orientation as a pipeline shows them to a model."""
    heif = pytest.importorskip("pillow_heif")
    root = folder(tmp_path, TWO)
    heif.register_heif_opener()
    turned = Image.Exif()
    turned[0x0112] = 6
    noise = Image.effect_noise((64, 40), 80)
    for mode in ("RGB", "L", "RGBA", "LA"):
        noise.convert(mode).save(root / "cats" / f"{mode}.heic")
    noise.save(root / "cats" / "turned.HIF", format="HEIF", exif=turned.tobytes())
    noise.save(root / "cats" / "from_a_phone.jpg", format="HEIF")
    data = load_images(str(root))
    assert total(data) == TWO | {"cats": 26}
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    seen = set()
    for split in (data.train, data.validation, data.test):
        for cell, row in zip(split["image"], ImageDataset(split, processor), strict=True):
            served = processor(load_image(Image.open(cell["path"])), return_tensors="pt")["pixel_values"][0]
            assert (row["pixel_values"] == served).all(), cell["path"]
            seen.add(Path(cell["path"]).name)
    assert {"RGB.heic", "L.heic", "RGBA.heic", "LA.heic", "turned.HIF", "from_a_phone.jpg"} <= seen


def test_heic_without_its_reader_is_named_also_without_an_ending(tmp_path, monkeypatch):
    for where in ("decoding", "scan"):
        monkeypatch.setattr(f"hf_kdtl.data.{where}.register_heif", lambda: False)
    root = folder(tmp_path, TWO)
    for name in ("noext", "a.jpg"):
        (root / "cats" / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    data = load_images(str(root), on_bad_image="skip")
    assert noted(data, "Not read in train, HEIC files", "pillow-heif", "cats 1 (1 in all)")
    assert noted(data, "1 of 41 images of train could not be read", "1 are HEIC files, which need pillow-heif")


def test_the_search_for_identical_images_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_kdtl.data.duplicates._BUDGET", 2**14 * 3)
    root = folder(tmp_path, {"train/a": 9, "train/b": 9, "test/b": 4, "val/a": 3})
    assert noted(load_images(str(root)), "Not all images were compared")


def test_a_class_that_a_split_lacks_is_noted(tmp_path):
    tree = {"train/a": 20, "train/b": 20, "val/b": 5, "test/a": 5, "test/b": 5}
    data = load_images(str(folder(tmp_path / "splits", tree)))
    assert noted(data, "Validation has no image of a") and not noted(data, "Test has no") and not noted(data, "listed")
    cut = load_images(str(folder(tmp_path / "cut", {"a": 2, "b": 30})))
    assert noted(cut, "Validation has no image of a") and noted(cut, "Test has no image of a")


@pytest.mark.parametrize("place", ["features.parquet", "cats/old.parquet"])
def test_parquet_files_among_class_folders_are_refused(tmp_path, place):
    root = folder(tmp_path, TWO)
    cells = [{"bytes": (root / "cats" / f"{i}.png").read_bytes(), "path": None} for i in range(20)]
    rows = {"image": cells, "label": ["x", "y"] * 10}
    Dataset.from_dict(rows).to_parquet(root / place)
    with pytest.raises(
        ValueError, match=rf"parquet files \({place}\) and folders of images \(cats, dogs\).*move"
    ) as e:
        load_images(str(root))
    (tables,) = re.findall(r"for the tables load '(.*)'", str(e.value))
    assert load_images(tables).label_names == ["x", "y"]
    (root / ".hidden").mkdir()  # as of a download
    (root / place).rename(root / ".hidden" / "old.parquet")
    assert total(load_images(str(root))) == TWO


def test_what_lies_next_to_the_files_that_are_read_is_counted(tmp_path):
    root = folder(tmp_path / "r", {"assets": 2})
    cells = [{"bytes": (root / "assets" / "0.png").read_bytes(), "path": None} for i in range(40)]
    Dataset.from_dict({"image": cells, "label": ["x", "y"] * 20}).to_parquet(root / "train.parquet")
    (root / "old.tar").write_bytes(b"")
    assert noted(load_images(str(root)), "3 images and archives next to train.parquet were not read")
    classes = folder(tmp_path / "c", TWO | {"": 1})
    assert noted(load_images(f"{classes}/*"), "1 files or runs that", "were not read: 0.png")
    shutil.copytree(classes / "cats", classes / "out")
    (classes / "out" / "results.json").write_text('{"schema": 2}')
    assert total(load_images(f"{classes}/*")) == TWO


def test_tables_and_what_lies_next_to_splits_are_counted(tmp_path):
    root = folder(tmp_path / "r", TWO)
    for table in ("labels.csv", "cats/more.csv", "metadata.csv"):
        (root / table).write_text("file_name,kind\ncats/0.png,b\n")
    data = load_images(str(root))
    assert total(data) == TWO and noted(data, "columns of metadata.csv were not used: kind")
    assert noted(data, "tables, which are not read", "loaded by its own name", "r 1 (1 in all)")
    assert noted(data, "tables, which are not read", "cats 1 (1 in all)")
    splits = folder(tmp_path / "s", {"data": 1, "data/train/a": 20, "data/train/b": 20, "data/test/b": 4, "": 2})
    for table in ("labels.csv", "data/metadata.csv"):
        (splits / table).write_text("file_name,label\n")
    data = load_images(str(splits))
    assert sizes(data) == [34, 6, 4]
    assert noted(data, "2 images next to the splits") and noted(data, "1 images next to the splits")
    assert noted(data, "tables", "s 1 (1 in all)") and noted(data, "tables", "data 1 (1 in all)")
    (root / "cats" / "notes.txt").write_text("hello")
    open_unlabelled(str(root), data, notes=(notes := []))
    assert any("Not read in the images without labels, files that are no images" in note for note in notes)


def test_runs_inside_of_the_images_are_no_class(tmp_path):
    root = folder(tmp_path, TWO | {"runs/teacher": 3, "birds": 20})
    (root / "runs/teacher/results.json").write_text('{"schema": 2}')
    (root / "birds" / "results.json").write_text('{"theirs": 1}')  # of another program
    data = load_images(str(root))
    assert total(data) == TWO | {"birds": 20}
    assert noted(data, "folders of runs of hf-kdtl", "runs 1 (1 in all)")
    assert len(open_unlabelled(str(root), data, notes=[])) == 60
