"""Weights that are "auto": what is measured, that measuring leaves no trace, and what is refused."""

import random

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils.data import IterableDataset

from hf_kdtl import DistillationConfig
from hf_kdtl.functional.random import Draws
from hf_kdtl.hub.model_card import student_card
from hf_kdtl.hub.trainer_results import results_of
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.objectives.logits import LogitKD
from hf_kdtl.trainer.auto_weights import _fitted
from tests.distributed.split_worker import run, work
from tests.support.helpers import Images, config, forked, largest_difference, pair, trainer, weights
from tests.support.tiny import build

AUTO = [{"name": "task", "weight": 0.3}, {"name": "logit_kd", "weight": "auto"}]
RUN = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3}


def with_numbers(entries, runner):
    """The entries with what the run measured."""
    measured = runner.auto_weights.weights
    return [entry | {"weight": measured.get(entry.get("key", entry["name"]), entry.get("weight", 1.0))}
            for entry in entries]  # fmt: skip


def trained(folder, entries, student="vit", data=None, **settings):
    model, teacher = pair(student)
    runner = trainer(folder, model, teacher, data, entries, **RUN | settings)
    runner.train()
    return runner


def test_it_is_the_ratio_of_the_mean_gradients(tmp_path):
    entries = [{"name": "lwf", "weight": 0.0}, *AUTO, {"name": "attention_transfer", "weight": {"auto": 0.5}}]
    runner = trained(tmp_path, entries, data=Images(12, "some"), gradient_accumulation_steps=2, max_steps=1)
    student, teacher = pair()
    by_hand = trainer(tmp_path, student, teacher, Images(12, "some"), entries)
    parameters = list(by_hand.model.parameters())
    rows = list(runner.get_train_dataloader().batch_sampler)  # of the first epoch, as training reads them
    sums = {key: 0.0 for key in ("task", "logit_kd", "attention_transfer")}
    for first, second in (rows[:2], [rows[2], []]):
        inputs = [Images(12, "some")[i] for i in [*first, *second]]
        inputs = {name: torch.stack([row[name] for row in inputs]) for name in inputs[0]}
        terms = by_hand.distiller.train().terms(inputs, Draws(0, 0, tuple(range(len(inputs["labels"])))))[1]
        for key in sums:
            images = (inputs["labels"] >= 0).sum() if key == "task" else len(inputs["labels"])
            loss = terms[key].sum() / images
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            flat = [
                (torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, parameters, strict=True)
            ]
            sums[key] = sums[key] + torch.cat(flat).double()
    norms = {key: total.norm().item() / 2 for key, total in sums.items()}
    assert runner.auto_weights.found["reference"] == "task" and runner.auto_weights.found["steps"] == 2
    assert runner.auto_weights.weights == {
        "logit_kd": pytest.approx(0.3 * norms["task"] / norms["logit_kd"], rel=1e-5),
        "attention_transfer": pytest.approx(0.5 * 0.3 * norms["task"] / norms["attention_transfer"], rel=1e-5),
    }


def test_a_reference_that_pulls_less_than_another_term_is_noted(tmp_path):
    second = {"name": "attention_transfer", "weight": "auto"}
    entries = [AUTO[0] | {"weight": 0.01}, {"name": "logit_kd", "weight": 0.9}, second]
    runner = trained(tmp_path / "weak", entries, max_steps=1)
    terms = runner.auto_weights.found["terms"]
    times = 0.9 * terms["logit_kd"]["norm"] / (0.01 * terms["task"]["norm"])
    assert times > 2 and f"'logit_kd' pulls {times:.2g} times as strongly as 'task'" in runner.auto_weights.sentence()
    other = trained(tmp_path / "strong", [entries[1], entries[0], second], max_steps=1)
    assert "pulls" not in other.auto_weights.sentence()
    ratio = other.auto_weights.weights["attention_transfer"] / runner.auto_weights.weights["attention_transfer"]
    assert ratio == pytest.approx(times, rel=1e-5)


class Noisy(Images):
    """Images with noise from each of the global streams."""

    def __getitem__(self, i):
        noise = random.random() + np.random.random() + torch.rand(()).item()
        return super().__getitem__(i) | {"pixel_values": self.pixels[i] + 0.1 * noise}


