"""Layers that compute with rounded numbers while a student is trained."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from hf_kdtl import DistillationConfig
from hf_kdtl.models.quantization import round_activation, round_layers, round_weight
from hf_kdtl.utils.versions import CHECKPOINTING
from tests.support.helpers import KD, trainer
from tests.support.tiny import build

PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shift", [0.0, -5.0, 5.0])
def test_activations_are_rounded_as_torch_rounds_them(shift):
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) + shift
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / 255
    expected = torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, 255)
    assert torch.allclose(round_activation(x), expected, atol=1e-5) and not torch.allclose(expected, x, atol=1e-4)
    assert round_activation(x).unique().numel() <= 256 and round_activation(torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(6, 20), (6, 3, 4, 4)])
def test_weights_are_rounded_for_each_output(shape):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 6).view(
        -1, *[1] * (len(shape) - 1)
    )
    scale = weight.flatten(1).abs().amax(1) / 127
    zero = torch.zeros(6, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)
    assert torch.allclose(round_weight(weight), expected, rtol=1e-5)
    assert ((round_weight(weight) - weight).flatten(1).abs().amax(1) <= 0.5001 * scale).all()


def test_gradients_pass_and_second_derivatives_exist():
    x = torch.randn(5, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(round_activation(x).square().sum(), x, create_graph=True)
    assert torch.allclose(gradient, 2 * round_activation(x))
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert torch.allclose(second, torch.full_like(x, 2.0))


@pytest.mark.parametrize("name", ["vit", "siglip", "convnext"])
def test_only_how_layers_compute_changes(name, tmp_path):
    model, plain = build(name), build(name)
    layers = [m for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d)]
    assert round_layers(model) == round_layers(model) == len(layers)
    with torch.no_grad():
        rounded, exact = model(pixel_values=PIXELS).logits, plain(pixel_values=PIXELS).logits
    assert 0 < (rounded - exact).abs().max() < 0.1
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=PIXELS).logits, exact)
    assert loaded.config.architectures == plain.config.architectures or loaded.config.architectures == [
        type(plain).__name__
    ]


def test_a_student_is_trained_with_rounded_layers_and_saved_plain(tmp_path):
    student, teacher = build("vit"), build("vit", seed=5)
    entries = [*KD, {"name": "hidden_states"}, {"name": "jacobian"}]
    runner = trainer(tmp_path, student, teacher, objectives=entries, quantize="int8", max_steps=2)
    assert type(runner.distiller.student.vit.layers[0].mlp.fc1).__name__ == "RoundedLinear"
    assert type(runner.teacher.classifier().vit.layers[0].mlp.fc1) is nn.Linear
    runner.train()
    runner.save_model(str(tmp_path / "saved"))
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert type(saved.vit.layers[0].mlp.fc1) is nn.Linear
    before = copy.deepcopy(student.state_dict())
    assert any(not torch.equal(value, before[key]) for key, value in saved.state_dict().items())


def test_half_precision_keeps_the_levels():
    x = torch.linspace(-3, 5, 1000)
    coarse, fine = round_activation(x.bfloat16()), round_activation(x.bfloat16().float())
    assert coarse.dtype == torch.bfloat16 and torch.equal(coarse, fine.bfloat16())
    assert torch.equal(
        round_weight(x.bfloat16().view(2, -1)), round_weight(x.bfloat16().float().view(2, -1)).bfloat16()
    )


def test_checkpointed_blocks_round_alike(tmp_path):
    weights = []
    for checkpointed in (False, True):
        more = {CHECKPOINTING: checkpointed, "quantize": "int8", "max_steps": 2}
        runner = trainer(tmp_path / str(checkpointed), build("vit"), build("vit", seed=5), objectives=KD, **more)
        runner.train()
        weights.append({name: value.clone() for name, value in runner.model.state_dict().items()})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"quantize.*int8"):
        DistillationConfig(str(tmp_path), quantize="int4")
    lora = peft.get_peft_model(build("vit"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapters replace them"):
        round_layers(lora)
    with pytest.raises(ValueError, match="ReLU has no linear or convolution layers"):
        round_layers(nn.ReLU())


def test_a_later_trainer_without_quantize_computes_in_full(tmp_path):
    first = trainer(tmp_path, build("vit"), build("vit", seed=5), quantize="int8")
    second = trainer(tmp_path, first.distiller.student, build("vit", seed=5)).distiller.student
    assert {type(m) for m in second.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    with torch.no_grad():
        assert torch.equal(second(pixel_values=PIXELS).logits, build("vit")(pixel_values=PIXELS).logits)
        assert not torch.equal(first.distiller.student(pixel_values=PIXELS).logits, second(pixel_values=PIXELS).logits)
