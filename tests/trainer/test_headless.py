"""Students and teachers without a head: trained, resumed, saved, given a head; and what is refused."""

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification

from hf_kdtl.models import Teacher
from hf_kdtl.trainer.headless import ZeroTouch
from tests.support.headless import headless
from tests.support.helpers import Images, largest_difference, trainer, weights
from tests.support.tiny import build

FEATURES = [{"name": "feature_kd", "sample": 8}, {"name": "similarity", "weight": 0.1}]


class Unlabelled(Images):
    def __getitem__(self, i):
        return {"pixel_values": self.pixels[i]}


def _run(folder, **settings):
    return trainer(folder, headless("dinov2"), headless("clip", seed=3, layers=3), Unlabelled(), FEATURES, **settings)


def test_a_student_without_a_head_is_trained_saved_and_takes_one(tmp_path):
    runner = _run(tmp_path, max_steps=3, learning_rate=1e-3)
    before = weights(runner.model)
    runner.train()
    runner.save_model(str(tmp_path / "student"))
    opened = AutoModel.from_pretrained(tmp_path / "student")
    assert largest_difference(weights(opened), weights(runner.model)) == 0
    assert largest_difference(before, weights(runner.model)) > 1e-4
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "student", num_labels=3).config.num_labels == 3
    logged = [entry for entry in runner.state.log_history if "loss" in entry]
    assert logged[0]["feature_kd"] > 0 and logged[0]["similarity"] > 0


def test_an_evaluation_before_weights_are_measured_has_no_loss_and_explains_it(tmp_path, caplog):
    objectives = [FEATURES[0], {"name": "similarity", "weight": "auto"}]
    runner = trainer(tmp_path, headless("vit"), headless("vit", seed=1), Unlabelled(), objectives, max_steps=1)
    runner.compute_metrics = lambda prediction: {"width": prediction.predictions.shape[1]}
    found = runner.evaluate(Images(4))
    assert "eval_loss" not in found and found["eval_width"] == 32
    assert "no eval_loss: the weight of similarity is auto, which train() measures first" in caplog.text
    runner.train()
    assert runner.evaluate(Images(4))["eval_loss"] > 0


def test_resuming_is_bitwise_with_statistics_and_bank(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    whole = _run(tmp_path / "a", **settings)
    whole.train()
    again = _run(tmp_path / "a", **settings)
    again.distiller.objective("similarity").bank.zero_()  # what the checkpoint holds is what counts
    again.distiller.objective("feature_kd").scale.zero_()
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert largest_difference(weights(whole.distiller), weights(again.distiller)) == 0


def test_class_outputs_are_refused_of_either_side(tmp_path):
    with pytest.raises(ValueError, match=r"objective 'task': it reads class outputs, and the student, Dinov2Model"):
        _ = trainer(tmp_path, headless("dinov2")).distiller
    with pytest.raises(ValueError, match=r"the teacher, Dinov2Model, has no classifier.*feature_kd"):
        _ = trainer(tmp_path, build("vit"), headless("dinov2")).distiller
    bss = trainer(tmp_path, headless("dinov2"), objectives=[{"name": "bss"}], per_device_train_batch_size=4)
    assert torch.isfinite(bss.objective_terms({"pixel_values": Images().pixels[:4]})["bss"])


def test_what_nothing_can_read_is_frozen_and_named(tmp_path):
    runner = trainer(tmp_path, headless("vit"), headless("vit", seed=1), Unlabelled(), FEATURES)
    notes = runner.distiller.notes
    frozen = [name for name, p in runner.model.named_parameters() if not p.requires_grad]
    assert frozen == ["pooler.dense.weight", "pooler.dense.bias"]
    assert any("pooler.dense.weight, pooler.dense.bias lead to nothing" in note for note in notes)
    assert any(
        "embedding of the student is what the classifiers of its family read (32 wide)" in note for note in notes
    )
    assert any("embedding of the teacher is its pooler_output (32 wide)" in note for note in notes)


def test_every_trainable_parameter_gets_a_gradient(tmp_path):
    first = [{"name": "hidden_states", "layers": [[0, 0]]}]
    runner = trainer(tmp_path, headless("vit"), headless("vit", seed=1, layers=3), Unlabelled(), first, max_steps=1)
    seen = {}
    runner.create_optimizer_and_scheduler(1)
    inputs = {"pixel_values": Images().pixels[:4]}
    runner.distiller.train()
    runner.compute_loss(runner.distiller, inputs).backward()
    seen = {name: p.grad for name, p in runner.model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in seen.values())
    assert not seen["layers.1.attention.q_proj.weight"].any() and seen["layers.0.attention.q_proj.weight"].any()


def test_the_zero_touch_changes_no_loss_and_no_gradient():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 1), "unused": torch.nn.Linear(2, 1)})
    loss = model["used"](torch.ones(1, 2)).sum()
    touched = ZeroTouch()(loss, model)
    assert torch.equal(touched, loss)
    touched.backward()
    assert torch.equal(model["used"].weight.grad, torch.ones(1, 2)) and not model["unused"].weight.grad.any()


def test_terms_are_reported_where_there_are_no_labels(tmp_path):
    runner = _run(tmp_path, eval_dataset=Unlabelled(seed=1), eval_objectives=True)
    found = runner.evaluate()
    assert found["eval_feature_kd"] > 0 and found["eval_similarity"] > 0


def test_a_pool_can_be_named(tmp_path):
    teacher = Teacher(headless("dinov2", seed=1), pool="mean")
    runner = trainer(tmp_path, headless("vit"), teacher, Unlabelled(), FEATURES)
    assert any("embedding of the teacher is the mean of its patch tokens" in note for note in runner.distiller.notes)


@pytest.mark.parametrize(("name", "message"), [("vit_mae", "ViTModel.from_pretrained"), ("siglip2", "flat patches")])
def test_what_reads_images_as_a_teacher_alone_is_no_student(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        _ = trainer(tmp_path, headless(name), headless("dinov2"), Unlabelled(), FEATURES).distiller
