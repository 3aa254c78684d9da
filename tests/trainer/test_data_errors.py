"""Data that Trainer cannot feed to a model is explained."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_kdtl import DistillationTrainer
from hf_kdtl.data import ImageDataset
from hf_kdtl.models import Teacher
from tests.support.helpers import Images, config, trainer
from tests.support.tiny import build

TASK = [{"name": "task"}]
PHOTO = Image.new("RGB", (32, 32))
PIL = datasets.Dataset.from_dict(
    {"image": [PHOTO] * 4, "label": [0, 1, 2, 0]},
    features=datasets.Features(image=datasets.Image(), label=datasets.Value("int64")),
)
LAZY = PIL.with_transform(
    lambda rows: {"pixel_values": [torch.zeros(3, 32, 32) for _ in rows["image"]], "labels": rows["label"]}
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LAZY, r"transform .*remove_unused_columns=False"),
        (PIL, r"no 'pixel_values'.*ImageDataset"),
        ([(torch.zeros(3, 32, 32), 0)] * 4, r"a tuple of 2, expected a dict.*data_collator="),
        ([{"pixel_values": PHOTO, "labels": 0}] * 4, "PIL images"),
        (
            [{"pixel_values": torch.zeros(32, 32, 3), "labels": 0}] * 4,
            r"\(32, 32, 3\), channels last.*permute\(2, 0, 1\)",
        ),
        ([{"pixel_values": torch.zeros(1, 3, 32, 32), "labels": 0}] * 4, "one image an item"),
        ([{"pixel_values": torch.zeros(32, 32), "labels": 0}] * 4, r"\(32, 32\), expected \(C, H, W\)"),
        ([{"pixel_values": None, "labels": 0}] * 4, "'pixel_values' is None"),
        ([{"pixel_values": "a.png", "labels": 0}] * 4, "'pixel_values' is 'a.png'"),
        ([{"pixel_values": torch.zeros(3, 32 + 8 * i, 32), "labels": 0} for i in range(4)], "different sizes"),
        ([{"pixel_values": torch.zeros(3, 32, 32), "labels": "cat"}] * 4, r"text, such as 'cat'.*label2id\[label\]"),
        ([{"pixel_values": torch.zeros(3, 32, 32), "label_ids": 1}] * 4, "'label_ids' and no 'labels': rename"),
        (
            [{"pixel_values": torch.zeros(3, 32, 32), "labels": 0 if i < 3 else None} for i in range(4)],
            "item 3 of the dataset has the label None",
        ),
        (
            [{"pixel_values": torch.zeros(3, 32, 32), "labels": 0, "interpolate_pos_encoding": True}] * 4,
            "such as interpolate_pos_encoding",
        ),
    ],
)
def test_data_of_another_form_is_explained(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, build("vit"), data=data, max_steps=1, per_device_train_batch_size=4).train()


def test_a_transform_works_as_the_message_says(tmp_path):
    trainer(tmp_path, build("vit"), data=LAZY, max_steps=1, remove_unused_columns=False).train()


def test_a_last_batch_of_one_image_is_explained(tmp_path):
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4}  # four stages: 32 x 32 pixels end in one value
    net = ResNetForImageClassification(ResNetConfig(embedding_size=8, layer_type="basic", num_labels=3, **sizes))
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 4}
    with pytest.raises(ValueError, match=r"batch of one image.*dataloader_drop_last=True"):
        trainer(tmp_path, net, data=Images(5), **settings).train()
    trainer(tmp_path, net, data=Images(5), dataloader_drop_last=True, **settings).train()


def test_other_errors_are_left_alone(tmp_path):
    class Broken(Images):
        def __getitem__(self, index):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trainer(tmp_path, build("vit"), data=Broken(4), max_steps=1).train()


@pytest.mark.parametrize(
    ("channels", "says"), [(1, r"1 channels; .*mean\(0, keepdim=True\)"), (3, r"3 channels; .*expand")]
)
def test_a_student_of_other_channels_is_explained(tmp_path, channels, says):
    data = [{"pixel_values": torch.zeros(4 - channels, 32, 32), "labels": 0}] * 4
    with pytest.raises(ValueError, match=says):
        trainer(tmp_path, build("vit", num_channels=channels), data=data, max_steps=1).train()


class Distances(torch.nn.Module):
    """An operation without a second derivative in torch."""

    def forward(self, x):
        return x + 0.01 * torch.cdist(x, x).mean(-1, keepdim=True)


def test_an_operation_without_a_second_derivative_is_explained(tmp_path):
    student = build("vit")
    student.vit.layers[0].layernorm_after = torch.nn.Sequential(student.vit.layers[0].layernorm_after, Distances())
    with pytest.raises(ValueError, match=r"no second derivative in torch.*_cdist_backward.*noisy_kd"):
        trainer(tmp_path, student, build("vit", seed=5), objectives=[{"name": "jacobian"}], max_steps=1).train()


@pytest.mark.parametrize(
    ("batch", "found"),
    [((1, 2), "tuple"), (None, "NoneType"), ({"x": torch.zeros(2), "labels": 0}, r"'labels' \(int\), 'x'")],
)
def test_a_batch_of_another_form_names_the_collator(tmp_path, batch, found):
    data = [{"pixel_values": torch.zeros(3, 32, 32), "labels": 0}] * 4
    runner = trainer(tmp_path, build("vit"), data=data, max_steps=1)
    runner.data_collator = lambda rows: batch
    with pytest.raises(ValueError, match=rf"data_collator made a batch of .*{found}.*expected a dict"):
        runner.train()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("digits", r"ImageDataset\(load_images\('digits'\)\.train"),
        (datasets.DatasetDict(train=PIL), "DatasetDict of train, expected one split"),
        (DataLoader([1]), r"train_dataset=loader\.dataset"),
        ((i for i in range(3)), "ends after an epoch"),
        (3, "int, expected a dataset"),
        ([], "no images"),
    ],
)
def test_what_is_no_dataset_is_refused_at_construction(tmp_path, data, message):
    with pytest.raises((TypeError, ValueError), match=message):
        DistillationTrainer(build("vit"), config(tmp_path, TASK), train_dataset=data)
    if data == []:  # as Trainer, which evaluates on nothing where nothing is asked of it
        assert DistillationTrainer(build("vit"), config(tmp_path, TASK), eval_dataset=data).eval_dataset == []
        return
    with pytest.raises((TypeError, ValueError), match=r"(eval_dataset|one split)"):
        named = {"eval_dataset": data if not isinstance(data, dict) else {"a": data}}
        DistillationTrainer(build("vit"), config(tmp_path, TASK), train_dataset=Images(4), **named)


@pytest.mark.parametrize("processor", ["a/path", ViTImageProcessor])
def test_what_is_no_image_processor_is_refused_at_construction(tmp_path, processor):
    message = "the image processor is .*; expected one that was made: AutoImageProcessor.from_pretrained"
    with pytest.raises(TypeError, match=message):
        DistillationTrainer(build("vit"), config(tmp_path, TASK), processing_class=processor)
    with pytest.raises(TypeError, match=message):
        Teacher(build("vit"), processor)
    with pytest.raises(TypeError, match=message):
        ImageDataset(PIL, processor, num_labels=3)


@pytest.mark.parametrize(
    ("model", "message"), [("path", "the text 'path'"), (ViTForImageClassification, "the class ViTFor"), (3, "int")]
)
def test_what_is_no_student_is_refused_at_construction(tmp_path, model, message):
    with pytest.raises(TypeError, match=rf"model is {message}.*from_pretrained"):
        DistillationTrainer(model, config(tmp_path, TASK), train_dataset=Images(4))


def test_pixels_that_are_not_finite_are_named(tmp_path):
    data = [{"pixel_values": torch.full((3, 32, 32), torch.nan if i else 0.0), "labels": 0} for i in range(4)]
    with pytest.raises(FloatingPointError, match="3 images of the batch have pixel_values that are nan"):
        trainer(tmp_path, build("vit"), data=data, max_steps=1, per_device_train_batch_size=4).train()


@pytest.mark.parametrize(
    ("who", "value", "message"),
    [
        ("teacher", torch.nan, r"The weights of the teacher are nan or infinite, such as vit\.layernorm\.bias"),
        ("student", torch.inf, r"The weights of the student are nan or infinite, such as vit\.layernorm\.bias"),
        ("teacher", 1e38, r"The class outputs of the teacher are nan or infinite \(float32\)"),
    ],
)
def test_a_model_that_is_not_finite_is_named(tmp_path, who, value, message):
    models = {"student": build("vit"), "teacher": build("vit", seed=5)}
    with torch.no_grad():
        models[who].vit.layernorm.bias.fill_(value)
        models[who].classifier.weight.mul_(100)
    with pytest.raises(FloatingPointError, match=message):
        trainer(tmp_path, models["student"], models["teacher"], max_steps=1, per_device_train_batch_size=4).train()


def test_a_model_with_an_answer_for_each_place_is_refused(tmp_path):
    small = {"num_encoder_blocks": 1, "depths": [1], "sr_ratios": [1], "hidden_sizes": [8], "patch_sizes": [3]}
    small |= {"strides": [2], "num_attention_heads": [1], "mlp_ratios": [1], "decoder_hidden_size": 8}
    teacher = SegformerForSemanticSegmentation(SegformerConfig(num_labels=3, **small))
    with pytest.raises(ValueError, match=r"logits of shape \(.*expected \(B, K\).*segmentation"):
        trainer(tmp_path, build("vit"), teacher, max_steps=1).train()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [0, torch.tensor([0.5, 0.5, 0.0]), 1, 2],
            r"item 0 of the dataset has a class index, and item 1 has one of shape",
        ),
        ([0, 1, ..., 2], r"item 0 of the dataset has a class index, and item 2 has no label.*-100"),
        ([{"name": "cat"}] * 4, r"the labels are dicts, such as \{'name': 'cat'\}; expected class indices"),
    ],
)
def test_labels_of_several_forms_are_explained(tmp_path, labels, message):
    rows = [{"pixel_values": torch.zeros(3, 32, 32)} | ({} if y is ... else {"labels": y}) for y in labels]
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, build("vit"), data=rows, max_steps=1, per_device_train_batch_size=4).train()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("cat", "there is no eval_loss: the labels are text, such as 'cat'"),
        (-100, "there is no eval_loss: no image has"),
    ],
)
def test_an_evaluation_without_a_loss_says_why(tmp_path, caplog, labels, message):
    made = trainer(tmp_path, build("vit"))
    rows = [{"pixel_values": torch.zeros(3, 32, 32), "labels": labels}] * 4
    assert "eval_loss" not in made.evaluate(rows) and message in caplog.text
    caplog.clear()
    made.predict([{"pixel_values": torch.zeros(3, 32, 32)}] * 4)  # as it is meant
    assert "there is no" not in caplog.text


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows=()):
        self.rows = rows

    def __iter__(self):
        yield from self.rows


def _of_text(_):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return {"model": BertForSequenceClassification(BertConfig(vocab_size=8, **sizes))}


def _as_arrays(rows):
    return {"pixel_values": np.stack([row["pixel_values"].numpy() for row in rows]), "labels": np.zeros(len(rows))}


def _too_few(rows):
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": torch.zeros(2).long()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (_of_text, "the student is a BertForSequenceClassification, which reads input_ids"),
        (lambda _: {"model": torch.compile(build("vit"), backend="eager")}, "set torch_compile=True"),
        (
            lambda _: {"data_collator": _as_arrays},
            r"'pixel_values' \(ndarray\), expected a dict with t",
        ),
        (lambda _: {"data_collator": _too_few}, "the batch has 4 images and 2 labels"),
        (lambda _: {"train_dataset": Stream()}, "train_dataset gave no images"),
    ],
    ids=["text", "compiled", "arrays", "too few labels", "empty stream"],
)
def test_students_and_batches_that_cannot_be_read_are_named(tmp_path, given, message):
    arguments = {"model": build("vit"), "train_dataset": Images(8)} | given(tmp_path)
    made = config(tmp_path, TASK, max_steps=1, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(arguments.pop("model"), made, **arguments).train()
