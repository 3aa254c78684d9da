"""A stopped run continues as if it had never stopped, and the best checkpoint is loaded completely."""

import importlib
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.parametrizations import weight_norm
from transformers import (
    AutoModelForImageClassification,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerState,
    ViTForImageClassification,
)

from hf_kdtl import DistillationTrainer
from hf_kdtl.checkpoints.manifest import read_manifest, write_manifest
from hf_kdtl.checkpoints.state import STATE_JSON
from hf_kdtl.checkpoints.student import load_student
from hf_kdtl.models.teachers.start import StartingPoint
from tests.support.helpers import Images, and_slow, config, largest_difference, trainer, weights
from tests.support.tiny import build

FAMILIES = and_slow(["vit", "resnet"], ["swin", "deit", "dinov2", "convnext"])
RUN = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_resume_is_bitwise(tmp_path, family):
    student, teacher = build(family), build("vit", seed=5)
    full = trainer(tmp_path, student, teacher, **RUN)
    full.train()
    for step in (2, 4) if family == "vit" else (2,):
        again = trainer(tmp_path, student, teacher, **RUN)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert again.state.global_step == 6
        assert largest_difference(weights(full.distiller), weights(again.distiller)) == 0.0
        assert full.state.log_history[-2]["loss"] == again.state.log_history[-2]["loss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_model_is_loaded_completely(tmp_path, family):
    class Worse(TrainerCallback):
        """Report a loss that rises, so that the first checkpoint is the best."""

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    runner = trainer(
        tmp_path,
        build(family),
        build("vit", seed=5),
        eval_dataset=Images(8),
        callbacks=[Worse()],
        **RUN,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
    )
    seen = {}

    class Remember(TrainerCallback):
        def on_save(self, args, state, control, model, **kwargs):
            seen[state.global_step] = weights(model)

    runner.add_callback(Remember())
    runner.train()
    assert runner.state.best_global_step == 2
    assert largest_difference(weights(runner.model), seen[2]) == 0.0
    assert largest_difference(seen[6], seen[2]) > 1e-5


class Widened(ViTForImageClassification):
    """Made of more than its config."""

    def __init__(self, config, width):
        super().__init__(config)
        self.added = torch.nn.Linear(width, width)


def changed(how, family="vit"):
    """A student whose config does not describe it."""
    if how == "more than a config":
        config = build("vit").config
        torch.manual_seed(1)
        return Widened(config, 4)
    student = build(family)
    if how == "another head":
        torch.manual_seed(1)
        features = student.classifier.in_features
        student.classifier = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(features, 3))
    if how == "fewer blocks":
        student.vit.layers = student.vit.layers[:1]
    if how == "a parameter more":
        student.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    if how == "weight norm":
        weight_norm(student.classifier)
    return student


CHANGES = [("another head", "convnext"), ("another head", "vit"), ("fewer blocks", "vit")]
CHANGES += [("a parameter more", "vit"), ("weight norm", "vit"), ("more than a config", "vit")]


@pytest.mark.parametrize(("how", "family"), CHANGES)
def test_a_student_that_was_changed_by_hand_resumes_bitwise_and_its_best_is_loaded(tmp_path, how, family, caplog):
    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    chosen = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": False}
    chosen |= {"metric_for_best_model": "loss", "eval_dataset": Images(4), "callbacks": [Worse()]}
    best = changed(how, family)
    full = trainer(tmp_path / "full", best, **RUN)
    full.train()
    assert caplog.text.count(f"the config of this {type(full.model).__name__} does not describe it, so from_pre") == 1
    again = trainer(tmp_path / "full", changed(how, family), **RUN)
    again.train(resume_from_checkpoint=str(tmp_path / "full/checkpoint-2"))
    assert largest_difference(weights(full.distiller), weights(again.distiller)) == 0.0
    ends = trainer(tmp_path / "best", best, **RUN | chosen)
    ends.train()
    load_student(best, tmp_path / "full/checkpoint-2")  # the same run
    assert ends.state.best_global_step == 2
    assert largest_difference(weights(ends.model), weights(best)) == 0.0


