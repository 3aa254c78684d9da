"""A student that was trained without labels takes a head: with layer rates, near its start, and never hurt."""

import json

import pytest
from safetensors.torch import load_file
from transformers import ViTImageProcessor

from hf_kdtl.evaluation import read_results
from tests.commands.conftest import QUICK
from tests.support.headless import headless
from tests.support.helpers import and_slow

RULE = ["--gradient_rule", '{"name": "never_hurt"}']


@pytest.fixture
def start(images):
    """What a run without labels leaves: a vision model without a head, and its image processor."""
    headless("vit", image_size=16, layers=2).save_pretrained("start")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("start")
    return "start"


@pytest.mark.parametrize("name", and_slow(["l2_sp"], ["delta"]))
def test_fine_tuned_near_its_start_with_rates_by_depth(command, start, images, name):
    entries = json.dumps([{"name": "task"}, {"name": name, "weight": 0.1}])
    rates = ["--layer_rates", '{"mode": "llrd", "decay": 0.5}']
    flags = ["--model", start, "--dataset", images, "--output_dir", "out", "--objectives", entries, *rates, *RULE]
    command("train_teacher").main([*flags, *QUICK, "--learning_rate", "1e-2", "--lr_scheduler_type", "constant"])
    found = read_results("out")
    assert found["gradient_rule"]["teacher"]["options"]["name"] == "never_hurt"
    before, after = load_file("start/model.safetensors"), load_file("out/model/model.safetensors")
    moved = [
        max((after[f"vit.{key}"] - value).abs().max().item() for key, value in before.items() if f"layer.{i}." in key)
        for i in range(2)
    ]
    assert 0 < moved[0] < moved[1], "a lower block has a lower rate"
    assert found["evaluation"]["models"]["teacher"]["runs"]["42"]["test"]["accuracy"] is not None


def test_distilled_near_its_start_with_measured_rates(command, start, images, teacher):
    entries = json.dumps([{"name": "task"}, {"name": "logit_kd"}, {"name": "l2_sp", "weight": 0.1}])
    rates = ["--layer_rates", '{"mode": "discrepancy", "source": "attention", "every": 1}']
    flags = ["--student", start, "--teacher", teacher, "--dataset", images, "--output_dir", "out", "--start", start]
    command("distill").main([*flags, "--objectives", entries, *rates, *RULE, *QUICK])
    found = read_results("out")
    assert len(found["layer_rates"]["distilled-seed42"]["history"][-1]["multipliers"]) == 2
    assert found["models"]["student"]["start"]["how"] == "pretrained"
    assert found["gradient_rule"]["distilled-seed42"]["history"]
