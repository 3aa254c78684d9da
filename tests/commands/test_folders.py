"""The folder of a run: the same command continues it, and nothing that a command was given or a user wrote is lost."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import builders, folders
from hf_kdtl.commands.common.trials import RunLog
from hf_kdtl.evaluation.results import read_results, update_results


@pytest.fixture
def train_teacher(command, monkeypatch, capsys):
    """train_teacher(...) -> (exit code, its error): begins a run in out and trains nothing."""
    module = command("train_teacher")

    def begin(options, data_options, config, data, *rest):
        run = folders.describe_run("train_teacher", config, options, data_options)
        trainer = SimpleNamespace(args=config, accelerator=SimpleNamespace(wait_for_everyone=lambda: None))
        folders.begin(trainer, {"run": run, "data": builders.facts(data, data_options)})
        Path("out/model").mkdir(exist_ok=True)

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
    update_results("out", "run", run := {"recipe": "distill", "settings": {}})
    folders.check_folder(config_of("out", "true", [term]), run, False)
    with pytest.raises(ValueError, match="was begun with the objectives"):
        folders.check_folder(config_of("out", "true", [term | {"representation": "other"}]), run, False)
    for _ in range(2):  # written, and found again
        line = RunLog(Path("runs.jsonl")).once("trial0", {"objectives": [term]}, lambda: {"curve": []})
        assert line["objectives"][0]["representation"] == "layer"


def test_a_run_does_not_go_on_with_other_images(train_teacher, images):
    assert train_teacher("--dataset", images) == (0, "")
    resume = ("--dataset", images, "--resume_from_checkpoint", "true")
    shutil.copy("images/red/0.png", "images/red/00.png")
    before = Path("out/results.json").read_text()
    code, error = train_teacher(*resume)
    assert code == 2 and "images has other images or labels (train, validation, test, labels) than when" in error
    assert Path("out/results.json").read_text() == before
    Path("images/red/00.png").unlink()
    assert train_teacher(*resume) == (0, "")
    old = read_results("out")["data"]
    update_results("out", "data", {name: value for name, value in old.items() if name != "digests"})
    assert train_teacher(*resume) == (0, "")  # of an earlier version


@pytest.mark.parametrize("given", ["--model", "--teacher", "--dataset"])
def test_what_a_command_was_given_is_not_removed(command, train_teacher, images, capsys, given):
    assert train_teacher("--dataset", images) == (0, "")
    Path("out/model/config.json").write_text("trained for days")
    flags = ["--output_dir", "out", "--use_cpu", "true", "--overwrite_output_dir", "true"]
    value = {"--model": "out/model", "--dataset": "out", "--teacher": '{"a": "./out/model", "b": "x"}'}[given]
    module = command("distill" if given == "--teacher" else "train_teacher")
    assert cli.run(lambda: module.main([*flags, given, value])) == 2
    assert "which this command was given and would replace" in capsys.readouterr().err
    assert Path("out/model/config.json").read_text() == "trained for days"
    Path("out/results.json").unlink()  # a model of the user's own: nothing says that a run was finished
    code = cli.run(lambda: module.main([*flags[:-1], "false", given, value, "--resume_from_checkpoint", "true"]))
    assert code == 2 and "was given and would replace" in capsys.readouterr().err


def test_files_that_no_run_has_written_stay(command, train_teacher, images, capsys):
    Path("out").mkdir()
    Path("out/report.md").write_text("my thesis")
    for overwrite in ("false", "true"):
        code, error = train_teacher("--dataset", images, "--overwrite_output_dir", overwrite)
        assert code == 2 and "out holds report.md and no results.json" in error
    evaluation = ["--models", "m", "--output_dir", "out", "--overwrite_output_dir", "true", "--use_cpu", "true"]
    fit = ["--teacher", "m", "--k", "2", "--output_dir", "out", "--overwrite_output_dir", "true"]
    assert cli.run(lambda: command("evaluate").main(evaluation)) == 2
    assert "out holds report.md and no results.json" in capsys.readouterr().err
    Path("out/representation.png").write_text("my picture")
    assert cli.run(lambda: command("fit_representation").main(fit)) == 2
    assert "out holds representation.png and no results.json" in capsys.readouterr().err
    update_results("out", "run", {"recipe": "distill", "settings": {}})  # a run, and another command's
    assert cli.run(lambda: command("fit_representation").main(fit)) == 2
    assert "holds a run of distill" in capsys.readouterr().err
    code, error = train_teacher("--dataset", images, "--resume_from_checkpoint", "true")
    assert code == 2 and "holds a run of distill" in error
    assert Path("out/report.md").read_text() == "my thesis"


def test_an_interrupted_removal_can_be_made_again(monkeypatch):
    update_results("out", "run", {"recipe": "distill"})
    Path("out/report.md").touch()
    Path("out/model").mkdir()
    monkeypatch.setattr("shutil.rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folders.clear(Path("out"))
    assert Path("out/results.json").exists()


def test_a_store_is_not_put_among_other_files(command, capsys):
    Path("mine/teacher").mkdir(parents=True)
    Path("mine/teacher/config.json").write_text("{}")
    assert cli.run(lambda: command("cache").main(["--teacher", "mine/teacher", "--output", "mine"])) == 2
    assert "holds other files than a store" in capsys.readouterr().err


def test_a_student_is_not_written_over_its_teacher(command, capsys):
    flags = ["--teacher", "t", "--output_dir", "./t", "--layers", "1", "--overwrite", "true"]
    assert cli.run(lambda: command("cut").main(flags)) == 2
    assert "is the teacher, which the student would replace" in capsys.readouterr().err


def test_a_comparison_replaces_a_comparison_alone(command):
    check = command("compare").check_replaced
    check(Path("out"))
    Path("out").mkdir()
    Path("out/comparison.md").write_text("# 4 models on the test images of pets\n")
    check(Path("out"))
    Path("out/comparison.md").write_text("my thesis")
    with pytest.raises(ValueError, match="of something else than hf-kdtl compare"):
        check(Path("out"))