@pytest.mark.parametrize("how", ["another head", "a parameter more"])
def test_the_start_of_a_student_that_was_changed_by_hand_is_kept(tmp_path, how):
    objectives, student = [{"name": "task"}, {"name": "l2_sp", "weight": 0.1}], changed(how)
    full = trainer(tmp_path, student, objectives=objectives, **RUN)
    full.train()
    other = changed(how)
    torch.nn.init.zeros_(other.vit.embeddings.cls_token)
    again = trainer(tmp_path, other, objectives=objectives, **RUN)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert largest_difference(weights(again.distiller.start.model), weights(student)) == 0.0
    assert largest_difference(weights(full.distiller), weights(again.distiller)) == 0.0


@pytest.mark.parametrize(
    ("saved", "other", "message"),
    [
        (changed("fewer blocks"), build("vit"), r"\['vit.*layer.*1.*'\], unexpected \[\]"),
        (build("vit"), changed("fewer blocks"), r"\[\], unexpected \['vit.*layer.1.*'\]"),
        (build("vit"), changed("another head"), r".*'classifier.1.weight'.*unexpected .*'classifier.weight'"),
        (build("vit"), build("vit", num_labels=4), r"\['classifier.weight', 'classifier.bias'\]"),
    ],
)
def test_a_checkpoint_of_a_student_that_was_changed_otherwise_is_refused(tmp_path, saved, other, message):
    trainer(tmp_path, saved, **RUN).train()
    run = trainer(tmp_path, other, **RUN)
    begins = "does not match ViTForImageClassification: missing or of another shape"
    with pytest.raises(
        ValueError, match=rf"{begins} {message}.* Resume with the student that the checkpoint was made"
    ):
        run.train(resume_from_checkpoint=True)
    assert largest_difference(weights(run.model), weights(other)) == 0.0


def test_a_callback_with_a_state_is_saved_as_it_is_then(tmp_path):
    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    chosen = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": False}
    patient = EarlyStoppingCallback(early_stopping_patience=9)
    settings = RUN | chosen | {"max_steps": 4, "eval_dataset": Images(4), "callbacks": [Worse(), patient]}
    trainer(tmp_path, build("vit"), **settings).train()
    counted = {}
    for step in (2, 4):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        counted[step] = state["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"]
    assert [found["early_stopping_patience_counter"] for found in counted.values()] == [1, 3]


LAST = {"max_steps": 6}, {"max_steps": 5}, {"num_train_epochs": 1.5, "max_steps": -1}, {"max_steps": 8}


@pytest.mark.parametrize(("steps", "best"), [*((steps, False) for steps in LAST), (LAST[2], True)], ids=str)
def test_a_run_that_is_finished_makes_no_further_step(tmp_path, steps, best, caplog):
    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    chosen = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": False}
    chosen |= {"metric_for_best_model": "loss", "eval_dataset": Images(4), "callbacks": [Worse()]}

    def run():
        settings = RUN | {"save_steps": 1} | steps | (chosen if best else {})
        return trainer(tmp_path, build("vit", hidden_dropout_prob=0.1), build("vit", seed=5), **settings)

    full = run()
    full.train()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = run()
    assert again.train(resume_from_checkpoint=True).global_step == full.state.global_step
    assert largest_difference(weights(full.distiller), weights(again.distiller)) == 0.0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files
    assert "training is already complete, and the model is loaded" in caplog.text
    assert not best or again.state.best_global_step == 1


def test_a_run_that_is_to_end_before_its_checkpoint_makes_no_step(tmp_path):
    full = trainer(tmp_path, build("vit"), **RUN)
    full.train()
    again = trainer(tmp_path, build("vit"), **RUN | {"max_steps": 5})
    assert again.train(resume_from_checkpoint=True).global_step == 6
    assert largest_difference(weights(full.distiller), weights(again.distiller)) == 0.0


