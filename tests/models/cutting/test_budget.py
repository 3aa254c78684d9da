"""Sizes within a budget."""

import itertools

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_kdtl.evaluation.cost import flops, parameters
from hf_kdtl.models import make_student
from hf_kdtl.models.cutting import budget as module
from hf_kdtl.models.student import Cut, plan_cut
from tests.models.cutting.test_cut import dinov3, teacher_of
from tests.support.helpers import and_slow
from tests.support.tiny import build

PIXELS = torch.zeros(1, 3, 32, 32)
FURTHER = ["dinov2", "dinov2_gated", "siglip", "convnext", "dinov3"]


@pytest.mark.parametrize(
    "family", and_slow(["vit", "swin"], ["dinov2", "dinov2_gated", "siglip", "convnext", "dinov3"])
)
@pytest.mark.parametrize(("kind", "share"), [("flops", 0.55), ("parameters", 0.6)])
def test_the_student_is_within_the_budget_and_near_it(family, kind, share):
    layers = [4, 3] if family in ("swin", "convnext") else 5
    teacher = dinov3(layers=layers) if family == "dinov3" else teacher_of(family, layers=layers)
    student = make_student(teacher, **{kind: share})
    cost = (lambda m: flops(m, PIXELS)) if kind == "flops" else parameters
    found = cost(student) / cost(teacher)
    assert (0.2 if family == "convnext" else 0.4) < found <= share
    with torch.no_grad():
        student(pixel_values=PIXELS)


def test_the_most_reduced_is_reduced_least():
    """Against all depths, head counts and MLP sizes, each built without memory and counted."""
    teacher = build("vit", layers=3, num_attention_heads=4, intermediate_size=12)
    settings = teacher.config.to_dict() | {"head_dim": 8}
    best = (0.0, 0.0)
    for layers, heads, mlp in itertools.product(range(1, 4), range(1, 5), range(1, 13)):
        sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp}
        with torch.device("meta"):
            cost = parameters(ViTForImageClassification(ViTConfig(**(settings | sizes))))
        if cost <= 0.5 * parameters(teacher):
            shares = (layers / 3, heads / 4, mlp / 12)
            best = max(best, (round(min(shares), 9), sum(shares)))
    found = plan_cut(teacher, Cut(parameters=0.5)).sizes
    shares = (found.depths[0] / 3, found.heads / 4, found.mlp / 12)
    assert (round(min(shares), 9), sum(shares)) == pytest.approx(best)


def test_a_number_is_absolute_and_what_is_given_stays(capsys):
    teacher = build("vit", layers=4, num_attention_heads=4)
    student = make_student(teacher, layers=3, heads=2, parameters=20_000)
    assert (student.config.num_hidden_layers, student.config.num_attention_heads) == (3, 2)
    assert 19_000 < parameters(student) <= 20_000
    printed = capsys.readouterr().out
    assert "heads of a block" in printed and f"{parameters(student):,}" in printed


@pytest.mark.parametrize("family", and_slow(["vit"], ["swin"]))
def test_a_budget_that_cannot_be_met_names_the_nearest(family):
    teacher = build(family, layers=[2, 2] if family == "swin" else 3)
    with pytest.raises(
        ValueError, match=r"flops=0.001 cannot be met.*nearest that can be met is flops=0\.\d+"
    ) as error:
        make_student(teacher, flops=0.001)
    nearest = float(str(error.value).split("flops=")[-1].split()[0])
    make_student(teacher, flops=nearest)
    with pytest.raises(ValueError, match="cannot be met"):
        make_student(teacher, flops=nearest - 0.01)


@pytest.mark.parametrize("value", [0, -1, "half", True])
def test_a_budget_is_a_number(value):
    with pytest.raises(ValueError, match="type a number above 0"):
        make_student(build("vit"), flops=value)


def test_latency_is_met_by_less_arithmetic(monkeypatch):
    """With a clock that counts parameters: a millisecond each 10,000."""
    monkeypatch.setattr(
        module, "latency", lambda models, repeats: {"student": {"median": parameters(models["student"][0]) / 1e4}}
    )
    teacher = build("vit", layers=6, num_attention_heads=4)
    full = parameters(teacher) / 1e4
    plan = plan_cut(teacher, Cut(latency_ms=full / 2))
    assert 0.85 * full / 2 < plan.after.parameters / 1e4 <= full / 2
    assert plan.latency_ms == (pytest.approx(full), pytest.approx(plan.after.parameters / 1e4))
    assert "ms of an image" in str(plan)
    assert plan_cut(teacher, Cut(latency_ms=full)).blocks == list(range(6))
    with pytest.raises(ValueError, match=r"latency_ms=0.001 cannot be met.*nearest that can be met is latency_ms="):
        plan_cut(teacher, Cut(latency_ms=0.001))
