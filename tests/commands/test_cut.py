"""hf-kdtl cut, and students that `distill` cuts to a budget, at once or in stages."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_kdtl import make_student
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common.cutting import number
from hf_kdtl.evaluation.cost import flops, parameters
from hf_kdtl.evaluation.results import read_results
from hf_kdtl.models.blocks import find_blocks
from tests.commands.conftest import QUICK

PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)


def open_model(folder):
    return AutoModelForImageClassification.from_pretrained(folder).eval()


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_sizes(command, teacher, capsys):
    command("cut").main(["--teacher", teacher, "--layers", "2", "--mlp", "0.5", "--output_dir", "small"])
    student, printed = open_model("small"), capsys.readouterr().out
    with torch.no_grad():
        expected = make_student(teacher, 2, mlp=0.5)(pixel_values=PIXELS).logits
        assert torch.equal(student(pixel_values=PIXELS).logits, expected)
    assert AutoImageProcessor.from_pretrained("small").size == {"height": 16, "width": 16}
    assert printed.index("neurons of a block") < printed.index("in small") < printed.index("distill")


def test_a_budget_by_importance(command, images, teacher):
    flags = ["--teacher", teacher, "--importance", "first_order", "--parameters", "0.6"]
    assert cli.run(lambda: command("cut").main([*flags, "--output_dir", "small"])) == 2
    assert not Path("small").exists()
    command("cut").main([*flags, "--dataset", images, "--output_dir", "small"])
    share = parameters(open_model("small")) / parameters(open_model(teacher))
    assert 0.5 < share <= 0.6
    with pytest.raises(ValueError, match="small holds a model"):
        command("cut").main([*flags, "--dataset", images, "--output_dir", "small"])


@pytest.mark.slow
def test_a_budget_of_distill(command, images, teacher):
    flags = ["--teacher", teacher, "--dataset", images, "--student_flops", "0.5", "--output_dir", "out", *QUICK]
    command("distill").main([*flags, "--student_importance", "first_order"])
    share = flops(open_model("out/student"), PIXELS) / flops(open_model(teacher), PIXELS)
    assert 0.4 < share <= 0.5
    results = read_results("out")
    start, summary = results["models"]["student"]["start"], results["pairing"]["student"]
    assert start["how"] == "cut" and summary.endswith(f", cut out of the teacher: {start['kept']}")
    assert start["kept"].endswith("of the FLOPs")


def test_a_teacher_without_a_head(command, images, teacher):
    """The student is cut out of it, and gets a head for the classes of the images."""
    headless = open_model(teacher).vit
    headless.save_pretrained("headless")
    AutoImageProcessor.from_pretrained(teacher).save_pretrained("headless")
    command("cut").main(["--teacher", "headless", "--layers", "2", "--heads", "1", "--output_dir", "small"])
    assert AutoModel.from_pretrained("small").config.num_attention_heads == 1
    module, building = command("common.experiment"), command("common.builders")
    types = (module.DistillOptions, building.DataOptions, module.DistillationConfig)
    flags = ["--teacher", "headless", "--dataset", images, "--student_layers", "2", "--student_heads", "1"]
    flags += ["--objectives", "task", "feature_kd", "--output_dir", "out", *QUICK]
    study = module.Experiment(*cli.parse(*types, argv=flags))
    student = study.trainer("distilled", 1, Path("out")).model
    assert sorted(student.config.id2label.values()) == ["blue", "green", "red"]
    cut_out = make_student(headless, 2, heads=1)
    assert torch.equal(student.vit.layers[1].mlp.fc1.weight, cut_out.layers[1].mlp.fc1.weight)


def test_stages(command, images, teacher):
    flags = ["--teacher", teacher, "--dataset", images, "--student_layers", "1", "--student_mlp", "0.25"]
    flags += ["--stages", "2", "--output_dir", "out", *QUICK, "--max_steps", "3", "--save_strategy", "no"]
    command("distill").main(flags)
    results = read_results("out")
    (rows,) = results["stages"].values()
    assert [(row["stage"], row["steps"]) for row in rows] == [(1, 1), (2, 2)]
    first, last = open_model("out/distilled-seed42/stage-1/model"), open_model("out/student")
    sizes = [(len(find_blocks(model)), model.config.intermediate_size) for model in (first, last)]
    assert sizes == [(2, 32), (1, 16)]  # of 3 blocks and 64 neurons, by the square root of the last
    log = results["curves"]["distilled-seed42"]
    assert set(results["curves"]) == {"distilled-seed42"}
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]
    assert [entry["stage"] for entry in log if "loss" in entry] == [1, 2, 2]
    assert "Stages of distilled-seed42" in Path("out/report.md").read_text()
    command("distill").main([*flags, "--resume_from_checkpoint", "true"])
    assert read_results("out")["stages"] == results["stages"] and read_results("out")["curves"] == results["curves"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--student", "teacher", "--stages", "2"], "stages is 2"),
        (["--student_flops", "0.5", "--stages", "0"], "stages is 0"),
        (["--student_heads", "many"], "student_heads is 'many'; expected a whole number"),
        (["--student_flops", "0.001"], "The nearest that can be met is flops=0"),
        (["--student_mlp", "0.5", "--student", "teacher"], "found student and student_mlp"),
        (["--student_layers", "1", "--student_importance", "magnitude"], "importance"),
    ],
)
def test_what_does_not_fit(flags, message, command, images, teacher, capsys):
    given = ["--teacher", teacher, "--dataset", images, "--output_dir", "out", *QUICK]
    assert cli.run(lambda: command("distill").main([*given, *flags])) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("1.0", 1.0), (6, 6), (0.5, 0.5), ("[2, 2]", (2, 2))])
def test_a_count_and_a_share(text, value):
    assert number("layers", text) == value and type(number("layers", text)) is type(value)


def test_the_command_that_is_printed_names_the_images_that_were_typed(command, teacher, capsys):
    """Where none were, none can be named: the default of distill is other images."""
    cut = ["--teacher", teacher, "--layers", "2", "--overwrite", "true", "--output_dir", "small"]
    command("cut").main(cut)
    assert "distill --dataset <your images> --teacher teacher --student small" in capsys.readouterr().out
    command("cut").main([*cut, "--dataset", "my images", "--split_seed", "7", "--multi_label", "true"])
    assert "distill --dataset 'my images' --split_seed 7 --multi_label True --teacher" in capsys.readouterr().out