def test_a_checkpoint_is_a_clean_student(tmp_path):
    runner = trainer(tmp_path, build("vit"), build("vit", seed=5, layers=3), **RUN)
    runner.train()
    folder = tmp_path / "checkpoint-6"
    opened = AutoModelForImageClassification.from_pretrained(folder)
    assert type(opened).__name__ == "ViTForImageClassification"
    assert largest_difference(weights(opened), weights(runner.model)) == 0.0
    names = set(load_file(folder / "model.safetensors"))
    assert not any("teacher" in name or "objectives" in name or "student" in name for name in names)
    assert (folder / STATE_JSON).is_file()
    runner.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / STATE_JSON).exists()


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path):
    runner = trainer(tmp_path, build("vit"), build("vit", seed=5), **RUN)
    runner.train()
    path = tmp_path / "checkpoint-4" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if "classifier.weight" in name))
    save_file(tensors, path, metadata={"format": "pt"})
    write_manifest(path.parent, 1, [])  # as if it had been written so
    with pytest.raises(ValueError, match=r"does not match ViTForImageClassification.*classifier.weight"):
        trainer(tmp_path, build("vit"), build("vit", seed=5), **RUN).train(str(tmp_path / "checkpoint-4"))


def test_a_checkpoint_of_other_objectives_is_refused(tmp_path):
    trainer(tmp_path, build("vit"), build("vit", seed=5), **RUN).train()
    other = trainer(tmp_path, build("vit"), **RUN)
    with pytest.raises(ValueError, match=r"was trained with the objectives .*logit_kd.*Resume with the same"):
        other.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_architecture_or_a_newer_version_is_refused(tmp_path):
    trainer(tmp_path, build("vit"), build("vit", seed=5), **RUN).train()
    message = r"holds a ViTForImageClassification \(vit\) and the student is a DeiTForImageClassification. Resume with"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, build("deit"), build("vit", seed=5), **RUN).train(resume_from_checkpoint=True)
    path = tmp_path / "checkpoint-6" / STATE_JSON
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    write_manifest(path.parent, 1, [])
    with pytest.raises(ValueError, match=r"has version 2 and this hf_kdtl reads up to 1: a newer .*. Install"):
        trainer(tmp_path, build("vit"), build("vit", seed=5), **RUN).train(resume_from_checkpoint=True)


def test_a_start_that_was_damaged_stops_the_resume(tmp_path):
    objectives = [{"name": "task"}, {"name": "l2_sp"}]
    trainer(tmp_path, build("vit"), objectives=objectives, **RUN).train()
    weights_file, config_file = (tmp_path / "start" / name for name in ("model.safetensors", "config.json"))
    full = weights_file.read_bytes()
    for path, content, message in (
        (weights_file, b"", r"start cannot be read \(.*restore the folder"),
        (
            weights_file,
            full[:-2] + bytes([full[-2] ^ 1]) + full[-1:],
            r"are not those that .* or they were damaged",
        ),
        (config_file, b"{", r"start cannot be read \(.*restore the folder"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, build("vit"), objectives=objectives, **RUN).train(resume_from_checkpoint=True)


def test_recipes_start_again_where_only_a_save_was_interrupted(tmp_path, monkeypatch):
    train = importlib.import_module("hf_kdtl.commands.common.runs")._train

    class Asked:
        state = TrainerState()

        def train(self, resume_from_checkpoint):
            self.asked = resume_from_checkpoint

    def asked(setting="true"):
        runner = Asked()
        train(runner, config(tmp_path / "run", resume_from_checkpoint=setting))
        return runner.asked

    assert asked() is False
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    assert asked() is False and asked("no") is False and asked("a/path") == "a/path"
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").write_text("")
    assert asked() is True and asked("no") is False  # the trainer says that it is damaged


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_continue(tmp_path, number):
    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    student, teacher = build("vit"), build("vit", seed=5)
    settings = RUN | {"gradient_accumulation_steps": 2, "save_strategy": "no"}
    full = trainer(tmp_path / "full", student, teacher, **settings)
    full.train()
    stopped = trainer(tmp_path / "run", student, teacher, callbacks=[Interrupt()], **settings)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"after step 3, saved in .*checkpoint-3.*resume_from_checkpoint"):
        stopped.train()
    assert signal.getsignal(signal.SIGINT) is before
    again = trainer(tmp_path / "run", student, teacher, **settings)
    again.train(resume_from_checkpoint=True)
    assert largest_difference(weights(full.distiller), weights(again.distiller)) == 0.0


PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}}
PLATEAU |= {"warmup_steps": 0, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1}
DRAWN = [{"name": name} for name in ("task", "noisy_kd", "hessian", "bss", "dist")]
EVERY_KIND = {
    "dropout, draws, batch statistics and a ragged window": (DRAWN, {"gradient_accumulation_steps": 3}),
    "a schedule that looks": ([{"name": "task"}, {"name": "logit_kd"}], PLATEAU),
}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_of_state_resumes_bitwise(tmp_path, kind):
    objectives, settings = EVERY_KIND[kind]
    student, teacher = build("vit", hidden_dropout_prob=0.2), build("vit", seed=5)
    rates = []

    class Remember(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **kwargs):
            rates.append((state.global_step, optimizer.param_groups[0]["lr"]))

    def run():
        extra = {"eval_dataset": Images(4), "callbacks": [Remember()]}
        return trainer(tmp_path, student, teacher, Images(20), objectives, **RUN | settings | extra)

    full = run()
    full.train()
    torch.manual_seed(99)  # what happens in between must not matter
    again = run()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert largest_difference(weights(full.distiller), weights(again.distiller)) == 0.0
    assert rates[4:6] == rates[6:] and (kind != "a schedule that looks" or len({rate for _, rate in rates}) > 1)


def test_projectors_are_trained_saved_and_resumed_and_stay_out_of_the_student(tmp_path):
    objectives = [{"name": "task"}, {"name": "hidden_states"}, {"name": "attention_map"}]
    student, teacher = build("vit"), build("vit", seed=5, hidden_size=48, num_attention_heads=3)
    full = trainer(tmp_path, student, teacher, objectives=objectives, weight_decay=0.1, **RUN)
    start = weights(full.distiller.objectives)
    full.train()
    moved = largest_difference(start, weights(full.distiller.objectives))
    assert len(start) == 4 and moved > 1e-4, "the projectors did not learn"
    held = {id(p) for group in full.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in full.distiller.parameters()}
    assert "projector" not in "".join(load_file(tmp_path / "checkpoint-6" / "model.safetensors"))
    again = trainer(tmp_path, student, teacher, objectives=objectives, weight_decay=0.1, **RUN)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert largest_difference(weights(full.distiller), weights(again.distiller)) == 0.0


def test_an_optimizer_that_lacks_the_projectors_is_refused(tmp_path):
    objectives = [{"name": "task"}, {"name": "hidden_states"}]
    student = build("vit")
    runner = DistillationTrainer(
        student,
        config(tmp_path, objectives, **RUN),
        teacher=build("vit", seed=5),
        train_dataset=Images(),
        optimizers=(torch.optim.SGD(student.parameters(), lr=0.1), None),
    )
    with pytest.raises(ValueError, match=r"does not hold the objectives' parameters .*trainer.distiller.parameters"):
        runner.train()


def test_a_signal_after_the_last_step_is_not_swallowed(tmp_path):
    class Late(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)

    runner = trainer(tmp_path, build("vit"), callbacks=[Late()], **RUN | {"save_strategy": "no"})
    with pytest.raises(KeyboardInterrupt, match="training is complete, and nothing is lost"):
        runner.train()


