"""What the trainer says, logs and refuses."""

import copy
import inspect

import datasets
import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback, TrainingArguments, ViTImageProcessor

from hf_kdtl import DistillationTrainer
from hf_kdtl.models.forward.capture import Needs, capture
from hf_kdtl.utils.versions import CHECKPOINTING
from tests.support.helpers import KD, Images, config, largest_difference, trainer, weights
from tests.support.tiny import build


def test_every_term_is_logged_as_the_mean_over_all_images(tmp_path):
    seen = []
    runner = trainer(
        tmp_path,
        build("vit"),
        build("vit", seed=5),
        max_steps=4,
        logging_steps=2,
        learning_rate=0.0,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=3,
        data=Images(24, "some"),
    )
    stepped = runner.training_step

    def spy(model, inputs, *args):
        with torch.no_grad():
            seen.append((runner.objective_terms(inputs), inputs["labels"] != -100))
        return stepped(model, inputs, *args)

    runner.training_step = spy
    runner.train()
    lines = [entry for entry in runner.state.log_history if "loss" in entry]
    assert len(lines) == 2 and len(seen) == 8
    for line, window in zip(lines, (seen[:4], seen[4:]), strict=True):
        known = torch.cat([mask for _, mask in window])
        task = torch.cat([terms["task"] for terms, _ in window])
        kd = torch.cat([terms["logit_kd"] for terms, _ in window])
        assert len(task) == 12 and known.sum() < 12 and (task[~known] == 0).all()
        assert line["task"] == pytest.approx(task.sum().item() / known.sum().item(), rel=1e-5)
        assert line["logit_kd"] == pytest.approx(kd.mean().item(), rel=1e-5)
        parts = 0.3 * line["task"], 0.7 * line["logit_kd"]
        assert line["task_share"] == pytest.approx(parts[0] / sum(parts))
        assert line["task_share"] + line["logit_kd_share"] == pytest.approx(1.0)


def test_the_loss_is_the_weighted_terms(tmp_path):
    student, teacher = build("vit"), build("vit", seed=5)
    runner = trainer(tmp_path, student, teacher, max_steps=1)
    inputs = {k: torch.stack([row[k] for row in Images(6)]) for k in ("pixel_values", "labels")}
    z_s, z_t = student(inputs["pixel_values"]).logits, teacher(inputs["pixel_values"]).logits
    kd = 16 * F.kl_div(F.log_softmax(z_s / 4, -1), F.log_softmax(z_t / 4, -1), reduction="batchmean", log_target=True)
    expected = 0.3 * F.cross_entropy(z_s, inputs["labels"]) + 0.7 * kd
    loss = runner.compute_loss(runner.distiller, inputs)
    torch.testing.assert_close(loss, expected)


