"""hf-kdtl init: what it finds, what it writes, and that what it writes runs."""

from pathlib import Path

import pytest
import yaml

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.init import Found, new_teacher
from hf_kdtl.data import load_images
from tests.commands.conftest import QUICK


def test_the_files_run_as_they_are_printed(command, images, capsys):
    command("init").main(["images"])
    printed = capsys.readouterr().out
    assert "16 x 16 pixels, in color" in printed and "of 3 classes, 8 to 9 of each" in printed
    assert "A class has 8 images" in printed
    *_, first, second = printed.strip().splitlines()
    assert first.endswith("train-teacher --config images_teacher.yaml")
    assert second.endswith("distill --config images.yaml")
    for file in ("images_teacher.yaml", "images.yaml"):
        lines = Path(file).read_text().splitlines()
        assert lines[0].startswith("# The ") and any("8 to 9 of each" in line for line in lines)
        learning_rate = next(line for line in lines if line.startswith("learning_rate"))
        assert "  # " in learning_rate
    short = [*QUICK[:8], "--disable_tqdm", "true", "--eval_strategy", "no", "--save_strategy", "no"]
    short += ["--load_best_model_at_end", "false"]
    capsys.readouterr()
    command("train_teacher").main(["--config", "images_teacher.yaml", *short])
    assert capsys.readouterr().out.split("a student of it:")[1].split("\n")[2].endswith("distill --config images.yaml")
    command("distill").main(["--config", "images.yaml", *short])
    assert Path("runs/images/student/config.json").exists()


def test_nothing_is_overwritten(command, images, capsys):
    main = command("init").main
    Path("images.yaml").write_text("mine: 1\n")
    assert cli.run(lambda: main(["images"])) == 2
    assert "images.yaml exists here and is left as it is" in capsys.readouterr().err
    assert Path("images.yaml").read_text() == "mine: 1\n" and not Path("images_teacher.yaml").exists()


def test_with_a_teacher_there_is_one_file(command, images, teacher):
    command("init").main(["images", "--teacher", "teacher", "--test_fraction", "0.2"])
    assert not Path("images_teacher.yaml").exists()
    found = yaml.safe_load(Path("images.yaml").read_text())
    assert (found["teacher"], found["student_flops"], found["test_fraction"]) == ("teacher", 0.5, 0.2)


def test_every_typed_setting_of_the_images_is_in_the_files(command, images):
    typed = {"labels_per_class": 3, "views": 2, "augmentation": {"flip": True}, "on_bad_image": "skip"}
    flags = [word for name, value in typed.items() for word in (f"--{name}", str(value))]
    flags[flags.index("--augmentation") + 1] = '{"flip": true}'
    command("init").main(["images", *flags])
    for file in ("images_teacher.yaml", "images.yaml"):
        lines = Path(file).read_text()
        assert typed.items() <= yaml.safe_load(lines).items() and "9 training images of 3 classes, 3 of each" in lines
        assert lines.count("augmentation:") == 1


def test_images_with_several_labels_are_counted_by_class_and_judged_by_map(command, table):
    command("init").main(table)
    labels = load_images("images.csv", multi_label=True).train["labels"][:]
    counts = [sum(row[i] == 1 for row in labels) for i in range(3)]
    for file in ("images_teacher.yaml", "images.yaml"):
        text = Path(file).read_text()
        assert yaml.safe_load(text)["metric_for_best_model"] == "map"
        assert f"{min(counts)} to {max(counts)} of each" in text


@pytest.mark.parametrize(
    ("width", "height", "expected"), [(16, 12, 16), (28, 28, 32), (300, 60, 64), (300, 200, "facebook/deit-small")]
)
def test_the_teacher_fits_the_images(images, width, height, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    data = load_images("images")
    lines, case, student = new_teacher(Found(2_000, 3, 5, 900, width, height, True), data)
    name, value, _ = lines[0]
    if isinstance(expected, int):
        assert name == "model_config" and value["image_size"] == expected and case.kind == "random"
    else:
        assert name == "model" and value.startswith(expected) and case.kind == "pretrained"
    assert student == {"student_flops": 0.5}


def test_what_is_reported_of_unequal_classes():
    printed = " ".join(Found(2_000, 3, 5, 900, 10, 10, False).sentences())
    assert "without color" in printed and "A class has 5 images" in printed and "mean_class_accuracy" in printed
    printed = Found(2_000, 3, 500, 900, 10, 10, True).sentences()
    assert len(printed) == 2


def test_inside_of_the_images_nothing_is_written(command, images, capsys, monkeypatch):
    before = sorted(Path("images").iterdir())
    monkeypatch.chdir("images")
    for name in (".", "./", str(Path.cwd()), ".."):
        assert cli.run(lambda name=name: command("init").main([name])) == 2
        assert "this folder lies in the images" in capsys.readouterr().err
    monkeypatch.chdir("..")
    assert sorted(Path("images").iterdir()) == before and not [*Path().glob(".*yaml")]
