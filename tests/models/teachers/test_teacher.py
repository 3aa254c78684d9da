"""The teacher sees its own pixels, answers in the student's classes, and is never trained."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerCallback, ViTImageProcessor

from hf_kdtl.models import Needs, Teacher
from tests.support.helpers import Images, largest_difference, trainer, weights
from tests.support.tiny import build

LOGITS = Needs(logits=True)


def _processor(size=32, mean=0.5, std=0.5, **options):
    return ViTImageProcessor(
        size={"height": size, "width": size}, image_mean=[mean] * 3, image_std=[std] * 3, **options
    )


def _image(size=32):
    values = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("mine", "its"),
    [
        ({"mean": 0.5, "std": 0.5}, {"mean": 0.45, "std": 0.22}),
        ({"do_normalize": False}, {"mean": 0.45, "std": 0.22}),
        ({"mean": 0.4}, {"do_normalize": False}),
        ({"do_rescale": False, "mean": 120, "std": 60}, {"mean": 0.45, "std": 0.22}),
        ({"rescale_factor": 1 / 127.5, "mean": 1.0, "std": 1.0}, {"mean": 0.45}),
    ],
)
def test_pixels_are_renormalised_to_what_its_own_processor_gives(mine, its):
    student, model = build("vit"), build("vit", seed=5)
    mine, its = _processor(**mine), _processor(**its)
    teacher = Teacher(model, its)
    teacher.match(student, mine, compare_classes=False)
    pixels = mine([_image()], return_tensors="pt")["pixel_values"]
    expected = its([_image()], return_tensors="pt")["pixel_values"]
    assert not torch.allclose(pixels, expected)
    with torch.no_grad():
        seen = teacher.capture(pixels, LOGITS)
    torch.testing.assert_close(seen.pixel_values, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.logits, model(pixel_values=expected).logits, rtol=1e-4, atol=1e-5)


def test_pixels_are_resized_to_its_size_and_that_is_reported(caplog):
    model = build("vit", image_size=64, seed=5)
    teacher = Teacher(model, _processor(64))
    teacher.match(build("vit"), _processor(32), compare_classes=False)
    pixels = torch.randn(2, 3, 32, 32, requires_grad=True)
    seen = teacher.capture(pixels, LOGITS)
    assert seen.pixel_values.shape == (2, 3, 64, 64)
    assert "up-sampled" in caplog.text
    (gradient,) = torch.autograd.grad(seen.logits.sum(), pixels)
    assert gradient.shape == pixels.shape and gradient.abs().max() > 0


def test_a_processor_that_cannot_be_matched_is_refused():
    with pytest.raises(ValueError, match=r"the student's is unknown.*Pass processing_class"):
        Teacher(build("vit", seed=5), _processor()).match(build("vit"), None, False)


def _named(model, names):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    return model


def test_labels_in_another_order_are_reordered_and_reported():
    student = _named(build("vit"), ["cat", "dog", "ship"])
    model = _named(build("vit", seed=5), ["ship", "cat", "dog"])
    teacher = Teacher(model)
    teacher.match(student, None, compare_classes=True)
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher.capture(pixels, LOGITS).logits, model(pixels).logits[:, [1, 2, 0]])
    assert any("another order" in note for note in teacher.notes)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_the_classifier_of_its_geometry_answers_in_the_students_order(name):
    """Objectives begin with it: lwf's head would learn the answers of other classes."""
    student = _named(build(name), ["cat", "dog", "ship"])
    teacher = Teacher(_named(build(name, seed=5), ["ship", "cat", "dog"]))
    pixels, own = torch.randn(2, 3, 32, 32), copy.deepcopy(teacher.model.state_dict())
    teacher.match(student, None, compare_classes=True)
    with torch.no_grad():
        found = teacher.capture(pixels, Needs(logits=True, pooled=True))
        answers = teacher.geometry(pixels).classifier(found.pooled)
    torch.testing.assert_close(answers, found.logits)
    assert largest_difference(own, teacher.model.state_dict()) == 0  # the model's own stays as it is
    teacher.match(student, None, compare_classes=False)  # then its own order is asked for
    with torch.no_grad():
        answers = teacher.geometry(pixels).classifier(found.pooled)
    torch.testing.assert_close(answers, teacher.capture(pixels, LOGITS).logits)


