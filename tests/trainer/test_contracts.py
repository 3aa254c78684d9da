"""What Trainer promises to those who subclass it, or give it functions, an optimizer and models of their own."""

import copy
import json
import signal

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.nn.functional import cross_entropy, multi_margin_loss
from transformers import Trainer, TrainingArguments, __version__
from transformers.modeling_outputs import ImageClassifierOutput

from hf_kdtl import DistillationConfig, DistillationTrainer
from tests.support.helpers import KD, Images, config, forked, largest_difference, leave, weights
from tests.support.tiny import build

TASK = [{"name": "task"}]
PROJECTED = [{"name": "task"}, {"name": "hidden_states"}]
RUN = {"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 4}


def run(kind, folder, model=None, change=lambda cls: cls, objectives=TASK, teacher=None, data=None, **settings):
    """A trained trainer of a kind, with a subclass made of it, and what Trainer itself takes among the settings."""
    own = {k: settings.pop(k) for k in list(settings) if k in ("compute_loss_func", "optimizer_cls_and_kwargs")}
    ours = kind is DistillationTrainer
    arguments = config(folder / kind.__name__, objectives, DistillationConfig if ours else TrainingArguments,
                       **RUN | settings)  # fmt: skip
    own |= {"teacher": teacher} if ours and teacher is not None else {}
    made = change(kind)(copy.deepcopy(model or build("vit")), arguments, train_dataset=data or Images(), **own)
    made.train()
    return made


def both(folder, *args, **kwargs):
    """Trainer and DistillationTrainer, trained alike; the student's weights must be the same to the bit."""
    plain, ours = (run(kind, folder, *args, **kwargs) for kind in (Trainer, DistillationTrainer))
    assert largest_difference(weights(plain.model), weights(ours.model)) == 0.0
    return plain, ours


def groups(runner):
    return [(len(g["params"]), g["initial_lr"], g["weight_decay"]) for g in runner.optimizer.param_groups]


# ---- The optimizer gets the student, by the student's names ----


def by_name(cls):
    class Named(cls):
        def create_optimizer(self, model=None):
            named = list(self.model.named_parameters())
            body, head = ([p for n, p in named if n.startswith("vit.") is is_body] for is_body in (True, False))
            self.optimizer = torch.optim.AdamW([{"params": body, "lr": 1e-5}, {"params": head, "lr": 1e-2}])
            return self.optimizer

    return Named


def by_module(cls):
    class ByModule(cls):
        def create_optimizer(self, model=None):
            groups = [{"params": self.model.vit.parameters()}, {"params": self.model.classifier.parameters()}]
            self.optimizer = torch.optim.SGD(groups, lr=0.1)
            return self.optimizer

    return ByModule


def by_decay(cls):
    class Decay(cls):
        def get_decay_parameter_names(self, model):
            return [name for name, _ in model.named_parameters() if name.startswith("classifier.")]

    return Decay


class Factory:
    def __call__(self, opt_model, **options):
        named = list(opt_model.named_parameters())
        body = [p for n, p in named if n.startswith("vit.")]
        return torch.optim.SGD(
            [{"params": body, "lr": 1e-5}, {"params": opt_model.classifier.parameters()}], **options
        )


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (by_name, {}),
        (by_module, {}),
        (by_decay, {"weight_decay": 0.1}),
        (lambda cls: cls, {"optimizer_cls_and_kwargs": (Factory, {"lr": 0.1})}),
        (lambda cls: cls, {"weight_decay": 0.1}),
    ],
    ids=["create_optimizer", "module", "get_decay_parameter_names", "factory", "default"],
)
def test_the_optimizer_is_made_of_the_student(tmp_path, change, settings):
    plain, ours = both(tmp_path, None, change, **settings)
    assert groups(plain) == groups(ours) and len(groups(ours)) == 2 and all(number for number, *_ in groups(ours))


def test_optim_target_modules_are_the_students_own(tmp_path, monkeypatch):
    seen = []
    given = Trainer.get_optimizer_cls_and_kwargs

    def spy(args, model=None):
        seen.append(model)
        return given(args, model)

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(spy))
    ours = run(DistillationTrainer, tmp_path)
    assert seen == [ours.model]


