"""Settings from YAML and flags: who wins, and the error when one is wrong."""

import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common.next_command import classify, command
from hf_kdtl.commands.common.shipped import find_config
from hf_kdtl.commands.model_card import CardOptions


@dataclass
class Options:
    teacher: str = field(metadata={"help": "needed"})
    seeds: list[int] | None = None
    student_config: dict | str | None = None
    baseline: bool = False
    image_size: int | None = None
    shuffle: bool = True


def write(text):
    with open("x.yaml", "w") as file:
        file.write(text)
    return ["--config", "x.yaml"]


def options(*flags):
    return cli.parse(Options, argv=list(flags))[0]


def test_flags_override_the_file_whatever_their_order():
    file = write("teacher: a\nseeds: [1, 2]\nbaseline: true\nimage_size: 32\nshuffle: false\n")
    plain = options(*file)
    assert (plain.teacher, plain.seeds, plain.baseline, plain.image_size, plain.shuffle) == (
        "a",
        [1, 2],
        True,
        32,
        False,
    )
    for flags in (["--teacher", "b", "--seeds", "3", *file], [*file, "--teacher=b", "--seeds", "3"]):
        both = options(*flags)
        assert (both.teacher, both.seeds, both.baseline) == ("b", [3], True)
    assert options(*file, "--baseline", "false", "--shuffle").baseline is False


def test_numbers_that_yaml_takes_for_text():
    config = cli.parse(DistillationConfig, argv=[*write("learning_rate: 1e-3\nmax_steps: 7\nsave_strategy: no\n")])[0]
    assert config.learning_rate == 1e-3 and config.max_steps == 7 and config.save_strategy == "no"


def test_lists_and_mappings_reach_their_field():
    text = (
        "objectives:\n- {name: task, weight: 0.5}\n- {name: logit_kd, temperature: 2.0}\nlr_scheduler_type: cosine\n"
    )
    config = cli.parse(DistillationConfig, argv=write(text))[0]
    assert config.objectives[1] == {"name": "logit_kd", "temperature": 2.0}
    assert config.lr_scheduler_type == "cosine"
    flags = [*write(text), "--objectives", '[{"name": "task"}]']
    assert cli.parse(DistillationConfig, argv=flags)[0].objectives == [{"name": "task"}]
    assert options(*write("teacher: a\nstudent_config: {model_type: vit}\n")).student_config == {"model_type": "vit"}


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("teacherr: a\n", [], r"x.yaml, line 1: unknown setting: 'teacherr'. Did you mean 'teacher'\?"),
        ("teacher: a\n", ["--baselin", "true"], r"unknown flag: '--baselin'. Did you mean '--baseline'\?"),
        ("teacher: a\n", ["true"], "found 'true' where a flag was expected"),
        ("baseline: true\n", [], "required: --teacher.*--help"),
        ("teacher:\n", [], "required: --teacher"),
        ("teacher: a\nimage_size: big\n", [], "x.yaml, line 2: image_size is 'big'; expected a whole number"),
        ("teacher: a\nimage_size: 1.5\n", [], "x.yaml, line 2: image_size is 1.5; expected a whole number"),
        ("teacher: a\nbaseline: 3\n", [], "x.yaml, line 2: baseline is 3; expected true or false"),
        ("teacher: a\n", ["--image_size", "big"], "image_size.*'big'"),
        ("teacher: a\nseeds: [1]\nteacher: b\n", [], "x.yaml, line 3: teacher stands in line 1 too"),
        ("- teacher\n", [], "x.yaml holds list, expected lines"),
        ("teacher: [\n", [], "x.yaml is not valid YAML, line 2: "),
    ],
)
def test_what_is_wrong_is_a_sentence(text, flags, message):
    with pytest.raises(ValueError, match=message):
        options(*write(text), *flags)


