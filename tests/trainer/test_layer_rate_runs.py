"""Learning rates per layer in the trainer: measured, applied, logged, saved, and the same for every split."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import TrainerCallback

from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.models import Teacher, plan
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.optim import LayerRates, LayerwiseOptimizer, create_layerwise_optimizer
from tests.distributed.split_worker import run, work
from tests.support.helpers import KD, Images, and_slow, config, forked, largest_difference, pair, trainer, weights
from tests.support.tiny import build

TASK = [{"name": "task"}]
ATTENTION = {"source": "attention", "every": 2, "momentum": 0.5}
JACOBIAN = {"source": "jacobian", "every": 2, "momentum": 0.5}
SHORT = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def multipliers(runner):
    return {g["layer"]: g["lr_multiplier"] for g in runner.optimizer.param_groups if "layer" in g}


class Calls:
    """How often a module ran."""

    def __init__(self, module):
        self.number = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, module, args):
        self.number += 1


class Watch(TrainerCallback):
    """(rate of the schedule, update / gradient of every tensor) of each step; for SGD."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        groups = optimizer.param_groups
        self.before = [(g["layer"], p, p.detach().clone(), p.grad.clone()) for g in groups for p in g["params"]]

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        found = {}
        for layer, p, before, gradient in self.before:
            sure = gradient.abs() > 1e-3
            if sure.any():
                found.setdefault(layer, []).extend(((before - p.detach())[sure] / gradient[sure]).tolist())
        self.steps.append((optimizer.param_groups[0]["lr"], found))


