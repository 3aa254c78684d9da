"""A student cut out of its teacher learns by every objective, whatever was cut."""

import math

import pytest

from hf_kdtl.models import make_student, plan
from hf_kdtl.objectives import OBJECTIVES
from tests.objectives.variants import VARIANTS
from tests.support.helpers import KD, trainer
from tests.support.representations import complete
from tests.support.tiny import build

CUTS = {
    "heads": {"heads": 3, "mlp": 0.5},
    "width": {"layers": 2, "heads": 1, "mlp": 24, "width": 20},
}


def cut(name, **more):
    teacher = build("vit", layers=3, num_attention_heads=4, seed=3)
    return make_student(teacher, **(CUTS[name] | more)), teacher


@pytest.mark.parametrize("name", CUTS)
def test_every_objective_has_a_value(name, tmp_path):
    student, teacher = cut(name)
    entries = [{"name": key} | complete(key, VARIANTS.get(key, [{}])[0], teacher) for key in OBJECTIVES]
    runner = trainer(tmp_path, student, teacher, objectives=entries)
    rows = [runner.train_dataset[i] for i in range(4)]
    terms = runner.objective_terms(runner.data_collator(rows))
    assert set(terms) >= set(OBJECTIVES)
    assert all(value.isfinite().all() for value in terms.values())


@pytest.mark.parametrize("source", ["attention", "jacobian", "hessian"])
def test_layer_rates_are_measured(source, tmp_path):
    student, teacher = cut("width")
    rates = {"mode": "discrepancy", "source": source}
    runner = trainer(tmp_path, student, teacher, objectives=KD, layer_rates=rates, max_steps=1)
    runner.train()
    assert math.isfinite(runner.state.log_history[-1]["train_loss"])
    assert all(math.isfinite(g["lr_multiplier"]) for g in runner.optimizer.param_groups)


def test_relation_heads_divide_the_heads_and_not_the_width():
    """3 heads of width 8: 24 columns of queries in a model of width 32."""
    student, teacher = cut("heads")
    pair = plan(student, teacher).pairs[-1]
    assert (pair.student.width, pair.student.heads, pair.student.attention_width) == (32, 3, 24)
    objective = OBJECTIVES["relation"]()
    objective.build(plan(student, teacher))
    assert objective._common_heads(pair) == 2  # of 1, 2, 4, 8: what divides 24 and 32, not above 3