@pytest.mark.parametrize("change", [lambda cls: cls, by_name], ids=["default", "override"])
def test_the_objectives_parameters_are_added_to_what_was_made_of_the_student(tmp_path, change):
    teacher = build("vit", seed=5, hidden_size=48, num_attention_heads=3)
    ours = run(DistillationTrainer, tmp_path, None, change, PROJECTED, teacher, weight_decay=0.1)
    added = {id(p) for g in ours.optimizer.param_groups[2:] for p in g["params"]}
    expected = dict(ours.distiller.objectives.named_parameters())
    assert added == {id(p) for p in expected.values()} and expected
    assert {g["weight_decay"] for g in ours.optimizer.param_groups[2:]} <= {0.0, 0.1}
    decaying = {id(p) for g in ours.optimizer.param_groups[2:] if g["weight_decay"] for p in g["params"]}
    assert decaying == {id(p) for n, p in expected.items() if not n.endswith("bias")}
    before = ours.optimizer.param_groups
    ours.train()
    assert len(ours.optimizer.param_groups) == len(before), "not added twice"


def test_an_optimizer_that_steps_in_the_backward_pass_is_refused_for_projectors():
    from hf_kdtl.trainer.contracts import add_objectives

    class Arguments:
        optim = "lomo"

    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())
    with pytest.raises(ValueError, match="optim 'lomo' steps during the backward pass, of the student alone"):
        add_objectives(optimizer, nn.Linear(1, 1), Arguments())


# ---- compute_loss and training_step ----


def weighted(cls):
    class Weighted(cls):  # of Trainer's documentation
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 2.0, 3.0]))
            return (loss, outputs) if return_outputs else loss

    return Weighted


def penalised(cls):
    class Penalised(cls):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss = loss + 0.01 * outputs.logits.square().mean()
            return (loss, outputs) if return_outputs else loss

    return Penalised


def counted(cls):
    class Counted(cls):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            loss = cross_entropy(model(**inputs).logits, labels, reduction="sum") / num_items_in_batch
            return loss

    return Counted


def of_config(cls):
    class OfConfig(cls):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = cross_entropy(outputs.logits.view(-1, model.config.num_labels), labels.to(model.device))
            return (loss, outputs) if return_outputs else loss

    return OfConfig


def inside(cls):
    class Inside(cls):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs, head = model(inputs["pixel_values"]), self.accelerator.unwrap_model(model).classifier
            size = sum(p.square().sum() for p in head.parameters())
            loss = cross_entropy(outputs.logits, inputs["labels"]) + 0.1 * size
            return (loss, outputs) if return_outputs else loss

    return Inside


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("change", [weighted, penalised, counted, of_config, inside])
@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_an_overridden_compute_loss_is_the_loss(tmp_path, family, change, accumulation):
    if family == "resnet" and change is penalised and accumulation > 1:
        pytest.skip("Trainer divides what is added by the accumulation steps only for models that take no loss kwargs")
    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 1}
    plain, ours = (run(kind, tmp_path, build(family), change, **settings) for kind in (Trainer, DistillationTrainer))
    exact = family == "vit" or change is not penalised  # see test_plain: the mean of means, where Trainer divides so
    difference = largest_difference(weights(plain.model), weights(ours.model))
    assert difference == 0.0 if exact else difference < 1e-6
    if change is not counted:
        assert ours.evaluate(Images(8))["eval_loss"] == pytest.approx(plain.evaluate(Images(8))["eval_loss"], rel=1e-6)


def _overridden(folder):
    torch.set_num_threads(1)
    found = {}
    for change in (weighted, penalised, counted, inside):
        made = [run(kind, folder / change.__name__, change=change, per_device_train_batch_size=2)
                for kind in (Trainer, DistillationTrainer)]  # fmt: skip
        moved = largest_difference(weights(build("vit")), weights(made[1].model))
        found[change.__name__] = [largest_difference(*(weights(one.model) for one in made)), moved]
    (folder / f"{made[1].args.process_index}.json").write_text(json.dumps(found))
    leave()


