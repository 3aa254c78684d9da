"""Colors, erasing and mixing of a batch are those of its images one by one."""

import pytest
import torch
from transformers import default_data_collator
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_kdtl import DistillationTrainer
from hf_kdtl.data import ImageDataset
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.data.indexed import IndexCollator, IndexedDataset
from hf_kdtl.models import Teacher
from tests.data.test_dataset import noisy
from tests.models.teachers.test_stored import write
from tests.support.helpers import KD, Images, config, largest_difference, weights
from tests.support.tiny import build

CROP = {"resized_crop": [0.3, 1.0], "flip": True}
AFTER = {
    "colors": {"color_jitter": 0.9},
    "erasing": {"random_erasing": 0.8},
    "mixup": {"mixup": 0.5},
    "cutmix": {"cutmix": 1.0},
    "all": {"color_jitter": 0.5, "random_erasing": 0.5, "mixup": 0.4, "cutmix": 1.0},
}
LEVEL = 1 / 255 / 0.25  # of 256, in normalised pixels


class Reversed(ViTImageProcessorPil):
    """Channels in the order blue, green, red."""

    def __call__(self, images, **kwargs):
        found = super().__call__(images, **kwargs)
        found["pixel_values"] = [torch.as_tensor(array).flip(0) for array in found["pixel_values"]]
        return found if "return_tensors" not in kwargs else {"pixel_values": torch.stack(found["pixel_values"])}


def images(augmentation, kind=ViTImageProcessorPil, side=20):
    processor = kind(size={"height": side, "width": side}, image_mean=[0.4, 0.5, 0.6], image_std=[0.25] * 3)
    return ImageDataset(noisy(24), processor, augmentation=Augmentation(augmentation))


def batch(data, rows, unfinished=False):
    indexed = IndexedDataset(data, unfinished)
    found = IndexCollator(default_data_collator)(indexed.__getitems__(list(rows)))
    return data.finish(found) if unfinished else found


@pytest.mark.parametrize("kind", [ViTImageProcessorPil, Reversed])
@pytest.mark.parametrize("after", AFTER)
def test_a_batch_is_its_images_but_for_rounding(after, kind):
    data = images(CROP | AFTER[after], kind)
    for view in range(3):
        data.set_epoch(view)
        whole, parts = batch(data, range(24), True), [batch(data, rows, True) for rows in (range(7), range(7, 24))]
        one_by_one = batch(data, range(24))
        assert whole.keys() == one_by_one.keys() and torch.equal(whole["labels"], one_by_one["labels"])
        apart = (whole["pixel_values"] - one_by_one["pixel_values"]).abs().max()
        assert apart < (1.01 if "color_jitter" in AFTER[after] else 1e-3) * LEVEL
        assert torch.allclose(torch.cat([part["pixel_values"] for part in parts]), whole["pixel_values"], atol=1e-6)
        plain = batch(images(CROP, kind), range(24))["pixel_values"]
        assert view or (whole["pixel_values"] - plain).abs().max() > 20 * LEVEL, "nothing was changed"


def trained(after, **settings):
    torch.manual_seed(0)
    out = config("out", KD, max_steps=8, per_device_train_batch_size=6, optim="sgd", learning_rate=0.1, **settings)
    data = images(CROP | after, side=32)
    trainer = DistillationTrainer(build("vit"), out, teacher=Teacher(build("vit", seed=5)), train_dataset=data)
    trainer.train()
    return weights(trainer.model)


def test_a_run_that_does_it_on_the_device_is_the_other_but_for_rounding():
    usual, other = trained(AFTER["all"]), trained({"color_jitter": 0.5, "random_erasing": 0.5})
    on_device = trained(AFTER["all"], augment_on_device=True)
    assert 0 < largest_difference(usual, on_device) < 0.05 * largest_difference(usual, other)
    assert largest_difference(trained({}), trained({}, augment_on_device=True)) == 0  # nothing is left to do


def test_what_it_does_not_go_with():
    data, student = images(CROP | AFTER["colors"], side=32), build("vit")
    with pytest.raises(ValueError, match="is of an ImageDataset, and train_dataset is Images"):
        DistillationTrainer(
            student, config("out", [{"name": "task"}], augment_on_device=True), train_dataset=Images(8)
        )
    settings = config("out", [{"name": "task"}, {"name": "logit_kd"}], augment_on_device=True)
    stored = write(data=data)
    with pytest.raises(ValueError, match="does not go with a stored teacher"):
        DistillationTrainer(student, settings, teacher=stored, train_dataset=data)
