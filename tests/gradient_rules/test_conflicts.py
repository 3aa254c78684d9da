"""What the optimizer's step did to the task, and what there is to tell of the two gradients."""

import json
import math

import pytest
import torch
from torch import nn

from hf_kdtl.functional import surgery
from hf_kdtl.functional.surgery import Products, inner_products
from hf_kdtl.gradient_rules import GRADIENT_RULES, GradientAccumulator
from hf_kdtl.gradient_rules.conflicts import ConflictLog
from tests.gradient_rules.small import Small, dot

# ---- What the optimizer's step did ----


def watched(small):
    window = small.window()
    window.watch = True
    window.add(*small.terms(), small.pairs)
    window.write(0)
    return window


def test_sgd_keeps_the_promise_and_clipping_does_not_spoil_the_figure():
    small = Small(torch.float64)
    optimizer = torch.optim.SGD([p for _, p in small.parameters], lr=0.1)
    g = small.sides()[0]
    window = watched(small)
    result = [None if r is None else r.clone() for r in small.gradients()]
    norm = torch.nn.utils.clip_grad_norm_([p for _, p in small.parameters], 1e-3).item()
    window.before_step()
    optimizer.step()
    window.after_step()
    assert norm > 0.01
    assert window.log(1)["gradient_rule/task_step"] == pytest.approx(0.1 * 1e-3 / norm * dot(g, result), rel=1e-3)


def two_numbers(optimizer, rule="never_hurt", lr=0.1, watch=True):
    """g = (1, .1) and d = (-2, 20) of one tensor; a second tensor has a task gradient alone."""
    w, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    window = GradientAccumulator(GRADIENT_RULES[rule](), [("w", w), ("other", other)], ["0", "1"], {}, {})
    window.watch = watch
    window.add(w @ torch.tensor([1.0, 0.1]) + 0 * other.sum(), {"d": w @ torch.tensor([-2.0, 20.0])}, {})
    window.write(0)
    made = optimizer([w, other], lr=lr)
    window.before_step()
    made.step()
    window.after_step()
    return window.log(1)


def test_adamw_does_not_keep_it_and_that_is_seen():
    # METHODS' example: no conflict, and yet <g, step> = -.9 times the rate.
    adam = two_numbers(lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.0))
    assert adam["gradient_rule/task_step"] == pytest.approx(-0.9 * 0.1, rel=1e-4)
    assert adam["gradient_rule/removed"] == 0.0 and adam["gradient_rule/cosine"] == pytest.approx(0.0, abs=1e-8)
    sgd = two_numbers(lambda p, lr: torch.optim.SGD(p, lr))
    assert sgd["gradient_rule/task_step"] == pytest.approx(0.1 * 1.01, rel=1e-5)


def test_a_gradient_of_the_task_alone_is_measured_as_it_was_before_clipping():
    w = nn.Parameter(torch.zeros(2))
    window = GradientAccumulator(GRADIENT_RULES["never_hurt"](), [("w", w)], ["0"], {}, {})
    window.watch = True
    window.add(w.sum(), {}, {})
    window.write(0)
    w.grad.mul_(0.5)
    window.before_step()
    w.data.sub_(w.grad)
    window.after_step()
    assert window.log(1)["gradient_rule/task_step"] == 1.0


def test_what_is_not_watched_is_not_measured():
    assert "gradient_rule/task_step" not in two_numbers(torch.optim.SGD, watch=False)


# ---- What there is to tell ----


def test_log_means_over_steps_and_history():
    small = Small()
    window = small.window()
    assert window.log(0) == {} and window.history == []
    message = []
    for wrong, shift in ((1.0, 1), (0.5, 0)):  # the first conflicts, the second does not
        g, d = small.sides(wrong=wrong, shift=shift)
        message.append(surgery.conflict(inner_products(g, d)))
        window.add(*small.terms(wrong=wrong, shift=shift), small.pairs)
        window.write(0)
    logged = window.log(7)
    for name in ("cosine", "conflicting", "removed"):
        assert logged[f"gradient_rule/{name}"] == pytest.approx(sum(getattr(s, name) for s in message) / 2, rel=1e-6)
    (entry,) = window.history
    assert entry["step"] == 7 and entry["task_step"] is None
    assert entry["removed"] == pytest.approx(logged["gradient_rule/removed"], rel=1e-5)
    assert entry["conflicting"] == {"rest": 0.5, "0": 0.5, "1": 0.5, "objectives": None}
    assert entry["all_layers"] == {
        "cosine": pytest.approx(logged["gradient_rule/cosine"], rel=1e-5),
        "conflicting": 0.5,
    }
    assert -0.1 < entry["cosine"]["0"] < 0.5 and entry["cosine"]["objectives"] is None
    g, d = small.sides(wrong=1.0)
    block = [i for i, (n, _) in enumerate(small.parameters) if ".layers.0." in n]
    a, b = [g[i] for i in block], [d[i] for i in block]
    first = dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))
    assert entry["cosine"]["0"] == pytest.approx((first + 1) / 2, rel=1e-5)  # the second step's d is g / 2
    assert window.log(8) == {} and len(window.history) == 1


def test_figures_of_layers_by_hand():
    record = ConflictLog(["a", "a", "b"])
    for both in (-1.0, 2.0, 2.0):
        # The second tensor has no task gradient: it is in no figure.
        products = [Products(4.0, both, 1.0), Products(0.0, 0.0, 100.0), Products(0.0, 0.0, 1.0)]
        record.add(surgery.conflict(products), products)
    record.task_step = 0.25
    logged = record.log(3)
    assert logged["gradient_rule/cosine"] == pytest.approx((-0.5 + 1 + 1) / 3)
    assert logged["gradient_rule/conflicting"] == pytest.approx(1 / 3)
    assert logged["gradient_rule/removed"] == pytest.approx(0.5 / 3)
    (entry,) = record.history
    assert entry == {
        "step": 3,
        "cosine": {"a": 0.5, "b": None},
        "conflicting": {"a": pytest.approx(1 / 3), "b": None},
        "all_layers": {"cosine": 0.5, "conflicting": pytest.approx(1 / 3)},
        "removed": pytest.approx(1 / 6, rel=1e-5),
        "task_step": 0.25,
    }
    record.add(surgery.conflict(products), products)
    assert "gradient_rule/task_step" not in record.log(4) and record.history[1]["task_step"] is None


def test_state_round_trip_and_a_run_that_begins_again():
    small = Small()
    window = small.window("never_hurt", form="orthogonal")
    for number in (1, 2, 3):
        window.add(*small.terms(), small.pairs)
        window.write(0)
        window.log(number)
    state = json.loads(json.dumps(window.state_dict(), allow_nan=False))
    assert state["options"] == {
        "name": "never_hurt",
        "form": "orthogonal",
        "scope": "global",
        "alpha": 0.1,
        "decay": 0.99,
    }
    other = small.window("never_hurt", form="orthogonal")
    other.load_state_dict(state)
    assert other.history == window.history and [e["step"] for e in other.history] == [1, 2, 3]
    other.add(*small.terms(), small.pairs)
    other.write(0)
    other.log(2)  # resumed from an earlier checkpoint, or begun again
    assert [e["step"] for e in other.history] == [1, 2] and len(window.history) == 3


def test_one_layer_a_parameter():
    small = Small()
    with pytest.raises(ValueError):
        GradientAccumulator(GRADIENT_RULES["pcgrad"](), small.parameters, ["x"], {}, {})
