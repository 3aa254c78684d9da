"""Preflight says what pairs, what it costs and what will not run, and leaves the models as they were."""

import pytest
import torch
from transformers import TrainingArguments

from hf_kdtl import DistillationConfig
from hf_kdtl.preflight import preflight
from tests.support.helpers import largest_difference, weights
from tests.support.tiny import build

PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ALL = ["task", "logit_kd", "attention_map", "hidden_states", "dist"]


def _config(folder, names=ALL, **settings):
    return DistillationConfig(str(folder), objectives=[{"name": name} for name in names], use_cpu=True, **settings)


def test_reports_the_plan_the_costs_and_what_to_mind(tmp_path):
    student, teacher = build("vit"), build("dinov2_with_registers", layers=4, seed=5)
    before = weights(student)
    report = preflight(student, teacher, _config(tmp_path, gradient_accumulation_steps=2), PIXELS)
    assert not report.problems
    assert [cost.key for cost in report.costs] == ALL[1:]
    assert all(0.9 < cost.memory < 5 for cost in report.costs)
    assert all(0.05 < cost.time < 500 for cost in report.costs)  # on a busy machine a factor of ten is possible
    assert max(report.costs, key=lambda cost: cost.memory).key == "hidden_states"
    text = str(report)
    for sentence in (
        "register dropped",
        "matched by position",
        "statistic of the micro-batch",
        "task + attention_map",
    ):
        assert sentence in text, sentence
    assert largest_difference(before, weights(student)) == 0 and not student.training
    assert all(p.grad is None for p in student.parameters())


def test_says_what_will_not_run_and_what_will(tmp_path):
    names = ["attention_map", "attention_transfer"]
    report = preflight(build("vit"), build("resnet", seed=5), _config(tmp_path, names), PIXELS)
    (problem,) = report.problems
    assert "gives no attention" in problem and "these work: attention_transfer, hidden_states" in problem
    assert [cost.key for cost in report.costs] == ["attention_transfer"]


def test_classes_that_differ_are_a_problem_and_not_a_crash(tmp_path):
    report = preflight(build("vit"), build("vit", num_labels=5, seed=5), _config(tmp_path), PIXELS)
    assert "the student has 3 classes and the teacher 5" in report.problems[0]


def test_settings_that_would_be_wrong_are_problems(tmp_path):
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    report = preflight(build("vit"), build("pvt", seed=5), _config(tmp_path, ["attention_transfer"], **kwargs), PIXELS)
    assert "wrong gradients under reentrant checkpointing" in report.problems[0]
    assert any("the teacher's attention comes as finished weights" in note for note in report.notes)


class _Distances(torch.nn.Module):
    """An operation without a second derivative in torch."""

    def forward(self, x):
        return x + 0.01 * torch.cdist(x, x).mean(-1, keepdim=True)


def test_an_operation_without_a_second_derivative_is_named_with_what_works(tmp_path):
    student = build("vit")
    student.vit.layers[0].layernorm_after = torch.nn.Sequential(student.vit.layers[0].layernorm_after, _Distances())
    (problem,) = preflight(student, build("vit", seed=5), _config(tmp_path, ["jacobian"]), PIXELS).problems
    assert problem.startswith("objective 'jacobian': an operation") and "_cdist_backward" in problem
    assert "noisy_kd" in problem and "estimator='finite_difference'" in problem
    fitting = {"name": "jacobian", "distance": "squared", "output": "all", "estimator": "finite_difference"}
    config = DistillationConfig(str(tmp_path), objectives=[fitting, {"name": "noisy_kd"}], use_cpu=True)
    assert not preflight(student, build("vit", seed=5), config, PIXELS).problems


def test_arguments_of_another_kind_are_refused(tmp_path):
    with pytest.raises(TypeError, match="args is TrainingArguments; expected DistillationConfig"):
        preflight(build("vit"), None, TrainingArguments(str(tmp_path)))
