import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

from hf_kdtl.data.loading import ImageData, load_images


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def png(value: int, size: tuple[int, int] = (6, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def folder(root: Path, counts: dict[str, int]) -> Path:
    """{"train/cat": 3} writes train/cat/0.png, 1.png, 2.png, each of its own grey."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(png((number * 40 + i) % 256))
    return root


def table(labels: list, feature=None, **columns) -> Dataset:
    features = {"image": datasets.Image(), "label": feature or ClassLabel(names=["cat", "dog"])}
    features |= {name: value[1] for name, value in columns.items()}
    rows = {"image": [{"bytes": png(i % 256), "path": f"{i}.png"} for i in range(len(labels))], "label": labels}
    return Dataset.from_dict(rows | {k: v[0] for k, v in columns.items()}, features=Features(features))


def saved(tmp_path: Path, **splits: Dataset) -> str:
    DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    return str(tmp_path / "saved")


def images_of(split: Dataset) -> list[bytes]:
    return [image["bytes"] or Path(image["path"]).read_bytes() for image in split["image"]]


def counts(split: Dataset) -> list[int]:
    return np.bincount(split["label"][:]).tolist()


def sizes(data: ImageData) -> list[int]:
    return [len(split) for split in (data.train, data.validation, data.test)]


def check(data: ImageData) -> None:
    for split in (data.train, data.validation, data.test):
        columns = {"label": ClassLabel(names=data.label_names), "row": datasets.Value("int64")}
        assert split.features == Features(image=datasets.Image(decode=False), **columns)


# ---- sources ----


def test_digits_are_embedded_and_split_by_class():
    data = load_images()
    check(data)
    assert data.label_names == list("0123456789")
    assert [len(s) for s in (data.train, data.validation, data.test)] == [1257, 270, 270]
    assert sum("270 images were cut from train, stratified by class, seed 42" in note for note in data.notes) == 2
    everything = np.array([counts(s) for s in (data.train, data.validation, data.test)])
    assert np.abs(everything[1:] - everything.sum(0) * 0.15).max() <= 1
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in images_of(data.test)])
    assert pixels.shape == (270, 8, 8)
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_splits_are_disjoint_and_seeded(tmp_path):
    source = saved(tmp_path, train=table([0, 1] * 100))

    def paths(seed: int) -> list[list[str]]:
        data = load_images(source, seed=seed)
        return [[image["path"] for image in split["image"]] for split in (data.train, data.validation, data.test)]

    first, again, other = paths(1), paths(1), paths(2)
    assert first == again != other
    assert sorted(path for part in first for path in part) == sorted(f"{i}.png" for i in range(200))
    assert [len(part) for part in first] == [140, 30, 30]


def test_a_seed_means_the_same_split_in_every_version(tmp_path):
    """A teacher that was trained before an upgrade saw what is cut into test after it, if this changes."""
    data = load_images(saved(tmp_path, train=table([0, 1] * 20)))
    rows = [[int(Path(image["path"]).stem) for image in split["image"]] for split in (data.validation, data.test)]
    assert rows == [[8, 19, 24, 25, 32, 35], [1, 3, 12, 20, 23, 28]]


def test_folder_of_classes(tmp_path):
    source = folder(tmp_path / "images", {"cat": 20, "dog": 20})
    (source / "dog" / "notes.txt").write_text("not an image")
    data = load_images(str(source))
    check(data)
    assert data.label_names == ["cat", "dog"]
    assert [counts(s) for s in (data.train, data.validation, data.test)] == [[14, 14], [3, 3], [3, 3]]
    for image, label in zip(data.train["image"], data.train["label"], strict=True):
        assert Path(image["path"]).parent.name == data.label_names[label]


def test_folder_of_splits_keeps_them(tmp_path):
    sizes = {"train/cat": 10, "train/dog": 12, "val/cat": 1, "val/dog": 2, "test/cat": 3, "test/dog": 4}
    data = load_images(str(folder(tmp_path / "images", sizes)))
    check(data)
    assert [counts(s) for s in (data.train, data.validation, data.test)] == [[10, 12], [1, 2], [3, 4]]
    assert data.notes == []


def test_validation_is_cut_from_train_and_never_from_test(tmp_path):
    sizes = {"train/cat": 20, "train/dog": 20, "test/cat": 5, "test/dog": 5}
    data = load_images(str(folder(tmp_path / "images", sizes)), validation_fraction=0.25)
    assert [counts(s) for s in (data.train, data.validation, data.test)] == [[15, 15], [5, 5], [5, 5]]
    assert data.notes[0].startswith("No validation split was found: 10 images were cut from train")


def test_classes_with_the_names_of_splits_stay_classes(tmp_path):
    # `datasets` by itself takes the first two for splits and drops the third.
    data = load_images(str(folder(tmp_path / "toys", {"train": 10, "test tube": 10, "car": 10})))
    assert data.label_names == ["car", "test tube", "train"]
    assert len(data.train) + len(data.validation) + len(data.test) == 30


def test_other_folders_beside_splits_are_reported(tmp_path):
    source = folder(tmp_path / "images", {"train/cat": 10, "train/dog": 10, "raw/cat": 3})
    assert "raw" in load_images(str(source)).notes[0]


def test_parquet_folder_file_and_glob(tmp_path):
    root = tmp_path / "tables"
    root.mkdir()
    table([0, 1] * 20).to_parquet(root / "train-00000-of-00002.parquet")
    table([0, 1] * 10).to_parquet(root / "train-00001-of-00002.parquet")
    table([0, 1, 1]).to_parquet(root / "validation.parquet")
    table([0, 1]).to_parquet(root / "test.parquet")
    data = load_images(str(root))
    check(data)
    assert [counts(s) for s in (data.train, data.validation, data.test)] == [[30, 30], [1, 2], [1, 1]]
    assert len(load_images(str(root / "train-*.parquet")).train) == 42
    assert len(load_images(str(root / "train-00000-of-00002.parquet")).train) == 28


def test_saved_dataset_and_dict(tmp_path):
    table([0, 1] * 20).save_to_disk(str(tmp_path / "one"))
    assert len(load_images(str(tmp_path / "one")).train) == 28
    data = load_images(saved(tmp_path, train=table([0, 1] * 20), dev=table([0, 1]), extra=table([0])))
    assert [len(data.train), len(data.validation), len(data.test)] == [34, 2, 6]
    assert "'extra'" in data.notes[0]


# ---- labels ----


@pytest.mark.parametrize(
    ("values", "feature", "names"),
    [
        (["dog", "cat"] * 20, Value("string"), ["cat", "dog"]),
        ([10, 9] * 20, Value("int64"), ["9", "10"]),
        ([True, False] * 20, Value("bool"), ["False", "True"]),
    ],
)
def test_plain_labels_become_classes(tmp_path, values, feature, names):
    data = load_images(saved(tmp_path, train=table(values, feature)))
    check(data)
    assert data.label_names == names
    expected = [names[label] for label in data.train["label"]]
    kept = [int(image["path"].split(".")[0]) for image in data.train["image"]]
    assert expected == [str(values[i]) for i in kept]
    assert f"Column 'label' ({feature.dtype}) was read as 2 classes: {', '.join(names)}." in data.notes


def test_other_column_names_by_feature_and_by_argument(tmp_path):
    odd = table([0, 1] * 20).rename_columns({"image": "photo", "label": "what"})
    check(load_images(saved(tmp_path, train=odd)))
    two = table([0, 1] * 20, coarse=([1, 0] * 20, ClassLabel(names=["x", "y"])))
    source = str(tmp_path / "two")
    two.save_to_disk(source)
    with pytest.raises(ValueError, match=r"are 2 columns.*'label' \(ClassLabel of 2\).*'coarse'.*label_column="):
        load_images(source)
    assert load_images(source, label_column="coarse").label_names == ["x", "y"]
    with pytest.raises(ValueError, match=r"no column 'coars'.*Did you mean 'coarse'"):
        load_images(source, label_column="coars")


def test_classes_in_another_order_are_matched_by_name(tmp_path):
    other = table([0, 0, 1], ClassLabel(names=["dog", "cat"]))
    data = load_images(saved(tmp_path, train=table([0, 1] * 20), validation=other, test=table([0, 1])))
    check(data)
    assert data.validation["label"][:] == [1, 1, 0]
    assert "classes of validation are listed as dog, cat: re-ordered" in data.notes[0]


def test_parquet_splits_in_another_order_are_matched_by_name(tmp_path):
    root = tmp_path / "tables"
    root.mkdir()
    table([0, 1] * 20).to_parquet(root / "train.parquet")
    table([0, 0, 1], ClassLabel(names=["dog", "cat"])).to_parquet(root / "test.parquet")
    assert load_images(str(root)).test["label"][:] == [1, 1, 0]


def test_unlabelled_images_stay_in_train(tmp_path):
    data = load_images(saved(tmp_path, train=table([0, 1, -100, 1, 0] * 20, Value("int64"))))
    check(data)
    assert data.train["label"][:].count(-100) == 20
    assert [len(data.validation), len(data.test)] == [12, 12]
    assert min(data.validation["label"][:] + data.test["label"][:]) == 0
    assert any("20 of 76 images of train are unlabelled" in note for note in data.notes)


# ---- bad input ----


def test_a_path_that_does_not_exist_lists_close_matches(tmp_path, monkeypatch):
    folder(tmp_path / "flowers", {"rose": 1})
    with pytest.raises(ValueError, match=r"flowrs' does not exist \(close matches in .*: flowers\)"):
        load_images(str(tmp_path / "flowrs"))
    with pytest.raises(ValueError, match=r"close matches in .*: flowers\)"):
        load_images(str(tmp_path / "flowrs" / "train"))
    monkeypatch.chdir(tmp_path)
    for name in ("./flowrs", "flowers/rosa"):  # "flowers" is here, so that this is no Hub name
        with pytest.raises(ValueError, match="does not exist"):
            load_images(name)


def test_a_hub_name_that_cannot_be_reached_is_reported(monkeypatch):
    def refuse(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"'owner/flowers' is no file or folder.*no network.*'digits'"):
        load_images("owner/flowers")


def test_a_hub_name_is_loaded_without_further_arguments(monkeypatch):
    calls = []

    def load(*args, **kwargs):
        calls.append((args, kwargs))
        return DatasetDict(train=table([0, 1] * 20), valid=table([0, 1]), test=table([1, 0]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = load_images("owner/flowers")
    assert calls == [(("owner/flowers",), {})]
    assert len(data.validation) == 2


def test_a_wrong_name_suggests_the_close_one(tmp_path, monkeypatch):
    monkeypatch.chdir(folder(tmp_path, {"flowers": 1}))
    with pytest.raises(ValueError, match="Did you mean 'digits'"):
        load_images("digit")
    with pytest.raises(ValueError, match="Did you mean 'flowers'"):
        load_images("flower")


def test_datasets_in_memory_are_taken_as_they_are(tmp_path):
    one = table([0, 1] * 20)
    data = load_images(one)
    check(data)
    assert (data.source, sizes(data)) == ("a Dataset in memory", [28, 6, 6])
    both = load_images(DatasetDict(train=one, dev=table([1, 0])))
    assert sizes(both) == [34, 2, 6]
    assert sizes(load_images({"train": one, "test": table([1, 0])})) == [34, 6, 2]
    split = folder(tmp_path / "images", {"cat": 20, "dog": 20})
    assert sizes(load_images(split)) == [28, 6, 6]  # a Path


def test_the_transform_of_a_dataset_is_noted_and_not_applied():
    data = load_images(table([0, 1] * 20).with_transform(lambda rows: {"pixel_values": [0] * len(rows["label"])}))
    check(data)
    assert any("set_transform" in note for note in data.notes)


@pytest.mark.parametrize(("source", "what"), [(7, "a int"), (iter([]), "iterator")])
def test_sources_of_another_type(source, what):
    with pytest.raises(ValueError, match=rf"{what}.*, expected a path, a name, a datasets\.Dataset"):
        load_images(source)
    with pytest.raises(ValueError, match=r"'train' is a IterableDataset.*without streaming"):
        load_images({"train": table([0, 1]).to_iterable_dataset()})


@pytest.mark.parametrize("file", [None, "notes.txt"])
def test_a_folder_without_images(tmp_path, file):
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    if file:
        (tmp_path / "empty" / "cat" / file).write_text("hello")
    with pytest.raises(ValueError, match=r"empty' holds no images, expected a sub-folder"):
        load_images(str(tmp_path / "empty"))


def test_no_label_column(tmp_path):
    with pytest.raises(
        ValueError, match=r"no column that could be the label.*holds 3 images and no class.*sub-folder"
    ):
        load_images(str(folder(tmp_path / "flat", {".": 3})))


def test_two_image_columns(tmp_path):
    two = table([0, 1], mask=([{"bytes": png(1), "path": None}] * 2, datasets.Image()))
    source = saved(tmp_path, train=two)
    with pytest.raises(ValueError, match=r"2 columns that could be the image column.*'mask' \(Image\).*image_column="):
        load_images(source)


def test_columns_of_the_wrong_type(tmp_path):
    source = saved(tmp_path, train=table([0, 1], weight=([0.5, 0.5], Value("float32"))))
    with pytest.raises(ValueError, match=r"'weight' is of type float32, expected ClassLabel"):
        load_images(source, label_column="weight")
    with pytest.raises(ValueError, match=r"'weight' is of type float32, expected images"):
        load_images(source, image_column="weight")


def test_classes_that_training_never_saw(tmp_path):
    sizes = {"train/cat": 10, "train/dog": 10, "test/cat": 3, "test/emu": 2}
    with pytest.raises(ValueError, match=r"classes of test .*training never sees emu"):
        load_images(str(folder(tmp_path / "images", sizes)))
    three = ClassLabel(names=["cat", "dog", "emu"])
    source = saved(tmp_path, train=table([0, 1] * 20, three), test=table([0, 2, 2], three))
    with pytest.raises(ValueError, match=r"'test' has images of classes that training never saw: 'emu' \(2 images\)"):
        load_images(source)


def test_class_names_that_differ(tmp_path):
    other = table([0, 1], ClassLabel(names=["cat", "wolf"]))
    with pytest.raises(ValueError, match=r"classes of test \(cat, wolf\) are not those of train \(cat, dog\).*wolf"):
        load_images(saved(tmp_path, train=table([0, 1] * 20), test=other))


def test_negative_labels_and_unlabelled_tests(tmp_path):
    test = table([-1, -1], Value("int64"))
    with pytest.raises(ValueError, match=r"'label' of test holds the labels -1, expected class indices"):
        load_images(saved(tmp_path, train=table([0, 1] * 20, Value("int64")), test=test))
    source = str(tmp_path / "second")
    DatasetDict(train=table([0, 1] * 20, Value("int64")), test=table([-100, 1], Value("int64"))).save_to_disk(source)
    with pytest.raises(ValueError, match="1 images of test are unlabelled"):
        load_images(source)


def test_too_few_images_to_split(tmp_path):
    with pytest.raises(ValueError, match=r"the rarest, 'dog', has 1 images.*bring a test split"):
        load_images(saved(tmp_path, train=table([0] * 30 + [1])))


@pytest.mark.parametrize("seed", [None, -1, 2**32, 1.0, True])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match=r"seed .--split_seed. is .*, expected a whole number from 0 on"):
        load_images(seed=seed)


def test_one_class_no_train_and_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"one class only \(cat\)"):
        load_images(saved(tmp_path, train=table([0] * 30, ClassLabel(names=["cat"]))))
    DatasetDict(test=table([0, 1])).save_to_disk(str(tmp_path / "test_only"))
    with pytest.raises(ValueError, match="has the splits test, expected one called 'train'"):
        load_images(str(tmp_path / "test_only"))
    with pytest.raises(ValueError, match="on_bad_image is 'ignore'"):
        load_images(on_bad_image="ignore")
    with pytest.raises(ValueError, match=r"test_fraction is 1\.5"):
        load_images(test_fraction=1.5)


def test_bad_parquet(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"train\.parquet could not be read, expected parquet"):
        load_images(str(tmp_path / "train.parquet"))
    for name, unpack in (("data.npz", ""), ("data.zip", ".* Unpack it first")):
        (tmp_path / name).write_text("a,b")
        with pytest.raises(ValueError, match=rf"matches {name}, expected parquet{unpack}"):
            load_images(str(tmp_path / name))
    with pytest.raises(ValueError, match="matches no file"):
        load_images(str(tmp_path / "*.nothing"))


def test_parquet_files_of_one_split_that_disagree(tmp_path):
    root = tmp_path / "tables"
    root.mkdir()
    table([0, 1]).to_parquet(root / "train-0.parquet")
    table([0, 1], ClassLabel(names=["dog", "cat"])).to_parquet(root / "train-1.parquet")
    with pytest.raises(ValueError, match=r"train-1\.parquet has other columns or class names than train-0"):
        load_images(str(root))
    (root / "train-1.parquet").rename(root / "more.parquet")
    with pytest.raises(ValueError, match=r"split of more\.parquet is unknown"):
        load_images(str(root))


def with_bad_images(root: Path) -> str:
    folder(root, {"cat": 20, "dog": 20})
    (root / "cat" / "3.png").write_bytes(b"junk")
    (root / "dog" / "5.png").write_bytes(png(1)[:40])
    return str(root)


def test_bad_images_are_counted_and_left_out(tmp_path):
    data = load_images(with_bad_images(tmp_path / "images"), on_bad_image="skip")
    assert len(data.train) + len(data.validation) + len(data.test) == 38
    assert "2 of 40 images of train could not be read and were left out: " in data.notes[0]
    assert f"{tmp_path}/images/cat/3.png" in data.notes[0]
    assert "dog/5.png" in data.notes[0]
    again = load_images(str(tmp_path / "images"), on_bad_image="skip")  # `datasets` caches: the names must survive it
    assert again.notes == data.notes


def test_no_image_at_all_can_be_read(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match="None of the 2 images of train could be read"):
        load_images(str(tmp_path / "images"), on_bad_image="skip")


def test_rows_without_an_image_are_left_out_and_noted():
    rows = table([0, 1] * 20)
    empty = rows.select(range(3)).map(lambda row: {"image": None}, features=rows.features)
    data = load_images(datasets.concatenate_datasets([empty, rows.select(range(3, 40))]))
    assert sum(sizes(data)) == 37 and "3 of 40 rows of train have no image and were left out." in data.notes
    data.check_readable()


def test_eval_is_a_validation_split():
    rows = table([0, 1] * 20)
    assert sizes(load_images(DatasetDict(train=rows, eval=rows.select(range(10))))) == [34, 10, 6]
