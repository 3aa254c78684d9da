"""hf-kdtl distill with adapters: a student that learns from itself without them, and what is kept of it."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForImageClassification

from hf_kdtl import DistillationConfig
from hf_kdtl.evaluation.results import read_results
from tests.support.tiny import build

LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def adapting(command):
    return command("common.adapters")


@pytest.fixture
def trained(tmp_path):
    model = build("vit", num_labels=10, num_channels=3)
    model.config.id2label = {i: str(i) for i in range(10)}
    model.config.label2id = {str(i): i for i in range(10)}
    model.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.mark.slow
def test_a_run_to_the_end(command, trained, tmp_path, capsys):
    arguments = ["--teacher", "self", "--student", str(trained), "--adapter", json.dumps(LORA)]
    arguments += [
        "--objectives",
        json.dumps([{"name": "task"}, {"name": "logit_kd"}]),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    arguments += ["--max_steps", "3", "--learning_rate", "0.01", "--use_cpu", "true", "--disable_tqdm", "true"]
    command("distill").main([*arguments, "--save_strategy", "no", "--report_to", "none"])
    run, message = tmp_path / "run", capsys.readouterr().out
    results = read_results(run)
    assert {"teacher", "distilled"} <= results["evaluation"]["models"].keys(), "what it was is scored too"
    assert results["models"]["student"]["adapters"] == {"default": "LORA"}
    assert json.loads(results["run"]["settings"]["adapter"]) == LORA
    assert "adapters off" in message
    merged = AutoModelForImageClassification.from_pretrained(run / "student")
    start = AutoModelForImageClassification.from_pretrained(trained)
    alone = PeftModel.from_pretrained(start, run / "distilled-seed42" / "adapter").eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = merged(pixel_values=pixels).logits
        assert torch.allclose(alone(pixel_values=pixels).logits, expected, atol=1e-5)
        with alone.disable_adapter():
            assert not torch.allclose(alone(pixel_values=pixels).logits, expected, atol=1e-4)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"peft_type": "LORRA"}, "Did you mean 'LORA'"),
        ({"peft_type": "LORA", "rank": 8}, "unknown option of adapter LORA"),
        ({"peft_type": "LORA", "target_modules": ["query"]}, '"q_proj", "v_proj"'),
    ],
)
def test_adapters_that_do_not_fit_are_refused(adapting, settings, message):
    with pytest.raises(ValueError, match=message):
        adapting.with_adapter(build("vit"), settings)


def test_a_second_adapter_is_refused(adapting):
    model = build("vit")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="would clash"):
        adapting.with_adapter(model, LORA)


def test_the_head_is_trained_with_it(adapting):
    for family, target in (("vit", ["q_proj"]), ("resnet", ["convolution"])):
        model = adapting.with_adapter(build(family), {"target_modules": target})
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert any("lora_A" in n for n in trained) and any("classifier" in n for n in trained)


def test_self_needs_something_to_teach(adapting, trained, tmp_path):
    settings = DistillationConfig(str(tmp_path), objectives=[{"name": "task"}, {"name": "logit_kd"}])
    plain, student = build("vit"), adapting.with_adapter(build("vit"), LORA)
    with pytest.raises(ValueError, match="--adapter"):
        adapting.check_self(plain, str(trained), settings)
    with pytest.raises(ValueError, match="--student"):
        adapting.check_self(student, None, settings)
    with pytest.raises(ValueError, match="10"):  # 3 classes with a new head, and the model's own 10
        adapting.check_self(student, str(trained), settings)
