"""A probe to its end, from a folder of images, with images without labels; and what it answers."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import probing, searches, trials
from hf_kdtl.commands.common.probing import verdict
from hf_kdtl.evaluation import read_results
from tests.commands.conftest import CONFIG

PROBE = ["--teacher", "teacher", "--dataset", "images", "--student_config", json.dumps(CONFIG), "--use_cpu", "true"]
PROBE += ["--max_steps", "4", "--per_device_train_batch_size", "4", "--seeds", "1", "2", "--output_dir", "out"]


def test_it_runs_to_its_end_stopped_and_continued(command, images, teacher, capsys, monkeypatch):
    main, real, made = command("probe").main, trials.short_run, []

    def run(experiment, arm, seed, *further):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append((arm, seed))
        return real(experiment, arm, seed, *further)

    monkeypatch.setattr(probing, "short_run", run)
    monkeypatch.setattr(probing, "SHARES", (0.5, 1.0))
    assert cli.run(lambda: main([*PROBE, "--second", "attention_transfer"])) == 130
    before = Path("out/runs.jsonl").read_text()
    assert before.count("\n") == 5
    monkeypatch.setattr(probing, "short_run", lambda *a: made.append(a[1:3]) or real(*a))
    main([*PROBE, "--second", "attention_transfer", "--resume_from_checkpoint", "true"])
    assert Path("out/runs.jsonl").read_text().startswith(before)
    by_arm = {
        line["arm"]: line["objectives"] for line in map(json.loads, Path("out/runs.jsonl").read_text().splitlines())
    }
    second = by_arm["with attention_transfer"]  # weighed against the heaviest term, which is the first
    assert [(one["name"], one["weight"]) for one in second] == [
        ("logit_kd", 0.9), ("task", 0.1), ("attention_transfer", {"auto": 0.5})
    ]  # fmt: skip
    assert [one["name"] for one in by_arm["distilled"]] == ["task", "logit_kd"]
    assert len(made) == 2 * 2 * 3 and made[:3] == [("alone", 1), ("distilled", 1), ("with attention_transfer", 1)]
    found = read_results("out")["probe"]
    assert found["labels_per_class"] == pytest.approx([13 / 3, 26 / 3], abs=0.4)
    assert set(found["scores"]) == {"alone", "distilled", "with attention_transfer"} and found["full_steps"] == 4
    printed = capsys.readouterr().out
    assert verdict(found) in printed and "hf-kdtl distill" in printed.replace("python -m hf_kdtl", "hf-kdtl")
    for name in ("probe.md", "labels.png"):
        assert Path("out", name).stat().st_size > 100


def test_steps_that_the_budget_chose_and_the_length_it_answers_for_are_those_of_the_run_that_is_continued(
    command, images, teacher, monkeypatch
):
    main, answers = command("probe").main, []
    monkeypatch.setattr(probing.Probe, "steps_in", lambda self, budget, least: 4)
    monkeypatch.setattr(
        probing.Probe, "found", lambda self, full: answers.append((self.experiment.chosen.steps, full))
    )
    monkeypatch.setattr(probing.Probe, "run", lambda self: None)
    monkeypatch.setattr(command("probe"), "finish", lambda probe, full: str(probe.found(full)))
    flags = shlex.split(shlex.join(PROBE).replace("--max_steps 4", ""))
    main([*flags, "--second", "none"])
    main([*flags, "--second", "none", "--resume_from_checkpoint", "true"])
    (steps, full), again = answers
    assert steps == 4 < full and again == (steps, full)


def test_smaller_shares_are_part_of_larger_ones_and_keep_every_class():
    labels = np.array([0] * 9 + [1] * 4 + [2])
    probe = object.__new__(probing.Probe)
    probe._images = type("Images", (), {"labelled": {"label": labels}})
    options = type("Options", (), {"split_seed": 3})
    probe.experiment = type("Experiment", (), {"data_options": options})
    quarter, half, whole = (set(probe._rows(share).tolist()) for share in probing.SHARES)
    assert quarter < half < whole == set(range(14))
    assert [sorted(labels[list(rows)].tolist()) for rows in (quarter, half)] == [[0, 0, 1, 2], [0] * 4 + [1] * 2 + [2]]


def answer(low, high, mean, more=12.0):
    gain = {"mean": mean / 100, "interval": None if low is None else [low / 100, high / 100], "number": 3, "note": "n"}
    return verdict({"gains": {"distilled": gain}, "best": "distilled", "objectives": [{"name": "task"}],
                    "labels_per_class": [5, 10, 20], "equal_labels": more})  # fmt: skip


def test_what_it_answers():
    assert "worth about +2.0 points" in answer(1, 3, 2) and "equals about 12 more labels a class" in answer(1, 3, 2)
    assert "more than 15 times the 20 labels" in answer(1, 3, 2, float("inf"))
    assert "has no equal in labels" in answer(1, 3, 2, None)
    assert answer(-2, 0.9, -0.5).startswith("No gain is to be expected here: -0.5 points")
    assert answer(-1, 4, 1.5).startswith("No gain is shown") and "as much as +4.0" in answer(-1, 4, 1.5)
    assert "nothing can be concluded" in answer(None, None, 1)
    assert "wider than accuracy itself: nothing can be concluded" in answer(-143, 139, -1.9)


def test_with_unlabelled_images_each_share_keeps_its_part_of_the_batch(command, images, teacher, capsys, monkeypatch):
    Path("images/red").rename("more")
    Path("images/red").mkdir()
    for number in range(8):
        Path(f"more/{number}.png").rename(f"images/red/{number}.png")
    seen, scored = {}, set()

    def run(experiment, arm, seed, config, at, stop=None):
        images = experiment.images
        scored.add(len(experiment.data.validation))
        seen[arm, len(images.labelled)] = (len(images.unlabelled), round(images.share, 2))
        return {"curve": [[1, 0.5], [2, 0.6], [4, 0.5 + 0.1 * seed]]}

    monkeypatch.setattr(probing, "short_run", run)
    monkeypatch.setattr(searches, "SCORED", 2)
    command("probe").main([*PROBE, "--second", "none", "--unlabelled", "more"])
    assert scored == {2} and "validation images are scored, seed" in capsys.readouterr().out
    assert {value for value in seen.values()} == {(4, share) for *_, share in seen.values()}
    assert len({labelled for _, labelled in seen}) == 3 and {arm for arm, _ in seen} == {"alone", "distilled"}


def test_an_unknown_second_term_is_refused(command, images, teacher, capsys):
    assert cli.run(lambda: command("probe").main([*PROBE, "--second", "hidden_state"])) == 2
    assert "Did you mean 'hidden_states'?" in capsys.readouterr().err and not Path("out").exists()
