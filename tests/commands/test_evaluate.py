"""hf-kdtl evaluate on tiny models: what it writes, that the order of classes does not matter, what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.evaluation import read_results, update_results

FEW = ["--images", "4", "--degradations", "jpeg", "--severities", "5", "1"]
QUICK = ["--speed", "eager", "--use_cpu", "true", "--per_device_eval_batch_size", "4", "--disable_tqdm", "true"]


def arguments(*extra, models=("student",)):
    return ["--models", *models, "--dataset", "images", "--output_dir", "out", *QUICK, *extra]


def with_labels(source, target, names):
    """A copy of a saved model whose classes are called otherwise."""
    shutil.copytree(source, target)
    config = json.loads(Path(target, "config.json").read_text())
    config["id2label"], config["label2id"] = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    Path(target, "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture
def student(teacher):
    """The teacher under another name: as it is saved, in the order green, red, blue."""
    return shutil.copytree(teacher, "student")


@pytest.fixture
def evaluate(command, images, student, capsys):
    """evaluate(...) -> (exit code, what it printed)."""

    def call(*given):
        code = cli.run(lambda: command("evaluate").main(list(given)))
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


def test_it_passes_or_fails_and_says_what_it_will_take(evaluate, student):
    flags = ["--degradations", "none", "--teacher", "teacher", "--overwrite_output_dir", "true", "--max_drop"]
    code, printed = evaluate(*arguments(*flags, "60"))  # the student is its teacher, and there are 5 images
    assert code == 0 and "Verdict: pass" in printed and "This takes about 20 s." in printed
    value = read_results("out")["evaluation"]
    assert value["max_drop"] == 60 and set(value["speed"]["latency_ms"]["student"]["eager"]) == {"1", "4"}
    assert "<h1>Evaluation on images</h1>" in Path("out/report.html").read_text()
    with_labels("student", "turned", ["red", "blue", "green"])  # its classes are other ones now
    code, printed = evaluate(*arguments(*flags, "0", models=["turned"]))
    assert code == 1 and "Verdict: fail" in printed
    for given, message in (
        (["--max_drop", "1"], "max_drop needs a model to compare with"),
        (["--max_drop", "-1", "--teacher", "teacher"], "expected 0 or more points"),
        (["--speed", "egaer"], "egaer"),
        (["--labels_per_class", "1"], "labels_per_class is about training images"),
    ):
        code, printed = evaluate(*arguments("--overwrite_output_dir", "true", *given))
        assert code == 2 and message in printed


def test_quick_full_and_single_degradations(command):
    options = command("evaluate").EvaluateOptions
    found = [options(models=[], degradations=names) for names in (["quick"], ["full"], ["jpeg"], ["none"])]
    assert [(len(one.chosen), one.chosen_severities, one.number) for one in found] == [
        (9, [1, 3, 5], 512), (9, [1, 2, 3, 4, 5], 1000), (1, [1, 2, 3, 4, 5], 512), (0, [1, 2, 3, 4, 5], 512),
    ]  # fmt: skip
    assert options(models=[], severities=[5, 2]).chosen_severities == [2, 5]


def test_student_teacher_and_baseline_to_the_end(evaluate):
    code, printed = evaluate(*arguments(*FEW, "--teacher", "teacher", "--baseline", "teacher"))
    assert code == 0, printed
    assert "student lists its classes in another order: its answers are re-ordered, by name." in printed
    assert "| accuracy [95% interval]" in printed and "The report is out/report.md." in printed
    results = read_results("out")
    value = results["evaluation"]
    assert list(value["models"]) == ["student", "teacher", "baseline"]
    mine, its = (value["models"][name] for name in ("student", "teacher"))
    # The same weights: the same scores, and agreement, which would not hold if a model's classes were mixed up.
    scores = mine["runs"]["student"]["test"]
    assert scores["accuracy"] == its["runs"]["teacher"]["test"]["accuracy"] and scores["agreement"] == 1
    assert "agreement" not in its["runs"]["teacher"]["test"], "a model is not compared with itself"
    assert scores["negative_flip_rate"] == 0 and scores["teacher_kl"] == pytest.approx(0, abs=1e-9)
    assert mine["degraded"] == its["degraded"] and list(mine["degraded"]) == ["clean", "jpeg"]
    assert value["degraded"] == {"images": 4, "severities": [1, 5], "side": 16}
    assert len(value["degradations_left_out"]) == 8
    fidelity = value["fidelity"]["student"]
    assert fidelity["images"] == 4 and fidelity["jacobian_cosine"] == pytest.approx(1, abs=1e-5)
    assert {"parameters", "flops", "file_bytes", "peak_memory_bytes", "latency_ms"} <= set(mine)
    assert value["images"] == results["data"]["sizes"]["test"]
    text = Path("out/report.md").read_text()
    assert "# Evaluation on images" in text and "](disagreement.png)" in text
    assert Path("out/disagreement.png").stat().st_size > 1000
    assert str(Path.cwd()) not in Path("out/results.json").read_text()
    assert not list(Path("out").rglob("*.bin")) and not list(Path("out").rglob("*.safetensors"))

    # An evaluation is replaced only where that is asked for, and not before the models are known to fit.
    before = Path("out/results.json").read_text()
    code, printed = evaluate(*arguments())
    assert code == 2 and "--overwrite_output_dir true" in printed
    code, printed = evaluate(*arguments("--overwrite_output_dir", "true", models=["nowhere/at/all"]))
    assert code == 2 and Path("out/results.json").read_text() == before
    code, printed = evaluate(*arguments("--overwrite_output_dir", "true", "--degradations", "none"))
    assert code == 0 and set(read_results("out")["evaluation"]["models"]) == {"student"}
    assert {path.name for path in Path("out").iterdir()} == {
        "results.json",
        "report.md",
        "report.html",
        "reliability.png",
    }


def test_the_order_of_classes_makes_no_difference(evaluate, command):
    # The same function with its outputs in another order: rows of the head permuted as its names are.
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained("student")
    names, order = [model.config.id2label[i] for i in range(3)], [2, 0, 1]
    for parameter in model.classifier.parameters():
        parameter.data = parameter.data[order].clone()
    model.save_pretrained("turned")
    shutil.copy("student/preprocessor_config.json", "turned")
    with_labels("turned", "other", [names[i] for i in order])
    code, printed = evaluate(*arguments("--degradations", "none", "--teacher", "other"))
    assert code == 0, printed
    models = read_results("out")["evaluation"]["models"]
    assert models["student"]["confusion"] == models["teacher"]["confusion"]
    assert models["student"]["runs"]["student"]["test"]["agreement"] == 1
    # Named wrongly, it is another model.
    code, printed = evaluate(
        *arguments("--degradations", "none", "--teacher", "turned", "--overwrite_output_dir", "true")
    )
    assert (
        code == 0
        and read_results("out")["evaluation"]["models"]["student"]["runs"]["student"]["test"]["agreement"] < 1
    )


def test_several_students(evaluate):
    shutil.copytree("student", "a/student")
    shutil.copytree("student", "b/student")
    code, printed = evaluate(
        *arguments("--degradations", "none", "--split", "validation", models=["a/student", "b/student"])
    )
    assert code == 0, printed
    value = read_results("out")["evaluation"]
    assert list(value["models"]) == ["student a/student", "student b/student"] and value["split"] == "validation"
    assert "No --teacher was given" in Path("out/report.md").read_text()
    code, printed = evaluate(*arguments("--output_dir", "again", models=["student", "student"]))
    assert code == 2 and "models are student, student; expected different ones" in printed


def test_a_model_without_names_takes_those_of_the_data(evaluate):
    with_labels("student", "unnamed", ["LABEL_0", "LABEL_1", "LABEL_2"])
    flags = ["--degradations", "none", "--high_bit_depth", "scale"]  # as the student may have been trained
    code, printed = evaluate(*arguments(*flags, models=["unnamed"]))
    assert read_results("out")["data"]["high_bit_depth"] == "scale"
    assert code == 0 and "student does not name its classes: they are taken to be those of the data" in printed


def test_what_is_refused(evaluate):
    with_labels("student", "others", ["green", "red", "yellow"])
    Path("run").mkdir()
    shutil.copytree("student", "run/model")
    update_results("trained", "run", {"recipe": "distill"})
    for given, message in (
        (arguments(models=["others"]), "student (others): the data has the classes"),
        (arguments("--teacher", "others"), "teacher (others): the data has the classes"),
        (arguments(models=["run"]), "Did you mean run/model?"),
        (arguments(models=["./nowhere"]), "path './nowhere' does not exist"),
        (arguments("--degradations", "jpg"), "unknown degradation: 'jpg'"),
        (arguments("--degradations", "none", "jpeg"), "unknown degradation: 'none'"),
        (arguments("--severities", "0"), "at severity 0"),
        (arguments("--images", "0"), "images is 0, expected 1 or more"),
        (arguments("--split", "train"), "train"),
        (
            [*arguments(), "--output_dir", "trained", "--overwrite_output_dir", "true"],
            "trained holds a run of distill",
        ),
    ):
        code, printed = evaluate(*given)
        assert code == 2 and message in printed, printed
        assert not Path("out/results.json").exists()
    assert read_results("trained")["run"] == {"recipe": "distill"}


def test_some_images_are_drawn_and_always_the_same(command):
    from datasets import Dataset

    some_of = command("common.candidates").some_of
    split = Dataset.from_dict({"i": list(range(100))})
    few = some_of(split, 20)["i"][:]
    assert few == some_of(split, 20)["i"][:] == sorted(set(few)) and len(few) == 20
    assert np.mean(few) == pytest.approx(50, abs=15), "not the first ones: a folder's images are sorted by class"
    assert some_of(split, 100) is split and some_of(split, 1000) is split