@pytest.mark.parametrize(
    ("flags", "text", "names"),
    [
        (["--objectives", "task", "logit_kd"], "", ["task", "logit_kd"]),
        (["--objectives", "logit_kd", "--use_cpu", "true"], "", ["logit_kd"]),
        (["--objectives=logit_kd"], "objectives: task\n", ["logit_kd"]),
        ([], "objectives: [task, {name: logit_kd}]\n", ["task", "logit_kd"]),
        ([], "objectives: task\n", ["task"]),
    ],
)
def test_objectives_by_name(flags, text, names):
    (config,) = cli.parse(DistillationConfig, argv=[*flags, *write(text)])
    assert config.objectives == [{"name": name} for name in names]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objectives:\n- {name: task}\n- {name: logitkd}\n", "x.yaml, line 3: unknown objective: 'logitkd'"),
        ("objectives:\n- name: logit_kd\n  temprature: 2\n", "x.yaml, line 3: unknown option of objective"),
        ("seed: 1\nlayer_rates: {sorce: jacobian}\n", "x.yaml, line 2: unknown key of layer_rates: 'sorce'"),
        ("a: &a {b: *a}\nobjectives: [x]\n", "x.yaml, line 1: unknown setting: 'a'"),
    ],
)
def test_a_mistake_inside_a_setting_names_its_line(text, message):
    with pytest.raises(ValueError) as error:
        cli.parse(DistillationConfig, argv=write(text))
    assert str(error.value).startswith(message)


