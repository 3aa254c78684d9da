"""hf-kdtl distill without a teacher, with a teacher of other classes, and with a gradient rule."""

import json
from pathlib import Path

import pytest
from transformers import ViTImageProcessor

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.evaluation import read_results
from hf_kdtl.reports.run_report import write_report
from tests.commands.conftest import QUICK
from tests.support.tiny import build

TASK = {"name": "task"}


def arguments(objectives, *extra):
    flags = ["--dataset", "images", "--output_dir", "out", *QUICK, "--objectives", json.dumps(objectives)]
    return [*flags, *extra]


@pytest.fixture
def source():
    """A saved model of two blocks and five other classes."""
    model = build("vit", image_size=16, layers=2, num_labels=5)
    model.config.id2label = dict(enumerate("abcde"))
    model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    model.save_pretrained("source")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("source")
    return "source"


def test_fine_tuning_towards_the_start_needs_no_teacher(command, images, source, capsys):
    distill = command("distill").main
    held = [TASK, {"name": "l2_sp", "weight": 0.1}]
    flags = ["--student", source, "--gradient_rule", json.dumps({"name": "never_hurt"}), "--baseline", "true"]
    distill(arguments(held, *flags))
    printed = capsys.readouterr().out
    assert "student alone" in printed and "teacher  " not in printed
    results = read_results("out")
    assert set(results["evaluation"]["models"]) == {"alone", "distilled"}
    assert Path("out/distilled-seed42/start/model.safetensors").is_file()
    assert not Path("out/alone-seed42/start").exists()
    ((name, met),) = results["gradient_rule"].items()
    assert name == "distilled-seed42" and met["options"]["name"] == "never_hurt" and len(met["history"]) == 2
    text, picture = Path("out/report.md").read_text(), Path("out/gradient_rule.png")
    assert "](gradient_rule.png)" in text and "not for its step" in text
    picture.unlink()
    write_report("out")
    assert Path("out/report.md").read_text() == text and picture.stat().st_size > 1000
    assert not any("gradient_rule/" in key for entry in results["curves"][name] for key in entry)

    elsewhere = ["--output_dir", "elsewhere"]
    assert cli.run(lambda: distill([*arguments(held, "--student_layers", "1"), *elsewhere])) == 2
    assert "cuts the student out of the teacher, and there is none" in capsys.readouterr().err
    assert cli.run(lambda: distill([*arguments([TASK, {"name": "logit_kd"}], "--student", source), *elsewhere])) == 2
    assert "need a teacher and none was given" in capsys.readouterr().err


def test_a_teacher_of_other_classes_teaches_and_is_not_scored(command, images, source, teacher, capsys):
    distill = command("distill").main
    objectives = [TASK, {"name": "lwf"}, {"name": "attention_transfer"}, {"name": "attention_jacobian"}]
    distill(arguments(objectives, "--student", teacher, "--teacher", source))
    assert "it is not scored on these images" in capsys.readouterr().out
    results = read_results("out")
    assert set(results["evaluation"]["models"]) == {"distilled"}
    assert Path("out/attention.png").stat().st_size > 1000 and not Path("out/sheet.png").exists()
    refused = arguments([TASK, {"name": "logit_kd"}], "--student", teacher, "--teacher", source)
    assert cli.run(lambda: distill([*refused, "--overwrite_output_dir", "true"])) == 2
    assert "classes" in capsys.readouterr().err