def test_an_overridden_compute_loss_is_the_loss_on_two_processes(tmp_path):
    forked(_overridden, 2, tmp_path)
    for rank in (0, 1):
        for difference, moved in json.loads((tmp_path / f"{rank}.json").read_text()).values():
            assert difference < 1e-7 and moved > 1e-4


def test_the_container_answers_for_its_student(tmp_path):
    model = build("vit")
    runner = DistillationTrainer(model, config(tmp_path, KD), teacher=build("vit", seed=5), train_dataset=Images())
    for made in (runner.distiller, copy.deepcopy(runner.distiller)):
        student = made.student
        assert made.config is student.config and made.vit is student.vit and made.dtype == torch.float32
        assert set(made.state_dict()) == {f"student.{name}" for name in student.state_dict()}
        pixels = Images()[0]["pixel_values"][None]
        expected = student(pixels).logits
        assert torch.equal(made(pixels).logits, expected) and torch.equal(made(pixel_values=pixels).logits, expected)
        assert made.notes == runner.distiller.notes and not hasattr(made, "module")
        made.student._orig_mod = made.student._hf_hook = None  # marks of another module
        assert not hasattr(made, "_orig_mod") and not hasattr(made, "_hf_hook")
        with pytest.raises(AttributeError, match="'ViTForImageClassification' object has no attribute 'hidden'"):
            made.hidden  # noqa: B018
        del made.student._orig_mod, made.student._hf_hook


def test_an_override_that_leaves_objectives_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not call super\(\).compute_loss.*objectives logit_kd are not trained"):
        run(DistillationTrainer, tmp_path, None, weighted, KD, build("vit", seed=5))


def test_an_override_adds_to_the_objectives(tmp_path):
    teacher = build("vit", seed=5)
    ours = run(DistillationTrainer, tmp_path, None, penalised, KD, teacher)
    alone = run(DistillationTrainer, tmp_path, None, lambda cls: cls, KD, teacher)
    first = [made.state.log_history[0] for made in (ours, alone)]
    assert first[0]["loss"] > first[1]["loss"] and first[0]["logit_kd"] == first[1]["logit_kd"]


def test_an_override_under_a_gradient_rule_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="compute_loss is overridden, and a gradient_rule"):
        arguments = config(tmp_path, KD, gradient_rule={"name": "pcgrad"})
        weighted(DistillationTrainer)(build("vit"), arguments, teacher=build("vit", seed=5))


def test_a_compute_loss_set_on_the_trainer_is_refused_under_a_gradient_rule(tmp_path):
    arguments = config(tmp_path, KD, gradient_rule={"name": "pcgrad"}, max_steps=1)
    runner = DistillationTrainer(build("vit"), arguments, teacher=build("vit", seed=5), train_dataset=Images())
    ours = runner.compute_loss
    runner.compute_loss = lambda *args, **kwargs: ours(*args, **kwargs) + 1.0
    with pytest.raises(ValueError, match="compute_loss is overridden, and a gradient_rule"):
        runner.train()


def copied(cls):
    class Copied(cls):  # Trainer's own steps, as users copy them
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()

    return Copied


def around(cls):
    class Around(cls):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, inputs, num_items_in_batch) * 1.0

    return Around