# ---- What the rates are ----


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}, {"bf16": True}, {"optim": "sgd"}],
    ids=["plain", "accumulated and clipped", "bf16", "sgd"],
)
def test_uniform_is_no_layer_rates_bitwise(tmp_path, settings):
    student, teacher = pair(), build("vit", seed=5, hidden_size=48, num_attention_heads=3)
    objectives = [*KD, {"name": "hidden_states"}]
    runs = [
        trainer(
            tmp_path,
            student[0],
            teacher,
            objectives=objectives,
            layer_rates=rates,
            weight_decay=0.1,
            **SHORT | settings,
        )
        for rates in (None, {"mode": "uniform"})
    ]
    for runner in runs:
        torch.manual_seed(3)  # the projectors' first weights
        runner.train()
    assert largest_difference(*(weights(r.distiller) for r in runs)) == 0
    losses = [[line["loss"] for line in r.state.log_history if "loss" in line] for r in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert largest_difference(weights(runs[0].model), weights(student[0])) > 1e-4


@pytest.mark.parametrize("rates", [ATTENTION, ATTENTION | {"map": "class"}, JACOBIAN], ids=str)
def test_the_first_measurement_is_of_the_first_step_and_applied_to_it(tmp_path, rates):
    """One step whose window is all the data: measured by hand, and read from the update itself."""
    (student, teacher), watch, data = pair(), Watch(), Images(8)
    settings = {"layer_rates": rates | {"momentum": 0.0}, "max_steps": 1, "gradient_accumulation_steps": 2}
    runner = trainer(
        tmp_path, student, teacher, data, callbacks=[watch], per_device_train_batch_size=4, **SGD, **settings
    )
    by_hand = LayerRates(rates | {"momentum": 0.0}, student, plan(student, teacher))
    expected = by_hand.measure(student, teacher, [data.pixels])
    runner.train()
    assert runner.layer_rates.rates.multipliers == pytest.approx(expected, rel=1e-4)
    assert max(abs(m - 1) for m in expected) > 1e-3
    ((lr, found),) = watch.steps
    assert lr == 0.1 and found.keys() == {"embeddings", 0, 1, "norm", "head"}
    for layer, updates in found.items():
        assert torch.tensor(updates).median() == pytest.approx(0.1 * multipliers(runner)[layer], rel=1e-3)
    assert multipliers(runner)[0] == runner.layer_rates.rates.multipliers[0] and multipliers(runner)["head"] == 1


def test_every_measurement_is_logged_and_only_they_move_the_rates(tmp_path):
    student, teacher = pair()
    runner = trainer(tmp_path, student, teacher, layer_rates=ATTENTION, **SHORT)
    runner.train()
    history = runner.layer_rates.history
    assert [entry["step"] for entry in history] == [0, 2]
    lines = [line for line in runner.state.log_history if "loss" in line]
    for line, of in zip(lines, (0, 0, 1, 1), strict=True):
        for block in (0, 1):
            assert line[f"lr_multiplier/{block}"] == history[of]["multipliers"][block]
            assert line[f"lr_discrepancy/{block}"] == history[of]["discrepancies"][str(block)]
    runner.train()
    assert [entry["step"] for entry in runner.layer_rates.history] == [0, 2], "a second training is a run of its own"


@pytest.mark.parametrize("rates, extra", [(ATTENTION, 0), (JACOBIAN, 1)], ids=["attention", "jacobian"])
def test_attention_costs_no_forward(tmp_path, rates, extra):
    student, teacher = pair()
    runner = trainer(tmp_path, student, teacher, layer_rates=rates, **SHORT)
    calls = Calls(runner.teacher.model), Calls(runner.model)
    runner.create_optimizer()  # groups are distinguished by a forward
    for counted in calls:
        counted.number = 0
    runner.train()
    before = [1, 2]  # what gets a gradient is looked at before training, and the student's own loss
    assert [counted.number - one for counted, one in zip(calls, before, strict=True)] == [4 + 2 * extra] * 2


def test_the_teacher_may_serve_the_rates_alone(tmp_path):
    student, teacher = pair()
    runner = trainer(
        tmp_path, student, teacher, objectives=TASK, layer_rates=ATTENTION, eval_dataset=Images(4), **SHORT
    )
    calls = Calls(runner.teacher.model)
    assert runner.layer_rates is not None
    calls.number = 0
    runner.train()
    runner.evaluate()
    assert calls.number == 2, "it runs where something is measured, and nowhere else"
    plain = trainer(tmp_path, student, objectives=TASK, **SHORT)
    plain.train()
    assert largest_difference(weights(plain.model), weights(runner.model)) > 1e-6
    assert plain.state.log_history[0]["loss"] == runner.state.log_history[0]["loss"]


def test_loss_weight_weighs_the_pairs_and_leaves_the_rates(tmp_path):
    student, teacher = pair()
    objectives = [*KD, {"name": "attention_transfer", "weight": 100.0}]
    rates = {"mode": "loss_weight", "momentum": 0.0, "every": 1}
    runner = trainer(tmp_path, student, teacher, objectives=objectives, layer_rates=rates, **SHORT | {"max_steps": 2})
    inputs = {k: torch.stack([row[k] for row in Images(6)]) for k in ("pixel_values", "labels")}
    runner.train()
    weighing = runner.layer_rates.rates.multipliers
    assert set(multipliers(runner).values()) == {1.0} and max(weighing) > 1.001
    runner.model.eval()
    with torch.no_grad():
        found = runner.objective_terms(inputs)["attention_transfer"]
        alone = []
        for layer in (0, 1):
            one = OBJECTIVES["attention_transfer"](layers=[[layer, layer]])
            one.build(runner.distiller.plans["teacher"])
            models = (Teacher(runner.model), runner.teacher)
            captures = [model.capture(inputs["pixel_values"], one.needs(None)[0]) for model in models]
            alone.append(one(*captures, {})[:, 0])
    expected = (weighing[0] * alone[0] + weighing[1] * alone[1]) / 2
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, (alone[0] + alone[1]) / 2, rtol=1e-4)


