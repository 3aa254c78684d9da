"""train-teacher and distill with several labels an image: settings, scores, report and card."""

import json
from pathlib import Path

import pytest
from transformers import pipeline

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.evaluation import read_results
from hf_kdtl.hub.model_card import student_card, with_evaluation
from tests.commands.conftest import CONFIG, QUICK


def test_from_a_table_to_a_student_and_its_card(command, table, capsys):
    command("train-teacher".replace("-", "_")).main(
        [*table, "--model_config", json.dumps(CONFIG), "--output_dir", "teacher", *QUICK]
    )
    assert "mAP" in capsys.readouterr().out
    command("distill").main(
        [*table, "--teacher", "teacher/model", "--student_layers", "1", "--baseline", "true", "--output_dir", "out",
         "--objectives", "task", "logit_kd", *QUICK]
    )  # fmt: skip
    printed, results = capsys.readouterr().out, read_results("out")
    scores = results["evaluation"]["models"]["distilled"]["runs"]["42"]["test"]
    assert set(scores) == {"map", "micro_f1", "macro_f1"} and "teacher" in results["evaluation"]["models"]
    assert results["comparison"][0]["metric"] == "map" and "paired by seed" in printed
    assert "--multi_label True" in printed
    report = Path("out/report.md").read_text()
    assert "test mAP" in report and "`micro_f1`" in report and "accuracy" not in report.split("## Objectives")[0]
    card = str(student_card(results))
    assert "**Mean average precision:**" in card and "it answers for each of its 3 classes apart" in card
    saved = json.loads(Path("out/student/config.json").read_text())
    assert saved["problem_type"] == "multi_label_classification"
    answers = pipeline("image-classification", "out/student")("0.png")
    assert abs(sum(entry["score"] for entry in answers) - 1) > 1e-4  # sigmoids
    _evaluated_and_compared(command, table, scores, capsys)


def _evaluated_and_compared(command, table, scores, capsys):
    flags = ["--models", "out/student", "--teacher", "teacher/model", "--output_dir", "judged", "--use_cpu", "true"]
    assert command("evaluate").main([*flags, *table, "--per_device_eval_batch_size", "4"]) == 0
    assert "test mAP" in capsys.readouterr().out
    found = read_results("judged")["evaluation"]["models"]
    assert found["student"]["runs"]["student"]["test"] == pytest.approx(scores) and set(found) == {
        "student",
        "teacher",
    }
    report = Path("judged/report.md").read_text()
    assert "# Evaluation on images.csv" in report and "`macro_f1`" in report
    with pytest.raises(ValueError, match="of several labels an image, whose mAP and F1 the run has measured itself"):
        with_evaluation(read_results("out"), read_results("judged"))
    again = ["--overwrite_output_dir", "true"]
    for given, message in (
        ([*flags, *again, *table, "--max_drop", "1"], "max_drop is of models with one label an image"),
        ([*flags, *again, *table[:2]], "labels an image"),
    ):
        assert cli.run(lambda given=given: command("evaluate").main(given)) == 2
        assert message in capsys.readouterr().err
    command("compare").main(["--runs", "out", "--metrics", "map", "micro_f1", "--output_dir", "compared"])
    assert "Not compared: a test of the images is of right and wrong" in Path("compared/comparison.md").read_text()
    assert "map" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tune", "probe"])
def test_what_goes_by_accuracy_says_what_to_type(command, table, capsys, name):
    flags = ["--student_config", json.dumps(CONFIG), "--output_dir", "out", "--teacher", "none", "--use_cpu", "true"]
    assert cli.run(lambda: command(name).main([*table, *flags])) == 2
    said = capsys.readouterr().err
    assert f"hf-kdtl {name} goes by accuracy, and the images have several labels" in said
    assert "hf-kdtl compare --runs <their folders> --metrics map" in said and not Path("out").exists()


def test_one_label_and_several_are_not_confused(command, table, images, capsys):
    new = ["--student_config", json.dumps(CONFIG), "--output_dir", "out", *QUICK, "--objectives", "task"]
    assert cli.run(lambda: command("distill").main([*table, "--labels_per_class", "3", *new])) == 2
    assert "labels_per_class counts one label an image" in capsys.readouterr().err