OVERRIDDEN = {
    "gradient_rule": {"gradient_rule": {"name": "never_hurt"}},
    "layer_rates": {"layer_rates": {"mode": "discrepancy", "source": "attention"}},
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_a_training_step_that_leaves_out_what_is_set_is_refused(tmp_path, name):
    settings = OVERRIDDEN[name] | {"gradient_accumulation_steps": 2, "objectives": KD, "teacher": build("vit", seed=5)}
    with pytest.raises(ValueError, match=rf"does not call super\(\).training_step.* so {name} would do nothing"):
        run(DistillationTrainer, tmp_path, change=copied, **settings)
    ours, alone = (run(DistillationTrainer, tmp_path, change=change, **settings) for change in (around, lambda c: c))
    assert largest_difference(weights(ours.model), weights(alone.model)) == 0.0


def test_a_copied_training_step_trains_the_objectives_or_is_refused(tmp_path):
    settings = {"objectives": KD, "teacher": build("vit", seed=5), "layer_rates": {"mode": "llrd"}}
    ours, alone = (run(DistillationTrainer, tmp_path, change=change, **settings) for change in (copied, around))
    assert largest_difference(weights(ours.model), weights(alone.model)) == 0.0
    with pytest.raises(ValueError, match="the objectives logit_kd are not trained"):
        run(DistillationTrainer, tmp_path, change=lambda cls: weighted(copied(cls)), **settings)


@pytest.mark.parametrize("number", [4, 4.0, torch.tensor(4), None])
def test_numbers_of_items_that_a_user_gives(tmp_path, number):
    found = []
    for kind in (Trainer, DistillationTrainer):
        made = run(kind, tmp_path, max_steps=1)
        batch = {"pixel_values": Images(4).pixels, "labels": Images(4).labels}
        made.model.zero_grad()
        found.append([float(made.training_step(made.model, dict(batch), number)),
                      float(made.compute_loss(made.model, dict(batch), num_items_in_batch=number).detach()),
                      made.model.classifier.weight.grad.norm().item()])  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_step_on_the_student_trains_every_objective(tmp_path):
    made = run(DistillationTrainer, tmp_path, None, objectives=KD, teacher=build("vit", seed=5), max_steps=1)
    batch = {"pixel_values": Images(4).pixels, "labels": Images(4).labels}
    terms = made.objective_terms(dict(batch))
    expected = 0.3 * terms["task"].mean() + 0.7 * terms["logit_kd"].mean()
    assert float(made.training_step(made.model, dict(batch), 4)) == pytest.approx(expected.item(), rel=1e-5)


# ---- compute_loss_func ----

TRAINERS = {DistillationConfig: DistillationTrainer, TrainingArguments: Trainer}


def test_compute_loss_func_gets_what_trainer_gives(tmp_path):
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        if len(labels) > 2:  # not the look before training
            dtype = num_items_in_batch.dtype if Version(__version__) >= Version("5.23") else None  # integers before
            seen.append((type(num_items_in_batch), dtype, float(num_items_in_batch), labels.shape))
        return cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    for kind in (Trainer, DistillationTrainer):
        run(kind, tmp_path, compute_loss_func=loss, gradient_accumulation_steps=2).evaluate(Images(8))
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :] and len(seen) >= 10


@pytest.mark.parametrize("steps", [1, 2])
def test_compute_loss_func_on_data_without_labels(tmp_path, steps):
    """As in a plain Trainer it gets labels None. Under accumulation its values are averaged over the images, as every
    term is: two micro-batches of 2 give the weights of one of 4."""
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append((labels, num_items_in_batch))
        return outputs.logits.square().mean()

    data = [{"pixel_values": pixels} for pixels in Images(8).pixels]

    def trained(kind, **settings):
        made = config(tmp_path, TASK, kind, max_steps=2, optim="sgd", learning_rate=0.1, **settings)
        model = build("vit")
        trainer = TRAINERS[kind](model, made, train_dataset=data, compute_loss_func=loss)
        trainer.train()
        return weights(model), [line["loss"] for line in trainer.state.log_history if "loss" in line], trainer

    ours, losses, runner = trained(
        DistillationConfig, per_device_train_batch_size=4 // steps, gradient_accumulation_steps=steps
    )
    plain, expected, _ = trained(TrainingArguments, per_device_train_batch_size=4)
    assert largest_difference(ours, plain) < 1e-7 and losses == pytest.approx(expected, rel=1e-6)
    assert set(seen) == {(None, None)}
    assert runner.state.log_history[0]["task"] == pytest.approx(expected[0], rel=1e-6)