@pytest.mark.parametrize("rates", and_slow([ATTENTION, JACOBIAN], [JACOBIAN | {"wrt": "inputs"}]), ids=str)
@pytest.mark.parametrize("settings", [{"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_under_autocast_and_checkpointing(tmp_path, rates, settings):
    student, teacher = pair()
    plain, other = (trainer(tmp_path, student, teacher, layer_rates=rates, **SHORT | s) for s in ({}, settings))
    for runner in (plain, other):
        runner.train()
    found = [r.layer_rates.history for r in (plain, other)]
    tolerance = 0.05 if "bf16" in settings else 1e-4
    for a, b in zip(*found, strict=True):
        assert b["multipliers"] == pytest.approx(a["multipliers"], rel=tolerance)


def test_a_batch_of_which_some_images_are_differentiated_is_measured_on_all(tmp_path):
    """An objective with a fraction runs the batch in two parts; the captures are put together again."""
    student, teacher = pair()
    objectives = [*KD, {"name": "jacobian", "fraction": 0.5}]
    plain, parts = (
        trainer(tmp_path, student, teacher, Images(4), o, layer_rates=ATTENTION, **SHORT | {"max_steps": 1})
        for o in (KD, objectives)
    )
    for runner in (plain, parts):
        runner.train()
    for key in ("0", "1"):
        a, b = (r.layer_rates.history[0]["discrepancies"][key] for r in (plain, parts))
        assert b == pytest.approx(a, rel=1e-4)


def test_lora(tmp_path):
    student, teacher = pair()
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    runner = trainer(tmp_path, get_peft_model(student, lora), teacher, layer_rates=ATTENTION, **SHORT)
    start = weights(runner.model)
    runner.train()
    assert list(multipliers(runner)) == [0, 1, "head"]
    assert sum(runner.layer_rates.rates.multipliers) == pytest.approx(2, abs=1e-8)
    moved = {n for n, w in weights(runner.model).items() if not torch.equal(w, start[n])}
    assert moved and all("lora" in name or "classifier" in name for name in moved)


# ---- What must survive ----

SAVED = SHORT | {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "warmup_steps": 2}


@pytest.mark.parametrize(
    "rates", and_slow([ATTENTION, {"mode": "permuted", "every": 2}, {"mode": "frozen"}], [JACOBIAN]), ids=str
)
def test_resume_is_bitwise(tmp_path, rates):
    student, teacher = pair()
    settings = SAVED | {"layer_rates": rates, "gradient_accumulation_steps": 2}
    full = trainer(tmp_path, student, teacher, **settings)
    full.train()
    for step in (3, 4) if rates == JACOBIAN else (3,):
        again = trainer(tmp_path, student, teacher, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert largest_difference(weights(full.distiller), weights(again.distiller)) == 0
        assert again.layer_rates.state_dict() == full.layer_rates.state_dict()
        assert multipliers(again) == multipliers(full) and len(set(multipliers(full).values())) > 1
    steps = [entry["step"] for entry in full.layer_rates.history]
    assert steps == ([0] if rates.get("mode") == "frozen" else [0, 2, 4])


def test_a_checkpoint_of_other_rates_is_refused(tmp_path):
    student, teacher = pair()
    settings = SAVED | {"max_steps": 1}
    trainer(tmp_path / "with", student, teacher, layer_rates=ATTENTION, **settings).train()
    trainer(tmp_path / "without", student, teacher, **settings).train()
    settings["max_steps"] = 2
    for folder, rates, message in (
        ("with", None, "was trained with layer_rates and this run has none. Resume with the same layer_rates"),
        ("without", ATTENTION, "was trained with no layer_rates and this run has them"),
        ("with", {"mode": "llrd"}, "the state is of mode 'discrepancy' and this run has 'llrd'"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path / folder, student, teacher, layer_rates=rates, **settings).train(True)
    changed = trainer(tmp_path / "with", student, teacher, layer_rates=ATTENTION | {"every": 1}, **settings)
    changed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in changed.layer_rates.history] == [0, 1]


def test_the_best_model_does_not_bring_its_rates_back(tmp_path):
    student, teacher = pair()
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "eval_dataset": Images(4)}
    best |= {"metric_for_best_model": "loss", "greater_is_better": True, "learning_rate": 1e-2}
    runner = trainer(tmp_path, student, teacher, layer_rates=ATTENTION, **SAVED | best)
    runner.train()
    assert runner.state.best_global_step < 6
    assert [entry["step"] for entry in runner.layer_rates.history] == [0, 2, 4]


SPLIT = {"objectives": [*KD, {"name": "attention_transfer"}], "max_steps": 3, "learning_rate": 0.5}


@pytest.mark.parametrize("rates", and_slow([ATTENTION | {"every": 1}], [JACOBIAN | {"every": 1}]), ids=str)
def test_two_processes_equal_one(tmp_path, rates):
    settings = SPLIT | {"layer_rates": rates}
    single = run(tmp_path / "single", 8, 1, "hard", **settings)
    split = run(tmp_path / "split", 2, 4, "hard", **settings)
    two, world, ranks, _ = _two(tmp_path, settings)
    assert world == 2 and len(ranks) == 2 and ranks[0] == ranks[1] and len(ranks[0]) == 3
    for other in (split.layer_rates.history, ranks[0]):
        for a, b in zip(single.layer_rates.history, other, strict=True):
            assert b["multipliers"] == pytest.approx(a["multipliers"], rel=1e-4)
    assert max(abs(m - 1) for m in ranks[0][-1]["multipliers"]) > 1e-3
    assert largest_difference(weights(single.distiller), two) < 1e-6
    assert largest_difference(weights(single.distiller), weights(split.distiller)) < 1e-6


def test_reduce_on_plateau_on_two_processes(tmp_path):
    """The scheduler is not accelerate's, so it steps once an evaluation on any number of ranks."""
    plateau = {"patience": 0, "factor": 0.5, "threshold": 10.0}  # no improvement is ever large enough
    settings = SPLIT | {"layer_rates": ATTENTION, "lr_scheduler_type": "reduce_lr_on_plateau"}
    settings |= {"lr_scheduler_kwargs": plateau, "eval_strategy": "steps", "eval_steps": 1}
    single = run(tmp_path / "single", 8, 1, "hard", eval_dataset=Images(4), **settings)
    expected = [line["learning_rate"] for line in single.state.log_history if "learning_rate" in line]
    two, world, _, logged = _two(tmp_path, settings)
    assert world == 2 and [line["learning_rate"] for line in logged if "learning_rate" in line] == expected
    assert len(set(expected)) > 1
    assert largest_difference(weights(single.distiller), two) < 1e-6


def _two(tmp_path, settings):
    out = tmp_path / "two.safetensors"
    forked(work, 2, out, 2, 2, "hard", settings)
    with safe_open(out, "pt") as file:
        message = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    ranks = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("two.safetensors.*.json"))]
    return tensors, int(message["world"]), ranks, json.loads(message["logged"])


def test_an_exception_inside_the_step_leaves_the_rates(tmp_path, monkeypatch):
    student, teacher = pair()
    rates = ATTENTION | {"momentum": 0.0}
    runner = trainer(tmp_path, student, teacher, layer_rates=rates, **SHORT | SGD | {"learning_rate": 0.25})
    seen = []

    def broken(optimizer, closure=None):
        seen.extend(group["lr"] for group in optimizer.param_groups)
        raise MemoryError("no memory")

    monkeypatch.setattr(torch.optim.SGD, "step", broken)
    with pytest.raises(MemoryError, match="no memory"):
        runner.train()
    assert len(set(seen)) > 1 and {group["lr"] for group in runner.optimizer.param_groups} == {0.25}


def test_a_step_that_was_broken_off_is_not_measured_twice(tmp_path):
    """An exception in the backward pass leaves a half-added measurement; the next step begins with none."""
    student, teacher = pair()
    runner = trainer(tmp_path, student, teacher, layer_rates=ATTENTION, **SHORT)
    rates = runner.layer_rates
    rates.begin(0)
    rates.add(runner.model, runner.teacher, Images(4).pixels)
    rates.begin(2)
    rates.add(runner.model, runner.teacher, Images(4).pixels)
    assert len(rates._rows) == 1
    rates.begin(3)
    assert not rates.measuring and not rates._rows


def test_a_nan_discrepancy_keeps_the_rate_and_is_counted(tmp_path):
    student, teacher = build("vit", layers=3), build("vit", layers=3, seed=5)
    with torch.no_grad():
        teacher.vit.layers[2].mlp.fc1.bias.fill_(math.nan)
    runner = trainer(tmp_path, student, teacher, objectives=TASK, layer_rates=ATTENTION, **SHORT)
    runner.train()
    assert [entry["discrepancies"]["2"] for entry in runner.layer_rates.history] == [None, None]
    assert runner.layer_rates.rates.ratios[2] == 1.0
    line = runner.state.log_history[-2]
    assert line["lr_discrepancies_skipped"] == 2 and "lr_discrepancy/2" not in line and line["lr_multiplier/2"] > 0


# ---- Optimizers ----


def test_a_foreign_optimizer_is_refused_with_the_call_that_makes_it_ours(tmp_path):
    student, teacher = pair()
    arguments = config(tmp_path, KD, layer_rates=ATTENTION, **SHORT)

    def made(**given):
        return DistillationTrainer(student, arguments, teacher=teacher, train_dataset=Images(), **given)

    message = r"the optimizer is AdamW, whose step .* hf_kdtl.optim.create_layerwise_optimizer\(student, args, obj"
    with pytest.raises(ValueError, match=message):
        made(optimizers=(torch.optim.AdamW(student.parameters()), None))
    with pytest.raises(ValueError, match=message):
        made(optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-3})).train()
    for given in (
        {"optimizers": (create_layerwise_optimizer(student, arguments), None)},
        {"optimizer_cls_and_kwargs": (LayerwiseOptimizer, {"args": arguments})},
    ):
        runner = made(**given)
        runner.train()
        found = multipliers(runner)
        assert [found[0], found[1]] == runner.layer_rates.rates.multipliers != [1.0, 1.0]