@pytest.mark.parametrize("student, options", [("vit", {"hidden_dropout_prob": 0.2}), ("resnet", {})])
@pytest.mark.parametrize("entry", ["logit_kd", "hidden_states"])
def test_the_run_is_as_if_nothing_had_been_measured(tmp_path, student, options, entry):
    entries = [{"name": "task", "weight": 0.3}, {"name": entry, "weight": "auto"}]
    runs = []
    for number in range(2):
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        runner = trainer(tmp_path, build(student, **options), build(student, seed=5), Noisy(), entries, **RUN)
        if number:
            assert {module.training for module in runner.model.modules()} == {False}
        runner.train()
        runs.append(runner)
        entries = with_numbers(entries, runner)
    assert largest_difference(weights(runs[0].distiller), weights(runs[1].distiller)) == 0.0
    assert runs[1].auto_weights.found is None


def test_a_term_that_is_100_times_as_large_gives_the_same_run(tmp_path, monkeypatch):
    class Larger(LogitKD):
        def forward(self, student, teacher, batch):
            return 100 * super().forward(student, teacher, batch)

    plain = trained(tmp_path, AUTO, optim="sgd")
    monkeypatch.setitem(OBJECTIVES, "logit_kd", Larger)
    larger = trained(tmp_path, AUTO, optim="sgd")
    assert larger.auto_weights.weights["logit_kd"] == pytest.approx(
        plain.auto_weights.weights["logit_kd"] / 100, rel=1e-5
    )
    assert largest_difference(weights(plain.model), weights(larger.model)) < 1e-6
    assert largest_difference(weights(plain.model), weights(build("vit"))) > 1e-4


def test_resume_is_bitwise(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, **RUN}
    student, teacher = pair()
    whole = trainer(tmp_path, student, teacher, None, AUTO, **settings)
    whole.train()
    again = trainer(tmp_path, student, teacher, None, AUTO, **settings)
    measured = []
    again.auto_weights._measured = measured.append
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not measured and again.auto_weights.found == whole.auto_weights.found
    assert largest_difference(weights(whole.distiller), weights(again.distiller)) == 0.0


def test_a_second_training_measures_again(tmp_path):
    runner = trained(tmp_path, AUTO)
    first = runner.auto_weights.found
    runner.train()
    assert runner.auto_weights.found["terms"] != first["terms"]


def test_resuming_with_another_ratio_measures_again(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, **RUN}
    whole = trained(tmp_path, AUTO, **settings)
    student, teacher = pair()
    half = [AUTO[0], {"name": "logit_kd", "weight": {"auto": 0.5}}]
    again = trainer(tmp_path, student, teacher, None, half, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.auto_weights.found["ratios"] == {"logit_kd": 0.5}
    assert again.auto_weights.found != whole.auto_weights.found


SPLIT = [*AUTO, {"name": "hidden_states", "weight": {"auto": 0.5}}]


def test_splits_and_processes_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_kdtl.trainer.auto_weights.FITTING", 10)
    one = run(tmp_path / "a", 8, 1, "some", 16, SPLIT)
    split = run(tmp_path / "b", 4, 2, "some", 16, SPLIT)
    assert split.auto_weights.weights == {k: pytest.approx(w, rel=1e-6) for k, w in one.auto_weights.weights.items()}
    assert largest_difference(weights(one.distiller), weights(split.distiller)) < 1e-6
    forked(work, 2, tmp_path / "two.safetensors", 2, 2, "some", {"objectives": SPLIT})
    assert largest_difference(weights(one.distiller), load_file(tmp_path / "two.safetensors")) < 1e-6


@pytest.mark.parametrize(
    "settings",
    [{"gradient_rule": {"name": "never_hurt"}}, {"layer_rates": {"mode": "discrepancy", "source": "attention"}},
     {"layer_rates": {"mode": "loss_weight", "source": "attention"}}, {"gradient_rule": {"name": "layer_local"}}],
)  # fmt: skip
def test_with_gradient_rules_and_layer_rates_the_weights_are_the_same(tmp_path, settings):
    entries = [AUTO[0], {"name": "attention_transfer", "weight": "auto"}]
    plain, other = trained(tmp_path, entries), trained(tmp_path, entries, **settings)
    assert other.auto_weights.found == plain.auto_weights.found
    if other.layer_rates is not None:
        assert other.layer_rates.history
    log = other.state.log_history[0]
    share = other.auto_weights.weights["attention_transfer"] * log["attention_transfer"]
    assert log["attention_transfer_share"] == pytest.approx(share / (share + 0.3 * log["task"]), rel=1e-4)


def test_it_takes_one_forward_and_one_backward_a_term_and_batch(tmp_path):
    student, teacher = pair()
    runner = trainer(tmp_path, student, teacher, Images(80), AUTO, **RUN | {"max_steps": 1, "logging_steps": 9})
    forwards, backwards = [], []
    runner.model.register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    runner.model.classifier.register_full_backward_hook(lambda *_: backwards.append(1))
    runner.train()
    # 16 optimizer steps for the weights, one of training, and before them one look at what can learn.
    assert runner.auto_weights.found["steps"] == 16
    assert forwards.count(True) == 16 + 1 + 1 and len(backwards) == 2 * 16 + 1 + 1


@pytest.mark.parametrize("name", ["l2_sp", "delta"])
def test_what_holds_to_the_start_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"'{name}': weight is auto.*at its minimum at the start; give a number"):
        student, _ = pair()
        entries = [{"name": "task"}, {"name": name, "weight": "auto"}]
        trainer(tmp_path, student, None, None, entries, **RUN).train()


