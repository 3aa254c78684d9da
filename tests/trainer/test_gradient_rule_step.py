"""A gradient rule inside the trainer: what the optimizer gets, however the batch was split, stopped or resumed."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import TrainerCallback

from hf_kdtl import DistillationConfig
from hf_kdtl.checkpoints.state import STATE_JSON
from hf_kdtl.trainer.checks import setting_problems
from hf_kdtl.utils.versions import CHECKPOINTING
from tests.distributed.split_worker import run, work
from tests.support.helpers import KD, Images, and_slow, config, forked, largest_difference, pair, trainer, weights
from tests.support.tiny import build

RULES = [
    {"name": "never_hurt"},
    {"name": "never_hurt", "scope": "tensor"},
    {"name": "never_hurt", "form": "orthogonal"},
    {"name": "pcgrad"},
    {"name": "layer_local"},
]
AGAINST = [{"name": "task", "weight": 0.3}, {"name": "logit_kd", "weight": 3.0, "temperature": 1.0}]
PAIRED = [{"name": "task"}, {"name": "attention_transfer", "weight": 100.0}, {"name": "hidden_states"}]


def _objectives(rule):
    return PAIRED if rule["name"] == "layer_local" else AGAINST


def _id(rule):
    return "-".join(map(str, rule.values()))


def _contradicted(student, teacher, number=8):
    """Images whose labels are the classes that the student finds likelier than the teacher by most."""
    data = Images(number)
    with torch.no_grad():
        mine, its = (model(pixel_values=data.pixels).logits.softmax(1) for model in (student, teacher))
    data.labels = (mine - its).argmax(1)
    return data


@pytest.mark.parametrize("rule", RULES, ids=_id)
def test_how_the_batch_is_split_changes_nothing(tmp_path, rule):
    settings = {"gradient_rule": rule, "objectives": _objectives(rule), "number": 24}
    one = run(tmp_path / "a", 8, 1, "some", **settings)
    split = run(tmp_path / "b", 2, 4, "some", **settings)
    assert one.state.global_step == split.state.global_step == 3
    assert largest_difference(weights(one.distiller), weights(split.distiller)) < 1e-5
    without = run(tmp_path / "c", 8, 1, "some", **settings | {"gradient_rule": None})
    assert largest_difference(weights(one.distiller), weights(without.distiller)) > 1e-4  # the rule did something


@pytest.mark.parametrize("rule", and_slow([RULES[0]], [RULES[-1]]), ids=_id)
def test_two_processes_equal_one(tmp_path, rule):
    settings = {"gradient_rule": rule, "objectives": _objectives(rule), "number": 40}
    single = run(tmp_path / "single", 8, 1, "some", **settings)
    forked(work, 2, tmp_path / "two", 2, 2, "some", settings)
    with safe_open(tmp_path / "two", "pt") as file:
        assert file.metadata()["world"] == "2"
        two = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert largest_difference(weights(single.distiller), two) < 1e-5


def test_what_an_interrupted_window_left_is_not_in_the_next_step(tmp_path):
    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise RuntimeError("between two micro-batches")

    student, teacher = pair()
    settings = {"gradient_rule": RULES[0], "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    settings |= {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1}
    runs = [trainer(tmp_path, student, teacher, Images(8), AGAINST, **settings) for _ in range(2)]
    interrupt = Interrupt()
    runs[0].add_callback(interrupt)
    with pytest.raises(RuntimeError, match="between two micro-batches"):
        runs[0].train()
    runs[0].remove_callback(interrupt)
    for one in runs:
        one.train()
    assert largest_difference(weights(runs[0].distiller), weights(runs[1].distiller)) < 1e-6


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_optimizer_gets_a_gradient_that_does_not_work_against_the_task(tmp_path, scope):
    class Look(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.seen.append({n: p.grad.clone() for n, p in runner.model.named_parameters() if p.grad is not None})

    def gradients(rule, objectives):
        nonlocal runner
        look = Look()
        runner = trainer(
            tmp_path, student, teacher, data, objectives, gradient_rule=rule, max_steps=1, optim="sgd",
            learning_rate=0.0, max_grad_norm=0.0, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            callbacks=[look],
        )  # fmt: skip
        runner.train()
        return look.seen[0]

    runner = None
    student, teacher = pair()
    data = _contradicted(student, teacher)
    g = gradients(None, [{"name": "task", "weight": 0.3}, {"name": "logit_kd", "weight": 0.0}])
    plain = gradients(None, AGAINST)
    ruled = gradients({"name": "never_hurt", "scope": scope}, AGAINST)

    def inner(a, b):
        return sum((a[n].double() * b[n].double()).sum().item() for n in g)

    transfer = {n: plain[n] - g[n] for n in g}
    cosine = inner(g, transfer) / (inner(g, g) * inner(transfer, transfer)) ** 0.5
    assert cosine < -0.2, cosine  # they do conflict
    assert inner(g, plain) < inner(g, g)
    assert inner(g, ruled) >= inner(g, g) * (1 - 1e-5)


def test_layer_local_gives_each_block_its_own_pair_alone(tmp_path):
    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append({n: p.grad.clone() for n, p in runner.model.named_parameters() if p.grad is not None})

    student, teacher = build("vit", layers=3), build("vit", layers=3, seed=5)
    data, seen = Images(8), []
    # The weights make each pair's term large beside rounding.
    entries = [{"name": "task"}, {"name": "attention_transfer", "weight": 1e4, "layers": [[0, 0], [2, 1]]}]
    for rule in (None, {"name": "layer_local"}):
        weighted = entries if rule else [entries[0], entries[1] | {"weight": 0.0}]
        runner = trainer(
            tmp_path, student, teacher, data, weighted, gradient_rule=rule, max_steps=1, optim="sgd",
            learning_rate=0.0, max_grad_norm=0.0, callbacks=[Look()],
        )  # fmt: skip
        runner.train()
    task, got = seen
    # By hand: the energies of two blocks, one gradient of each pair's term by its own block's parameters.
    model = copy.deepcopy(student).train()
    outputs, its = (m(pixel_values=data.pixels, output_hidden_states=True).hidden_states for m in (model, teacher))
    reached = set()
    for s, t in ((0, 0), (2, 1)):
        mine, target = (F.normalize(h[i + 1][:, 1:].square().mean(-1), dim=-1) for h, i in ((outputs, s), (its, t)))
        term = 1e4 * (mine - target.detach()).square().mean(-1).sum() / 2 / 8
        block = dict(model.vit.layers[s].named_parameters(prefix=f"vit.layers.{s}"))
        for name, gradient in zip(block, torch.autograd.grad(term, block.values(), retain_graph=True), strict=True):
            scale = gradient.abs().max().clamp(min=1e-3)
            assert torch.allclose((got[name] - task[name]) / scale, gradient / scale, atol=1e-4), name
            reached.add(name)
    assert len(reached) > 10
    for name in got.keys() - reached:  # among them the block between the two, and the embeddings
        assert torch.equal(got[name], task[name]), name


def test_clipping_and_layer_rates_act_after_the_rule(tmp_path):
    student, teacher = pair()
    runner = trainer(
        tmp_path, student, teacher, Images(8), AGAINST, gradient_rule={"name": "never_hurt"}, max_steps=1,
        max_grad_norm=1e-3, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
        layer_rates={"mode": "llrd", "decay": 0.5},
    )  # fmt: skip
    before = weights(runner.model)
    runner.train()
    moved = {name: (value - before[name]).norm().item() for name, value in weights(runner.model).items()}
    clipped = sum(step**2 for step in moved.values()) ** 0.5
    assert 0 < clipped < 4e-3  # the norm is 1e-3 before the multipliers, of which the largest is below 4
    assert runner.state.log_history[0]["grad_norm"] > 1e-2


@pytest.mark.parametrize("rule", [{"name": "never_hurt", "form": "orthogonal", "decay": 0.5}, RULES[-1]], ids=_id)
def test_resume_is_bitwise_with_the_decay_and_the_history(tmp_path, rule):
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_strategy": "steps",
        "save_steps": 2, "gradient_rule": rule, "logging_steps": 1,
    }  # fmt: skip
    student, teacher = pair()
    full = trainer(tmp_path, student, teacher, Images(8), _objectives(rule), **settings)
    full.train()
    again = trainer(tmp_path, student, teacher, Images(8), _objectives(rule), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert largest_difference(weights(full.distiller), weights(again.distiller)) == 0.0
    assert len(full.gradient_rule.history) == 6
    assert again.gradient_rule.history == full.gradient_rule.history
    state = json.loads(Path(tmp_path, "checkpoint-4", STATE_JSON).read_text())
    assert state["gradient_rule"]["options"]["name"] == rule["name"]


def test_what_is_logged(tmp_path):
    student, teacher = pair()
    runner = trainer(
        tmp_path, student, teacher, _contradicted(student, teacher, 16), AGAINST, max_steps=3, optim="sgd",
        gradient_rule={"name": "never_hurt"}, learning_rate=0.1, max_grad_norm=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    runner.train()
    for line in runner.state.log_history[:-1]:
        assert -1 <= line["gradient_rule/cosine"] <= 1
        assert 0 <= line["gradient_rule/conflicting"] <= 1
        assert 0 <= line["gradient_rule/removed"] <= 1
        # SGD without momentum keeps the law for the step: <g, step> >= lr <g, g> > 0.
        assert line["gradient_rule/task_step"] > 0
    assert any(line["gradient_rule/cosine"] < 0 for line in runner.state.log_history[:-1])
    layers = runner.gradient_rule.history[0]["cosine"]
    assert {"embeddings", "0", "1", "head"} <= layers.keys()


def test_no_gradients_are_left_and_the_backward_of_accelerate_is_back(tmp_path):
    student, teacher = pair()
    runner = trainer(tmp_path, student, teacher, gradient_rule={"name": "never_hurt"}, max_steps=1)
    runner.train()
    assert "backward" not in vars(runner.accelerator)
    assert all(p.grad is None for p in runner.distiller.parameters())


@pytest.mark.parametrize("rule", [RULES[0], RULES[-1]], ids=_id)
def test_the_graph_is_gone_after_the_step(tmp_path, rule):
    class Alive(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            held.append(runner._term_losses)

    student, teacher = pair()
    held = []
    runner = trainer(tmp_path, student, teacher, Images(8), _objectives(rule), gradient_rule=rule, max_steps=2)
    runner.add_callback(Alive())
    runner.train()
    assert held == [{}, {}]


def test_the_step_is_measured_whatever_the_logging_strategy(tmp_path):
    student, teacher = pair()
    settings = {"gradient_rule": {"name": "never_hurt"}, "logging_strategy": "epoch", "num_train_epochs": 2}
    runner = trainer(tmp_path, student, teacher, Images(16), AGAINST, **settings | {"logging_steps": 500})
    runner.train()
    lines = [line for line in runner.state.log_history if "gradient_rule/cosine" in line]
    assert len(lines) == 2 and all("gradient_rule/task_step" in line for line in lines)


def test_checkpointing_and_bf16_agree_with_plain(tmp_path):
    student, teacher = pair()
    settings = {"gradient_rule": {"name": "never_hurt"}, "max_steps": 2, "optim": "sgd", "learning_rate": 0.05}
    plain = trainer(tmp_path, student, teacher, Images(16), AGAINST, **settings)
    plain.train()
    saved = trainer(tmp_path, student, teacher, Images(16), AGAINST, **settings, **{CHECKPOINTING: True})
    saved.train()
    assert largest_difference(weights(plain.model), weights(saved.model)) < 1e-6
    half = trainer(tmp_path, student, teacher, Images(16), AGAINST, **settings, bf16=True)
    half.train()
    assert 0 < largest_difference(weights(plain.model), weights(half.model)) < 2e-2


@pytest.mark.slow
def test_compiled_models_agree_with_plain(tmp_path):
    student, teacher = pair()
    settings = {"gradient_rule": {"name": "never_hurt"}, "max_steps": 2, "optim": "sgd", "learning_rate": 0.05}
    plain = trainer(tmp_path, student, teacher, Images(16), AGAINST, **settings)
    plain.train()
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    again = trainer(tmp_path, student, teacher, Images(16), AGAINST, **settings, **compiled)
    again.train()
    assert largest_difference(weights(plain.model), weights(again.model)) < 1e-5


class Freeze(TrainerCallback):
    """From the second step on, the student's body is frozen, or no longer."""

    def __init__(self, frozen):
        self.frozen = frozen

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.vit.requires_grad_(not self.frozen)


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_that_are_frozen_or_unfrozen_during_a_run(tmp_path, frozen):
    """Two terms whose gradients agree: the rule changes nothing, and the run is that without it."""
    found = []
    objectives = [{"name": "task"}, {"name": "task", "key": "again", "role": "transfer"}]
    for rule in (None, {"name": "never_hurt"}):
        runner = trainer(tmp_path, build("vit"), None, Images(24), objectives, gradient_rule=rule, max_steps=2)
        student = runner.model
        runner.optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        runner._given_optimizer = True
        student.vit.requires_grad_(frozen)
        runner.add_callback(Freeze(frozen))
        runner.evaluate(Images(4))  # builds what is trained, before the first step
        runner.train()
        found.append(weights(student))
    assert largest_difference(*found) < 1e-6
    moved = [name for name, before in weights(build("vit")).items() if not torch.equal(before, found[1][name])]
    assert {"vit.embeddings.cls_token", "classifier.weight"} <= set(moved)
    measured = [{k for k, v in entry["cosine"].items() if v is not None} for entry in runner.gradient_rule.history]
    assert measured[frozen] == {"head"} and measured[not frozen] == {"embeddings", "0", "1", "norm", "head"}


