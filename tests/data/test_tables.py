import io
import json
import tarfile
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as Image_
from PIL import Image

from hf_kdtl.data import ImageData, load_images
from tests.data.test_folders import folder, noted, sizes, total


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def images(root: Path, count: int = 40) -> Path:
    return folder(root, {"": count})


def names_of(data: ImageData) -> dict[str, str]:
    """{file: class}, over all splits."""
    return {
        Path(image["path"]).name: data.label_names[label]
        for split in (data.train, data.validation, data.test)
        for image, label in zip(split["image"], split["label"], strict=True)
        if label >= 0
    }


def lines(header: str, count: int, line) -> str:
    return "\n".join([header, *(line(i) for i in range(count))])


EXPECTED = {f"{i}.png": "ab"[i % 2] for i in range(40)}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("l.csv", lines("file_name,label", 40, lambda i: f"{i}.png,{'ab'[i % 2]}")),
        ("l.csv", lines("\ufefflabel;path", 40, lambda i: f"{'ab'[i % 2]};./{i}.png")),  # as Excel writes it
        ("l.tsv", lines("image\tclass", 40, lambda i: f"{i}.png\t{'ab'[i % 2]}")),
        ("l.csv", lines("File_Name,Label", 40, lambda i: f"{i}.png,{'ab'[i % 2]}")),
        ("l.csv", lines("path,label", 40, lambda i: f"x\\..\\{i}.png,{'ab'[i % 2]}")),  # as Windows writes it
        ("l.csv", lines("file_name, label", 40, lambda i: f"{i}.png , {'ab'[i % 2]}")),  # as people write it
        ("l.jsonl", lines("", 40, lambda i: json.dumps({"path": f"{i}.png", "what": "ab"[i % 2]})).strip()),
    ],
)
def test_tables_of_paths_and_labels(tmp_path, file, text):
    (tmp_path / "x").mkdir()
    (images(tmp_path) / file).write_text(text, encoding="utf-8")
    data = load_images(str(tmp_path / file))
    assert names_of(data) == EXPECTED
    assert sizes(data) == [28, 6, 6]
    data.check_readable()


def test_a_table_with_a_split_column_keeps_the_splits(tmp_path):
    split = ["train"] * 20 + ["val"] * 10 + ["test"] * 8 + ["spare"] * 2
    text = lines("split,file_name,label", 40, lambda i: f"{split[i]},{i}.png,{i % 2 + 1}")
    (images(tmp_path) / "l.csv").write_text(text)
    data = load_images(str(tmp_path / "l.csv"))
    assert sizes(data) == [20, 10, 8]
    assert data.label_names == ["1", "2"]
    assert noted(data, "split 'spare'", "(2 images) was not used")


@pytest.mark.parametrize("name", ["NA", "None", "null", "nan"])
def test_a_class_may_be_called_like_a_missing_value(tmp_path, name):
    text = lines("file_name,label", 40, lambda i: f"{i}.png,{name if i % 2 else 'b' if i else ''}")
    (images(tmp_path) / "l.csv").write_text(text)
    data = load_images(str(tmp_path / "l.csv"))
    assert total(data) == {name: 20, "b": 19}
    assert noted(data, "1 of 29 images of train are unlabelled") or noted(data, "images of train are unlabelled")


def test_numbers_are_classes_in_their_order_and_a_gap_is_unlabelled(tmp_path):
    text = lines("file_name,label", 40, lambda i: f"{i}.png,{'' if i == 3 else (9, 10)[i % 2]}")
    (images(tmp_path) / "l.csv").write_text(text)
    data = load_images(str(tmp_path / "l.csv"))
    assert data.label_names == ["9", "10"]
    assert total(data) == {"9": 20, "10": 19}


def test_tables_that_cannot_be_used_are_named(tmp_path):
    root = images(tmp_path)
    (root / "a.csv").write_text("file_name,label\nnone/1.png,a\nnone/2.png,b")
    with pytest.raises(ValueError, match=r"None of the 2 files.*'file_name' of a\.csv.*none/1\.png.*relative to"):
        load_images(str(root / "a.csv"))
    (root / "b.csv").write_text("where,label\n1.png,a")
    with pytest.raises(ValueError, match=r"b\.csv has the columns where, label, expected.*image_column="):
        load_images(str(root / "b.csv"))
    (root / "c.csv").write_text("file_name,label\n1.png,a\n2.png,b,c")
    with pytest.raises(ValueError, match=r"c\.csv' could not be read as a table"):
        load_images(str(root / "c.csv"))
    (root / "d.csv").write_text(lines("file_name,label,patient", 40, lambda i: f"{i}.png,{i % 2},{i % 4}"))
    with pytest.raises(ValueError, match=r"2 columns that could be the label.*label_column="):
        load_images(str(root / "d.csv"))
    assert load_images(str(root / "d.csv"), label_column="patient").label_names == ["0", "1", "2", "3"]
    (root / "e.csv").write_text(lines("where,label", 40, lambda i: f"{i}.png,{i % 2}"))
    assert sizes(load_images(str(root / "e.csv"), image_column="where")) == [28, 6, 6]