def test_a_bare_name_is_a_shipped_file_and_a_path_is_a_file():
    write("seed: 7\n")
    Path("x.yaml").rename("digits.yaml")
    assert cli.parse(DistillationConfig, argv=["--config", "digits.yaml"])[0].seed == 7
    assert cli.parse(DistillationConfig, argv=["--config", "./digits.yaml"])[0].seed == 7
    assert find_config("digits").parent.name == "configs" and "The demo" in find_config("digits").read_text()
    for name, message in (
        ("digit", "Did you mean digits?"),
        ("ddp", "hf-kdtl configs copy ddp"),
        ("no/digits.yaml", "Did you mean digits?"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            find_config(name)
        assert message in str(error.value)
    Path("mine").write_text("seed: 8\n")
    assert find_config("mine") == Path("mine")


def test_a_missing_file_names_the_closest_one():
    write("teacher: a\n")
    with pytest.raises(FileNotFoundError, match=r"'xx.yaml', does not exist. Did you mean x.yaml\?"):
        options("--config", "xx.yaml")


def test_a_path_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    Path("x.yaml").write_text("runs: [~/a, b]\n")
    (options,) = cli.parse(CardOptions, argv=["--config", "x.yaml", "--evaluation=~/c"])
    assert (options.runs, options.evaluation) == (["/somewhere/a", "b"], "/somewhere/c")


def test_printed_commands_hold_for_any_name_of_a_folder():
    student, image = Path('q\'s "x"/student'), Path("a b/é.png")
    *_, code = shlex.split(classify(student, image))
    compile(code, "", "exec")
    assert f"{json.dumps(str(student))})" in code and '"a b/é.png"' in code
    assert shlex.split(command("cut", student=student))[-1] == str(student)


def test_unknown_choice_is_named():
    with pytest.raises(
        ValueError, match=r"x.yaml, line 1: unknown value of lr_scheduler_type: 'cosin'. Did you mean 'cosine'\?"
    ):
        cli.parse(DistillationConfig, argv=write("lr_scheduler_type: cosin\n"))


def test_mapping():
    assert cli.mapping("a", '{"crop": 1}') == cli.mapping("a", {"crop": 1}) == {"crop": 1}
    assert cli.mapping("a", None) == {}
    with pytest.raises(ValueError, match="augmentation is not valid JSON"):
        cli.mapping("augmentation", "{crop")
    with pytest.raises(ValueError, match="expected a mapping"):
        cli.mapping("augmentation", "[1]")


def failing(error):
    def program():
        raise error

    return program


def test_exit_codes(capsys, monkeypatch):
    assert cli.run(lambda: None) == 0
    assert cli.run(failing(ValueError("found a\n  expected b."))) == 2
    assert cli.run(failing(FileNotFoundError(2, "No such file", "x"))) == 2
    assert cli.run(failing(KeyboardInterrupt("saved."))) == 130
    printed = capsys.readouterr().err
    assert "error: found a expected b." in printed and "Traceback" not in printed and printed.endswith("saved.\n")
    for bug in (TypeError("a"), KeyError("b"), AssertionError(), RuntimeError("c")):
        with pytest.raises(type(bug)):
            cli.run(failing(bug))
    monkeypatch.setenv("HF_KDTL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="found"):
        cli.run(failing(ValueError("found")))
    monkeypatch.delenv("HF_KDTL_TRACEBACK")
    monkeypatch.setenv("RANK", "1")
    assert cli.run(failing(ValueError("found"))) == 2
    assert capsys.readouterr().err.startswith("[process 1] error: found")


def test_an_output_that_is_no_longer_read_ends_the_command_without_a_word(monkeypatch, tmp_path, capfd):
    with (tmp_path / "pipe").open("w") as pipe:  # stands for the closed pipe of `hf-kdtl ... | head`
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.run(failing(BrokenPipeError(32, "Broken pipe"))) == 141
        print("more", file=pipe, flush=True)
    assert capfd.readouterr().err == "" and (tmp_path / "pipe").read_text() == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("objectives:\n- name: task\n  weight: 1\n  weight: 5\n", "x.yaml, line 4: weight stands in line 3 too; keep"),
        ("layer_rates:\n  mode: llrd\n  decay: 0.9\n  mode: x\n", "x.yaml, line 4: mode stands in line 2 too; keep"),
        ("learning_rate:\n", "x.yaml, line 1: learning_rate has no value; give it one, or leave the line out"),
        ("seed: 1\nnum_train_epochs: null\n", "x.yaml, line 2: num_train_epochs has no value"),
        ("per_device_train_batch_size: 0\n", "x.yaml, line 1: 'per_device_train_batch_size' is 0; expected a whole"),
        ("gradient_accumulation_steps: 0\n", "x.yaml, line 1: 'gradient_accumulation_steps' is 0; expected a whole"),
        ("per_device_eval_batch_size: -1\n", "x.yaml, line 1: 'per_device_eval_batch_size' is -1; expected a whole"),
        ("max_steps: 1:30\n", "x.yaml, line 1: max_steps is 90; expected a whole number"),
    ],
)
def test_what_a_file_says_twice_or_does_not_say_is_refused(text, message):
    with pytest.raises(ValueError) as error:
        cli.parse(DistillationConfig, argv=write(text))
    assert str(error.value).startswith(message)


def test_what_json_says_twice_is_refused():
    with pytest.raises(ValueError, match="objectives has the key 'weight' twice"):
        DistillationConfig("out", objectives='[{"name": "task", "weight": 1, "weight": 5}]')
    with pytest.raises(ValueError, match="augmentation has the key 'flip' twice"):
        cli.mapping("augmentation", '{"flip": true, "crop": 4, "flip": false}')


def test_a_value_is_the_text_that_stands_there():
    @dataclass
    class Texts:
        class_names: list[str] | None = None
        label_column: str = "label"
        time_budget: str | None = None
        split_seed: int = 42
        limit: float = 1.0

    text = "class_names: [yes, no, 01, 2020-01-01, null]\nlabel_column: 1_0\ntime_budget: 1:30\nsplit_seed: 010\n"
    (found,) = cli.parse(Texts, argv=write(text + "limit: .inf\n"))
    assert found.class_names == ["yes", "no", "01", "2020-01-01", "null"] and found.label_column == "1_0"
    assert found.time_budget == "1:30" and found.split_seed == 10 and found.limit == float("inf")


def test_numbers_that_yaml_takes_for_text_inside_of_a_setting():
    text = "lr_scheduler_kwargs: {min_lr: 1e-6}\nobjectives:\n- {name: task, weight: 5E-1}\n"
    (config,) = cli.parse(DistillationConfig, argv=write(text))
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-6} and config.objectives[0]["weight"] == 0.5


def test_an_anchor_may_be_overridden():
    text = "layer_rates: {<<: &rates {mode: llrd, decay: 0.9}, decay: 0.8}\n"
    assert cli.parse(DistillationConfig, argv=write(text))[0].layer_rates == {"mode": "llrd", "decay": 0.8}
