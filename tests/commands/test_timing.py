"""A time budget: how it is typed, what it allows, and that measuring leaves no trace in the run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import timing
from hf_kdtl.commands.common.timing import MEASURED, Pace, expected, fitting_steps, seconds, steps_within
from hf_kdtl.evaluation import read_results
from tests.commands.conftest import CONFIG, QUICK, ROOT

TRAIN = ["--dataset", "images", "--model_config", json.dumps(CONFIG), *QUICK[2:]]
DISTILL = ["--dataset", "images", "--teacher", "teacher", "--student_layers", "2", *QUICK[2:]]


@pytest.mark.parametrize(
    ("text", "value"), [("20min", 1200), ("90s", 90), ("1h30min", 5400), ("1.5 h", 5400), ("2h 5s", 7205)]
)
def test_a_time(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["20", "", "0min", "20 minutes", "min", "-5s", "5s later"])
def test_no_time(text):
    with pytest.raises(ValueError, match=r"expected a time such as 20min"):
        seconds(text)


def test_the_steps_of_a_search_fit_beside_its_scoring_or_the_budget_that_would_do_is_named():
    assert steps_within(600, a_step=2.0, evaluations=40, least=20) == 250
    with pytest.raises(ValueError, match=r"with 3 min for scoring 0 steps .* at least 20") as e:
        steps_within(180, a_step=2.0, evaluations=170, least=20)
    assert "--budget is 3 min" in str(e.value) and "Type --budget 4min for so many, 11min for 200" in str(e.value)
    assert steps_within(240, 2.0, 170, 20) >= 20 and steps_within(660, 2.0, 170, 20) >= 10 * 20


def test_steps_and_evaluations_fit_into_the_budget():
    for budget, paces, a_pass in (
        (1200, [Pace(0.5, 50)], 55),
        (1200, [Pace(0.5, 1), Pace(1.0, 1)], 55),
        (60, [Pace(0.1, 0.01)], 3),
        (3600, [Pace(0.01, 2)], 1000),
    ):
        steps = fitting_steps(budget, paces, a_pass)
        made = min(20, max(1, steps // a_pass))
        assert 0.5 * budget < expected(paces, steps, made) <= budget
    assert fitting_steps(100, [Pace(1, 1000)], 5, evaluates=False) == 90
    assert fitting_steps(1, [Pace(10, 10)], 5) == 1


def test_a_budget_together_with_steps_is_refused(command, images, capsys):
    main = command("train_teacher").main
    flags = [*TRAIN, "--output_dir", "out", "--time_budget", "1min"]
    assert cli.run(lambda: main([*flags, "--num_train_epochs", "3"])) == 2
    assert "found time_budget and num_train_epochs" in capsys.readouterr().err and not Path("out").exists()


@pytest.mark.parametrize(
    ("name", "flags", "runs", "model"),
    [
        ("distill", DISTILL, 1, "student"),
        pytest.param("distill", [*DISTILL, "--baseline", "true"], 2, "student", marks=pytest.mark.slow),
        pytest.param("train_teacher", TRAIN, 1, "model", marks=pytest.mark.slow),
    ],
)
def test_measuring_leaves_no_trace(command, images, teacher, monkeypatch, capsys, name, flags, runs, model):
    main = command(name).main
    monkeypatch.setattr(timing, "fitting_steps", lambda *args: 3)
    main([*flags, "--output_dir", "budget", "--time_budget", "1min"])
    printed = capsys.readouterr().out
    assert f"Training will take about 1 s: {runs} x 3 steps, measured on {MEASURED}." in printed
    assert printed.count("'eval_loss'") == runs  # of the run itself, at its end; measuring prints nothing
    assert "max_steps: 3  " in printed and read_results("budget")["run"]["settings"]["max_steps"] == 3
    main([*flags, "--output_dir", "plain", "--max_steps", "3"])
    one, two = (AutoModelForImageClassification.from_pretrained(f"{run}/{model}") for run in ("budget", "plain"))
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
    # Continuing keeps the steps that were measured.
    monkeypatch.setattr(timing, "fitting_steps", lambda *args: 99)
    main([*flags, "--output_dir", "budget", "--time_budget", "1min", "--resume_from_checkpoint", "true"])
    assert read_results("budget")["run"]["settings"]["max_steps"] == 3


@pytest.mark.slow
def test_two_processes_agree_on_the_steps(images, teacher):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617"]
    flags = ["-m", "hf_kdtl.commands.distill", *DISTILL, "--output_dir", "out", "--time_budget", "2s"]
    ran = subprocess.run([*launch, *flags], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ran.returncode == 0, ran.stderr[:2000]
    results = read_results("out")
    assert results["run"]["processes"] == 2 and results["run"]["settings"]["max_steps"] >= 1
