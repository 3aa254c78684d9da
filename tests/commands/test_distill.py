import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import TrainerCallback, pipeline

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common.scores import best_seed
from hf_kdtl.evaluation import read_results
from hf_kdtl.evaluation.predictions import read_predictions
from hf_kdtl.evaluation.results import update_results
from tests.commands.conftest import CONFIG, QUICK, ROOT

NEW = ("--student_config", json.dumps(CONFIG))


def arguments(*extra, student=NEW):
    return ["--teacher", "teacher", "--dataset", "images", "--output_dir", "out", *student, *QUICK, *extra]


BOTH = ["--baseline", "true", "--seeds", "1", "2"]


def test_two_seeds_two_arms_to_the_end_and_again(command, images, teacher, capsys):
    distill = command("distill").main
    distill(arguments(*BOTH))
    printed = capsys.readouterr().out
    for expected in (
        "1 process",
        "labels match by name in another order",
        "student distilled",
        "out/student",
        "paired",
    ):
        assert expected in printed, expected
    names = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in Path("out/student").iterdir()} == names
    for name in ("report.md", "curves.png", "sheet.png", "example.png"):
        assert Path("out", name).stat().st_size > 100
    answer = pipeline("image-classification", "out/student")(Image.open("out/example.png"))
    assert {entry["label"] for entry in answer} == {"blue", "green", "red"}
    results = read_results("out")
    assert set(results["curves"]) == {f"{arm}-seed{k}" for arm in ("alone", "distilled") for k in (1, 2)}
    assert set(results["evaluation"]["models"]["alone"]["runs"]) == {"1", "2"}
    assert results["comparison"][1]["seeds"] == [1, 2]
    for arm, replaces in (("alone", False), ("distilled", True)):  # the student alone is what a distilled one replaces
        for seed, run in results["evaluation"]["models"][arm]["runs"].items():
            assert {"ece", "agreement"} < set(run["test"]) and ("negative_flip_rate" in run["test"]) == replaces
            predicted, labels = read_predictions(f"out/{arm}-seed{seed}", "test")
            assert (predicted == labels).mean() == run["test"]["accuracy"]
    assert "| `negative_flip_rate`" in Path("out/report.md").read_text()
    seed = results["evaluation"]["student_seed"]
    assert seed == best_seed(results["evaluation"]["models"]["distilled"]["runs"])
    kept, its = (Path(folder, "model.safetensors") for folder in ("out/student", f"out/distilled-seed{seed}/model"))
    assert kept.read_bytes() == its.read_bytes() and f"out/alone-seed{seed}/model" in printed
    assert f"that of seed {seed}, the best on validation" in Path("out/report.md").read_text()
    assert str(Path.cwd()) not in Path("out/results.json").read_text()

    # Another run in the folder: stop, and lose nothing.
    before = Path("out/results.json").read_text()
    assert cli.run(lambda: distill(arguments(*BOTH))) == 2
    assert "--resume_from_checkpoint true" in capsys.readouterr().err
    assert Path("out/results.json").read_text() == before

    # Continue: what is finished is kept, a seed may be added, other settings are refused.
    kept = Path("out/alone-seed1/model/model.safetensors").stat().st_mtime_ns
    more = [*BOTH, "3", "--resume_from_checkpoint", "true"]
    distill(arguments(*more))
    assert "alone-seed1: finished before, kept." in capsys.readouterr().out
    assert Path("out/alone-seed1/model/model.safetensors").stat().st_mtime_ns == kept
    assert read_results("out")["comparison"][1]["seeds"] == [1, 2, 3]
    assert cli.run(lambda: distill(arguments(*more, "--learning_rate", "1e-2"))) == 2
    assert "begun with learning_rate 0.001 and is now asked to continue with 0.01" in capsys.readouterr().err

    # Overwrite: the old runs are gone, a user's own files are not.
    Path("out/mine.txt").write_text("mine")
    distill(arguments("--overwrite_output_dir", "true"))
    assert {path.name for path in Path("out").glob("*-seed*")} == {"distilled-seed42"}
    assert Path("out/mine.txt").read_text() == "mine"
    assert set(read_results("out")["curves"]) == {"distilled-seed42"}


def test_what_was_measured_of_another_student_is_taken_out(command):
    judged = {"role": "student", "fingerprint": "s1", "runs": {}}
    update_results("out", "student_evaluation", {"evaluation": {"models": {"student": judged}}})
    update_results("out", "export", {"fingerprint": "s1", "images": 5})
    remove = command("distill").without_other_student
    assert remove(Path("out"), "s1") == [] and read_results("out")["export"]["images"] == 5
    notes = remove(Path("out"), "s2")
    assert len(notes) == 2 and all("was of another student and is taken out; measure" in note for note in notes)
    found = read_results("out")
    assert found["student_evaluation"] is found["export"] is None and remove(Path("out"), "s2") == []


