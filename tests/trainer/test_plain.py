"""With one task objective and no teacher the class is the plain Trainer."""

import copy

import numpy as np
import pytest
import torch
from packaging.version import Version
from transformers import Trainer, TrainerCallback, TrainingArguments, __version__

from hf_kdtl import DistillationConfig, DistillationTrainer
from tests.support.helpers import Images, config, largest_difference, weights
from tests.support.tiny import build

TASK = [{"name": "task"}]


def _run(cls, folder, model, steps=8, **settings):
    kind = DistillationConfig if cls is DistillationTrainer else TrainingArguments
    recipe = {"max_steps": steps, "learning_rate": 1e-3, "warmup_steps": 3, "weight_decay": 0.01, "max_grad_norm": 0.5}
    arguments = config(folder, TASK, kind, **(recipe | settings))
    runner = cls(copy.deepcopy(model), arguments, train_dataset=Images(32), eval_dataset=Images(20, seed=1))
    before = runner.evaluate()["eval_loss"]
    runner.train()
    predicted = runner.predict(Images(5, seed=2))
    return {
        "weights": weights(runner.model),
        "losses": [line["loss"] for line in runner.state.log_history if "loss" in line],
        "norms": [line["grad_norm"] for line in runner.state.log_history if "grad_norm" in line],
        "evals": [before, runner.evaluate()["eval_loss"], predicted.metrics["test_loss"]],
        "predictions": predicted.predictions,
        "keys": set(predicted.metrics),
    }


@pytest.mark.parametrize(
    ("family", "accumulation", "smoothing"), [("vit", 1, 0.0), ("vit", 2, 0.0), ("vit", 1, 0.1), ("convnext", 2, 0.1)]
)
def test_trains_evaluates_and_predicts_as_trainer_does(tmp_path, family, accumulation, smoothing):
    if smoothing and accumulation > 1 and Version(__version__) < Version("5.15"):
        pytest.skip("Trainer averages the smoothed loss over micro-batches there, and the other over images")
    model = build(family)
    settings = {
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "label_smoothing_factor": smoothing,
    }
    plain = _run(Trainer, tmp_path / "plain", model, **settings)
    ours = _run(DistillationTrainer, tmp_path / "ours", model, **settings)
    assert largest_difference(plain["weights"], ours["weights"]) == 0.0
    assert (plain["predictions"] == ours["predictions"]).all()
    assert plain["norms"] == ours["norms"] and len(plain["norms"]) == 8
    # The loss is summed in another order: one unit in the last place.
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert ours["evals"] == pytest.approx(plain["evals"], rel=1e-6)
    assert plain["keys"] == ours["keys"]


@pytest.mark.parametrize(("family", "times"), [("resnet", 2), ("beit", 2), ("vit", 1)])
def test_models_that_do_not_pass_the_number_of_items_on_to_their_loss(tmp_path, family, times):
    """Trainer 5.23 takes the loss of these for one that was divided; when it does no more, the docstring changes."""
    found = []
    for cls in (Trainer, DistillationTrainer):
        kind = DistillationConfig if cls is DistillationTrainer else TrainingArguments
        settings = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        runner = cls(build(family), config(tmp_path / cls.__name__, TASK, kind, **settings), train_dataset=Images(8))
        runner.train()
        found.append(runner.state.log_history[0])
    for name in ("loss", "grad_norm"):
        assert found[0][name] == pytest.approx(times * found[1][name], rel=1e-5)
    with_all = DistillationTrainer(
        build(family), config(tmp_path, TASK, max_steps=1, per_device_train_batch_size=8), train_dataset=Images(8)
    )
    with_all.train()
    assert found[1]["loss"] == pytest.approx(
        with_all.state.log_history[0]["loss"], rel=0.2 if family == "resnet" else 1e-5
    )


def test_unlabelled_images_count_nothing_as_in_trainer(tmp_path):
    model = build("vit")
    found = []
    for cls in (Trainer, DistillationTrainer):
        kind = DistillationConfig if cls is DistillationTrainer else TrainingArguments
        arguments = config(tmp_path / cls.__name__, TASK, kind, max_steps=4, gradient_accumulation_steps=2)
        runner = cls(copy.deepcopy(model), arguments, train_dataset=Images(64, labels="some"))
        runner.train()
        found.append(weights(runner.model))
    assert largest_difference(*found) == 0.0


def test_compute_loss_func_keeps_its_meaning(tmp_path):
    def squared(outputs, labels, num_items_in_batch=None):
        picked = outputs["logits"].gather(1, labels[:, None])
        return (picked - 1).square().sum() / num_items_in_batch

    model, found = build("vit"), []
    for cls in (Trainer, DistillationTrainer):
        kind = DistillationConfig if cls is DistillationTrainer else TrainingArguments
        arguments = config(tmp_path / cls.__name__, TASK, kind, max_steps=3, gradient_accumulation_steps=2)
        runner = cls(copy.deepcopy(model), arguments, train_dataset=Images(64), compute_loss_func=squared)
        runner.train()
        found.append(weights(runner.model))
    assert largest_difference(*found) < 1e-7
    assert largest_difference(found[0], weights(model)) > 1e-5


def test_iterable_data_with_max_steps(tmp_path):
    class Stream(__import__("torch").utils.data.IterableDataset):
        def __iter__(self):
            return iter(Images(32))

    model, found = build("vit"), []
    for cls in (Trainer, DistillationTrainer):
        kind = DistillationConfig if cls is DistillationTrainer else TrainingArguments
        runner = cls(
            copy.deepcopy(model), config(tmp_path / cls.__name__, TASK, kind, max_steps=6), train_dataset=Stream()
        )
        runner.train()
        found.append(weights(runner.model))
    assert largest_difference(*found) == 0.0