def test_rates_that_nobody_measures_reach_an_optimizer_that_the_user_made(tmp_path):
    arguments = config(tmp_path, TASK, layer_rates={"mode": "llrd", "decay": 0.5}, **SHORT | {"max_steps": 1})

    def made(kind, **options):
        given = {"optimizer_cls_and_kwargs": (kind, options), "train_dataset": Images()}
        return DistillationTrainer(build("vit"), arguments, **given)

    runner = made(LayerwiseOptimizer, args=arguments)
    runner.train()
    assert multipliers(runner)[1] == pytest.approx(2 * multipliers(runner)[0]) and multipliers(runner)["head"] == 1
    with pytest.raises(ValueError, match="the optimizer is SGD, whose step does not know the layers' rates"):
        made(torch.optim.SGD, lr=0.1).train()


def test_which_tensors_decay_is_what_an_override_says(tmp_path):
    class OfHead(DistillationTrainer):
        def get_decay_parameter_names(self, model):
            return [name for name, _ in model.named_parameters() if name.startswith("classifier.")]

    teacher = build("vit", seed=5, hidden_size=48, num_attention_heads=3)
    arguments = config(tmp_path, [*KD, {"name": "hidden_states"}], layer_rates=ATTENTION, weight_decay=0.1, **SHORT)
    runner = OfHead(build("vit"), arguments, teacher=teacher, train_dataset=Images())
    runner.train()
    names = {id(p): name for name, p in runner.distiller.named_parameters()}
    groups = runner.optimizer.param_groups
    decaying = {names[id(p)] for g in groups for p in g["params"] if g["weight_decay"]}
    projectors = {name for name in names.values() if name.startswith("objectives.") and name.endswith("weight")}
    assert decaying == {"student.classifier.weight", "student.classifier.bias"} | projectors and projectors


