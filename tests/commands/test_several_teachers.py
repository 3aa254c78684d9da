"""hf-kdtl distill with several teachers."""

import json
from pathlib import Path

import pytest

from hf_kdtl.hub.model_card import student_card
from tests.commands.conftest import CONFIG, QUICK
from tests.support.tiny import build

TWO = [{"name": "logit_kd", "teacher": "b"}, {"name": "hidden_states", "teacher": "a"}]


def test_the_command_takes_them_as_json_and_from_yaml(command, images, teacher, capsys):
    build("vit", image_size=16, seed=9, num_labels=7).save_pretrained("other")
    Path("mine.yaml").write_text("teacher: {a: other, b: teacher}\nobjectives:\n- {name: logit_kd, teacher: b}\n"
                                 "- {name: hidden_states, teacher: a}\n")  # fmt: skip
    common = ["--dataset", "images", "--student_config", json.dumps(CONFIG), *QUICK]
    command("distill").main(["--config", "mine.yaml", "--output_dir", "out", *common])
    told = capsys.readouterr().out
    assert "teacher a: ViTForImageClassification" in told and "teacher b: ViT" in told
    assert "the teacher 'a' answers in other classes: it is not scored" in told
    results = json.loads(Path("out/results.json").read_text())
    assert list(results["models"]["teachers"]) == ["a", "b"] and "teacher b" in results["evaluation"]["models"]
    assert results["run"]["settings"]["teacher"] == {"a": "other", "b": "teacher"}
    assert "| teacher b |" in Path("out/report.md").read_text()
    assert "**Accuracy of its teachers:** a not measured, b " in str(student_card(results))
    flags = ["--teacher", '{"a": "other", "b": "teacher"}', "--student_layers", "1", "--dataset", "images"]
    with pytest.raises(ValueError, match=r"there are several\. Cut it first"):
        command("distill").main([*flags, "--objectives", json.dumps(TWO), "--output_dir", "two", *QUICK])