def test_compute_loss_func_may_read_labels_of_any_form(tmp_path):
    """Attributes (B, 7) are neither indices nor distributions; other objectives do not read them."""

    def loss(outputs, labels, num_items_in_batch=None):
        return (outputs.logits.sum(-1, keepdim=True) - labels).square().mean()

    data = [{"pixel_values": pixels, "labels": torch.zeros(7)} for pixels in Images(8).pixels]
    made = config(tmp_path, KD, max_steps=1)
    DistillationTrainer(build("vit"), made, teacher=build("vit", seed=5), train_dataset=data,
                        compute_loss_func=loss).train()  # fmt: skip


def test_the_task_among_the_terms_is_what_is_trained(tmp_path):
    def tripled(outputs, labels, num_items_in_batch=None):
        return 3 * cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    made = run(DistillationTrainer, tmp_path, compute_loss_func=tripled)
    batch = {"pixel_values": Images(4).pixels, "labels": Images(4).labels}
    with torch.no_grad():
        expected = 3 * cross_entropy(made.model.eval()(batch["pixel_values"]).logits, batch["labels"])
        assert made.objective_terms(batch)["task"].item() == pytest.approx(expected.item(), rel=1e-6)


# ---- Evaluation of images without labels ----


class Unlabelled(Images):
    """The first 8 of 24 images have no label."""

    def __init__(self):
        super().__init__(24)
        self.labels[:8] = -100


def _evaluated(folder):
    torch.set_num_threads(1)
    arguments = config(folder, TASK, per_device_eval_batch_size=4)
    made = DistillationTrainer(build("vit"), arguments, eval_dataset=Unlabelled())
    (folder / f"{arguments.process_index}.json").write_text(json.dumps(made.evaluate()["eval_loss"]))
    leave()


def test_batches_without_labels_do_not_lower_eval_loss_on_two_processes(tmp_path):
    forked(_evaluated, 2, tmp_path)
    data = Unlabelled()
    with torch.no_grad():
        expected = cross_entropy(build("vit").eval()(data.pixels[8:]).logits, data.labels[8:]).item()
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found == pytest.approx([expected] * 2, rel=1e-6)


# ---- Models of other kinds ----


def test_a_loss_function_that_was_set_is_refused_and_kept_as_the_message_says(tmp_path):
    student = build("vit")
    student.loss_function = lambda labels, logits, config, **kwargs: multi_margin_loss(logits, labels)
    with pytest.raises(ValueError, match=r"loss_function of ViTFor.* was set.*compute_loss_func=lambda outputs"):
        DistillationTrainer(student, config(tmp_path, TASK))

    def margin(outputs, labels, num_items_in_batch=None):
        return multi_margin_loss(outputs.logits, labels, reduction="sum") / num_items_in_batch

    plain = run(Trainer, tmp_path, student)
    ours = run(DistillationTrainer, tmp_path, build("vit"), compute_loss_func=margin)
    assert largest_difference(weights(plain.model), weights(ours.model)) < 1e-6