def test_a_group_that_an_override_adds_has_the_rate_of_the_schedule(tmp_path):
    extra = torch.nn.Parameter(torch.ones(1))

    class Extra(DistillationTrainer):
        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer(model)
            optimizer.add_param_group({"params": [extra], "lr": 0.5})
            return optimizer

        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) + extra.sum()

    settings = {"layer_rates": {"mode": "llrd"}, "optim": "sgd"} | SHORT
    arguments = config(tmp_path, [{"name": "task"}], **settings | {"max_steps": 1})
    runner = Extra(build("vit"), arguments, train_dataset=Images())
    runner.train()
    assert extra.item() == pytest.approx(0.5)
    assert multipliers(runner)[1] > multipliers(runner)[0] and set(multipliers(runner)) >= {0, 1, "head"}


def test_a_layerwise_optimizer_that_lacks_the_projectors_is_refused(tmp_path):
    student, teacher = build("vit"), build("vit", seed=5, hidden_size=48, num_attention_heads=3)
    arguments = config(tmp_path, [*KD, {"name": "hidden_states"}], layer_rates=ATTENTION, **SHORT)
    ours = create_layerwise_optimizer(student, arguments)
    runner = DistillationTrainer(student, arguments, teacher=teacher, train_dataset=Images(), optimizers=(ours, None))
    with pytest.raises(ValueError, match="does not hold the objectives' parameters"):
        runner.train()
    runner.optimizer = create_layerwise_optimizer(student, arguments, runner.distiller.objectives)
    runner.train()
    assert multipliers(runner)["objectives"] == 1