@pytest.mark.parametrize(
    ("mine", "its", "sentence"),
    [
        (["cat", "dog", "ship"], ["cat", "dog", "truck"], "Only the student: 'ship'. Only the teacher: 'truck'"),
        (["cat", "dog", "ship"], ["cat", "dog"], "Only the student: 'ship'. Only the teacher: none"),
        (["cat", "cat", "ship"], ["ship", "cat", "cat"], "occur more than once"),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["cat", "dog"], "the student has 3 classes and the teacher 2"),
    ],
)
def test_classes_that_differ_are_refused(tmp_path, mine, its, sentence):
    student = _named(build("vit", num_labels=len(mine)), mine)
    teacher = _named(build("vit", num_labels=len(its), seed=5), its)
    with pytest.raises(ValueError) as error:
        trainer(tmp_path, student, teacher)
    assert sentence in str(error.value)


def test_it_is_frozen_in_eval_mode_and_keeps_its_dtype(tmp_path):
    teacher = build("vit", seed=5, hidden_dropout_prob=0.5).to(torch.bfloat16).train()
    before = weights(teacher)
    runner = trainer(tmp_path, build("vit"), teacher, max_steps=3)
    teacher.train()  # whoever does this later must not wake its dropout
    runner.train()
    assert not teacher.training and next(teacher.parameters()).dtype == torch.bfloat16
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert largest_difference(weights(teacher), before) == 0.0
    held = {id(p) for group in runner.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in teacher.parameters()}
    assert not any("teacher" in name for name in runner.distiller.state_dict())


def test_a_path_brings_its_own_processor(tmp_path):
    build("vit", seed=5).save_pretrained(tmp_path / "t")
    _processor(mean=0.45, std=0.22).save_pretrained(tmp_path / "t")
    teacher = Teacher.from_pretrained(tmp_path / "t")
    assert teacher.processing_class.image_mean == (0.45, 0.45, 0.45)
    with pytest.raises(FileNotFoundError, match=r"teacher's path .*nowhere.* does not exist"):
        Teacher.from_pretrained(tmp_path / "nowhere")


def test_one_forward_of_each_model_a_step(tmp_path):
    student, teacher = build("vit"), build("vit", seed=5)
    objectives = [{"name": "task"}, {"name": "logit_kd"}, {"name": "logit_kd", "key": "second", "temperature": 1}]
    runner = trainer(tmp_path, student, teacher, objectives=objectives, max_steps=3)
    calls = {"student": 0, "teacher": 0}

    def count(who):
        return lambda *_: calls.update({who: calls[who] + 1})

    runner.model.register_forward_hook(count("student"))
    teacher.register_forward_hook(count("teacher"))

    class Begin(TrainerCallback):  # the look before training has forwards of its own
        def on_train_begin(self, *_, **__):
            calls.update(student=0, teacher=0)

    runner.add_callback(Begin())
    runner.train()
    assert calls == {"student": 3, "teacher": 3}
    runner.evaluate(Images(8))
    assert calls == {"student": 4, "teacher": 3}


@pytest.mark.parametrize("names", [None, ["c", "b", "a"]], ids=["by position", "by name"])
@pytest.mark.parametrize("outputs", [2, 5])
def test_a_head_that_was_replaced_by_hand_is_refused(tmp_path, names, outputs):
    """Its config still says 3 classes: some columns would be taken for them, or torch would complain."""
    student, model = build("vit", id2label=dict(enumerate("abc"))), build("vit", seed=5)
    model.classifier = torch.nn.Linear(32, outputs)
    if names is not None:
        model.config.id2label = dict(enumerate(names))
    with pytest.raises(ValueError, match=f"gives {outputs} outputs and its config has 3 classes.*which is which"):
        trainer(tmp_path, student, model, max_steps=1, logging_steps=1).train()