def test_a_term_without_gradient_adds_nothing(tmp_path):
    # No image takes part in most steps, so the transfer gradient is absent there.
    student, teacher = pair()
    objectives = [{"name": "task"}, {"name": "jacobian", "fraction": 0.05}]
    runner = trainer(
        tmp_path, student, teacher, Images(8), objectives, gradient_rule={"name": "never_hurt"}, max_steps=4
    )
    runner.train()
    assert runner.state.global_step == 4
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())


@pytest.mark.parametrize(
    ("rule", "objectives", "says"),
    [
        ("never_hurt", KD, "expected a mapping"),
        ({"name": "never_hurts"}, KD, "Did you mean 'never_hurt'"),
        ({"name": "never_hurt", "scop": "tensor"}, KD, "Did you mean 'scope'"),
        ({"name": "never_hurt", "scope": "layer"}, KD, "scope is 'layer'"),
        ({"name": "never_hurt", "form": "orthogonal", "alpha": -1.0}, KD, "alpha is -1.0"),
        ({"name": "never_hurt", "form": "orthogonal", "decay": 1.5}, KD, "decay is 1.5"),
        ({"name": "never_hurt"}, [{"name": "logit_kd"}], "protects the task"),
        ({"name": "never_hurt"}, [{"name": "task", "weight": 0}, {"name": "logit_kd"}], "protects the task"),
        ({"name": "layer_local"}, KD, "logit_kd pairs no layers"),
    ],
)
def test_refusals(tmp_path, rule, objectives, says):
    with pytest.raises(ValueError, match=says):
        config(tmp_path, objectives, gradient_rule=rule if isinstance(rule, dict) else json.dumps(rule))


def test_a_rule_with_nothing_to_protect_from_is_reported(tmp_path, monkeypatch):
    message = []
    monkeypatch.setattr("hf_kdtl.config.logger.warning_once", message.append)
    DistillationConfig(str(tmp_path), objectives=[{"name": "task"}], gradient_rule={"name": "never_hurt"})
    assert message and "nothing to protect" in message[0]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"fp16": True}, "fp16"),
        ({CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}, "reentrant"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(tmp_path, settings, says):
    arguments = config(tmp_path, KD, gradient_rule={"name": "never_hurt"})
    for name, value in settings.items():
        setattr(arguments, name, value)
    assert any("gradient_rule" in p and says in p for p in setting_problems(arguments, build("vit")))