def test_data_that_can_be_read_once_is_refused(tmp_path):
    class Pipe(IterableDataset):
        def __init__(self):
            self.items = iter([Images(24)[i] for i in range(24)])

        def __iter__(self):
            return self.items

    runner = trainer(tmp_path, *pair(), Pipe(), AUTO, **RUN)
    with pytest.raises(ValueError, match=r"train_dataset can be read once\. Give numbers"):
        runner.train()
    assert sum(1 for _ in runner.train_dataset) == 24


def test_a_copy_of_the_teacher_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'logit_kd'.*at its minimum at the start"):
        trainer(tmp_path, build("vit"), build("vit"), None, AUTO, **RUN).train()


def test_a_step_before_anything_was_measured_is_refused(tmp_path):
    runner = trainer(tmp_path, *pair(), None, AUTO, **RUN)
    batch = next(iter(runner.get_train_dataloader()))
    _ = runner.distiller
    with pytest.raises(ValueError, match="weight of logit_kd is auto, which train"):
        runner.compute_loss(runner.distiller, batch)


def test_the_config_takes_it_from_text_and_gives_it_back():
    text = '[{"name": "task"}, {"name": "logit_kd", "weight": {"auto": 0.5}}]'
    args = DistillationConfig("out", objectives=text, use_cpu=True)
    assert args.auto_ratios() == {"logit_kd": 0.5} and args.to_dict()["objectives"][1]["weight"] == {"auto": 0.5}
    from_yaml = yaml.safe_load("objectives: [{name: task}, {name: logit_kd, weight: auto}]")
    assert DistillationConfig("out", use_cpu=True, **from_yaml).auto_ratios() == {"logit_kd": 1.0}


@pytest.mark.parametrize(
    "weight, expected",
    [("Auto", 'a number of at least 0, "auto"'), ({"auto": 0}, "a number above 0"), ({"auto": "x"}, "a number above"),
     ({"auto": 1, "from": "task"}, "a number above 0"), ({}, "a number above 0"), (True, "a number of at least 0")],
)  # fmt: skip
def test_other_weights_are_refused(tmp_path, weight, expected):
    with pytest.raises(ValueError, match=f"'logit_kd': weight is .*; expected .*{expected}"):
        config(tmp_path, [{"name": "task"}, {"name": "logit_kd", "weight": weight}])


def test_without_a_number_to_compare_with_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"weight of logit_kd is auto.*there is none"):
        config(tmp_path, [{"name": "task", "weight": 0}, {"name": "logit_kd", "weight": "auto"}])


def test_results_and_card_say_what_was_measured(tmp_path):
    runner = trained(tmp_path, AUTO)
    found = results_of(runner)
    assert found["auto_weights"]["run"]["terms"]["logit_kd"]["weight"] == runner.auto_weights.weights["logit_kd"]
    assert f"auto: {runner.auto_weights.weights['logit_kd']:.3g}" in str(student_card(found))


def test_projectors_are_fitted_for_the_measuring_and_put_back(tmp_path):
    runner = trainer(tmp_path, *pair(), None, [AUTO[0], {"name": "hidden_states", "weight": "auto"}], **RUN)
    distiller, batch = runner.distiller, next(iter(runner.get_train_dataloader()))
    own, start = list(distiller.objectives["hidden_states"].parameters()), weights(distiller)
    # As while measuring: every weight 1, each term apart.
    distiller.weights, distiller.split_terms = {"task": 1.0, "hidden_states": 1.0}, "terms"
    values = [runner.objective_terms(batch)["hidden_states"].mean().item()]
    with _fitted(runner, distiller, {"hidden_states": own}):
        values.append(runner.objective_terms(batch)["hidden_states"].mean().item())
        assert largest_difference(weights(distiller.student), weights(runner.model)) == 0.0
    assert values[1] < 0.85 * values[0] and largest_difference(weights(distiller), start) == 0.0
