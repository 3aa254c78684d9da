"""The start of a run: where it comes from, how it is kept, and what is refused."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import ViTImageProcessor

from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.models import Needs
from hf_kdtl.models.teachers.start import StartingPoint, weight_pairs
from hf_kdtl.preflight import preflight
from tests.support.helpers import Images, config, forked, largest_difference, leave, trainer, weights
from tests.support.tiny import build

TASK = {"name": "task"}
L2_SP = [TASK, {"name": "l2_sp", "weight": 0.5}]
KEPT = [
    L2_SP,
    [TASK, {"name": "delta", "sample": 12}],
    [TASK, {"name": "lwf", "source": "start", "weight": 0.5}],
]
RUN = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
    "save_strategy": "steps",
    "save_steps": 2,
}


@pytest.mark.parametrize("objectives", KEPT, ids=lambda entries: entries[1]["name"])
def test_the_first_weights_are_kept_and_resumed(tmp_path, objectives):
    student = build("vit")
    full = trainer(tmp_path, student, objectives=objectives, **RUN)
    full.train()
    kept = load_file(tmp_path / "start" / "model.safetensors")
    assert kept.keys() == load_file(tmp_path / "checkpoint-4" / "model.safetensors").keys()
    again = trainer(tmp_path, build("vit", seed=3), objectives=objectives, **RUN)  # other weights: not the start
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert largest_difference(weights(full.distiller), weights(again.distiller)) == 0.0
    assert largest_difference(weights(again.distiller.start.model), weights(student)) == 0.0


def test_a_start_that_went_missing_stops_the_resume(tmp_path):
    trainer(tmp_path, build("vit"), objectives=L2_SP, **RUN).train()
    (tmp_path / "start").rename(tmp_path / "elsewhere")
    again = trainer(tmp_path, build("vit"), objectives=L2_SP, **RUN)
    with pytest.raises(ValueError, match=r"start is missing.*restore the folder"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_another_run_in_the_same_folder_has_its_own_start(tmp_path):
    trainer(tmp_path, build("vit"), objectives=L2_SP, **RUN).train()
    second = build("vit", seed=3)
    trainer(tmp_path, second, objectives=L2_SP, **RUN).train()
    resumed = trainer(tmp_path, build("vit"), objectives=L2_SP, **RUN)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert largest_difference(weights(resumed.distiller.start.model), weights(second)) == 0.0


def test_the_pull_is_to_the_start(tmp_path):
    def distance(objectives):
        student = build("vit")
        runner = trainer(tmp_path, student, objectives=objectives, **RUN | {"save_strategy": "no", "max_steps": 12})
        runner.train()
        return sum(0.5 * (w.now - w.then).square().sum() for w in weight_pairs(runner.model, student) if not w.head)

    assert distance([TASK, {"name": "l2_sp", "weight": 10.0}]) < 0.5 * distance([TASK])


def test_a_start_of_other_classes(tmp_path):
    source = build("vit", num_labels=5, seed=9)
    source.save_pretrained(tmp_path / "source")
    student = build("vit")
    student.vit.load_state_dict(source.vit.state_dict())
    for objectives in (L2_SP, [TASK, {"name": "lwf", "source": "start"}]):
        runner = trainer(tmp_path, student, objectives=objectives, start=str(tmp_path / "source"), **RUN)
        terms = runner.objective_terms({"pixel_values": Images(4).pixels, "labels": Images(4).labels})
        value = terms[objectives[1]["name"]]
        assert torch.allclose(value, torch.zeros_like(value), atol=1e-5)  # it is the start, and has its head
        runner.train()
        assert runner.state.log_history[-2][objectives[1]["name"]] > 1e-6
    names = runner.distiller.objectives["lwf"].state_dict()
    assert any(tuple(value.shape) == (5, student.config.hidden_size) for value in names.values())


@pytest.mark.parametrize(
    ("start", "says"),
    [
        ("no/such/folder", "does not exist"),
        ("other", "has not the weights of the student"),
        ("wider", "has not the weights of the student"),
    ],
)
def test_wrong_starts_are_refused_by_name(tmp_path, start, says):
    build("deit").save_pretrained(tmp_path / "other")
    build("vit", hidden_size=48, num_attention_heads=3).save_pretrained(tmp_path / "wider")
    path = start if "/" in start else str(tmp_path / start)
    runner = trainer(tmp_path, build("vit"), objectives=L2_SP, start=path, **RUN)
    with pytest.raises((ValueError, OSError), match=says) as caught:
        runner.train()
    if start == "wider":
        assert "(the head is left out)" in str(caught.value)
        assert "layers.0" in str(caught.value) or "embeddings" in str(caught.value)


def test_an_unused_start_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no objective holds the student to it"):
        DistillationTrainer(build("vit"), config(tmp_path, [TASK], start="x"), train_dataset=Images())


def _lora(seed=0):
    torch.manual_seed(seed)
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    student = get_peft_model(build("vit"), settings)
    for name, p in student.named_parameters():
        if "lora_B" in name:  # zeros at first, where the pull has no gradient
            p.data.normal_(std=0.1)
    return student


def test_l2_sp_of_adapters_is_the_product_they_make():
    student = _lora()
    start = StartingPoint(student)
    pairs = start.weights(student)
    held = [w for w in pairs if not w.head]
    assert held and all(w.then.abs().sum() == 0 for w in held)
    expected = torch.zeros(())
    for module in student.modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            b, a = module.lora_B["default"].weight, module.lora_A["default"].weight
            expected = expected + 0.5 * (module.scaling["default"] * b @ a).square().sum()
    value = sum(0.5 * w.now.square().sum() for w in held)
    assert torch.allclose(value, expected)
    value.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in student.named_parameters() if "lora_A" in n)


@pytest.mark.parametrize("objectives", KEPT, ids=lambda entries: entries[1]["name"])
def test_adapters_train_towards_the_model_without_them(tmp_path, objectives):
    student = _lora()
    settings = config(tmp_path, objectives, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2)
    runner = DistillationTrainer(student, settings, train_dataset=Images())
    runner.train()
    assert runner.distiller.start.model is runner.model
    plain = copy.deepcopy(runner.model)
    with plain.disable_adapter(), torch.no_grad():
        expected = plain.eval()(pixel_values=Images(4).pixels).logits
    runner.model.train()
    with torch.no_grad():
        assert torch.equal(runner.distiller.start.capture(Images(4).pixels, Needs(logits=True)).logits, expected)
    assert runner.model.training


def test_adapters_refuse_a_start_by_path(tmp_path):
    settings = config(tmp_path, L2_SP, start=str(tmp_path))
    with pytest.raises(ValueError, match="Leave start out"):
        DistillationTrainer(_lora(), settings, train_dataset=Images()).train()


def test_preflight_knows_the_start(tmp_path):
    settings = config(tmp_path, [TASK, *(entries[1] for entries in KEPT)], weight_decay=0.1)
    report = preflight(build("vit"), None, settings, Images(8).pixels)
    assert not report.problems
    assert {cost.key for cost in report.costs} == {"l2_sp", "delta", "lwf"}
    assert any("weight_decay" in warning for warning in report.warnings)
    assert not any("micro-batch" in warning for warning in report.warnings)


def test_start_comes_from_the_command_line_too(tmp_path):
    settings = DistillationConfig(str(tmp_path), objectives=json.dumps(L2_SP), start="there")
    assert settings.start == "there" and settings.to_dict()["start"] == "there"


def test_a_kept_start_has_its_image_processor(tmp_path):
    source = build("vit", seed=9)
    source.save_pretrained(tmp_path / "source")
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1] * 3).save_pretrained(tmp_path / "source")
    mine = ViTImageProcessor(size={"height": 32, "width": 32})
    objectives = [TASK, {"name": "lwf", "source": "start", "weight": 0.5}]

    def runner(**extra):
        settings = config(tmp_path / "out", objectives, start=str(tmp_path / "source"), **RUN)
        return DistillationTrainer(build("vit"), settings, train_dataset=Images(), **extra)

    with pytest.raises(ValueError, match=r"start .* has its own image processor"):
        runner().train()
    full, again = runner(processing_class=mine), runner(processing_class=mine)
    full.train()
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert largest_difference(weights(full.distiller), weights(again.distiller)) == 0.0


def test_the_start_of_another_run_is_refused(tmp_path):
    trainer(tmp_path, build("vit"), objectives=L2_SP, **RUN).train()
    trainer(tmp_path, build("vit", seed=3), objectives=L2_SP, **RUN | {"max_steps": 2}).train()
    again = trainer(tmp_path, build("vit"), objectives=L2_SP, **RUN)
    with pytest.raises(ValueError, match="another run has used this folder since"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_trainer_that_has_trained_can_resume(tmp_path):
    runner = trainer(tmp_path, build("vit"), objectives=KEPT[2], **RUN)
    runner.train()
    end = weights(runner.distiller)
    runner.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert largest_difference(end, weights(runner.distiller)) == 0.0


def test_objectives_added_at_a_resume_are_reported_before_the_start(tmp_path):
    trainer(tmp_path, build("vit"), objectives=[TASK], **RUN).train()
    with pytest.raises(ValueError, match="was trained with the objectives"):
        again = trainer(tmp_path, build("vit"), objectives=L2_SP, **RUN)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_adapters_that_are_more_than_a_product_are_refused():
    student = get_peft_model(build("vit"), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="in addition to A and B"):
        weight_pairs(student, student)
    named = get_peft_model(
        build("vit"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["layernorm"]), adapter_name="mine"
    )
    assert any(w.then is not None and "layernorm" in w.name for w in weight_pairs(named, named))


def test_a_last_batch_that_bss_cannot_take_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="dataloader_drop_last=True"):
        trainer(tmp_path, build("vit"), data=Images(17), objectives=[TASK, {"name": "bss"}], **RUN)


def _towards_the_start(out):
    """Ranks that begin with other weights."""
    rank = int(os.environ["RANK"])
    settings = {"objectives": [TASK, {"name": "l2_sp"}], "max_steps": 1, "learning_rate": 1e-12}
    runner = trainer(f"{out}.run", build("vit", seed=rank), data=Images(16), per_device_train_batch_size=4, **settings)
    runner.train()
    start, held = build("vit", seed=0).state_dict(), runner.distiller.start.model.state_dict()
    found = {"world": runner.args.world_size, "same": all(torch.equal(held[name], start[name]) for name in start)}
    Path(f"{out}.{rank}.json").write_text(json.dumps(found | {"l2_sp": runner.state.log_history[0]["l2_sp"]}))
    leave()


def test_the_start_is_that_of_the_first_rank(tmp_path):
    forked(_towards_the_start, 2, tmp_path / "out")
    for rank in (0, 1):
        found = json.loads((tmp_path / f"out.{rank}.json").read_text())
        assert found["world"] == 2 and found["same"] and found["l2_sp"] < 1e-9
