"""The share of labelled images of each batch in a run: with accumulation, and resumed in the middle of an epoch."""

import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTImageProcessor

from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.data.dataset import ImageDataset
from tests.support.helpers import largest_difference, trainer, weights
from tests.support.tiny import build

RUN = {"max_steps": 5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}


@pytest.fixture
def images(tmp_path):
    """4 labelled images and 14 without a label: an epoch of 5 batches, one of them in its own step."""
    rows = []
    for number in range(18):
        path = str(tmp_path / f"{number}.png")
        Image.new("RGB", (16, 16), (number * 10, 255 - number * 10, 90)).save(path)
        rows.append({"bytes": None, "path": path})
    split = Dataset.from_dict({"image": rows}, features=Features({"image": ImageFeature(decode=False)}))
    labels = [0, 1, 2, 0] + [-100] * 14
    split = split.add_column("label", labels, feature=ClassLabel(names=list("abc")))
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    return lambda: ImageDataset(
        split, processor, augmentation=Augmentation({"flip": True}), seed=1, labelled_share=0.25
    )


def test_every_micro_batch_has_its_share_and_a_resumed_run_has_the_same_ones(tmp_path, images):
    def run(seen, **where):
        made = trainer(
            tmp_path / "out", build("vit", image_size=16), build("vit", seed=5, image_size=16),
            data=images(), **RUN, save_strategy="steps", save_steps=2,
        )  # fmt: skip
        step = made.training_step

        def recording(model, inputs, counts=None):
            seen.append((inputs["labels"].tolist(), inputs["pixel_values"].sum().item()))
            return step(model, inputs, counts)

        made.training_step = recording
        made.train(**where)
        return made

    full, seen, rest = None, [], []
    full = run(seen)
    assert len(seen) == 9 and all(sum(label >= 0 for label in labels) == 1 for labels, _ in seen)
    again = run(rest, resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert rest == seen[4:]
    assert largest_difference(weights(full.distiller), weights(again.distiller)) == 0.0
