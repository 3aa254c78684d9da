"""Several teachers: each by its own pixels, blocks and classes, run once a step, and named in every report."""

from pathlib import Path

import pytest
import torch
from transformers import ViTImageProcessor

from hf_kdtl import DistillationTrainer
from hf_kdtl.evaluation.model_records import Models
from hf_kdtl.hub.license import of_parents, student_license
from hf_kdtl.hub.model_card import results_of, student_card
from hf_kdtl.models import Teacher
from hf_kdtl.models.teachers import SelfTeacher, SeveralTeachers, as_source
from hf_kdtl.preflight import preflight
from tests.support.helpers import Images, config, largest_difference, weights
from tests.support.tiny import build

TWO = [{"name": "logit_kd", "teacher": "b"}, {"name": "hidden_states", "teacher": "a"}]


def trained(folder, teacher, objectives, data=None, **settings):
    settings = {"max_steps": 3, "per_device_train_batch_size": 4} | settings
    runner = DistillationTrainer(
        build("vit"), config(folder, objectives, **settings), teacher=teacher, train_dataset=data or Images(16)
    )
    runner.train()
    return runner


def counted(model, calls):
    model.register_forward_pre_hook(lambda *_: calls.append(model))
    return model


def test_one_teacher_under_two_names_teaches_as_it_does_alone(tmp_path):
    model = build("vit", seed=5)
    alone = trained(tmp_path / "a", model, [{"name": "logit_kd"}])
    halves = [{"name": "logit_kd", "key": n, "teacher": n, "weight": 0.5} for n in ("a", "b")]
    twice = trained(tmp_path / "b", {"a": model, "b": Teacher(model)}, halves)
    assert largest_difference(weights(alone.model), weights(twice.model)) < 1e-6


