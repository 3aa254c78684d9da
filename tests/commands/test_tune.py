"""A search to its end, from a folder of images; stopped and continued it is the same search."""

import json
from pathlib import Path

import pytest
import yaml
from optuna.trial import FixedTrial

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import trials, tuning
from hf_kdtl.commands.common.search_space import SearchSpace
from hf_kdtl.commands.common.trials import RunLog
from hf_kdtl.evaluation import read_results
from tests.commands.conftest import CONFIG

TUNE = ["--teacher", "teacher", "--dataset", "images", "--student_config", json.dumps(CONFIG), "--use_cpu", "true"]
TUNE += ["--max_steps", "9", "--per_device_train_batch_size", "4", "--seeds", "1", "2", "--candidates", "logit_kd"]
TUNE += ["attention_transfer", "--output_dir", "out"]


def lines(path="out/runs.jsonl"):
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"} for line in Path(path).read_text().splitlines()
    ]


def test_a_search_ends_with_settings_that_distill_reads(command, images, teacher, capsys):
    command("tune").main([*TUNE, "--max_trials", "5"])
    printed = capsys.readouterr().out
    found = read_results("out")["tune"]
    assert [trial["number"] for trial in found["trials"]] == list(range(5))
    assert found["trials"][0]["objectives"] == read_results("out")["objectives"]
    for trial in found["trials"]:  # stopped at a rung, or trained with both seeds
        steps = [step for step, _ in trial["curve"]]
        assert (set(trial["scores"]) == {"1", "2"} and steps == [1, 3, 9]) or steps in ([1], [1, 3]), trial
    complete = [trial for trial in found["trials"] if trial["scores"]]
    mean = {trial["number"]: sum(trial["scores"].values()) / 2 for trial in complete}
    assert len(complete) > 1 and mean[found["best"]] == max(mean.values())
    assert "5 trials" in printed and "hf-kdtl distill --config out/best.yaml" in printed.replace(
        "python -m hf_kdtl", "hf-kdtl"
    )
    best = yaml.safe_load(Path("out/best.yaml").read_text())
    assert best["dataset"] == "images" and best["seeds"] == [1, 2] and "candidates" not in best
    for name in ("tune.md", "tune.png"):
        assert Path("out", name).stat().st_size > 100
    objectives = ["--objectives", '[{"name": "task"}, {"name": "logit_kd", "weight": "auto"}]']
    command("distill").main(["--config", "out/best.yaml", "--max_steps", "1", "--seeds", "1", *objectives])
    measured = read_results("out/best")["auto_weights"]["distilled-seed1"]["terms"]["logit_kd"]["weight"]
    assert f"auto: {measured:.3g}" in Path("out/best/report.md").read_text()


def test_stopped_and_continued_it_is_the_same_search(command, images, teacher, monkeypatch):
    main = command("tune").main
    main([*TUNE, "--max_trials", "4"])
    whole = lines()
    Path("out").rename("whole")
    main([*TUNE, "--max_trials", "2"])
    with Path("out/runs.jsonl").open("a") as file:
        file.write('{"run": "trial2-see')  # cut off while it was written
    with pytest.raises(ValueError, match="holds another run"):
        main([*TUNE, "--max_trials", "4"])
    made, real = [], trials.short_run
    monkeypatch.setattr(tuning, "short_run", lambda *a: made.append(a[1]) or real(*a))
    main([*TUNE, "--max_trials", "4", "--resume_from_checkpoint", "true"])
    assert lines() == whole and not {"trial0", "trial1"} & set(made) and made
    assert read_results("out")["tune"] == read_results("whole")["tune"]
    with pytest.raises(ValueError, match="begun with per_device_train_batch_size"):
        main([*TUNE, "--per_device_train_batch_size", "5", "--resume_from_checkpoint", "true"])


def test_a_budget_that_is_too_short_ends_after_what_was_typed(command, images, teacher, capsys, monkeypatch):
    monkeypatch.setattr(tuning, "short_run", lambda *a: {"curve": [[1, 0.2], [3, 0.3], [9, 0.4]]})
    monkeypatch.setattr(tuning.Tuning, "_seconds", lambda self, trial: 40.0)
    command("tune").main([*TUNE, "--budget", "42s"])
    assert [line["run"] for line in lines()] == ["trial0-seed1", "trial0-seed2"]
    assert "Fewer than 9 trials fitted" in capsys.readouterr().out


def test_a_line_of_other_settings_is_refused(tmp_path):
    log = RunLog(tmp_path / "runs.jsonl")
    assert log.once("a", {"seed": 1}, lambda: {"curve": [[1, 0.5]]})["curve"] == [[1, 0.5]]
    again = RunLog(tmp_path / "runs.jsonl")
    assert again.once("a", {"seed": 1}, lambda: 1 / 0)["curve"] == [[1, 0.5]]
    with pytest.raises(ValueError, match="holds a with seed 1, and it is now 2"):
        again.once("a", {"seed": 2}, lambda: {})
    (tmp_path / "runs.jsonl").write_text("x\n{}\n")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        RunLog(tmp_path / "runs.jsonl")


@pytest.mark.parametrize(
    ("flags", "why"),
    [(["--budget", "soon"], "budget is 'soon'; expected a time"), (["--baseline", "true"], "found baseline"),
     (["--candidates", "jacobian"], "expected one on class outputs"), (["--candidates", "logit_dk"], "Did you mean"),
     (["--max_trials", "0"], "max_trials is 0")],
)  # fmt: skip
def test_what_is_refused(command, images, teacher, capsys, flags, why):
    assert cli.run(lambda: command("tune").main([*TUNE, *flags])) == 2
    assert why in capsys.readouterr().err and not Path("out/runs.jsonl").exists()


def test_without_optuna_it_says_what_to_type(monkeypatch):
    monkeypatch.setattr(tuning, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'hf_kdtl\[tune\]'"):
        tuning.check_optuna()


@pytest.mark.parametrize("output, second", [(20.0, 10.0), (0.4, 0.5)])
def test_a_second_term_is_weighed_against_the_stronger_of_the_others(output, second):
    given = {"output": "logit_kd", "output_ratio": output, "temperature": 2.0, "second": "relation"}
    trial = FixedTrial(given | {"second_ratio": 0.5, "learning_rate": 1e-3})
    entries, _ = SearchSpace.of(["logit_kd", "relation"], 1e-3).suggest(trial)
    assert [entry["weight"] for entry in entries] == [1.0, {"auto": output}, {"auto": second}]
