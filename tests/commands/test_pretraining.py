"""hf-kdtl distill without labels: a folder of images and a teacher without a head, then a head from few labels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, ViTImageProcessor, pipeline

from hf_kdtl.evaluation import read_results
from hf_kdtl.hub.model_card import student_card
from tests.commands.conftest import CONFIG, QUICK
from tests.recipes.test_recipes import STEPS, script
from tests.support.headless import headless

FLAGS = [
    "--unlabelled",
    "more",
    "--teacher",
    "backbone",
    "--student_config",
    json.dumps(CONFIG),
    "--output_dir",
    "out",
]


@pytest.fixture
def backbone():
    """A teacher without a head, and 24 images in a nested folder."""
    headless("dinov2_with_registers", image_size=16, layers=3).save_pretrained("backbone")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("backbone")
    draw = np.random.default_rng(0)
    Path("more/deep").mkdir(parents=True)
    for number in range(24):
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(f"more/deep/{number}.png")


def test_no_labels_anywhere(command, backbone, capsys):
    command("distill").main([*FLAGS, *QUICK, "--teacher_pool", "mean"])
    found = read_results("out")
    assert found["objectives"] == [{"name": "feature_kd"}]
    assert found["data"]["sizes"] == {"train": 21, "held out": 3}
    assert [*found["embedding"]["models"]] == ["teacher", "student before", "student"]
    assert "knn" not in found["embedding"]["models"]["student"]
    curve = found["curves"]["distilled-seed42"]
    assert all(entry["eval_loss"] > 0 for entry in curve if "eval_loss" in entry)
    assert any(
        "embedding of the teacher is the mean of its patch tokens" in note for note in found["pairing"]["notes"]
    )
    assert Path("out/patches.png").is_file() and "patches.png" in Path("out/report.md").read_text()
    assert AutoModel.from_pretrained("out/student").config.model_type == "vit"
    card = student_card(found, model_id="me/features", license="mit")
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert (
        'pipeline("image-feature-extraction", model="me/features")' in card.text and "| student before |" in card.text
    )
    seen = pipeline("image-feature-extraction", "out/student", device="cpu")("more/deep/0.png", return_tensors=True)
    assert seen.shape == (1, 5, 32)
    assert "takes a head from few labels" in capsys.readouterr().out


def test_labels_beside_it_serve_knn_and_probe_and_then_a_head(command, backbone, images):
    command("distill").main([*FLAGS, *QUICK, "--dataset", images, "--objectives", "feature_kd", "similarity"])
    found = read_results("out")
    scores = found["embedding"]["models"]
    for who in ("teacher", "student before", "student"):
        assert (
            0 <= scores[who]["knn"] <= 1
            and 0 <= scores[who]["probe"] <= 1
            and set(scores[who]["recall"]) == {"1", "5"}
        )
    curve = found["curves"]["distilled-seed42"]
    assert [entry["eval_knn"] for entry in curve if "eval_knn" in entry]
    assert found["embedding"]["metric"] == "knn" and "linear probe" in Path("out/report.md").read_text()
    command("train_teacher").main(
        ["--model", "out/student", "--dataset", images, "--output_dir", "classifier", *QUICK]
    )
    assert read_results("classifier")["evaluation"]["models"]["teacher"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--baseline", "true"], "baseline is True in a run without labels: it trains the student on its labels"),
        (["--adapter", '{"peft_type": "LORA", "r": 2}'], "adapter is .* in a run without labels"),
        (["--push_to_hub", "true"], "push_to_hub is set in a run without labels, which publishes nothing"),
        (["--student_layers", "2"], "found student_config and student_layers; expected one of"),
        (["--teacher_pool", "pooled"], "pool is 'pooled'; expected 'auto' or 'pooler'"),
        (["--gradient_rule", '{"name": "never_hurt"}', "--objectives", "feature_kd"], "protects the task, and none"),
    ],
)
def test_what_has_no_meaning_without_labels_is_refused(command, backbone, flags, message):
    with pytest.raises(ValueError, match=message):
        command("distill").main([*FLAGS, *QUICK, *flags])


def test_the_recipe_gives_a_student_without_a_head(backbone):
    student = {"model_type": "vit", "image_size": 16, "patch_size": 8} | CONFIG
    made = script("pretrain")("more", "backbone", student, ["feature_kd"], {"flip": True}, "script", **STEPS)
    opened = AutoModel.from_pretrained("script")
    assert torch.equal(opened.layers[0].attention.q_proj.weight, made.layers[0].attention.q_proj.weight)
