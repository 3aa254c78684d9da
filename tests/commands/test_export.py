"""hf-kdtl export and hf_kdtl/export.py: an ONNX file that answers as the student does."""

from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from torch import nn

from hf_kdtl import export
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.export import OnnxModel, export_onnx, largest_difference
from tests.support.tiny import build

slow = pytest.mark.slow


def arguments(*extra):
    return ["--student", "teacher", "--output", "out/deep/student.onnx", "--batch_size", "3", *extra]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=slow) for name in ("swin", "vit", "deit", "dinov2", "convnext", "resnet")],
)
def test_a_family_is_exported_for_any_batch(name, tmp_path):
    model, pixels = build(name).train(), torch.randn(7, 3, 32, 32)
    attention = model.config._attn_implementation
    export_onnx(model, pixels, tmp_path / "model.onnx")
    assert model.training and model.config._attn_implementation == attention
    exported = OnnxModel(tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]  # the weights are inside
    assert largest_difference(model.eval(), exported, pixels) < 1e-5
    assert largest_difference(build(name, seed=1), exported, pixels) > 1e-3
    assert exported(pixel_values=pixels).logits.shape == (7, 3)


def test_the_recipe_writes_compares_and_times(command, teacher, capsys):
    module = command("export")
    build("vit", image_size=16, layers=1).save_pretrained(teacher)  # the families of the slow suite have more blocks
    module.main(arguments())
    printed = capsys.readouterr().out
    assert [p.name for p in Path("out/deep").iterdir()] == ["student.onnx"]
    session = onnxruntime.InferenceSession("out/deep/student.onnx", providers=["CPUExecutionProvider"])
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.shape[1:], given.name) == ("pixel_values", [3, 16, 16], "logits")
    assert "pixels (3, 16, 16) and any batch" in printed and "largest difference of a logit" in printed
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")][2:] == ["1", "3"]
    before = Path("out/deep/student.onnx").read_bytes()
    assert cli.run(lambda: module.main(arguments())) == 2
    assert "exists. Give another --output, or replace it: --overwrite true" in capsys.readouterr().err
    assert Path("out/deep/student.onnx").read_bytes() == before


# ---- the rest needs no export ----


def answering(function):
    """A model whose logits are a function of the pixels."""
    model = nn.Module()
    model.forward = lambda pixel_values: SimpleNamespace(logits=function(pixel_values))
    return model


def test_the_difference_is_of_the_worst_batch_and_a_share_of_large_logits():
    pixels = torch.full((6, 4), 0.5)
    same = answering(lambda x: x)
    assert largest_difference(same, same, pixels) == 0
    assert largest_difference(same, answering(lambda x: x + 0.25), pixels) == 0.25  # logits below 1: as it is
    assert largest_difference(answering(lambda x: 20 * x), answering(lambda x: 20 * x + 1), pixels) == pytest.approx(
        0.1
    )
    for wrong_at in (1, 5):
        fixed = answering(lambda x, at=wrong_at: x + (len(x) == at))
        assert largest_difference(same, fixed, pixels) == 1
    one_nan = answering(lambda x: x * torch.tensor([1, 1, 1, float("nan")]))
    assert largest_difference(same, one_nan, pixels) == float("inf")


@pytest.fixture
def copied(command, monkeypatch):
    """The command, with "exports" that say how far they are away."""

    def fake(difference):
        module = command("export")
        monkeypatch.setattr(module, "export_onnx", lambda model, pixels, path: Path(path).write_text("onnx"))
        monkeypatch.setattr(module, "OnnxModel", lambda path: None)
        monkeypatch.setattr(module, "largest_difference", lambda *_: difference)
        monkeypatch.setattr(module, "timed", lambda student, exported, pixels, size: f"pixels {tuple(pixels.shape)}")
        return module

    return fake


def test_a_file_that_disagrees_is_not_written(copied, teacher, capsys):
    module = copied(2e-4)
    Path("out/deep").mkdir(parents=True)
    Path("out/deep/student.onnx").write_text("before")
    assert cli.run(lambda: module.main(arguments("--overwrite", "true"))) == 2
    assert "is 2.0e-04 away from the student, expected 1e-04 at most: nothing was written" in capsys.readouterr().err
    assert [p.read_text() for p in Path("out/deep").iterdir()] == ["before"]


@pytest.mark.parametrize(("extra", "shape"), [([], "(5, 3, 16, 16)"), (["--image_size", "24"], "(5, 3, 24, 24)")])
def test_the_pixels_are_those_of_the_processor_or_as_asked(copied, teacher, capsys, extra, shape):
    Path("out/deep").mkdir(parents=True)
    Path("out/deep/student.onnx").write_text("before")
    copied(1e-6).main(arguments("--overwrite", "true", *extra))
    assert f"pixels {shape}" in capsys.readouterr().out
    assert Path("out/deep/student.onnx").read_text() == "onnx"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--student", "nowhere/at/all"], "'nowhere/at/all' does not exist"),
        (["--output", "teacher"], "teacher is a folder; expected a file: --output teacher/student.onnx"),
        (["--batch_size", "0"], "batch_size is 0, expected 1 or more"),
        (["--image_size", "-1"], "image_size is -1, expected 1 or more"),
    ],
)
def test_bad_input_is_a_sentence(command, teacher, capsys, extra, message):
    assert cli.run(lambda: command("export").main(arguments(*extra))) == 2
    assert message in capsys.readouterr().err and not Path("out").exists()


def test_without_the_extra_it_says_what_to_type(command, teacher, capsys, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name != "onnx" else object())
    assert cli.run(lambda: command("export").main(arguments())) == 2
    message = capsys.readouterr().err
    assert "onnxruntime, onnxscript not found" in message and "pip install 'hf_kdtl[export]'" in message


def test_a_model_that_torch_cannot_export_is_reported(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise torch.onnx.OnnxExporterError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    model = build("vit").train()
    with pytest.raises(
        ValueError, match=r"cannot export ViTForImageClassification for any batch size.*no such operator"
    ):
        export_onnx(model, torch.zeros(1, 3, 32, 32), tmp_path / "model.onnx")
    assert model.training and model.config._attn_implementation == "sdpa"