def test_a_signal_during_an_evaluation_saves(tmp_path):
    class During(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGINT) if state.global_step == 2 else None

    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": Images(4), "save_strategy": "no"}
    runner = trainer(tmp_path, build("vit"), callbacks=[During()], **RUN | evaluated)
    with pytest.raises(KeyboardInterrupt, match="after step 2, saved in"):
        runner.train()


def test_resuming_with_another_option_is_reported(tmp_path, caplog):
    trainer(tmp_path, build("vit"), build("vit", seed=5), **RUN).train()
    other = [{"name": "task", "weight": 0.3}, {"name": "logit_kd", "weight": 0.7, "temperature": 2.0}]
    runner = trainer(tmp_path, build("vit"), build("vit", seed=5), objectives=other, **RUN)
    runner.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "'temperature': 2.0" in caplog.text and "continuing with" in caplog.text


def test_a_checkpoint_in_the_form_of_the_first_version_resumes(tmp_path):
    """Written here as version 0.1 wrote it: one JSON file, one safetensors file, the start next to the checkpoints."""
    objectives = [{"name": "task"}, {"name": "hidden_states"}, {"name": "l2_sp", "weight": 0.1}]
    more = {"layer_rates": {"mode": "discrepancy", "source": "attention"}, "gradient_rule": {"name": "never_hurt"}}

    def run():
        teacher = build("vit", seed=5, hidden_size=48, num_attention_heads=3)
        return trainer(tmp_path, build("vit"), teacher, objectives=objectives, **RUN | more)

    first = run()
    first.train()
    folder = tmp_path / "checkpoint-4"
    state = json.loads((folder / STATE_JSON).read_text())
    history = [
        {"whole" if k == "all_layers" else k: v for k, v in e.items()} for e in state["gradient_rule"]["history"]
    ]
    old = {
        "version": 1,
        "objectives": objectives,
        "layer_rates": state["layer_rates"],
        "gradient_rule": {"options": state["gradient_rule"]["options"], "history": history},
        "start": StartingPoint.from_path(tmp_path / "start", build("vit"), None).fingerprint,
    }
    assert state | {"gradient_rule": old["gradient_rule"]} == old and len(history) > 0
    assert {"options", "rates", "history"} == old["layer_rates"].keys()
    (folder / STATE_JSON).write_text(json.dumps(old, indent=2))
    tensors = load_file(folder / "distillation_state.safetensors")
    assert tensors.keys() == first.distiller.objectives.state_dict().keys() and len(tensors) > 0
    write_manifest(folder, 1, [], read_manifest(folder)["run"])
    again = run()
    again.train(resume_from_checkpoint=str(folder))
    assert largest_difference(weights(first.distiller), weights(again.distiller)) == 0.0
    assert again.gradient_rule.history == first.gradient_rule.history
    assert again.layer_rates.state_dict() == first.layer_rates.state_dict()


def test_a_new_part_of_a_checkpoint_is_one_line(tmp_path):
    class Counter:
        def __init__(self):
            self.loaded = None

        def state_dict(self):
            return {"seen": torch.arange(3.0)}

        def load_state_dict(self, state):
            self.loaded = state

    counters = []

    class WithCounter(DistillationTrainer):
        def _checkpoint_parts(self, folder):
            counters.append(Counter())
            return super()._checkpoint_parts(folder) | {"counter": counters[-1]}

    def run():
        settings = config(tmp_path, objectives=[{"name": "task"}], **RUN | {"max_steps": 2})
        return WithCounter(build("resnet"), settings, train_dataset=Images(8))

    run().train()
    run().train(resume_from_checkpoint=True)
    assert counters[-1].loaded["seen"].tolist() == [0.0, 1.0, 2.0]
    (tmp_path / "checkpoint-2" / "counter.safetensors").unlink()
    with pytest.raises(ValueError, match=r"counter\.safetensors is missing"):
        run().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
