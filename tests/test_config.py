"""Settings are data: checked before any work, the same from Python, text and to_dict()."""

import copy
import json

import pytest
from transformers import HfArgumentParser

from hf_kdtl import DistillationConfig
from hf_kdtl.config import DEFAULT_OBJECTIVES


def test_default_is_task_and_logit_kd(tmp_path):
    config = DistillationConfig(str(tmp_path))
    assert config.objectives == [
        {"name": "task", "weight": 0.1},
        {"name": "logit_kd", "weight": 0.9, "temperature": 4.0},
    ]
    config.objectives[0]["weight"] = 3
    assert DEFAULT_OBJECTIVES[0]["weight"] == 0.1


def test_round_trips_through_to_dict_and_json(tmp_path):
    entries = [{"name": "task"}, {"name": "logit_kd", "key": "soft", "temperature": 2, "weight": 0.5, "role": "task"}]
    first = DistillationConfig(str(tmp_path), objectives=entries, learning_rate=3e-4, eval_objectives=True)
    kept = {k: v for k, v in first.to_dict().items() if not k.endswith("_token")}
    second = DistillationConfig(**json.loads(json.dumps(kept)))
    assert second.to_dict() == first.to_dict() and second.objectives == entries


def test_the_command_line_takes_json(tmp_path):
    text = '[{"name": "logit_kd", "temperature": 2}]'
    parser = HfArgumentParser(DistillationConfig)
    (config,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--objectives", text])
    assert config.objectives == [{"name": "logit_kd", "temperature": 2}]


@pytest.mark.parametrize(
    "given", [["task", "logit_kd"], '["task", {"name": "logit_kd"}]', ["task", {"name": "logit_kd"}]]
)
def test_a_name_stands_for_an_entry_with_its_defaults(tmp_path, given):
    config = DistillationConfig(str(tmp_path), objectives=given)
    assert config.objectives == [{"name": "task"}, {"name": "logit_kd"}]
    assert config.weights() == {"task": 1.0, "logit_kd": 1.0}
    assert DistillationConfig(str(tmp_path), objectives="task").objectives == [{"name": "task"}]


@pytest.mark.parametrize(
    ("objectives", "sentence"),
    [
        ([], "objectives is empty; expected at least one"),
        ("[{'name': 'task'}]", "objectives is not valid JSON"),
        ({"name": "task"}, "expected a list of mappings"),
        ([{"weight": 1}], "has no name; expected one of task"),
        (["task", "logitkd"], "unknown objective: 'logitkd'. Did you mean 'logit_kd'?"),
        ([{"name": "logitkd"}], "unknown objective: 'logitkd'. Did you mean 'logit_kd'?"),
        ([{"name": "logit_kd", "tempreature": 2}], "Did you mean 'temperature'?"),
        ([{"name": "logit_kd", "temperature": 0}], "temperature is 0; expected a number greater than 0"),
        ([{"name": "logit_kd", "temperature": True}], "temperature is True; expected a number"),
        ([{"name": "logit_kd", "direction": "back"}], "direction is 'back'; expected 'forward' or 'reverse' or 'jsd'"),
        ([{"name": "logit_kd", "beta": 1.0}], "beta is 1.0; expected a number between 0 and 1"),
        ([{"name": "logit_kd", "hard": True, "standardize": True}], "would be ignored"),
        ([{"name": "task", "label_smoothing": 1.0}], "label_smoothing is 1.0; expected a number in"),
        ([{"name": "task", "weight": -1}], "weight is -1; expected a number of at least 0"),
        ([{"name": "task", "weight": float("nan")}], "weight is nan; expected a number of at least 0"),
        ([{"name": "task", "weight": 0}], "every weight is 0"),
        ([{"name": "task"}, {"name": "task"}], "two entries have the key 'task'"),
        ([{"name": "task", "key": "a.b"}], "expected a word without dots"),
        ([{"name": "task", "key": "forward"}], "which torch's modules use"),
        ([{"name": "task", "key": "loss"}], "key is 'loss', which is another number in the log; take 'loss_term'"),
        ([{"name": "task", "key": "kd_share"}], "another number in the log"),
        ([{"name": "task", "role": "teacher"}], "role is 'teacher'; expected 'task' or 'transfer'"),
    ],
)
def test_refuses_in_a_sentence(tmp_path, objectives, sentence):
    with pytest.raises(ValueError) as error:
        DistillationConfig(str(tmp_path), objectives=objectives)
    assert sentence in str(error.value)


def test_a_gradient_rule_round_trips(tmp_path):
    rule = {"name": "never_hurt", "form": "orthogonal", "alpha": 0.2}
    config = DistillationConfig(str(tmp_path), gradient_rule=json.dumps(rule))
    assert config.gradient_rule == config.to_dict()["gradient_rule"] == rule
    assert config.with_dotted({"gradient_rule.alpha": 0.3}) == {"gradient_rule": rule | {"alpha": 0.3}}
    with pytest.raises(ValueError, match="alpha is -1"):
        config.with_dotted({"gradient_rule.alpha": -1.0})


def test_two_label_smoothings_are_refused(tmp_path):
    objectives = [{"name": "task", "label_smoothing": 0.2}]
    with pytest.raises(ValueError, match="set one of them"):
        DistillationConfig(str(tmp_path), objectives=objectives, label_smoothing_factor=0.1)
    config = DistillationConfig(str(tmp_path), objectives=[{"name": "task"}], label_smoothing_factor=0.1)
    assert config.build_objectives()["task"].label_smoothing == 0.1


def test_dotted_names_of_a_search_reach_into_a_setting(tmp_path):
    config = DistillationConfig(str(tmp_path), layer_rates={"mode": "discrepancy"})
    before = copy.deepcopy(config.objectives)
    tried = {"learning_rate": 1e-3, "objectives.logit_kd.temperature": 2.0, "objectives.task.weight": 0.3}
    found = config.with_dotted(tried | {"layer_rates.momentum": 0.5})
    task, logit_kd = before
    expected = [task | {"weight": 0.3}, logit_kd | {"temperature": 2.0}]
    rates = {"mode": "discrepancy", "momentum": 0.5}
    assert found == {"learning_rate": 1e-3, "objectives": expected, "layer_rates": rates}
    assert config.objectives == before and config.with_dotted({"seed": 3}) == {"seed": 3}
    for name in ("objectives.nothing.temperature", "learning.rate.now", "objectives.logit_kd", "layer_rates.a.b"):
        with pytest.raises(ValueError, match=rf"'{name}' names no setting; expected objectives"):
            config.with_dotted({name: 1.0})
    for name, value, message in (
        ("objectives.logit_kd.temperature", -1, "expected a number greater than 0"),
        ("layer_rates.momentum", 2, "momentum is 2"),
        ("objectives.logit_kd.temperatur", 2, "Did you mean 'temperature'"),
    ):
        with pytest.raises(ValueError, match=message):
            config.with_dotted({name: value})


def test_the_role_of_an_entry_is_that_of_its_objective(tmp_path):
    entries = [{"name": "task"}, {"name": "logit_kd"}, {"name": "logit_kd", "key": "protected", "role": "task"}]
    objectives = DistillationConfig(str(tmp_path), objectives=entries).build_objectives()
    assert [objectives[key].role for key in ("task", "logit_kd", "protected")] == ["task", "transfer", "task"]


def test_settings_may_be_assigned_as_they_are_given_to_the_constructor(tmp_path):
    config = DistillationConfig(str(tmp_path))
    config.objectives = ["task", "logit_kd"]
    assert config.objectives == [{"name": "task"}, {"name": "logit_kd"}]
    config.objectives, config.gradient_rule = '[{"name": "task"}, {"name": "logit_kd"}]', '{"name": "pcgrad"}'
    assert list(config.build_objectives()) == ["task", "logit_kd"] and config.gradient_rule == {"name": "pcgrad"}
    setattr(config, "objectives.logit_kd.temperature", 2.0)
    assert config.objectives[1] == {"name": "logit_kd", "temperature": 2.0}
    assert not any("." in name for name in vars(config))
    for name, sentence in {
        "objectives.logit_kd.temprature": "Did you mean 'temperature'",
        "objectives.dist.temperature": "names no setting; expected objectives.<key>.<option>",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            setattr(config, name, 2.0)