# ---- Refused ----


@pytest.mark.parametrize(
    "rates, message",
    [
        ({"mode": "discrepency"}, "unknown mode of layer_rates: 'discrepency'. Did you mean 'discrepancy'"),
        ({"source": "gradient"}, "unknown source of layer_rates: 'gradient'"),
        ({"r_min": 2.0, "r_max": 0.5}, r"\[r_min, r_max\] is \[2.0, 0.5\]; expected 0 < r_min < 1 < r_max"),
        ("{mode: llrd}", "layer_rates is not valid JSON.*--layer_rates .{.mode.: .llrd.}"),
        ([{"mode": "llrd"}], "expected a mapping such as"),
    ],
)
def test_bad_settings_are_refused_by_the_config(tmp_path, rates, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(str(tmp_path), layer_rates=rates)


def test_the_config_is_data(tmp_path):
    made = DistillationConfig(str(tmp_path), layer_rates='{"source": "jacobian"}')
    assert made.layer_rates == {"source": "jacobian"} == made.to_dict()["layer_rates"]
    assert DistillationConfig(str(tmp_path), layer_rates={}).rate_options.mode == "discrepancy", "the defaults"
    with pytest.raises(ValueError, match="optim is 'lomo', which cannot have a learning rate per layer"):
        DistillationConfig(str(tmp_path), layer_rates={"mode": "llrd"}, optim="lomo")


def test_what_does_not_fit_is_refused_before_training(tmp_path):
    student, teacher = pair()
    frozen, all_frozen = copy.deepcopy(student), copy.deepcopy(student)
    frozen.vit.layers[0].requires_grad_(False)
    all_frozen.vit.layers.requires_grad_(False)
    cases = [
        (student, None, KD[:1], {}, "layer_rates: mode 'discrepancy' compares .* none was given. .*'llrd'"),
        (student, teacher, KD[:1], {"mode": "llrd"}, "a teacher was given and no objective uses it"),
        (student, teacher, KD, {"mode": "loss_weight"}, "no objective has any. Add one"),
        (frozen, teacher, KD, {"layers": [[0, 0], [1, 1]]}, r"the student's blocks \[0\], which are frozen"),
        (frozen, teacher, KD, {}, "compares pairs of layers and has 1; expected two or more trainable"),
        (all_frozen, None, KD[:1], {"mode": "llrd"}, "no block of the student is trainable"),
        (student, teacher, KD, {"layers": [[0, 0], [7, 1]]}, "block 7 of the student, which has the blocks 0 to 1"),
        (build("levit"), build("levit", seed=5), KD, {}, "the student's patches are a single cell"),
    ]
    for model, of, objectives, rates, message in cases:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, model, of, objectives=objectives, layer_rates=rates, **SHORT).train()
