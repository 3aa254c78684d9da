"""What a user changes of the trainer or its settings after construction: it acts, or is refused in a sentence."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_kdtl import DistillationTrainer
from hf_kdtl.models.quantization import RoundedLinear
from hf_kdtl.optim.layerwise import is_layerwise
from tests.support.helpers import CLASSES, KD, Images, config, largest_difference, pair, trainer, weights
from tests.support.tiny import build

TASK = {"name": "task"}
L2_SP = [TASK, {"name": "l2_sp", "weight": 0.5}]
RUN = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3}


class Change(TrainerCallback):
    """Calls a function of the arguments at the start of step 2."""

    def __init__(self, change):
        self.change = change

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.change(args)


def _logged(runner):
    return [line for line in runner.state.log_history if "grad_norm" in line]


# ---- During training ----


@pytest.mark.parametrize("settings", [{}, {"gradient_rule": {"name": "pcgrad"}}], ids=["sum", "rule"])
def test_weights_of_a_schedule_act_at_the_next_step(tmp_path, settings):
    student, teacher = pair()

    def fade(args):
        args.objectives[1]["weight"] = 0.1

    def run(*callbacks):
        runner = trainer(tmp_path, student, teacher, callbacks=[*callbacks], **RUN, **settings)
        runner.train()
        return runner, [line["loss"] - 0.3 * line["task"] for line in _logged(runner)], _logged(runner)

    runner, transfer, lines = run(Change(fade))
    for value, line, weight in zip(transfer, lines, (0.7, 0.1, 0.1), strict=True):
        assert value == pytest.approx(weight * line["logit_kd"], rel=1e-4)
    _, _, steady = run()
    assert lines[0]["grad_norm"] == steady[0]["grad_norm"] and lines[1]["grad_norm"] != steady[1]["grad_norm"]
    assert runner.distiller.weights == {"task": 0.3, "logit_kd": 0.1}


def test_a_schedule_keeps_every_term_where_all_have_the_role_task(tmp_path):
    entries = [TASK, {"name": "jacobian_norm", "role": "task", "weight": 5.0}]
    fade = Change(lambda args: args.objectives[1].update(weight=2.0))
    runner = trainer(tmp_path, build("vit"), objectives=entries, callbacks=[fade], **RUN)
    runner.train()
    for line, weight in zip(_logged(runner), (5.0, 2.0, 2.0), strict=True):
        assert line["loss"] == pytest.approx(line["task"] + weight * line["jacobian_norm"], rel=1e-4)


def test_a_weight_that_is_measured_stays_beside_a_schedule(tmp_path):
    student, teacher = pair()
    entries = [{**TASK, "weight": 1.0}, {"name": "logit_kd", "weight": "auto"}]
    fade = Change(lambda args: args.objectives[0].update(weight=0.5))
    runner = trainer(tmp_path, student, teacher, objectives=entries, callbacks=[fade], **RUN)
    runner.train()
    assert runner.distiller.weights == {"task": 0.5} | runner.auto_weights.weights


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda args: args.objectives[1].update(temperature=2.0), r"args\.objectives changed during training, where"),
        (lambda args: args.objectives[1].update(weight="auto"), r"args\.objectives changed during training, where"),
        (lambda args: args.objectives[1].update(weight=-1.0), "weight is -1.0; expected a number of at least 0"),
        (lambda args: setattr(args, "gradient_rule", {"name": "pcgrad"}), r"args\.gradient_rule changed during"),
        (lambda args: setattr(args, "quantize", "int8"), r"args\.quantize changed during training, where"),
    ],
)
def test_other_changes_during_training_are_refused(tmp_path, change, message):
    student, teacher = pair()
    runner = trainer(tmp_path, student, teacher, callbacks=[Change(change)], objectives=copy.deepcopy(KD), **RUN)
    with pytest.raises(ValueError, match=message):
        runner.train()


def test_what_was_refused_during_training_acts_in_the_next(tmp_path):
    student, teacher = pair()
    change = Change(lambda args: args.objectives[1].update(temperature=2.0))
    runner = trainer(tmp_path, student, teacher, callbacks=[change], **RUN)
    with pytest.raises(ValueError, match=r"the next train\(\) takes it up"):
        runner.train()
    runner.train()
    assert runner.distiller.objective("logit_kd").temperature == 2.0


# ---- Between two trainings ----

CHANGES = {
    "weight": lambda args: args.objectives[0].update(weight=0.5),
    "option": lambda args: args.objectives[0].update(label_smoothing=0.1),
    "objectives": lambda args: setattr(args, "objectives", [*args.objectives, {"name": "bss", "k": 1}]),
    "layer_rates": lambda args: setattr(args, "layer_rates", {"mode": "llrd"}),
    "gradient_rule": lambda args: setattr(args, "gradient_rule", {"name": "pcgrad"}),
    "quantize": lambda args: setattr(args, "quantize", "int8"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_start_is_kept(tmp_path, name):
    student = build("vit")
    runner = trainer(tmp_path, student, objectives=L2_SP, **RUN)
    runner.train()
    before = runner.distiller
    CHANGES[name](runner.args)
    runner.train()
    assert largest_difference(weights(runner.distiller.start.model), weights(student)) == 0.0
    assert (runner.distiller is before) == (name == "weight")


@pytest.mark.parametrize("name", CHANGES)
def test_parameters_of_unchanged_entries_are_kept(tmp_path, name):
    student, teacher = build("vit"), build("vit", seed=5, hidden_size=48, num_attention_heads=3)
    runner = trainer(tmp_path, student, teacher, objectives=[TASK, {"name": "hidden_states"}], **RUN)
    runner.train()
    own = dict(runner.distiller.objectives.named_parameters())
    before = weights(runner.distiller.objectives)
    CHANGES[name](runner.args)
    assert largest_difference(weights(runner.distiller.objectives["hidden_states"]), {
        key.removeprefix("hidden_states."): value for key, value in before.items()
    }) == 0.0  # fmt: skip
    runner.train()
    now = dict(runner.distiller.objectives.named_parameters())
    assert own and all(now[key] is own[key] for key in own)
    held = [id(p) for group in runner.optimizer.param_groups for p in group["params"]]
    assert all(held.count(id(p)) == 1 for p in own.values())


def test_what_an_objective_learned_of_the_images_is_kept(tmp_path, monkeypatch):
    entries = [TASK, {"name": "delta", "sample": 12}]
    runner = trainer(tmp_path, build("vit"), objectives=entries, **RUN)
    runner.train()
    before = weights(runner.distiller.objectives)
    monkeypatch.setattr("hf_kdtl.trainer.distiller.read_sample", lambda *args: pytest.fail("read again"))
    runner.args.objectives[0]["label_smoothing"] = 0.1
    assert before and largest_difference(weights(runner.distiller.objectives), before) == 0.0


def test_a_changed_entry_begins_again_and_is_trained(tmp_path):
    student, teacher = build("vit"), build("vit", seed=5, hidden_size=48, num_attention_heads=3)
    runner = trainer(tmp_path, student, teacher, objectives=[TASK, {"name": "hidden_states"}], **RUN)
    runner.train()
    old = weights(runner.distiller.objectives)
    runner.args.objectives[1]["layers"] = "last"
    new = weights(runner.distiller.objectives)
    assert new.keys() != old.keys() or largest_difference(new, old) > 0.0
    runner.train()
    assert largest_difference(weights(runner.distiller.objectives), new) > 0.0


@pytest.mark.parametrize("earlier, later", [(None, {"mode": "llrd"}), ({"mode": "llrd"}, None)])
def test_layer_rates_have_an_optimizer_that_fits(tmp_path, earlier, later):
    runner = trainer(tmp_path, build("vit"), layer_rates=earlier, **RUN)
    runner.train()
    runner.args.layer_rates = later
    runner.train()
    assert is_layerwise(runner.optimizer) == (later is not None)


def test_own_loss_and_quantize_act_after_an_evaluation(tmp_path):
    def run(evaluate, change):
        runner = trainer(tmp_path, build("vit"), eval_dataset=Images(8, seed=3), **RUN)
        if evaluate:
            runner.evaluate()
        change(runner)
        runner.train()
        return runner, [line["loss"] for line in _logged(runner)]

    def own(runner):
        runner.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: 7.0 + outputs.logits.sum() * 0

    def quantize(runner):
        runner.args.quantize = "int8"

    assert run(True, own)[1] == [7.0] * 3
    runner, losses = run(True, quantize)
    assert losses == run(False, quantize)[1] != run(False, lambda runner: None)[1]
    assert any(isinstance(module, RoundedLinear) for module in runner.model.modules())


def test_an_own_loss_is_checked_as_by_the_constructor(tmp_path):
    student, teacher = pair()
    runner = trainer(tmp_path, student, teacher, objectives=[{"name": "logit_kd"}], **RUN)
    runner.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: F.cross_entropy(outputs.logits, labels)
    with pytest.raises(ValueError, match="compute_loss_func replaces the value of the task objective"):
        runner.train()


# ---- Attributes ----


def test_a_teacher_may_be_assigned(tmp_path):
    student, teacher = pair()
    other = build("vit", seed=9)
    runner, expected = (trainer(tmp_path, student, one, **RUN) for one in (teacher, other))
    runner.teacher = other
    runner.train()
    expected.train()
    assert largest_difference(weights(runner.model), weights(expected.model)) == 0.0


def test_a_teacher_may_be_taken_away_with_its_objectives(tmp_path):
    student, teacher = pair()
    runner = trainer(tmp_path, student, teacher, **RUN)
    runner.train()
    runner.args.objectives = ["task"]
    runner.train()  # it is at rest
    runner.teacher = None
    runner.train()
    assert not runner.distiller.sources
    runner.args.objectives = KD
    with pytest.raises(ValueError, match="the objectives logit_kd need a teacher and none was given"):
        runner.train()


def test_data_of_another_class_order_is_refused(tmp_path):
    names = ["a", "b", "c"]
    student = build("vit", id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    data = {order: Images() for order in ("abc", "bac")}
    for order, images in data.items():
        images.classes = list(order)
    runner = trainer(tmp_path, student, data=data["abc"], **RUN)
    runner.train_dataset = data["bac"]
    with pytest.raises(ValueError, match="label 0 would mean another class"):
        runner.train()


def test_another_student_is_trained_after_a_training(tmp_path):
    first, second = build("vit"), build("vit", seed=3)
    runner, expected = trainer(tmp_path, first, **RUN), trainer(tmp_path, second, **RUN)
    runner.train()
    runner.model = copy.deepcopy(second)
    runner.train()
    expected.train()
    assert largest_difference(weights(runner.model), weights(expected.model)) == 0.0


def test_another_student_keeps_an_optimizer_of_the_users(tmp_path):
    runner = trainer(tmp_path, build("vit"), **RUN)
    runner.train()
    runner.model = build("vit", seed=3)
    runner.optimizer = optimizer = torch.optim.SGD(runner.model.parameters(), 0.1)
    runner.train()
    assert runner.optimizer.optimizer is optimizer
    given = torch.optim.SGD(runner.model.parameters(), 0.1)
    runner = DistillationTrainer(runner.model, config(tmp_path, [TASK], **RUN), train_dataset=Images(),
                                 optimizers=(given, None))  # fmt: skip
    runner.train()
    runner.model = build("vit", num_labels=CLASSES)
    with pytest.raises(ValueError, match="the optimizer holds none of the student's"):
        runner.train()
