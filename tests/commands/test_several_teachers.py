"""hf-kdtl distill with several teachers."""

import json
from pathlib import Path

import pytest
import torch

from hf_kdtl.commands.common.teachers import loading_options, open_teachers
from hf_kdtl.hub.model_card import student_card
from hf_kdtl.models import Needs, Teacher
from tests.commands.conftest import CONFIG, QUICK
from tests.support.tiny import build

TWO = [{"name": "logit_kd", "teacher": "b"}, {"name": "hidden_states", "teacher": "a"}]


def test_the_command_takes_them_as_json_and_from_yaml(command, images, teacher, capsys):
    build("vit", image_size=16, seed=9, num_labels=7).save_pretrained("other")
    Path("mine.yaml").write_text("teacher: {a: other, b: teacher}\nobjectives:\n- {name: logit_kd, teacher: b}\n"
                                 "- {name: hidden_states, teacher: a}\n")  # fmt: skip
    common = ["--dataset", "images", "--student_config", json.dumps(CONFIG), *QUICK]
    command("distill").main(["--config", "mine.yaml", "--output_dir", "out", *common])
    printed = capsys.readouterr().out
    assert "teacher a: ViTForImageClassification" in printed and "teacher b: ViT" in printed
    assert "the teacher 'a' answers in other classes: it is not scored" in printed
    results = json.loads(Path("out/results.json").read_text())
    assert list(results["models"]["teachers"]) == ["a", "b"] and "teacher b" in results["evaluation"]["models"]
    assert results["run"]["settings"]["teacher"] == {"a": "other", "b": "teacher"}
    assert "| teacher b |" in Path("out/report.md").read_text()
    assert "**Accuracy of its teachers:** a not measured, b " in str(student_card(results))
    flags = ["--teacher", '{"a": "other", "b": "teacher"}', "--student_layers", "1", "--dataset", "images"]
    with pytest.raises(ValueError, match=r"there are several\. Cut it first"):
        command("distill").main([*flags, "--objectives", json.dumps(TWO), "--output_dir", "two", *QUICK])


def test_how_a_teacher_is_loaded_passes_through(command, images, teacher, capsys):
    loading = loading_options("bfloat16", {"device_map": "cpu"})
    opened = open_teachers({"teacher": teacher}, {"teacher"}, **loading)["teacher"]
    assert opened.classifier().dtype == torch.bfloat16
    with pytest.raises((OSError, ValueError, RuntimeError), match="nowhere"):
        open_teachers({"teacher": teacher}, {"teacher"}, **loading_options(None, {"device_map": "nowhere"}))
    half = ["--teacher", teacher, "--teacher_dtype", "bfloat16", "--objectives", "logit_kd", "--student_layers", "1"]
    command("distill").main([*half, "--dataset", "images", "--output_dir", "out", *QUICK, "--max_steps", "1"])
    assert json.loads(Path("out/results.json").read_text())["run"]["settings"]["teacher_dtype"] == "bfloat16"
    with pytest.raises(ValueError, match=r"unknown teacher_dtype: 'bfloat61'\. Did you mean 'bfloat16'"):
        loading_options("bfloat61", {})
    with pytest.raises(ValueError, match="the dtype is --teacher_dtype"):
        loading_options(None, {"dtype": "bfloat16"})


def test_derivatives_of_a_quantised_or_spread_teacher_are_refused_by_name():
    for attribute, value, match in (
        ("quantization_method", "bitsandbytes", "the teacher is quantised"),
        ("hf_device_map", {"vit": 0, "classifier": "cpu"}, "the teacher is spread over 2 places"),
    ):
        model = build("vit", seed=5)
        setattr(model, attribute, value)
        assert match in Teacher(model).unserved(Needs(input_gradient=True))
        assert not Teacher(model).unserved(Needs(logits=True, hidden_states=frozenset([0])))