@pytest.mark.parametrize(
    "student",
    [NEW, ("--student", "teacher"), ("--student_layers", "2")],
)
def test_both_arms_start_from_the_same_weights_and_see_the_same_images(command, images, teacher, student):
    module, building = command("common.experiment"), command("common.builders")
    types = (module.DistillOptions, building.DataOptions, module.DistillationConfig)
    flags = arguments(*BOTH, "--augmentation", '{"flip": true}', student=student)
    study = module.Experiment(*cli.parse(*types, argv=flags))
    batches, weights = {}, {}
    for arm, seed, folder in study.runs():
        trainer = study.trainer(arm, seed, folder)
        weights[arm, seed] = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        seen = batches[arm, seed] = []
        step = trainer.training_step

        def recording(model, inputs, counts=None, step=step, seen=seen):
            seen.append(inputs["pixel_values"].clone())
            return step(model, inputs, counts)

        trainer.training_step = recording
        trainer.train()
    for seed in study.seeds:
        one, other = weights["alone", seed], weights["distilled", seed]
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert all(map(torch.equal, batches["alone", seed], batches["distilled", seed]))
    assert len(batches["alone", 1]) == 2 and not torch.equal(batches["alone", 1][0], batches["alone", 2][0])


def test_a_student_cut_out_of_the_teacher(command, images, teacher):
    command("distill").main(arguments("--max_steps", "1", "--learning_rate", "0", student=("--student_layers", "3")))
    results = read_results("out")
    models = results["evaluation"]["models"]
    # All blocks and no learning: the student is the teacher, which lists its classes in another order.
    for split, scores in models["teacher"]["runs"]["teacher"].items():
        found = models["distilled"]["runs"]["42"][split]
        assert {name: found[name] for name in scores} == scores and {"accuracy", "nll", "ece"} < set(scores)
        assert found["agreement"] == 1 and abs(found["teacher_kl"]) < 1e-6
    assert results["data"]["classes"] == ["green", "red", "blue"]
    assert results["comparison"] == []


@pytest.mark.parametrize(
    ("extra", "student", "message"),
    [
        ([], [], "found no student; expected one of --student"),
        ([], ["--student", "teacher", "--student_layers", "1"], "found student and student_layers"),
        ([], ["--student_layers", "9"], "found 9 student layers for a teacher of 3"),
        (["--teacher", "./nowhere"], ["--student_layers", "1"], "'./nowhere' does not exist"),
        (["--objectives", '[{"name": "task"}]'], ["--student_layers", "1"], "no objective uses it"),
        (["--objectives", '[{"name": "logit_kdd"}]'], ["--student_layers", "1"], "Did you mean 'logit_kd'"),
        (["--seeds", "1", "1"], ["--student_layers", "1"], "seeds are [1, 1], expected different ones"),
        (["--resume_from_checkpoint", "out/x"], ["--student_layers", "1"], "--resume_from_checkpoint true"),
    ],
)
def test_bad_input_is_a_sentence_and_writes_nothing(command, images, teacher, capsys, extra, student, message):
    main = command("distill").main
    assert cli.run(lambda: main(arguments(*extra, student=student))) == 2
    *before, error = capsys.readouterr().err.splitlines()
    assert message in error and "Traceback" not in "".join(before)
    assert not Path("out/results.json").exists()


def test_classes_of_another_world(command, images, teacher, capsys):
    config = Path(teacher, "config.json")
    config.write_text(config.read_text().replace("green", "yellow"))
    main = command("distill").main
    for student in (["--student_layers", "1"], NEW):
        assert cli.run(lambda student=student: main(arguments(student=student))) == 2
        error = capsys.readouterr().err
        assert "Only the student: 'green'. Only the teacher: 'yellow'." in error


def test_a_teacher_of_other_splits_is_reported(command, images, teacher, capsys):
    flags = ["--dataset", "images", "--model", teacher, "--output_dir", "taught", *QUICK]
    command("train_teacher").main(flags)
    student = ("--student_layers", "1", "--teacher", "taught/model")
    command("distill").main(arguments("--split_seed", "7", student=student))
    assert "it may have seen images that are test images here" in capsys.readouterr().out


def test_ctrl_c_saves_and_the_same_command_continues(command, images, teacher, capsys, monkeypatch):
    distill, running = command("distill"), command("common.runs")

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)

    make = running.make_trainer
    monkeypatch.setattr(running, "make_trainer", lambda *args, **parts: make(*args, callbacks=[Stop()], **parts))
    flags = arguments("--save_strategy", "no")
    assert cli.run(lambda: distill.main(flags)) == 130
    assert capsys.readouterr().err.endswith("or the same command with --resume_from_checkpoint true.\n")
    assert Path("out/distilled-seed42/checkpoint-1/model.safetensors").exists()

    monkeypatch.setattr(running, "make_trainer", make)
    assert not cli.run(lambda: distill.main([*flags, "--resume_from_checkpoint", "true"]))
    log = read_results("out")["curves"]["distilled-seed42"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]


@pytest.mark.slow
def test_a_program_prints_what_the_command_prints_and_nothing_else(images, teacher):
    command = [sys.executable, "-m", "hf_kdtl", "distill", *arguments()]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(ran.stdout.splitlines()) < 40


@pytest.mark.slow
def test_two_processes_write_one_run(images, teacher):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29613"]
    command = [*launch, "-m", "hf_kdtl.commands.distill", *arguments(*BOTH)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == 1 and done.stdout.count("student distilled") == 1
    assert read_results("out")["run"]["processes"] == 2
    assert len(pipeline("image-classification", "out/student")(Image.open("out/example.png"))) == 3
