"""hf-kdtl export and hf_kdtl/export.py: an ONNX file that answers as the student does."""

import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from hf_kdtl import export
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import builders, int8
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.evaluation.results import read_results, update_results
from hf_kdtl.export import OnnxModel, export_onnx, largest_difference, quantize_onnx
from hf_kdtl.models.teachers.resolve import open_classifier
from tests.commands.conftest import QUICK
from tests.support.state import mixed, state_of
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
    assert "pixels (3, 16, 16) and any batch" in printed and "largest difference of an output" in printed
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")][2:] == [
        "student, eager (float32)",
        "student, ONNX",
    ]
    before = Path("out/deep/student.onnx").read_bytes()
    assert cli.run(lambda: module.main(arguments())) == 2
    assert "exists. Give another --output, or replace it: --overwrite true" in capsys.readouterr().err
    assert Path("out/deep/student.onnx").read_bytes() == before


@slow
def test_int8_is_smaller_and_answers_nearly_as_the_student(tmp_path):
    model, pixels = build("vit", layers=1), torch.randn(40, 3, 32, 32)
    export_onnx(model, pixels, tmp_path / "model.onnx")
    quantize_onnx(tmp_path / "model.onnx", pixels, tmp_path / "int8.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node)
    assert kinds["QuantizeLinear"] > 10 and kinds["DequantizeLinear"] > kinds["QuantizeLinear"]
    assert 1e-6 < largest_difference(model, OnnxModel(tmp_path / "int8.onnx"), pixels) < 0.05
    with pytest.raises(ValueError, match="is calibrated on training images, and there are none"):
        quantize_onnx(tmp_path / "model.onnx", pixels[:0], tmp_path / "none.onnx")


@slow
def test_int8_of_a_run_is_in_its_report_and_card(command, images, teacher, capsys):
    flags = ["--teacher", teacher, "--dataset", images, "--student_layers", "1", "--output_dir", "run", *QUICK]
    command("distill").main(flags)
    asked = ["--student", "run/student", "--output", "student.onnx", "--int8", "true", "--dataset", images]
    command("export").main([*asked, "--max_drop", "100"])
    found = read_results("run")["export"]
    assert found["images"] == 5 and set(found["accuracy"]) == {"onnx", "int8"} and found["calibration_images"] <= 256
    assert {*found["speed"]["latency_ms"]["student"]} == {"eager", "onnx", "int8"}
    assert found["file_bytes"]["int8"] == Path("student.int8.onnx").stat().st_size
    assert "## Exported files" in Path("run/report.md").read_text()
    assert "Exported as ONNX:** In int8 it" in Path("run/README.md").read_text()


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
        timing = {"batch_size": 1, "latency_ms": {}, "reasons": {}}
        monkeypatch.setattr(module, "timed", lambda student, forms, pixels: timing)
        return module

    return fake


@pytest.mark.parametrize(("allowed", "written"), [("40", False), ("60", True)])
def test_int8_that_loses_too_much_is_refused(copied, images, teacher, monkeypatch, capsys, allowed, written):
    """Half of the test images are wrong in "int8"."""
    module = copied(1e-6)
    monkeypatch.setattr(int8, "quantize_onnx", lambda source, pixels, path: Path(path).write_text(f"{len(pixels)}"))
    monkeypatch.setattr(int8, "OnnxModel", lambda path: str(path))
    monkeypatch.setattr(int8.Images, "accuracy", lambda self, model: 0.25 if "int8" in model else 0.75)
    flags = arguments("--int8", "true", "--dataset", images, "--max_drop", allowed)
    assert cli.run(lambda: module.main(flags)) == (0 if written else 2)
    assert Path("out/deep/student.onnx").exists() and Path("out/deep/student.int8.onnx").exists() == written
    printed = capsys.readouterr()
    if written:
        assert "loses 50.00 points of accuracy on 5 test images (75.00 % in float32, 25.00 % in int8" in printed.out
        assert Path("out/deep/student.int8.onnx").read_text() == "26"
    else:
        assert "loses 50.00 points" in printed.err and "--max_drop 50.1" in printed.err
    assert len(list(Path("out/deep").iterdir())) == 1 + written


@pytest.mark.parametrize("seed", ["42", "7"])
def test_int8_is_written_to_a_run_with_these_test_images_alone(copied, images, teacher, monkeypatch, capsys, seed):
    """42 is the seed of the run's split."""
    shutil.copytree(teacher, "run/student")
    options = DataOptions(dataset=images)
    update_results("run", "run", {"recipe": "distill"})
    update_results("run", "models", {"student": {"fingerprint": "s1"}})
    update_results("run", "data", builders.facts(builders.open_data(options), options))
    monkeypatch.setattr(int8, "quantize_onnx", lambda source, pixels, path: Path(path).write_text("int8"))
    monkeypatch.setattr(int8, "OnnxModel", lambda path: str(path))
    monkeypatch.setattr(int8.Images, "accuracy", lambda self, model: 0.5)
    monkeypatch.setattr(int8, "write_report", lambda folder: None)
    monkeypatch.setattr(int8, "write_card", lambda folder: "the card")
    flags = ["--student", "run/student", "--output", "student.onnx", "--int8", "true", "--dataset", images]
    copied(1e-6).main([*flags, "--split_seed", seed])
    printed, same = capsys.readouterr().out, seed == "42"
    assert ("export" in read_results("run")) == same == ("the card" in printed)
    assert ("Careful: the student was trained on images split by" in printed) == (not same)
    assert ("Not written to run: these are not the test images of that run" in printed) == (not same)


def test_accuracy_is_of_all_test_images_in_the_students_classes(images, teacher):
    student = open_classifier(teacher).model
    held = int8.Images(teacher, student, DataOptions(dataset=images))
    colours = {0: 1, 1: 0, 2: 2}  # the student's classes are green, red, blue: the channel that is brightest

    def brightest(pixels):
        channel = pixels.mean((2, 3)).argmax(1)
        return torch.stack([channel == colours[k] for k in range(3)], 1).float()

    assert held.accuracy(answering_keywords(brightest)) == 1.0
    assert held.accuracy(answering_keywords(lambda x: brightest(x)[:, [1, 2, 0]])) == 0.0
    assert len(held.test) == 5 and len(held.calibration) == 26


def answering_keywords(function):
    return lambda pixel_values: SimpleNamespace(logits=function(pixel_values))


def test_a_file_that_disagrees_is_not_written(copied, teacher, capsys):
    module = copied(2e-4)
    Path("out/deep").mkdir(parents=True)
    Path("out/deep/student.onnx").write_text("before")
    assert cli.run(lambda: module.main(arguments("--overwrite", "true"))) == 2
    assert "is 2.0e-04 away from the student, expected 1e-04 at most: nothing was written" in capsys.readouterr().err
    assert [p.read_text() for p in Path("out/deep").iterdir()] == ["before"]


@pytest.mark.parametrize(("extra", "shape"), [([], "(3, 16, 16)"), (["--image_size", "24"], "(3, 24, 24)")])
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
        (["--int8", "true"], "calibrated on training images and scored on test images, and none were given"),
        (
            ["--int8", "true", "--dataset", "digits", "--multi_label", "true"],
            "several labels an image. Leave --int8 out",
        ),
        (["--int8", "true", "--dataset", "digits", "--max_drop", "-1"], "max_drop is -1.0, expected 0 or more"),
    ],
)
def test_bad_input_is_a_sentence(command, teacher, capsys, extra, message):
    assert cli.run(lambda: command("export").main(arguments(*extra))) == 2
    assert message in capsys.readouterr().err and not Path("out").exists()


