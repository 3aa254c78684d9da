"""The rules, as a table; what was typed wins; and what is put into the settings."""

import dataclasses

import pytest
import yaml

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.chosen import put_in
from hf_kdtl.commands.common.defaults import Case, choose, listing, yaml_value
from hf_kdtl.commands.common.shipped import training_files

CUT = Case("cut", True, 3_000_000, 2_000, 32)


def values(case, typed=None, steps=None):
    return {default.name: default.value for default in choose(case, typed or {}, steps)}


@pytest.mark.parametrize(
    ("kind", "transformer", "parameters", "images", "rate", "batch", "passes", "warmup", "evaluations"),
    [
        # 63 steps a pass
        ("random", True, 1e6, 2_000, 1e-3, 32, 100, 630, 20),
        ("random", False, 1e6, 2_000, 2e-3, 32, 100, 315, 20),
        ("cut", True, 1e6, 2_000, 5e-4, 32, 30, 94, 20),
        ("cut", False, 1e6, 2_000, 1e-3, 32, 30, 94, 20),
        ("pretrained", True, 3e6, 2_000, 3e-4, 32, 20, 63, 20),
        ("pretrained", True, 9e7, 2_000, 1e-4, 32, 20, 63, 20),
        ("pretrained", False, 9e7, 2_000, 1e-4, 32, 20, 63, 20),
        ("adapter", True, 9e7, 2_000, 1e-3, 32, 20, 63, 20),
        # by size
        ("cut", True, 1e6, 20, 5e-4, 20, 60, 3, 20),
        ("cut", True, 1e6, 999, 5e-4, 32, 60, 96, 20),
        ("cut", True, 1e6, 1_000, 5e-4, 32, 30, 48, 20),
        ("pretrained", True, 9e7, 10_000, 1e-4, 64, 10, 78, 10),
        ("random", True, 1e6, 50_000, 1e-3, 128, 40, 1_000, 20),
        ("pretrained", True, 9e7, 1_300_000, 1e-4, 128, 3, 1_000, 3),
    ],
)
def test_the_rules(kind, transformer, parameters, images, rate, batch, passes, warmup, evaluations):
    found = values(Case(kind, transformer, int(parameters), images, 224))
    assert found["learning_rate"] == rate  # as it is typed: it is printed
    assert (found["per_device_train_batch_size"], found["num_train_epochs"]) == (batch, passes)
    assert (found["warmup_steps"], found["lr_scheduler_type"]) == (warmup, "cosine")
    steps = passes * -(-images // batch)
    assert steps // found["eval_steps"] == evaluations and found["save_steps"] == found["eval_steps"]
    assert 20 <= steps // found["logging_steps"] <= 21
    assert found["load_best_model_at_end"] and found["metric_for_best_model"] == "accuracy"
    assert found["save_total_limit"] == 2 and found["weight_decay"] == (0.0 if kind == "adapter" else 0.05)


@pytest.mark.parametrize(
    ("side", "color", "expected"),
    [
        (224, True, {"resized_crop": [0.6, 1.0], "flip": True}),
        (32, True, {"resized_crop": [0.6, 1.0], "flip": True}),
        (224, False, {"resized_crop": [0.6, 1.0]}),
        (16, False, {"crop": 1}),
        (64, False, {"crop": 4}),
    ],
)
def test_augmentation_by_size_and_color(side, color, expected):
    assert values(dataclasses.replace(CUT, side=side, color=color))["augmentation"] == expected


def test_steps_follow_what_was_typed():
    assert values(CUT, {"per_device_train_batch_size": 100})["warmup_steps"] == 30 * 20 // 20
    assert values(dataclasses.replace(CUT, processes=2))["warmup_steps"] == 30 * 32 // 20
    assert values(CUT, {"gradient_accumulation_steps": 2})["warmup_steps"] == 30 * 32 // 20
    found = values(CUT, {"max_steps": 126})
    assert "num_train_epochs" not in found
    assert (found["warmup_steps"], found["eval_steps"], found["logging_steps"]) == (6, 63, 6)
    assert values(CUT, {"max_steps": -1})["num_train_epochs"] == 30
    found = values(CUT, steps=40)
    assert found["max_steps"] == found["eval_steps"] == 40 and "num_train_epochs" not in found


def test_the_best_model_is_kept_where_trainer_can_load_one():
    best = "load_best_model_at_end"
    assert best in values(CUT, {"eval_strategy": "epoch", "save_strategy": "epoch"})
    for typed in ({"save_strategy": "no"}, {"eval_strategy": "epoch"}, {"save_steps": 7}, {"eval_strategy": "no"}):
        assert best not in values(CUT, typed), typed
    assert "eval_steps" not in values(CUT, {"eval_strategy": "epoch", "save_strategy": "epoch"})
    assert values(CUT, {best: False}).keys().isdisjoint({best})


def test_what_is_typed_wins_also_as_the_default_of_trainer():
    everything = values(CUT)
    for name in everything:
        assert name not in values(CUT, {name: everything[name]}), name
    types = (DataOptions, DistillationConfig)
    flags = ["--learning_rate", "5e-5", "--eval_strategy=no", "--load_best_model_at_end", "--augmentation", "{}"]
    assert cli.typed_names(*types, argv=flags) == {
        "learning_rate", "eval_strategy", "load_best_model_at_end", "augmentation",
    }  # fmt: skip
    with open("x.yaml", "w") as file:
        file.write("weight_decay: 0.0\nseed: 42\n")
    assert cli.typed_names(*types, argv=["--config", "x.yaml", "--max_steps", "3"]) == {
        "weight_decay", "seed", "max_steps",
    }  # fmt: skip


def test_a_file_of_ours_that_trains_fixes_what_a_rule_would_change():
    fixed = {"learning_rate", "per_device_train_batch_size", "weight_decay", "warmup_steps", "lr_scheduler_type",
             "eval_strategy"}  # fmt: skip
    for name, path in training_files().items():
        found = yaml.safe_load(path.read_text())
        if name in ("folder", "pretrain"):  # for images of which nothing is known
            assert not fixed & found.keys()
            continue
        assert fixed <= found.keys() and {"max_steps", "num_train_epochs"} & found.keys(), name
        assert "augmentation" in found, name


def test_they_reach_the_settings_as_trainer_has_them():
    config, options = DistillationConfig("out", objectives=["task"], use_cpu=True), DataOptions()
    put_in(choose(CUT, {}), config, options, ())
    same = DistillationConfig(
        "out",
        objectives=["task"],
        use_cpu=True,
        **{name: value for name, value in values(CUT).items() if name != "augmentation"},
    )
    mine, theirs = config.to_dict(), same.to_dict()
    assert {name for name in theirs if mine[name] != theirs[name]} == set()
    assert type(config.save_strategy) is type(same.save_strategy)
    assert options.augmentation == {"resized_crop": [0.6, 1.0], "flip": True}


@pytest.mark.parametrize(
    ("settings", "higher"),
    [
        ({"metric_for_best_model": "nll"}, False),
        ({"metric_for_best_model": "eval_ece"}, False),
        ({"metric_for_best_model": "map"}, True),
        ({"metric_for_best_model": "knn"}, True),
        ({"metric_for_best_model": "loss"}, False),
        ({"metric_for_best_model": "logit_kd", "eval_objectives": True, "objectives": ["task", "logit_kd"]}, False),
        ({"metric_for_best_model": "nll", "greater_is_better": True}, True),  # typed
    ],
)
def test_the_best_model_is_the_best_by_what_the_metric_is(settings, higher):
    config = DistillationConfig("out", use_cpu=True, **settings)
    put_in([], config, DataOptions(), settings)
    assert config.greater_is_better is higher


def test_a_metric_that_is_set_later_brings_its_direction():
    """Where load_best_model_at_end alone is typed, Trainer has set the metric loss, and its direction."""
    config = DistillationConfig("out", use_cpu=True, load_best_model_at_end=True, save_strategy="epoch",
                                eval_strategy="epoch")  # fmt: skip
    typed = {"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "epoch"}
    put_in(choose(CUT, typed), config, DataOptions(), typed)
    assert (config.metric_for_best_model, config.greater_is_better) == ("accuracy", True)


def test_the_list_names_each_with_its_reason():
    chosen = choose(CUT, {})
    title, *lines = listing(chosen)
    assert "not typed" in title and len(lines) == len(chosen)
    for default, line in zip(chosen, lines, strict=True):
        assert default.reason and line.endswith(default.reason)
        assert line.strip().startswith(f"{default.name}: {yaml_value(default.value)}")
        assert yaml.safe_load(line.split("  ")[1]) == {default.name: default.value}
    assert listing([]) == []
