"""The folder of a run: the same command continues it, and nothing that a command was given or a user wrote is lost."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import folders
from hf_kdtl.commands.common.trials import RunLog
from hf_kdtl.evaluation.results import read_results, update_results


@pytest.fixture
def train_teacher(command, monkeypatch, capsys):
    """train_teacher(...) -> (exit code, its error): begins a run in out and trains nothing."""
    module = command("train_teacher")

    def begin(options, data_options, config, *rest):
        Path("out/model").mkdir(parents=True, exist_ok=True)
        update_results("out", "run", folders.describe_run("train_teacher", config, options, data_options))

    def call(*given):
        argv = ["--output_dir", "out", "--use_cpu", "true", *map(str, given)]
        return cli.run(lambda: module.main(argv)), capsys.readouterr().err

    monkeypatch.setattr(module, "train", begin)
    return call


def config_of(folder, resume=None, objectives=()):
    return SimpleNamespace(output_dir=folder, resume_from_checkpoint=resume, objectives=[*objectives])


@pytest.mark.parametrize("below", ["the working folder", "the home folder"])
def test_a_command_with_an_absolute_path_continues(train_teacher, images, monkeypatch, below):
    dataset = Path(images).absolute()
    if below == "the home folder":
        monkeypatch.setenv("HOME", str(dataset.parent))
        Path("work").mkdir()
        monkeypatch.chdir("work")
    assert train_teacher("--dataset", dataset) == (0, "")
    assert read_results("out")["run"]["settings"]["dataset"] in ("images", "~/images")
    same = [dataset, f"{dataset}/", Path("..", "images") if below == "the home folder" else "./images"]
    for again in same:
        assert train_teacher("--dataset", again, "--resume_from_checkpoint", "true") == (0, "")
    dataset.rename(dataset.with_name("others"))
    code, error = train_teacher("--dataset", dataset.with_name("others"), "--resume_from_checkpoint", "true")
    assert code == 2 and "was begun with dataset" in error


def test_paths_in_objectives_and_of_trials_are_the_same_paths():
    term = {"name": "bregman", "representation": str(Path("layer").absolute())}
    update_results("out", "objectives", [term])
    update_results("out", "run", run := {"settings": {}})
    folders.check_folder(config_of("out", "true", [term]), run, False)
    with pytest.raises(ValueError, match="was begun with the objectives"):
        folders.check_folder(config_of("out", "true", [term | {"representation": "other"}]), run, False)
    for _ in range(2):  # written, and found again
        line = RunLog(Path("runs.jsonl")).once("trial0", {"objectives": [term]}, lambda: {"curve": []})
        assert line["objectives"][0]["representation"] == "layer"
