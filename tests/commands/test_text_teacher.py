"""hf-kdtl distill with a teacher whose classes are texts, and the evaluation of its student."""

import json
import shlex
from pathlib import Path

import pytest

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.evaluation import read_results
from hf_kdtl.hub.model_card import student_card, with_evaluation
from tests.commands.conftest import CONFIG, QUICK
from tests.support.text import save_text

NEW = ["--dataset", "images", "--student_config", json.dumps(CONFIG), "--output_dir", "out", *QUICK]


def test_class_names_of_the_data_make_a_teacher(command, images, capsys):
    save_text("clip", "clip")
    texts = ["--templates", "a photo of a {}", "a drawing of a {}"]
    command("distill").main(["--teacher", "clip", *texts, "--objectives", "task", "logit_kd", *NEW])
    printed = capsys.readouterr().out
    assert "made of the class names by: a photo of a {} | a drawing of a {}" in printed
    results = read_results("out")
    assert results["models"]["teacher"]["architecture"] == "CLIPModel"
    assert "teacher" in results["evaluation"]["models"] and Path("out/sheet.png").exists()
    words = evaluation_words(printed)
    assert "--templates" in words and "a drawing of a {}" in words


def evaluation_words(printed):
    line = next(line for line in printed.splitlines() if "evaluate --" in line)
    return shlex.split(line)[shlex.split(line).index("evaluate") + 1 :]


@pytest.mark.slow
def test_an_evaluation_knows_the_teacher_again(command, images, capsys):
    save_text("clip", "clip")
    texts = ["--templates", "a photo of a {}", "a drawing of a {}"]
    command("distill").main(["--teacher", "clip", *texts, "--objectives", "task", "logit_kd", *NEW])
    words, results = evaluation_words(capsys.readouterr().out), read_results("out")
    command("evaluate").main([*words, "--degradations", "none", "--disable_tqdm", "true"])
    evaluated = with_evaluation(results, read_results("out/evaluation"))  # the same teacher, by its weights
    assert "CLIPModel" in str(student_card(evaluated))


def test_texts_for_a_teacher_without_a_text_tower_are_refused(command, images, teacher, capsys):
    distill = command("distill").main
    assert cli.run(lambda: distill(["--teacher", teacher, "--class_names", "red", "green", "blue", *NEW])) == 2
    assert "--class_names and --templates are texts, for a teacher of images and texts" in capsys.readouterr().err
    save_text("clip", "clip")
    wrong = ["--teacher", "clip", "--class_names", "red", "green", "pink", *NEW]
    assert cli.run(lambda: distill(wrong)) == 2
    assert "Only the teacher: 'pink'" in capsys.readouterr().err
    cut = ["--teacher", "clip", "--student_layers", "1", "--dataset", "images", "--output_dir", "o", *QUICK]
    with pytest.raises(ValueError, match=r"the teacher's classes are texts\. Type --student"):
        distill(cut)
