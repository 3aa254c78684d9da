"""Models of timm, by transformers' wrapper of them, as teacher and student: `make test-timm`."""

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

from hf_kdtl.models import Teacher, plan
from hf_kdtl.models.blocks import find_blocks
from tests.support.helpers import Images, trainer
from tests.support.tiny import build

pytest.importorskip("timm", reason="make test-timm installs timm and torchvision, in an environment of its own")
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

SHALLOW = {"img_size": 64, "depth": 2}
# architecture: (arguments of timm, blocks, the first block's output at 64 x 64 pixels, the last one's)
MODELS = {
    "vit_tiny_patch16_224": (SHALLOW, 2, (17, 192), (17, 192)),
    "deit3_small_patch16_224": (SHALLOW, 2, (17, 384), (17, 384)),
    "resnet18": ({}, 8, (64, 16, 16), (512, 2, 2)),
    "convnext_atto": ({}, 4, (40, 16, 16), (320, 2, 2)),
    "mobilenetv3_small_050": ({}, 6, (8, 16, 16), (288, 2, 2)),
    "efficientvit_b0": ({}, 4, (16, 16, 16), (128, 2, 2)),
}
PLAIN = ["logit_kd", "hidden_states", "attention_transfer"]


def made(name, seed=0):
    torch.manual_seed(seed)
    arguments = MODELS[name][0]
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture=name, num_labels=3, model_args=arguments)
    ).eval()


def pixels(number=2):
    return torch.randn(number, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_are_those_of_all_stages(name):
    model, (_, depth, first, last) = made(name), MODELS[name]
    assert len(find_blocks(model)) == depth
    seen = plan(model, made(name, 1), pixel_values=pixels()).student.layers
    for layer, shape in ((seen[0], first), (seen[-1], last)):
        assert (layer.width, *(layer.grid or ())) == (shape if layer.layout == "maps" else (shape[1], 4, 4))
        assert layer.prefix == (() if layer.layout == "maps" else ("class",)) and layer.attention == "none"


def run(folder, student, teacher, objectives):
    data = Images(4, size=64)
    entries = [{"name": entry} if isinstance(entry, str) else entry for entry in objectives]
    return trainer(folder, student, teacher, data, entries, max_steps=1,
                   per_device_train_batch_size=4)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_it_teaches_and_learns(tmp_path, name):
    objectives = ["task", *PLAIN, "jacobian"]
    runner = run(tmp_path, made(name), made(name, 1), objectives)
    before = [p.detach().clone() for p in runner.model.parameters()]
    runner.train()
    log = runner.state.log_history[0]
    assert all(log[key] > 0 and torch.isfinite(torch.tensor(log[key])) for key in objectives)
    moved = sum(bool((a != b).any()) for a, b in zip(before, runner.model.parameters(), strict=True))
    assert moved >= 0.9 * len(before)
    runner.save_model(str(tmp_path / "saved"))
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        found, expected = again(pixels()).logits, runner.model.eval()(pixels()).logits
    torch.testing.assert_close(found, expected)


class Formula(torch.nn.Module):
    """Hard-sigmoid by operations that have two derivatives."""

    def forward(self, x):
        return torch.nn.functional.relu6(x + 3.0) / 6.0


def test_a_layer_without_a_second_derivative_in_torch(tmp_path):
    """MobileNetV3's hard-sigmoid: it is composed for derivatives, and the gradient is that of its formula."""
    models, exact = [made("mobilenetv3_small_050", i) for i in (0, 1)], [{"name": "jacobian", "estimator": "vjp"}]
    assert any(isinstance(module, torch.nn.Hardsigmoid) for module in models[0].modules())
    student = made("mobilenetv3_small_050")
    for module in student.modules():
        if isinstance(getattr(module, "gate", None), torch.nn.Hardsigmoid):
            module.gate = Formula()
    found = []
    for model, objectives in ((models[0], exact), (models[0], ["jacobian"]), (student, exact)):
        runner = run(tmp_path, model, models[1], objectives)
        runner.model.eval()
        value = runner.objective_terms({"pixel_values": pixels(), "labels": torch.tensor([0, 1])})["jacobian"].mean()
        value.backward()
        found.append((value.detach(), runner.model.timm_model.conv_stem.weight.grad))
    for value, gradient in found[:2]:
        torch.testing.assert_close(value, found[2][0])
        assert (gradient - found[2][1]).norm() < 1e-3 * found[2][1].norm()


@pytest.mark.parametrize("names", [("vit", "vit_tiny_patch16_224"), ("convnext_atto", "vit"), ("resnet", "resnet18")])
def test_beside_models_of_transformers(tmp_path, names):
    student, teacher = (made(n, i) if n in MODELS else build(n, image_size=64, seed=i) for i, n in enumerate(names))
    runner = run(tmp_path, student, teacher, ["task", *PLAIN])
    runner.train()
    assert runner.state.log_history[0]["hidden_states"] > 0


@pytest.mark.parametrize("objective", ["attention_map", "relation"])
def test_attention_is_refused_with_the_reason(tmp_path, objective):
    student, teacher = made("vit_tiny_patch16_224"), made("vit_tiny_patch16_224", 1)
    with pytest.raises(ValueError, match=r"no attention .*timm's call torch's kernel themselves.*compare features"):
        run(tmp_path, student, teacher, [objective]).train()


def test_its_own_processor_gives_what_it_is_shown(tmp_path):
    """Saved models of timm have their pixels' mean and std in config.json, under pretrained_cfg."""
    model = made("vit_tiny_patch16_224")
    model.config.pretrained_cfg = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 64, 64], "crop_pct": 1.0,
                                   "interpolation": "bicubic", "crop_mode": "center"}  # fmt: skip
    model.save_pretrained(tmp_path)
    teacher = Teacher.from_pretrained(tmp_path)
    assert type(teacher.processing_class).__name__ == "TimmWrapperImageProcessor"
    own = AutoImageProcessor.from_pretrained(tmp_path)
    teacher.match(build("vit", image_size=64), ViTImageProcessor(size={"height": 64, "width": 64}), True)
    x = pixels()
    assert torch.allclose(teacher.pixels(x), (x * 0.5 + 0.5 - 0.5) / 0.25, atol=1e-5)
    assert "mean 0.5 0.5 0.5, std 0.25 0.25 0.25" in teacher.notes[-1] and own is not None
