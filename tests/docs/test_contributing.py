"""CONTRIBUTING's example is real: the class and the reference in it obey the laws."""

import re
from pathlib import Path

import torch

import hf_kdtl.objectives as registry
from tests.objectives import test_laws as laws
from tests.reference import objectives as reference

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()


def test_the_example_is_an_objective_that_obeys_the_laws(monkeypatch, tmp_path):
    code, _, slow = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
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
    laws.test_permuting_the_images_permutes_the_result(name, {})
    laws.test_has_the_shape_it_promises(name, {})
    laws.test_stays_finite_at_extreme_logits(name, {}, torch.bfloat16)
    laws.test_config_round_trips_and_refuses_an_unknown_key(name, {}, tmp_path)