class Net(nn.Module):
    """A classifier of plain torch, whose outputs and loss are of a kind."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.kind = nn.Linear(3 * 32 * 32, 3), kind

    def forward(self, pixel_values, labels=None):
        logits = self.layer(pixel_values.flatten(1))
        own = multi_margin_loss if self.kind == "own" else cross_entropy
        loss = None if labels is None else own(logits, labels)
        if self.kind == "dict":
            return {"loss": loss, "logits": logits}
        if self.kind == "tuple":
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("kind", ["dict", "tuple", "output"])
def test_outputs_of_other_types(tmp_path, kind):
    plain, ours = both(tmp_path, Net(kind))
    found = [made.evaluate(Images(8))["eval_loss"] for made in (plain, ours)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    shapes = [made.predict(Images(8)).predictions.shape for made in (plain, ours)]
    assert shapes[0] == shapes[1] == (8, 3)


def test_a_forward_with_a_loss_of_its_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the loss of Net is its own: .* cross-entropy of its logits is"):
        run(DistillationTrainer, tmp_path, Net("own"))


def test_an_input_of_another_name_is_refused_at_once(tmp_path):
    class Other(nn.Module):
        def forward(self, x, labels=None):
            return x

    with pytest.raises(ValueError, match=r"forward of Other takes \['x', 'labels'\]; expected 'pixel_values'"):
        DistillationTrainer(Other(), config(tmp_path, TASK))


class Larger(Images):
    def __init__(self):
        super().__init__(size=48)

    def __getitem__(self, i):
        return super().__getitem__(i) | {"interpolate_pos_encoding": True}


def collate(rows):
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in ("pixel_values", "labels")} | {
        "interpolate_pos_encoding": True
    }


def test_interpolated_positions_are_the_students_alone(tmp_path):
    def made(objectives, **models):
        arguments = config(tmp_path, objectives, **RUN, remove_unused_columns=False)
        return DistillationTrainer(
            build("vit"), arguments, train_dataset=Larger(), data_collator=collate, **models
        ).train()

    made(TASK)
    with pytest.raises(ValueError, match=r"'interpolate_pos_encoding', which would reach the student and not the te"):
        made(KD, teacher=build("vit", seed=5))


# ---- SIGTERM ----


def test_a_second_handler_of_sigterm_is_not_left_behind(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    try:
        run(DistillationTrainer, tmp_path, max_steps=1, enable_jit_checkpoint=True)
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- A checkpoint of a plain Trainer ----

SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def test_a_plain_checkpoint_is_continued_to_the_same_bits(tmp_path, caplog):
    full = run(Trainer, tmp_path, **SAVED)
    ours = DistillationTrainer(
        build("vit", seed=9), config(tmp_path / "ours", TASK, **RUN | SAVED), train_dataset=Images()
    )
    ours.train(resume_from_checkpoint=str(tmp_path / "Trainer/checkpoint-2"))
    assert "was written by a plain Trainer: weights, optimizer and scheduler are continued" in caplog.text
    assert ours.state.global_step == 4
    assert largest_difference(weights(full.model), weights(ours.model)) == 0.0


def test_a_plain_checkpoint_can_be_the_best_one(tmp_path):
    run(Trainer, tmp_path, **SAVED)
    first = tmp_path / "Trainer/checkpoint-2"
    ours = run(DistillationTrainer, tmp_path, max_steps=1)
    ours.state.best_model_checkpoint = str(first)
    ours._load_best_model()
    saved = type(ours.model).from_pretrained(first)
    assert largest_difference(weights(saved), weights(ours.model)) == 0.0


@pytest.mark.parametrize(
    ("objectives", "missing", "says"),
    [
        (TASK, "optimizer.pt", "plain Trainer and lacks optimizer.pt, so it cannot be continued from"),
        (TASK, "model.safetensors", "plain Trainer and lacks model.safetensors"),
        (PROJECTED, None, "does not have the objectives' own parameters"),
    ],
)
def test_a_plain_checkpoint_that_is_not_enough_is_refused(tmp_path, objectives, missing, says):
    run(Trainer, tmp_path, **SAVED | {"max_steps": 2})
    checkpoint = tmp_path / "Trainer/checkpoint-2"
    if missing:
        (checkpoint / missing).unlink()
    teacher = build("vit", seed=5, hidden_size=48, num_attention_heads=3) if objectives is PROJECTED else None
    arguments = config(tmp_path / "ours", objectives, **RUN | SAVED)
    ours = DistillationTrainer(build("vit"), arguments, teacher=teacher, train_dataset=Images())
    with pytest.raises(ValueError, match=says):
        ours.train(resume_from_checkpoint=str(checkpoint))


def test_a_best_model_that_would_be_the_worst_is_said(tmp_path, caplog):
    for metric in ("accuracy", "f1", "loss", "eval_photos_nll"):
        assert "worst" not in caplog.text, metric
        DistillationTrainer(build("vit"), config(tmp_path, TASK, metric_for_best_model=metric), train_dataset=Images())
    assert "the best eval_photos_nll is the lowest" in caplog.text and "Set greater_is_better=False" in caplog.text