def test_rows_of_files_that_do_not_exist_are_noted(tmp_path):
    (images(tmp_path, 39) / "l.csv").write_text(lines("file_name,label", 40, lambda i: f"{i}.png,{i % 2}"))
    data = load_images(str(tmp_path / "l.csv"), on_bad_image="skip")
    assert sum(sizes(data)) == 39
    assert noted(data, "1 of 40 files that l.csv names do not exist", "39.png")


# ---- metadata.csv in a folder ----


@pytest.mark.parametrize("file", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_metadata_names_the_classes_of_a_flat_folder(tmp_path, file):
    rows = {"file_name": [f"{i}.png" for i in range(30)] + ["no.png"], "label": ["ab"[i % 2] for i in range(31)]}
    write = {"csv": "to_csv", "jsonl": "to_json", "parquet": "to_parquet"}[file.split(".")[1]]
    getattr(Dataset.from_dict(rows), write)(images(tmp_path / "r") / file)
    data = load_images(str(tmp_path / "r"))
    assert names_of(data) == {name: kind for name, kind in EXPECTED.items() if int(name[:-4]) < 30}
    assert noted(data, f"10 of 40 images of train are not named in {file}", "30.png")
    assert noted(data, f"1 rows of {file} name no image of train", "no.png")


def test_other_columns_beside_class_folders_are_not_labels(tmp_path):
    root = folder(tmp_path, {"cats": 20, "dogs": 20})
    files = sorted(path.relative_to(root) for path in root.rglob("*.png"))
    text = lines("file_name,patient", 40, lambda i: f"{files[i]},{i % 4}")
    (root / "metadata.csv").write_text(text)
    data = load_images(str(root))
    assert total(data) == {"cats": 20, "dogs": 20}
    assert noted(data, "columns of metadata.csv were not used: patient")
    assert load_images(str(root), label_column="patient").label_names == ["0", "1", "2", "3"]
    (root / "metadata.csv").write_text(text.replace("patient", "label"))  # by its name, the label
    assert load_images(str(root)).label_names == ["0", "1", "2", "3"]


def test_metadata_inside_of_splits(tmp_path):
    root = folder(tmp_path, {"train/images": 20, "test/images": 4})
    for split, count in (("train", 20), ("test", 4)):
        text = lines("file_name,label", count, lambda i: f"images/{i}.png,{'ab'[i % 2]}")
        (root / split / "metadata.csv").write_text(text)
    data = load_images(str(root))
    assert data.label_names == ["a", "b"]
    assert len(data.test) == 4


@pytest.mark.parametrize("path", ["../r/0.png", "/etc/passwd", "a/../../x.png"])
def test_metadata_cannot_name_files_outside_of_its_folder(tmp_path, path):
    (images(tmp_path / "r") / "metadata.csv").write_text(f"file_name,label\n{path},a\n1.png,b")
    with pytest.raises(ValueError, match="expected paths inside of its folder"):
        load_images(str(tmp_path / "r"))


# ---- WebDataset ----


def archive(file: Path, samples: dict[str, bytes | str]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            data = content.encode() if isinstance(content, str) else content
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def picture(value: int, kind: str = "PNG") -> bytes:
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def test_webdataset_archives(tmp_path):
    for split, count in (("train-0", 20), ("train-1", 20), ("test", 4)):
        samples: dict[str, bytes | str] = {}
        for i in range(count):
            kind = ("png", "jpg")[i % 2]
            samples[f"x/{i:03d}.{kind}"] = picture(i + 30 * len(split), {"png": "PNG", "jpg": "JPEG"}[kind])
            samples[f"x/{i:03d}.cls"] = str((9, 10)[i % 2])
        archive(tmp_path / f"{split}.tar", samples)
    data = load_images(str(tmp_path))
    assert data.label_names == ["9", "10"]
    assert sizes(data) == [34, 6, 4]
    assert data.test["label"][:] == [0, 1, 0, 1]
    data.check_readable()
    assert sizes(load_images(str(tmp_path / "train-*.tar"))) == [28, 6, 6]


def test_webdataset_labels_in_json_and_changed_archives(tmp_path):
    def write(names: str) -> str:
        samples: dict[str, bytes | str] = {}
        for i in range(40):
            samples |= {f"{i}.png": picture(i), f"{i}.json": json.dumps({"label": names[i % 2], "other": 1})}
        return str(archive(tmp_path / "a.tar", samples))

    assert load_images(write("ab")).label_names == ["a", "b"]
    assert load_images(write("cd")).label_names == ["c", "d"]  # and not those of the cache


def test_archives_that_are_not_webdatasets(tmp_path):
    with pytest.raises(ValueError, match=r"2 images in .*a\.tar have no label.*key\.cls"):
        load_images(str(archive(tmp_path / "a.tar", {"cat/1.png": picture(1), "dog/2.png": picture(2)})))
    (tmp_path / "b.tar").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"b\.tar could not be read"):
        load_images(str(tmp_path / "b.tar"))


def test_two_images_of_one_key_are_refused(tmp_path):
    samples = {"0.left.png": picture(1), "0.right.png": picture(2), "0.cls": "1"}
    with pytest.raises(ValueError, match=r"0\.right\.png is the second image of its key.*0\.left\.png"):
        load_images(str(archive(tmp_path / "a.tar", samples)))


def test_labels_of_an_archive_without_their_image_are_counted(tmp_path):
    samples: dict[str, bytes | str] = {}
    for i in range(40):
        samples |= {f"{i}.png": picture(i), f"{i}.cls": str(i % 2)} if i % 10 else {f"{i}.npy": b"", f"{i}.cls": "1"}
    data = load_images(str(archive(tmp_path / "a.tar", samples)))
    assert sum(sizes(data)) == 36 and noted(data, "4 labels in a.tar have no image")


def test_a_table_that_is_not_utf8_is_named(tmp_path):
    text = lines("path,label", 40, lambda i: f"{i}.png,{'éb'[i % 2]}")
    (images(tmp_path) / "l.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"'label' of .*l\.csv' is not UTF-8"):
        load_images(str(tmp_path / "l.csv"))


def test_whole_numbers_that_a_gap_made_floats_are_classes(tmp_path):
    text = lines("path,label", 40, lambda i: f"{i}.png,{'' if i < 4 else float(i % 2)}")
    (images(tmp_path) / "l.csv").write_text(text)
    data = load_images(str(tmp_path / "l.csv"))
    assert data.label_names == ["0", "1"] and data.train["label"][:].count(-100) == 4
    assert names_of(data) == {f"{i}.png": str(i % 2) for i in range(4, 40)}


def test_a_file_with_two_labels_is_noted(tmp_path):
    text = lines("path,label", 40, lambda i: f"{i}.png,{'ab'[i % 2]}") + "\n0.png,b\n2.png,b\n1.png,b"
    (images(tmp_path) / "l.csv").write_text(text)
    assert noted(load_images(str(tmp_path / "l.csv")), "4 rows of train name 2 files with different labels", "0.png")


@pytest.mark.parametrize("names", [("a", " a"), ("caf\u00e9", "cafe\u0301"), ("big cat", "Big  Cat")])
def test_labels_that_look_alike_are_noted(tmp_path, names):
    (images(tmp_path) / "l.csv").write_text(lines("path,label", 40, lambda i: f"{i}.png,{names[i % 2]}"))
    assert noted(load_images(str(tmp_path / "l.csv")), "differ in case, spaces or the form of accents alone")


def test_a_table_without_rows_is_named(tmp_path):
    (tmp_path / "l.csv").write_text("file_name,label\n")
    with pytest.raises(ValueError, match=r"l\.csv has no rows"):
        load_images(str(tmp_path / "l.csv"))


@pytest.mark.parametrize(
    ("written", "names"),
    [
        (["01", "1", "007", "7"], ["007", "01", "1", "7"]),
        (["true", "false", "true", "false"], ["false", "true"]),
        (["2020-01-01", "2021-01-01"] * 2, ["2020-01-01", "2021-01-01"]),
        (["1e3", "1000", "5", "inf"], ["1000", "1e3", "5", "inf"]),
        (["²", "1", "3", "10"], ["1", "10", "3", "²"]),
        (["10", "9", "", " "], ["9", "10"]),
        (["a", "b", "", "-100"], ["a", "b"]),
    ],
)
def test_labels_are_the_text_that_stands_there_and_an_empty_cell_is_no_class(tmp_path, written, names):
    root, texts = images(tmp_path, 48), [written[i % 4] for i in range(48)]
    (root / "l.csv").write_text(lines("file_name,label", 48, lambda i: f"{i}.png,{texts[i]}"), encoding="utf-8")
    rows = [json.dumps({"file_name": f"{i}.png", "label": text}) for i, text in enumerate(texts)]
    (root / "l.jsonl").write_text("\n".join(rows))
    samples = [{f"{i}.png": picture(i), f"{i}.cls": text} for i, text in enumerate(texts)]
    archive(root / "a.tar", {name: content for sample in samples for name, content in sample.items()})
    cells = {"image": [{"bytes": picture(i), "path": None} for i in range(48)], "label": texts}
    Dataset.from_dict(cells, features=Features(image=Image_(), label=Value("string"))).to_parquet(root / "p.parquet")
    for file in ("l.csv", "l.jsonl", "a.tar", "p.parquet"):
        data = load_images(str(root / file))
        assert sorted(data.label_names) == sorted(names), file
        expected = {name: 12 * written.count(name) for name in names}
        assert total(data) == expected, file
        if file in ("l.csv", "a.tar"):  # whose cells have no type: whole numbers are in their order
            assert data.label_names == names, file


def test_numbers_in_columns_of_floats_that_are_no_class_indices(tmp_path):
    def rows(labels):
        cells = {"image": [{"bytes": picture(i), "path": None} for i in range(40)], "label": labels * 20}
        features = Features(image=Image_(), label=Value("float64"))
        Dataset.from_dict(cells, features=features).to_parquet(tmp_path / "p.parquet")
        return str(tmp_path / "p.parquet")

    assert load_images(rows([1.0, 2.0])).label_names == ["1", "2"]
    with pytest.raises(ValueError, match=r"no column that could be the label.*'label' \(float64\)"):
        load_images(rows([1.0, float("inf")]))


@pytest.mark.parametrize("header", ["file_name,label,label", "file_name,label, label"])
def test_a_name_of_two_columns_is_refused(tmp_path, header):
    (images(tmp_path) / "l.csv").write_text(lines(header, 40, lambda i: f"{i}.png,{i % 2},{i % 3}"))
    with pytest.raises(ValueError, match=r"l\.csv' has 2 columns called 'label'; give each a name of its own"):
        load_images(str(tmp_path / "l.csv"))


def test_measurements_and_dates_beside_the_labels_are_no_candidates(tmp_path):
    text = lines("path,what,score,day,empty", 40, lambda i: f"{i}.png,{'ab'[i % 2]},{i / 7},2020-01-{i % 9 + 1:02},")
    (images(tmp_path) / "l.csv").write_text(text)
    assert load_images(str(tmp_path / "l.csv")).label_names == ["a", "b"]


def test_a_column_of_splits_divides_the_images_wherever_it_stands(tmp_path):
    names = ["train"] * 20 + ["Val"] * 8 + ["valid"] * 2 + ["test"] * 8 + ["spare"] * 2
    root = images(tmp_path / "r")
    (root / "metadata.csv").write_text(lines("file_name,label,Split", 40, lambda i: f"{i}.png,{i % 2},{names[i]}"))
    cells = {"image": [{"bytes": picture(i), "path": None} for i in range(40)], "label": [0, 1] * 20, "split": names}
    kinds = {"image": Image_(), "label": ClassLabel(names=["0", "1"])}
    table = Dataset.from_dict(cells, features=Features(**kinds, split=Value("string")))
    table.to_parquet(tmp_path / "p.parquet")
    listed = ClassLabel(names=list(dict.fromkeys(names)))
    for source in (str(root), str(tmp_path / "p.parquet"), table, table.cast_column("split", listed)):
        data = load_images(source)
        assert sizes(data) == [20, 10, 8] and data.label_names == ["0", "1"]
        assert noted(data, "splits are those of the column", "train, validation, test")
        assert noted(data, "'spare'", "(2 images) was not used")


def test_a_column_of_splits_that_decides_nothing_is_noted(tmp_path):
    cells = {"image": [{"bytes": picture(i), "path": None} for i in range(40)], "label": [0, 1] * 20}
    table = Dataset.from_dict(cells, features=Features(image=Image_(), label=ClassLabel(names=["a", "b"])))
    other = table.add_column("split", ["A", "B"] * 20)
    data = load_images(other)
    assert sizes(data) == [28, 6, 6] and noted(data, "column 'split' of train does not divide the images", "A, B")
    assert load_images(other, label_column="split").label_names == ["A", "B"]
    parts = {"train": table.add_column("split", ["train", "test"] * 20), "test": table.select(range(4))}
    data = load_images(parts)
    assert sizes(data) == [34, 6, 4] and noted(data, "(train, test) was not used: the splits are train, test")
    folder(tmp_path, {"cats": 20, "dogs": 20})
    rows = [f"{c}/{i}.png,{'test' if i < 9 else 'train'}" for c in ("cats", "dogs") for i in range(20)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,split", *rows]))
    assert noted(load_images(str(tmp_path)), "columns of metadata.csv were not used: split")