def test_eval_loss_is_the_task_loss_whatever_the_objectives(tmp_path):
    student, teacher = build("vit"), build("vit", seed=5)
    data = Images(20)
    pixels, labels = data.pixels, data.labels
    expected = F.cross_entropy(student(pixels).logits, labels).item()
    for objectives in (KD, [{"name": "logit_kd"}]):
        runner = trainer(tmp_path, student, teacher, objectives=objectives)
        metrics = runner.evaluate(data)
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
        assert "eval_logit_kd" not in metrics
    soft = Images(8, "soft")
    expected = F.cross_entropy(student(soft.pixels).logits, soft.labels).item()
    assert runner.evaluate(soft)["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_terms_are_evaluated_when_asked_for(tmp_path):
    runner = trainer(tmp_path, build("vit"), build("vit", seed=5), eval_objectives=True)
    data = Images(11, "some")
    metrics = runner.evaluate(data)
    runner.model.eval()
    with torch.no_grad():
        terms = runner.objective_terms({"pixel_values": data.pixels, "labels": data.labels})
    assert metrics["eval_logit_kd"] == pytest.approx(terms["logit_kd"].mean().item(), rel=1e-5)
    assert metrics["eval_task"] == pytest.approx(terms["task"].sum().item() / (data.labels != -100).sum().item())


class EvaluateInside(TrainerCallback):
    """Evaluates before and between the micro-batches of every step."""

    runner = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.runner.evaluate(Images(6), metric_key_prefix="inside")

    on_substep_end = on_step_begin


def test_an_evaluation_inside_a_step_changes_nothing_of_it(tmp_path):
    objectives = [*KD, {"name": "jacobian", "estimator": "vjp"}]  # with random directions
    moved = []
    for callbacks in ([], [EvaluateInside()]):
        settings = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
        data = Images(32, "some")
        runner = trainer(
            tmp_path, build("vit"), build("vit", seed=5), data, objectives, callbacks=callbacks, **settings
        )
        EvaluateInside.runner = runner
        runner.train()
        moved.append(weights(runner.model))
    assert sum("inside_loss" in entry for entry in runner.state.log_history) == 4
    assert largest_difference(*moved) == 0.0


def test_an_evaluation_inside_an_evaluation_changes_nothing_of_it(tmp_path):
    found = []
    for inner in (False, True):
        runner = trainer(tmp_path, build("vit"), build("vit", seed=5), eval_objectives=True)
        before = []

        def metrics(prediction, inner=inner, runner=runner, before=before):
            if inner and not before:
                before.append(1)  # it is called for the inner one too
                before.append(runner.predict(Images(4, seed=3), metric_key_prefix="inner").metrics["inner_loss"])
            return {"n": len(prediction.predictions)}

        runner.compute_metrics = metrics
        result = runner.evaluate(Images(11, "some"))
        found.append({key: result[key] for key in ("eval_loss", "eval_task", "eval_logit_kd", "eval_n")})
    assert found[0] == found[1] and found[1]["eval_n"] == 11
    assert before[1] == pytest.approx(trainer(tmp_path, build("vit")).evaluate(Images(4, seed=3))["eval_loss"])


def test_a_metric_keeps_its_name_beside_a_term_of_that_key(tmp_path, caplog):
    entries = [{"name": "task"}, {"name": "logit_kd", "key": "accuracy"}]
    runner = trainer(tmp_path, build("vit"), build("vit", seed=5), objectives=entries, eval_objectives=True)
    runner.compute_metrics = lambda prediction: {"accuracy": 0.25}
    assert runner.evaluate(Images(8))["eval_accuracy"] == 0.25
    assert "['eval_accuracy'] are of compute_metrics; give the objectives another key" in caplog.text


def test_training_with_unlabelled_images_only_needs_no_task(tmp_path):
    data = [{"pixel_values": row["pixel_values"]} for row in Images()]
    runner = trainer(tmp_path, build("vit"), build("vit", seed=5), data, [{"name": "logit_kd"}], max_steps=2)
    runner.train()
    assert largest_difference(weights(runner.model), weights(build("vit"))) > 0
    with pytest.raises(ValueError, match=r"objective 'task' needs labels and the batch has only \['pixel_values'\]"):
        trainer(tmp_path, build("vit"), build("vit", seed=5), data, max_steps=1).train()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_precision_and_checkpointing(tmp_path, precision, checkpointing):
    student, teacher = build("vit"), build("vit", seed=5)
    plain = trainer(tmp_path, student, teacher, max_steps=3, eval_dataset=Images(8))
    plain.train()
    other = trainer(
        tmp_path,
        student,
        teacher,
        max_steps=3,
        eval_dataset=Images(8),
        bf16=precision == "bf16",
        gradient_checkpointing=checkpointing,
    )
    other.train()
    difference = largest_difference(weights(plain.model), weights(other.model))
    assert difference == 0.0 if precision == "float32" else 0 < difference < 1e-3
    seen = []
    other.preprocess_logits_for_metrics = lambda logits, labels: seen.append(logits) or logits
    other.compute_metrics = lambda prediction: {}
    other.evaluate()
    with torch.no_grad():
        exact = other.model.eval()(Images(8).pixels).logits
    difference = (seen[0] - exact).abs().max().item()
    assert seen[0].dtype == torch.float32
    assert difference == 0 if precision == "float32" else 1e-6 < difference < 0.1, "evaluation is in another precision"


@pytest.mark.slow
def test_torch_compile_gives_the_same_weights(tmp_path):
    student, teacher = build("vit"), build("vit", seed=5)
    plain = trainer(tmp_path, student, teacher, max_steps=3)
    plain.train()
    compiled = trainer(tmp_path, student, teacher, max_steps=3, torch_compile=True, torch_compile_backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2, "student and teacher were not compiled"
    assert largest_difference(weights(plain.model), weights(compiled.model)) < 1e-6


@pytest.mark.slow
def test_code_compiled_without_hooks_serves_no_forward_that_has_some(tmp_path):
    student, pixels, reading = build("vit"), torch.randn(2, 3, 32, 32), Needs(hidden_states=frozenset({0}))
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # torch's default
        torch._dynamo.reset()
        student.compile(backend="eager")
        capture(student, pixels, Needs())
        with pytest.raises(ValueError, match=r"did not run the blocks \[0\].*If it is compiled"):
            capture(student, pixels, reading)
        trainer(tmp_path, build("vit"), build("vit", seed=5), torch_compile=True, torch_compile_backend="aot_eager")
        capture(student, pixels, Needs())
        assert capture(student, pixels, reading).hidden_states.keys() == {0}


@pytest.mark.slow
def test_layer_rates_are_measured_again_in_a_compiled_run(tmp_path):
    rates = {"mode": "discrepancy", "source": "attention", "every": 2}  # the steps in between read no blocks
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    found = []
    for settings in ({}, compiled):
        student, teacher = build("vit"), build("vit", seed=5)
        run = trainer(tmp_path / str(len(found)), student, teacher, max_steps=5, layer_rates=rates, **settings)
        run.train()
        found.append((run.layer_rates.rates.ratios, weights(student)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert largest_difference(found[0][1], found[1][1]) < 1e-5


def test_a_loss_that_turns_nan_stops_and_keeps_the_checkpoint(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                model.classifier.weight.data.fill_(float("nan"))

    runner = trainer(
        tmp_path,
        build("vit"),
        build("vit", seed=5),
        max_steps=6,
        callbacks=[Poison()],
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
    )
    with pytest.raises(FloatingPointError) as error:
        runner.train()
    message = str(error.value)
    assert "step 3" in message and "task, logit_kd is not finite" in message and "largest" in message
    assert "checkpoint-2" in message and (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


def test_a_gradient_that_turns_nan_leaves_the_weights(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                model.classifier.weight.register_hook(lambda g: g * float("inf"))

    runner = trainer(tmp_path, build("vit"), build("vit", seed=5), max_steps=3, callbacks=[Poison()])
    with pytest.raises(FloatingPointError, match=r"gradient's norm is (nan|inf) at step 1"):
        runner.train()
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())


def test_what_does_not_fit_together_is_refused(tmp_path):
    student, teacher = build("vit"), build("vit", seed=5)

    def refused(sentence, model=student, entries=KD, kind=ValueError, given=teacher, **settings):
        loss = {"compute_loss_func": settings.pop("loss")} if "loss" in settings else {}
        with pytest.raises(kind) as error:
            DistillationTrainer(copy.deepcopy(model), config(tmp_path, entries, **settings), teacher=given, **loss)
        assert sentence in str(error.value), error.value

    refused("logit_kd need a teacher and none was given", given=None)
    refused("a teacher was given and no objective uses it", entries=[{"name": "task"}])
    refused("the teacher is int; expected a model", given=3, kind=TypeError)
    refused("the student with its adapters off, and ViTForImageClassification has none", given="self")
    refused("does not exist", given="./nowhere", kind=FileNotFoundError)
    refused("there is none. Add", entries=[{"name": "logit_kd"}], loss=lambda *a, **k: 0)
    refused("Rename the column", label_names=["target"])
    multi = build("vit")
    multi.config.problem_type = "multi_label_classification"
    refused("the student has several labels an image and the teacher's problem_type is None", model=multi)
    with pytest.raises(TypeError, match="expected DistillationConfig"):
        DistillationTrainer(student, TrainingArguments(str(tmp_path)))
    with pytest.raises(ValueError, match="teacher and student share parameters"):
        DistillationTrainer(student, config(tmp_path), teacher=student)
    with pytest.raises(TypeError, match="trian_dataset"):
        DistillationTrainer(student, config(tmp_path), teacher=teacher, trian_dataset=Images())


def test_an_image_size_the_model_cannot_take_is_explained(tmp_path):
    runner = trainer(tmp_path, build("vit"), build("vit", seed=5), Images(size=48), max_steps=1)
    with pytest.raises(ValueError, match=r"given pixels of 48 x 48 and is made for 32 x 32.*image processor of size"):
        runner.train()


def test_the_trainer_keeps_the_image_processor_with_the_student(tmp_path):
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    runner = DistillationTrainer(
        build("vit"), config(tmp_path), teacher=build("vit", seed=5), processing_class=processor
    )
    runner.save_model()
    assert (tmp_path / "preprocessor_config.json").is_file()


def test_reentrant_checkpointing_is_refused_where_it_would_be_wrong(tmp_path):
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="attention_map would get wrong gradients under reentrant checkpointing"):
        trainer(tmp_path, build("vit"), build("vit", seed=5), objectives=[{"name": "attention_map"}], **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"objectives": [{"name": "task"}, {"name": "attention_map"}]},
        {"objectives": [{"name": "task"}, {"name": "logit_kd", "weight": "auto"}]},
        {"gradient_rule": {"name": "never_hurt"}},
    ],
    ids=["attention", "auto", "rule"],
)
def test_reentrant_checkpointing_that_the_model_has_is_refused_as_in_the_arguments(tmp_path, settings):
    student, teacher, enable = build("vit"), build("vit", seed=5), f"{CHECKPOINTING}_enable"
    getattr(student, enable)({"use_reentrant": True})
    says = rf"reentrant checkpointing.*use student.{enable}\("
    with pytest.raises(ValueError, match=says):
        trainer(tmp_path, student, teacher, **settings)
    runner = trainer(tmp_path, build("vit"), teacher, max_steps=1, **settings)
    getattr(runner.model, enable)({"use_reentrant": True})  # later
    with pytest.raises(ValueError, match=says):
        runner.train()
    trainer(tmp_path, student, teacher, objectives=KD, max_steps=1).train()
    of_arguments = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    trainer(tmp_path, student, teacher, max_steps=1, **settings | of_arguments).train()  # which win


def test_auto_find_batch_size_keeps_its_meaning(tmp_path):
    runner = trainer(
        tmp_path, build("vit"), build("vit", seed=5), max_steps=2, auto_find_batch_size=True,
        per_device_train_batch_size=16, objectives=[{"name": "task"}, {"name": "hidden_states"}],
    )  # fmt: skip
    stepped, sizes = runner.training_step, []

    def full(model, inputs, *args):
        sizes.append(len(inputs["labels"]))
        if sizes[-1] > 8:
            raise RuntimeError("CUDA out of memory.")
        return stepped(model, inputs, *args)

    runner.training_step = full
    runner.train()
    assert sizes[0] == 16 and sizes[-1] <= 8 and runner.state.global_step == 2
    held = {id(p) for group in runner.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in runner.distiller.parameters()}


def test_data_whose_classes_are_not_the_students_is_refused(tmp_path):
    def labelled(names):
        features = datasets.Features(label=datasets.ClassLabel(names=names), pixel_values=datasets.Value("float32"))
        return datasets.Dataset.from_dict({"label": [0], "pixel_values": [0.0]}, features=features)

    student = build("vit")
    student.config.id2label = {0: "emu", 1: "dog", 2: "cat"}
    for names, sentence in (
        (["cat", "dog", "emu"], r"label 0 would mean another class. Re-order the data.*in_order\(student\)"),
        (["cat", "dog", "fox"], "only the data has 'fox', only the student 'emu'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            trainer(tmp_path, student, data=labelled(names))
        with pytest.raises(ValueError, match=sentence):
            trainer(tmp_path, student, eval_dataset={"a": labelled(names)})
    trainer(tmp_path, student, data=labelled(["emu", "dog", "cat"]))


def test_a_student_whose_forward_takes_no_labels_learns_and_is_evaluated(tmp_path):
    entries = [{"name": "task", "head": "class"}, {"name": "logit_kd", "head": "distillation", "hard": True}]
    runner = trainer(tmp_path, build("deit_teacher"), build("vit", seed=5), objectives=entries, max_steps=2)
    assert "labels" not in inspect.signature(type(runner.model).forward).parameters
    runner.train()
    assert runner.evaluate(Images(8))["eval_loss"] > 0


def test_paired_objectives_take_any_data_that_trainer_takes(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Images(16))

    rows = [{"pixel_values": row["pixel_values"].tolist(), "labels": int(row["labels"])} for row in Images(8)]
    extra = datasets.Dataset.from_list([row | {"note": {"who": "me"}} for row in rows])
    for data in (Stream(), extra):
        entries = [{"name": "task"}, {"name": "hidden_states"}]
        runner = trainer(tmp_path, build("vit"), build("vit", seed=5), data, entries, max_steps=1)
        runner.train()
        assert len(runner.distiller.plans["teacher"].pairs) == 2


def test_a_log_starts_again_with_each_training(tmp_path):
    runner = trainer(tmp_path, build("vit"), max_steps=3, logging_steps=2)
    runner.train()
    runner.train()
    assert runner._meter._sums["task"][1] == 8  # the images of the last step alone