def test_hyperparameter_search_reaches_nested_values(tmp_path):
    seen = []
    teacher = build("vit", seed=5)

    def space(trial):
        return {
            "learning_rate": trial.suggest_categorical("learning_rate", [1e-3]),
            "objectives.logit_kd.temperature": trial.suggest_categorical("t", [2.5]),
            "objectives.logit_kd.weight": trial.suggest_categorical("w", [0.25]),
        }

    runner = DistillationTrainer(
        None,
        config(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1),
        model_init=lambda: build("vit"),
        teacher=teacher,
        train_dataset=Images(),
        eval_dataset=Images(8),
    )
    trained = runner.training_step

    def spy(*args, **kwargs):
        objective = runner.distiller.objective("logit_kd")
        seen.append((objective.temperature, runner.distiller.weights["logit_kd"]))
        return trained(*args, **kwargs)

    runner.training_step = spy
    best = runner.hyperparameter_search(space, n_trials=2, backend="optuna")
    assert seen == [(2.5, 0.25)] * 2
    assert best.hyperparameters["t"] == 2.5


def _searching(tmp_path, **settings):
    return DistillationTrainer(
        None,
        config(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1, **settings),
        model_init=lambda: build("vit"),
        teacher=build("vit", seed=5),
        train_dataset=Images(),
        eval_dataset=Images(8),
    )


def test_the_best_run_can_be_set_name_by_name(tmp_path):
    """As the documentation of transformers does."""
    key, runner = "objectives.logit_kd.temperature", _searching(tmp_path)
    best = runner.hyperparameter_search(
        lambda trial: {key: trial.suggest_categorical(key, [2.5])}, n_trials=1, backend="optuna"
    )
    runner.args.objectives[1]["temperature"] = 1.0
    for name, value in best.hyperparameters.items():
        setattr(runner.args, name, value)
    runner.train()
    assert runner.distiller.objective("logit_kd").temperature == 2.5


def test_a_search_optimizes_the_same_with_and_without_reported_terms(tmp_path):
    def space(trial):
        return {"learning_rate": trial.suggest_categorical("learning_rate", [1e-3])}

    runner = _searching(tmp_path, eval_objectives=True)
    best = runner.hyperparameter_search(space, n_trials=1, backend="optuna")
    line = next(line for line in runner.state.log_history if "eval_loss" in line)
    assert best.objective == line["eval_loss"] and line["eval_logit_kd"] > 0
    runner.compute_metrics = lambda prediction: {"task": 3.0, "own": 4.0}  # eval_task is the metric's
    best = runner.hyperparameter_search(space, n_trials=1, backend="optuna")
    assert best.objective == 7.0
    best = runner.hyperparameter_search(space, lambda metrics: metrics["eval_logit_kd"], n_trials=1, backend="optuna")
    assert best.objective == line["eval_logit_kd"]


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def _sum(prediction):
    parts = (prediction.predictions, prediction.label_ids, prediction.inputs, prediction.losses)
    return {
        "sum": float(sum(np.concatenate(x).sum() if isinstance(x, list) else x.sum() for x in parts if x is not None))
    }


def _sgd(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}
OPTIONS = {
    "metrics of inputs and losses": ({"include_for_metrics": ["inputs", "loss"]}, {"compute_metrics": _sum}),
    "metrics of the predicted class": (
        {},
        {"compute_metrics": _sum, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)},
    ),
    "metrics of batches": ({"eval_do_concat_batches": False}, {"compute_metrics": _sum}),
    "loss alone": ({"prediction_loss_only": True}, {"compute_metrics": _sum}),
    "own optimizer and schedule": ({}, {"optimizers": _sgd}),
    "own model_init": ({}, {"model_init": lambda: build("vit", seed=3)}),
    "a callback that stops": ({}, {"callbacks": [Stop]}),
    "evaluated at the start": ({"eval_on_start": True, **EVERY_STEP}, {}),
    "a plateau": ({"lr_scheduler_type": "reduce_lr_on_plateau", **EVERY_STEP}, {}),
    "a batch size that is searched": ({"auto_find_batch_size": True}, {}),
    "emptied caches": ({"torch_empty_cache_steps": 1}, {}),
    "a seed of the data": ({"data_seed": 7}, {}),
    "adafactor": ({"optim": "adafactor"}, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_trainer_mean_what_they_mean_there(tmp_path, name):
    settings, given = OPTIONS[name]
    found = []
    for cls in (Trainer, DistillationTrainer):
        kind = DistillationConfig if cls is DistillationTrainer else TrainingArguments
        model, more = build("vit"), dict(given)
        if "optimizers" in more:
            more["optimizers"] = more["optimizers"](model)
        recipe = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3} | settings
        arguments = config(tmp_path / cls.__name__, TASK, kind, **recipe)
        data = {"train_dataset": Images(16), "eval_dataset": Images(8, seed=3)}
        runner = cls(None if "model_init" in more else model, arguments, **data, **more)
        runner.train()
        lines = [*runner.state.log_history, runner.evaluate()]
        kept = ("loss", "learning_rate", "grad_norm", "eval_loss", "eval_sum", "step")
        found.append([{key: line[key] for key in kept if key in line} for line in lines])
    plain, ours = found
    assert len(plain) == len(ours) > 2
    for one, other in zip(plain, ours, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
