"""CONTRIBUTING's examples are real: what they add to the package works."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hf_kdtl.objectives as registry
from hf_kdtl.checkpoints import state
from hf_kdtl.evaluation import metrics
from hf_kdtl.models.forward.capture import Needs
from tests.objectives import test_laws as laws
from tests.reference import objectives as reference
from tests.support.tiny import build

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
BLOCKS = {code.split("\n")[0]: code for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)}


def block(file):
    """The code that CONTRIBUTING puts into a file."""
    (code,) = (code for first, code in BLOCKS.items() if first.startswith(f"# {file}"))
    return code


def test_the_example_is_an_objective_with_the_promised_properties(monkeypatch, tmp_path):
    code, slow = block("hf_kdtl/objectives/logit_regression.py"), block("tests/reference/objectives.py")
    space: dict = {}
    exec(code, space)
    exec(slow.split("REFERENCES")[0], vars(reference) | space, space)
    name = "logit_regression"
    monkeypatch.setitem(registry.OBJECTIVES, name, space["LogitRegression"])
    monkeypatch.setitem(laws.REFERENCES, name, space[name])
    laws.test_has_a_reference_and_says_where_it_comes_from(name)
    laws.test_value_and_gradient_agree_with_the_reference(name, {})
    laws.test_is_zero_where_student_and_teacher_agree(name, {})
    laws.test_no_gradient_reaches_the_teacher(name, {})
    laws.test_has_the_shape_it_promises_and_permutes_with_the_images(name, {})
    laws.test_stays_finite_at_extreme_logits(name, {}, torch.bfloat16)
    laws.test_config_round_trips_and_refuses_an_unknown_key(name, {}, tmp_path)


def test_the_example_of_a_metric_is_in_every_score(monkeypatch):
    monkeypatch.setattr(metrics, "RECORDS", dict(metrics.RECORDS))
    exec(block("hf_kdtl/evaluation/metrics.py"), vars(metrics) | {"RECORDS": metrics.RECORDS})
    scores = metrics.paired_scores(np.log([[0.5, 0.5], [0.25, 0.75]]), np.array([0, 1]))
    assert scores["confidence"] == pytest.approx(0.625)


def test_the_example_of_a_checkpoint_part_is_saved_and_loaded(tmp_path):
    space = dict(vars(state))
    exec(block("hf_kdtl/checkpoints/state.py"), space)
    state.save_parts(tmp_path, {"seen": space["SeenImages"](SimpleNamespace(seen_images=120))})
    trainer = SimpleNamespace(seen_images=0)
    state.load_parts(tmp_path, {"seen": space["SeenImages"](trainer)})
    assert trainer.seen_images == 120


def test_the_example_of_a_source_serves_class_outputs():
    space: dict = {}
    exec(block("hf_kdtl/models/teachers/stored.py"), space)
    source = space["StoredLogits"](torch.arange(12.0).view(4, 3))
    source.match(build("vit"), None, True)
    captured = source.capture(torch.zeros(2, 3, 8, 8), Needs(logits=True), {"image_index": torch.tensor([3, 1])})
    assert captured.logits.tolist() == [[9, 10, 11], [3, 4, 5]]
    assert not source.unserved(Needs(logits=True)) and "logit_kd" in source.unserved(Needs(logits=True, order=1))
    with pytest.raises(ValueError, match="3 classes; expected 5"):
        source.match(build("vit", num_labels=5), None, True)


def test_the_example_of_a_command_runs(capsys):
    space = {"__doc__": ""}
    exec(block("hf_kdtl/commands/count.py"), space)
    space["main"](["--dataset", "digits", "--train_images", "100"])
    counts = dict(line.split(": ") for line in capsys.readouterr().out.splitlines()[-10:])
    assert sum(map(int, counts.values())) == 100 and set(counts) == {str(digit) for digit in range(10)}
