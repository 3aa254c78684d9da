"""Data that Trainer cannot feed to a model is explained."""

import datasets
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from tests.support.helpers import Images, trainer
from tests.support.tiny import build

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
