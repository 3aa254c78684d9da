"""Each script of recipes/ gives what its command gives."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_kdtl.evaluation import read_results
from tests.commands.conftest import CONFIG, ROOT, _figures, coarse_figures, command, images, teacher  # noqa: F401
from tests.hub.client import hub  # noqa: F401

STEPS = {"max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "use_cpu": True}
STEPS |= {"disable_tqdm": True, "save_strategy": "no", "seed": 3, "learning_rate": 1e-3}
STEPS |= {"weight_decay": 0.0, "warmup_steps": 0, "lr_scheduler_type": "linear"}  # which the commands would choose
FLAGS = [text for name, value in STEPS.items() for text in (f"--{name}", str(value).lower())]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))


def script(name):
    """The function `main` of recipes/<name>.py."""
    return runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))["main"]


def same_weights(one, other):
    a, b = load_file(Path(one, "model.safetensors")), load_file(Path(other, "model.safetensors"))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_is_short_and_names_its_command(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 70 and "Copy this file and edit it." in text and "`hf-kdtl " in text


def test_there_is_one_for_each_of_these():
    names = {"train_teacher", "distill", "evaluate_student", "export_student", "push_student", "pretrain"}
    assert {path.stem for path in RECIPES} == names


def test_train_teacher(command, images):  # noqa: F811
    vit = {name: value for name, value in CONFIG.items() if name != "model_type"}
    script("train_teacher")(images, vit, {"flip": True}, "script", **STEPS)
    flags = ["--dataset", images, "--model_config", json.dumps(CONFIG), "--augmentation", '{"flip": true}']
    command("train_teacher").main([*flags, "--output_dir", "out", *FLAGS])
    assert same_weights("script", "out/model")


def test_distill_evaluate_and_push(hub, command, images, teacher, capsys):  # noqa: F811
    objectives = ["task", {"name": "logit_kd", "weight": 0.5}, "hidden_states"]
    script("distill")(images, teacher, 2, objectives, {"flip": True}, "script", **STEPS)
    flags = ["--dataset", images, "--teacher", teacher, "--student_layers", "2", "--augmentation", '{"flip": true}']
    command("distill").main([*flags, "--objectives", json.dumps(objectives), "--output_dir", "out", *FLAGS])
    assert same_weights("script", "out/student")

    found = script("evaluate_student")(images, "script", teacher)
    flags = ["--dataset", images, "--models", "out/student", "--teacher", teacher, "--degradations", "none"]
    command("evaluate").main([*flags, "--output_dir", "evaluation", "--use_cpu", "true", "--disable_tqdm", "true"])
    value = read_results("evaluation")["evaluation"]
    expected = value["models"]["student"]["runs"]["student"]["test"]
    assert found.pop("jacobian_cosine") == pytest.approx(value["fidelity"]["student"]["jacobian_cosine"], abs=1e-5)
    assert found == pytest.approx(expected, abs=1e-6) and {"accuracy", "teacher_kl"} <= found.keys()

    script("push_student")("out", "tester/script", "mit")
    command("push").main(["--run", "out", "--hub_model_id", "tester/command", "--license", "mit"])
    one, other = hub.files("tester/script"), hub.files("tester/command")
    assert set(one) == set(other) and "README.md" in one


@pytest.mark.slow
def test_export_student(command, teacher):  # noqa: F811
    from hf_kdtl.export import OnnxModel

    assert script("export_student")(teacher, "script.onnx") < 1e-4
    command("export").main(["--student", teacher, "--output", "command.onnx"])
    pixels = torch.randn(2, 3, 16, 16)
    one, other = (OnnxModel(f"{name}.onnx")(pixel_values=pixels).logits for name in ("script", "command"))
    assert torch.equal(one, other)