def test_a_student_with_several_labels_an_image_is_not_kept_by_accuracy(command, teacher, capsys):
    config = Path(teacher, "config.json")
    config.write_text(config.read_text().replace("{", '{"problem_type": "multi_label_classification",', 1))
    assert cli.run(lambda: command("export").main(arguments("--int8", "true", "--dataset", "digits"))) == 2
    assert "several labels an image. Leave --int8 out" in capsys.readouterr().err and not Path("out").exists()


def test_an_int8_file_that_exists_is_not_replaced(command, teacher, capsys):
    Path("out/deep").mkdir(parents=True)
    Path("out/deep/student.int8.onnx").write_text("precious")
    assert cli.run(lambda: command("export").main(arguments("--int8", "true", "--dataset", "digits"))) == 2
    assert "out/deep/student.int8.onnx exists. Give another --output" in capsys.readouterr().err
    assert [path.name for path in Path("out/deep").iterdir()] == ["student.int8.onnx"]


def test_without_the_extra_it_says_what_to_type(command, teacher, capsys, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name != "onnx" else object())
    assert cli.run(lambda: command("export").main(arguments())) == 2
    message = capsys.readouterr().err
    assert "onnxruntime, onnxscript not found" in message and "pip install 'hf_kdtl[export]'" in message


def test_a_model_that_torch_cannot_export_is_reported(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise torch.onnx.OnnxExporterError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    model = mixed(build("vit"))
    before = state_of(model)
    with pytest.raises(
        ValueError, match=r"cannot export ViTForImageClassification for any batch size.*no such operator"
    ):
        export_onnx(model, torch.zeros(1, 3, 32, 32), tmp_path / "model.onnx")
    assert state_of(model) == before


def test_shapes_that_onnxruntimes_symbols_cannot_say_are_left_out(monkeypatch):
    from onnxruntime.quantization import shape_inference

    from hf_kdtl import export

    asked = []

    def inferred(source, path, skip_symbolic_shape=False):
        asked.append(skip_symbolic_shape)
        if not skip_symbolic_shape:
            raise TypeError("object of type 'NoneType' has no len()")

    monkeypatch.setattr(shape_inference, "quant_pre_process", inferred)
    export._prepare("a.onnx", "b.onnx")
    assert asked == [False, True]
