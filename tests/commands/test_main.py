"""hf-kdtl: it finds the command, explains it in two screens, copies settings files, prints what can be typed."""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest

from hf_kdtl import __version__
from hf_kdtl.__main__ import COMMANDS, main
from hf_kdtl.commands.common import next_command
from hf_kdtl.commands.common.shipped import launch_files, training_files
from hf_kdtl.objectives import OBJECTIVES
from tests.commands.conftest import QUICK, ROOT
from tests.support.tiny import build


def test_without_a_command_it_lists_them(capsys):
    assert main([]) == main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS) and "{" not in text
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"hf_kdtl {__version__}\n"


def test_a_misspelt_command_names_the_closest(capsys):
    assert main(["distil", "--config", "digits"]) == 2
    assert "unknown command: 'distil'. Did you mean 'distill'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    try:
        main([name, "--help"])
    except SystemExit as end:
        assert end.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= (120 if name == "cache" else 110) and f"\n  hf-kdtl {name}" in text
    assert not re.search(r"--\w+-\w+", text.replace("--help-all", "")), "one spelling, with underscores"


def test_help_of_distill_has_groups_defaults_objectives_and_more_on_demand(capsys):
    texts = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main(["distill", flag])
        texts.append(capsys.readouterr().out)
    short, long = texts
    assert short.count("\n  hf-kdtl distill") >= 2 and "accelerate launch" in short
    for part in (
        "Teacher, student, and how many runs:",
        "--seed N",
        "(default: 42)",
        "Its peak. (chosen)",
        "(chosen): by model",
        "--objectives TEXT ...",
    ):
        assert part in short
    assert all(re.search(rf"^  {name} +\w", short, re.M) for name in OBJECTIVES)
    assert "--torch_compile" not in short and "--torch_compile" in long and "--torch-compile" not in long
    assert len(long.splitlines()) > 2 * len(short.splitlines())


def test_a_command_is_imported_when_it_is_asked_for():
    top = ast.parse((ROOT / "hf_kdtl/__main__.py").read_text()).body
    modules = [node.module for node in top if isinstance(node, ast.ImportFrom)]
    assert "hf_kdtl.utils.options" in modules and not [name for name in modules if name.startswith("hf_kdtl.commands")]


# ---- Settings files ----


def test_configs_lists_each_file_by_its_first_line(capsys):
    assert not training_files().keys() & launch_files().keys()
    assert main(["configs"]) == 0
    text = capsys.readouterr().out
    for name, path in (training_files() | launch_files()).items():
        assert re.search(rf"^  {name} +{re.escape(path.read_text().splitlines()[0][2:])}$", text, re.M), name


def test_configs_copies_and_never_overwrites(capsys):
    for name, use in (("digits", "hf-kdtl distill --config digits.yaml"), ("ddp", "accelerate launch --config_file")):
        assert main(["configs", "copy", name]) == 0
        assert use in capsys.readouterr().out
        assert Path(f"{name}.yaml").read_text() == (training_files() | launch_files())[name].read_text()
    Path("digits.yaml").write_text("seed: 7\n")
    assert main(["configs", "copy", "digits"]) == 2
    assert "digits.yaml exists here" in capsys.readouterr().err and Path("digits.yaml").read_text() == "seed: 7\n"
    assert main(["configs", "copy", "digit"]) == 2 and "Did you mean 'digits'?" in capsys.readouterr().err
    assert main(["configs", "paste"]) == 2 and "expected hf-kdtl configs" in capsys.readouterr().err


# ---- Printed commands ----


def printed(text):
    """The command lines that a text shows, without the name of the program."""
    lines = [line.strip() for line in text.splitlines() if f" {next_command.program()} " in f" {line} "]
    return [shlex.split(line.removeprefix(next_command.program())) for line in lines]


def test_what_is_printed_runs(images, capsys):
    data = ["--dataset", images, "--split_seed", "7", *QUICK]
    settings = '{"model_type": "vit", "image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, '
    settings += '"num_attention_heads": 2, "intermediate_size": 64}'
    assert main(["train-teacher", *data, "--model_config", settings, "--output_dir", "my runs/teacher"]) == 0
    ((name, *flags),) = printed(capsys.readouterr().out)
    assert name == "distill" and flags[:4] == ["--dataset", "images", "--split_seed", "7"]
    assert main([name, *flags, *QUICK]) == 0
    ((name, *flags),) = printed(text := capsys.readouterr().out)
    assert "it may have seen images that are test images here" not in text
    assert name == "evaluate" and "--baseline" in flags and "my runs/teacher/model" in flags
    assert main([name, *flags, "--degradations", "none", "--speed", "eager", "--disable_tqdm", "true"]) == 0
    assert Path("my runs/student/evaluation/report.md").is_file()


def test_the_program_is_named_so_that_the_shell_finds_it(monkeypatch, tmp_path):
    folder = tmp_path / "env" / "bin"
    folder.mkdir(parents=True)
    for name in ("hf-kdtl", "python"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    assert next_command.program() == "env/bin/hf-kdtl" and next_command.python() == "env/bin/python"
    monkeypatch.setenv("PATH", str(folder))
    assert next_command.program() == "hf-kdtl" and next_command.python() == "python"
    (folder / "hf-kdtl").unlink()
    assert next_command.program() == "python -m hf_kdtl"
    monkeypatch.chdir("env")
    assert next_command.command("push", run=tmp_path / "a b") == f"python -m hf_kdtl push --run '{tmp_path}/a b'"


@pytest.mark.parametrize("family", ["vit", "swin", "resnet"])
def test_flags_for_half_a_student_are_settings_that_work(command, family):
    processor = type("Processor", (), {"size": {"height": 32, "width": 32}})
    options = command("common.experiment").DistillOptions
    flags = shlex.split(next_command.student_flags(build(family, layers=4), processor))
    (found,) = command("common.arguments").parse(options, argv=flags)
    if family == "vit":
        return
    student = command("common.builders").from_config(
        command("common.arguments").mapping("x", found.student_config), ["a", "b"], "student_config"
    )
    assert student.config.depths == [2, 2] and (found.image_size == 32) == (family == "resnet")


@pytest.mark.parametrize("field", ["id2label", "num_labels"])
def test_a_config_with_classes_of_its_own_is_refused(command, field):
    settings = {"model_type": "vit", field: {"0": "a"} if field == "id2label" else 3}
    with pytest.raises(ValueError, match=f"student_config has {field}; leave them out: the classes are those of the"):
        command("common.builders").from_config(settings, ["a", "b"], "student_config")
