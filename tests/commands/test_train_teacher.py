import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.evaluation import read_results
from tests.commands.conftest import CONFIG, NAMES, QUICK


def arguments(*extra):
    config = ["--model_config", json.dumps(CONFIG)]
    return ["--dataset", "images", "--output_dir", "out", *([] if "--model" in extra else config), *QUICK, *extra]


def test_from_a_config_to_a_folder_that_transformers_opens(command, images, capsys):
    train = command("train_teacher").main
    train(arguments("--augmentation", '{"flip": true}'))
    model = AutoModelForImageClassification.from_pretrained("out/model")
    assert list(model.config.id2label.values()) == NAMES
    assert {p.name for p in Path("out/model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    results = read_results("out")
    assert results["objectives"] == [{"name": "task"}] and results["data"]["classes"] == NAMES
    assert results["data"]["augmentation"] == {"flip": True} and len(results["curves"]["teacher"]) == 4
    assert set(results["evaluation"]["models"]["teacher"]["runs"]["42"]) == {"validation", "test"}
    assert results["run"]["settings"]["learning_rate"] == 1e-3 and results["run"]["settings"]["max_steps"] == 2
    printed = capsys.readouterr().out
    assert "learning_rate: 0.001  " in printed and "random weights, a transformer" in printed
    assert "max_steps" not in {entry["name"] for entry in results["defaults"]}
    assert "1 process" in printed and "out/model" in printed and "--student_flops 0.5" in printed
    assert str(Path.cwd()) not in Path("out/results.json").read_text()
    # Continuing a finished run keeps it.
    train(arguments("--augmentation", '{"flip": true}', "--resume_from_checkpoint", "true"))
    assert "teacher: finished before, kept." in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_on_a_terminal_and_lines_elsewhere(command, images, capsys, monkeypatch, terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    command("train_teacher").main(arguments("--disable_tqdm", "false"))
    printed = capsys.readouterr()
    assert ("teacher: step 2 of 2, loss " in printed.out) == (not terminal)
    assert ("2/2" in printed.err) == terminal


def test_resumed_is_what_was_not_interrupted(command, images):
    train = command("train_teacher").main
    train(arguments())
    full = AutoModelForImageClassification.from_pretrained("out/model").state_dict()
    for name in ("model", "checkpoint-2"):  # as if it had been stopped after its first step
        Path("out", name).rename(f"gone-{name}")
    train(arguments("--resume_from_checkpoint", "true"))
    again = AutoModelForImageClassification.from_pretrained("out/model").state_dict()
    assert all(torch.equal(full[name], again[name]) for name in full)


def test_fine_tuning_keeps_the_classes_that_a_model_knows(command, images, teacher):
    command("train_teacher").main(arguments("--model", teacher))
    results = read_results("out")
    assert results["data"]["classes"] == ["green", "red", "blue"]
    assert any("re-ordered, by name" in note for note in results["data"]["notes"])


def test_a_new_head_for_other_classes(command, images, teacher):
    config = Path(teacher, "config.json")
    config.write_text(config.read_text().replace("green", "yellow"))
    command("train_teacher").main(arguments("--model", teacher))
    assert "3 other classes: it gets a new one for the 3" in read_results("out")["pairing"]["notes"][0]
    assert read_results("out")["data"]["classes"] == NAMES


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model", "nowhere/at/all"], "path 'nowhere/at/all' does not exist"),
        (
            ["--model_config", '{"model_type": "vitt"}'],
            "unknown model_type in model_config: 'vitt'. Did you mean 'vit'",
        ),
        (["--model_config", '{"model_type": "vit", "hiden_size": 8}'], "'hiden_size'. Did you mean 'hidden_size'"),
        (["--model_config", '{"model_type": "resnet"}'], "ResNetConfig has no image_size; type --image_size"),
        (["--augmentation", '{"flipp": true}'], "Did you mean 'flip'"),
        (["--train_images", "2"], "train_images is 2, expected 3"),
        (["--dataset", "images/bleu"], "does not exist (close matches"),
        (["--objectives", '[{"name": "logit_kd"}]'], "need a teacher"),
        (["--model", "a", "--model_config", "{}"], "expected one of --model"),
        (
            ["--metric_for_best_model", "f1", "--eval_strategy", "steps"],
            "unknown metric_for_best_model: 'f1'. Valid: loss, accuracy, mean_class_accuracy, nll, brier, ece.",
        ),
    ],
)
def test_bad_input_is_a_sentence_and_writes_nothing(command, images, capsys, extra, message):
    main = command("train_teacher").main
    assert cli.run(lambda: main(arguments(*extra))) == 2
    *before, error = capsys.readouterr().err.splitlines()
    assert message in error and "Traceback" not in "".join(before)
    assert not Path("out/results.json").exists()


def test_image_size_the_model_cannot_take(command, images, capsys):
    main = command("train_teacher").main
    assert cli.run(lambda: main(arguments("--image_size", "24"))) == 2
    assert "24 x 24 and is made for 16 x 16" in capsys.readouterr().err