def test_each_teacher_runs_once_a_step_whatever_the_number_of_its_objectives(tmp_path):
    calls = []
    one, other = counted(build("vit", seed=5), calls), counted(build("convnext", seed=6), calls)
    entries = [*TWO, {"name": "dist", "teacher": "b"}, {"name": "attention_transfer", "teacher": "b"}]
    runner = trained(tmp_path, {"a": one, "b": other}, entries)
    assert set(runner.distiller.plans) == {"a", "b"}
    assert [type(runner.distiller.plans[n].teacher).__name__ for n in "ab"] and len(set(map(id, calls))) == 2
    before = {model: calls.count(model) for model in (one, other)}
    runner.objective_terms({"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])})
    assert {model: calls.count(model) - n for model, n in before.items()} == {one: 1, other: 1}


def test_accumulation_and_resuming_change_nothing(tmp_path):
    two = {"a": build("vit", seed=5), "b": build("vit", seed=6)}
    whole = trained(tmp_path / "a", two, TWO, per_device_train_batch_size=8, save_strategy="steps", save_steps=2)
    parts = trained(tmp_path / "b", two, TWO, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert largest_difference(weights(whole.distiller), weights(parts.distiller)) < 1e-6
    again = DistillationTrainer(
        build("vit"), config(tmp_path / "a", TWO, max_steps=3, per_device_train_batch_size=8),
        teacher=two, train_dataset=Images(16),
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert largest_difference(weights(whole.distiller), weights(again.distiller)) == 0


def named(model, names):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


def test_classes_are_matched_for_those_alone_that_are_compared(tmp_path):
    student = named(build("vit"), ["x", "y", "z"])
    turned, others = named(build("vit", seed=5), ["z", "x", "y"]), named(build("vit", seed=6, num_labels=5), "vwxyz")
    source = as_source({"a": others, "b": turned})
    settings = config(tmp_path, TWO, max_steps=1)
    runner = DistillationTrainer(student, settings, teacher=source, train_dataset=Images(8))
    runner.train()
    assert source.members()["b"].order == [1, 2, 0] and source.members()["a"].order is None
    assert any(note.startswith("teacher 'b': labels match by name in another order") for note in source.notes)
    both = [{"name": "logit_kd", "key": n, "teacher": n} for n in ("a", "b")]
    with pytest.raises(ValueError, match=r"teacher 'a': .*different classes"):
        DistillationTrainer(student, config(tmp_path, both), teacher=source, train_dataset=Images(8))


def test_each_teacher_sees_its_own_pixels(tmp_path):
    small = ViTImageProcessor(size={"height": 32, "width": 32})
    large = ViTImageProcessor(size={"height": 48, "width": 48}, image_mean=[0.1] * 3)
    source = as_source({"a": Teacher(build("vit", seed=5), small), "b": Teacher(build("vit", image_size=48), large)})
    DistillationTrainer(
        build("vit"), config(tmp_path, TWO), teacher=source, train_dataset=Images(8), processing_class=small
    )
    x = torch.randn(2, 3, 32, 32)
    assert source.members()["a"].pixels(x).shape[-1] == 32 and source.members()["b"].pixels(x).shape[-1] == 48


def test_what_the_names_must_be(tmp_path):
    two, data = {"a": build("vit", seed=5), "b": build("vit", seed=6)}, Images(8)

    def refused(match, teacher, entries, **settings):
        with pytest.raises(ValueError, match=match):
            DistillationTrainer(build("vit"), config(tmp_path, entries, **settings), teacher=teacher,
                                train_dataset=data)  # fmt: skip

    refused(r"objective 'logit_kd': it does not say which teacher; set its 'teacher' to one of \['a', 'b'\]", two,
            [{"name": "logit_kd"}])  # fmt: skip
    refused(r"objective 'logit_kd': it takes its signals from 'bb'; .* Did you mean 'b'", two,
            [{"name": "logit_kd", "teacher": "bb"}])  # fmt: skip
    refused("the teacher 'a' is not used", two, [{"name": "logit_kd", "teacher": "b"}])
    refused("layer_rates: it does not say which teacher", two, TWO, layer_rates={"mode": "discrepancy"})
    refused("there is one teacher, without a name", two["a"], [{"name": "logit_kd", "teacher": "a"}])
    refused("a teacher is called 'start'", {"start": two["a"]}, [{"name": "logit_kd"}])
    refused("a teacher is called 'a b'", {"a b": "no/such/folder"}, [{"name": "logit_kd", "teacher": "a b"}])
    with pytest.raises(ValueError, match="empty mapping"):
        SeveralTeachers({})
    refused("nothing: it takes no signals", two, [*TWO, {"name": "task", "teacher": "a"}])


def test_layer_rates_are_measured_by_the_teacher_that_they_name(tmp_path):
    two = {"a": build("vit", seed=5), "b": build("vit", seed=6, layers=3)}
    alone = trained(tmp_path / "a", two["b"], [{"name": "logit_kd"}], layer_rates={"mode": "discrepancy"})
    rates = {"mode": "discrepancy", "teacher": "b"}
    entries = [{"name": "logit_kd", "teacher": "b"}, {"name": "hidden_states", "teacher": "a", "weight": 0.0}]
    named = trained(tmp_path / "b", two, entries, layer_rates=rates)
    mine, its = named.layer_rates.history[0], alone.layer_rates.history[0]
    assert mine["multipliers"] == its["multipliers"] and mine["discrepancies"] == its["discrepancies"]
    assert "layer_rates" in ", ".join(results_of(named)["models"]["pairing"])


def test_only_an_objectives_own_teacher_must_be_precise(tmp_path):
    two = {"a": build("vit", seed=5), "b": build("vit", seed=6).to(torch.bfloat16)}
    entries = [
        {"name": "jacobian", "teacher": "a", "distance": "squared", "estimator": "finite_difference"},
        {"name": "logit_kd", "teacher": "b"},
    ]
    trained(tmp_path, two, entries, max_steps=1)
    entries[0]["teacher"], entries[1]["teacher"] = "b", "a"
    with pytest.raises(ValueError, match="the teacher 'b' has half-precision weights"):
        trained(tmp_path, two, entries, max_steps=1)


def test_the_student_itself_may_be_one_of_them():
    assert isinstance(as_source({"me": "self"}).members()["me"], SelfTeacher)


def folder(name, license=None, seed=5):
    build("vit", seed=seed).save_pretrained(name)
    if license:
        Path(name, "README.md").write_text(f"---\nlicense: {license}\n---\n")
    return name


def test_results_card_and_license_name_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two = {"a": folder("runs/first/model", "mit"), "b": folder("runs/second/model", "cc-by-nc-4.0", 6)}
    runner = trained("out", two, TWO)
    results = results_of(runner)
    assert {name: one["name"] for name, one in results["models"]["teachers"].items()} == {"a": "first", "b": "second"}
    assert len({one["fingerprint"] for one in results["models"]["teachers"].values()}) == 2
    assert any(note.startswith("teacher 'a': ") for note in results["pairing"]["notes"])
    models = Models.of(results["models"], "models")
    assert of_parents(models) == student_license(models, None) == "cc-by-nc-4.0"
    with pytest.raises(ValueError, match=r"strictest license of the teachers is cc-by-nc-4.0 and mit is requested"):
        student_license(models, "mit")
    card = str(student_card(results))
    assert "distilled from 2 teachers: first and second" in card
    assert "- **Teacher a:** first" in card and "- **Teacher b:** second" in card
    assert "**Effect of the teachers:** not measured" in card
    assert "its license: mit" in card and "license: cc-by-nc-4.0" in card and "knowledge-distillation" in card
    assert "**Accuracy of its teachers:** a not measured, b not measured" in card and str(tmp_path) not in card


def test_preflight_shows_each_pairing_and_what_each_sees(tmp_path):
    two = {"a": build("vit", seed=5, layers=4), "b": build("convnext", seed=6)}
    shown = str(preflight(build("vit"), two, config(tmp_path, [{"name": "task"}, *TWO])))
    for expected in (
        "With the teacher 'a'",
        "With the teacher 'b'",
        "the teacher 'b' sees 32 x 32",
        "task + logit_kd",
    ):
        assert expected in shown, expected
    assert "does not say which teacher" in str(preflight(build("vit"), two, config(tmp_path, [{"name": "logit_kd"}])))
