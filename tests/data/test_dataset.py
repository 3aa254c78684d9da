import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    pipeline,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_kdtl.data import load_images
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.data.dataset import ImageDataset
from hf_kdtl.data.indexed import RowPass
from hf_kdtl.trainer.callbacks import SetDatasetEpoch


def processor(**options) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(**{"size": {"height": 8, "width": 8}, "image_mean": [0.4, 0.5, 0.6], **options})


def noisy(count: int) -> Dataset:
    values = np.random.default_rng(0).integers(0, 256, (count, 9, 7, 3), dtype=np.uint8)
    features = Features(image=datasets.Image(decode=False), label=ClassLabel(names=["a", "b", "c"]))
    rows = []
    for pixels in values:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    return Dataset.from_dict({"image": rows, "label": [i % 3 for i in range(count)]}, features=features)


def stacked(batch: list[dict]) -> torch.Tensor:
    return torch.stack([item["pixel_values"] for item in batch])


def test_without_augmentation_the_pixels_are_those_of_a_pipeline(tmp_path):
    model = tiny_vit()
    split = noisy(4)
    classify = pipeline("image-classification", model=model, image_processor=processor(), device="cpu")
    items = ImageDataset(split, processor()).__getitems__([2, 0])
    for item, index in zip(items, [2, 0], strict=True):
        (tmp_path / "a.png").write_bytes(split[index]["image"]["bytes"])
        assert torch.equal(item["pixel_values"], classify.preprocess(str(tmp_path / "a.png"))["pixel_values"][0])
        assert item["pixel_values"].dtype == torch.float32
        assert item["labels"] == index % 3


FILES = [
    ("png", Image.fromarray(np.arange(256, dtype=np.uint8).reshape(8, 8, 4), "RGBA")),
    ("png", Image.fromarray(np.arange(128, dtype=np.uint8).reshape(8, 8, 2), "LA")),
    ("png", Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)),
    ("tif", Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8) * 9)),
    ("tif", Image.fromarray(np.arange(64, dtype=np.float32).reshape(8, 8) / 3)),
    ("gif", Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")),
    ("tif", Image.fromarray(np.arange(256, dtype=np.uint8).reshape(8, 8, 4), "CMYK")),
]


def test_files_of_every_kind_are_the_pixels_of_a_pipeline(tmp_path):
    classify = pipeline("image-classification", model=tiny_vit(), image_processor=processor(), device="cpu")
    paths = [str(tmp_path / f"{number}.{kind}") for number, (kind, _) in enumerate(FILES)]
    for path, (_, image) in zip(paths, FILES, strict=True):
        image.save(path)
    rows = {"image": [{"bytes": None, "path": path} for path in paths], "label": [0] * len(paths)}
    items = ImageDataset(Dataset.from_dict(rows, features=noisy(1).features), processor()).__getitems__([*range(7)])
    for path, item in zip(paths, items, strict=True):
        assert torch.equal(item["pixel_values"], classify.preprocess(path)["pixel_values"][0]), path


@pytest.mark.parametrize("options", [{}, {"do_normalize": False}])
def test_augmented_pixels_are_normalised_like_the_others(options):
    split = noisy(4)
    nothing = ImageDataset(split, processor(**options), augmentation=Augmentation({}))
    plain = ImageDataset(split, processor(**options))
    torch.testing.assert_close(stacked(nothing.__getitems__([0, 1])), stacked(plain.__getitems__([0, 1])))
    assert nothing[1]["labels"] == plain[1]["labels"] == 1


def test_mixed_labels_and_the_default_collator():
    dataset = ImageDataset(noisy(6), processor(), augmentation=Augmentation({"mixup": 1.0}), num_labels=5)
    batch = default_data_collator(dataset.__getitems__([0, 1, 2, 3]))
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    assert batch["labels"].dtype == torch.float32
    torch.testing.assert_close(batch["labels"].sum(1), torch.ones(4))
    assert batch["labels"].shape == (4, 5)
    hard = ImageDataset(noisy(6), processor(), augmentation=Augmentation({"flip": True}))
    assert default_data_collator(hard.__getitems__([0, 1, 5]))["labels"].tolist() == [0, 1, 2]


EVERYTHING = {"crop": 2, "flip": True, "color_jitter": 0.2, "random_erasing": 0.5, "mixup": 0.2, "cutmix": 1.0}


def augmented(count: int = 12, **options) -> ImageDataset:
    return ImageDataset(noisy(count), processor(), augmentation=Augmentation(EVERYTHING), **options)


def test_draws_depend_on_view_seed_and_pass_alone():
    first, second, third = augmented(), augmented(seed=7), augmented(view_seed=1)
    indices = [3, 1, 2]
    reference = stacked(first.__getitems__(indices))
    torch.manual_seed(99)
    first.__getitems__([5, 6])
    state = torch.get_rng_state()
    assert torch.equal(stacked(second.__getitems__(list(np.array(indices)))), reference)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(stacked(third.__getitems__(indices)), reference)
    assert torch.equal(stacked([first[1], first[3], first[2]])[[1, 0, 2]], reference)  # any batch, any order
    first.set_epoch(1)
    second_pass = stacked(first.__getitems__(indices))
    assert not torch.equal(second_pass, reference)
    first.set_epoch(0)
    assert torch.equal(stacked(first.__getitems__(indices)), reference)
    assert torch.equal(stacked(first.__getitems__([RowPass(index, 1) for index in indices])), second_pass)


def test_views_come_back_after_as_many_passes():
    dataset = augmented(views=3)
    seen = []
    for epoch in range(7):
        dataset.set_epoch(epoch)
        seen.append(dataset[4]["pixel_values"])
        assert dataset.image_view(4) == epoch % 3 and torch.equal(seen[-1], dataset[RowPass(4, epoch)]["pixel_values"])
    assert all(torch.equal(one, seen[epoch % 3]) for epoch, one in enumerate(seen))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("config", [{"resized_crop": [0.3, 1.0], "flip": True, "color_jitter": 0.3}, EVERYTHING])
def test_pixels_do_not_depend_on_the_order_of_the_split_nor_on_what_is_selected(config):
    split = noisy(12).add_column("row", list(range(30, 42)))
    order = [7, 2, 11, 0, 5]

    def shown(split):
        dataset = ImageDataset(split, processor(), augmentation=Augmentation(config))
        return {dataset.source_index(i): dataset[i] for i in range(len(dataset))}

    reference = shown(split)
    for chosen in (split.select([*order, *(i for i in range(12) if i not in order)]), split.select(order)):
        if len(chosen) < 12 and config is EVERYTHING:
            continue  # the partners are drawn among other images
        for row, item in shown(chosen).items():
            assert torch.equal(item["pixel_values"], reference[row]["pixel_values"])
            assert np.array_equal(item["labels"], reference[row]["labels"])


def constant(labels: list[int]) -> Dataset:
    """Image i is grey, of value 10 i."""
    rows = []
    for number in range(len(labels)):
        Image.new("RGB", (8, 8), (10 * number,) * 3).save(buffer := io.BytesIO(), "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    features = Features(image=datasets.Image(decode=False))
    return Dataset.from_dict({"image": rows}, features=features).add_column("label", labels)


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_partners_are_of_the_same_status_and_labels_weigh_as_the_pixels_do(key):
    labels = [0, -100, 1, -100, 2, -100, -100, -100, -100, -100]
    dataset = ImageDataset(
        constant(labels), processor(do_normalize=False), augmentation=Augmentation({key: 1.0}), num_labels=3
    )
    values = torch.tensor([0.0, 20.0, 40.0]) / 255  # of the three labelled images, by label
    partners = set()
    for number in range(30):
        items = dataset.__getitems__([RowPass(index, number) for index in range(10)])
        for label, item in zip(labels, items, strict=True):
            if label < 0:
                assert (item["labels"] == -100).all()
                continue
            assert item["labels"].sum() == pytest.approx(1)
            assert item["pixel_values"].mean().item() == pytest.approx((item["labels"] @ values).item(), abs=1e-6)
            partners |= {(label, other) for other in item["labels"].nonzero()[:, 0].tolist()}
    assert partners == {(i, j) for i in range(3) for j in range(3)}


def test_what_decides_the_views_is_told_as_plain_data():
    facts = augmented(view_seed=3).view_facts()
    assert facts["view_seed"] == 3 and facts["augmentation"]["crop"] == "2 of 8x8 pixels"
    assert facts == augmented(seed=9, view_seed=3, views=7).view_facts() != augmented().view_facts()
    split = noisy(12)
    for other in (split.select(range(11)), split.remove_columns("label").add_column("label", [-100] * 12)):
        dataset = ImageDataset(other, processor(), augmentation=Augmentation(EVERYTHING), num_labels=3, view_seed=3)
        assert facts["partners"] != dataset.view_facts()["partners"]
    assert ImageDataset(split, processor()).view_facts() == {"augmentation": {}}


def test_workers_and_persistent_workers_give_the_same_pixels():
    def epochs(**options):
        dataset = augmented()
        loader = DataLoader(dataset, batch_size=5, collate_fn=default_data_collator, **options)
        for epoch in range(2):
            dataset.set_epoch(epoch)
            yield from (batch["pixel_values"] for batch in loader)

    alone = list(epochs())
    workers = list(epochs(num_workers=2, persistent_workers=True))
    assert len(alone) == 6
    assert all(torch.equal(a, b) for a, b in zip(alone, workers, strict=True))
    assert not torch.equal(alone[0], alone[3])  # another epoch, the same indices


def tiny_vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))


class Recorder(Trainer):
    """Plain Trainer with a loss for soft labels, that keeps the pixels it saw."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.seen = [*getattr(self, "seen", []), inputs["pixel_values"].clone()]
        logits = model(pixel_values=inputs["pixel_values"]).logits
        return torch.nn.functional.cross_entropy(logits, inputs["labels"])


def recorder(tmp_path: Path, **options) -> Recorder:
    args = {"max_steps": 6, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    args |= {"save_strategy": "no", "logging_strategy": "no", **options}
    return Recorder(
        tiny_vit(),
        TrainingArguments(str(tmp_path / "run"), **args),
        train_dataset=augmented(),
        callbacks=[SetDatasetEpoch],
    )


def test_plain_trainer_sees_the_same_pixels_with_workers(tmp_path):
    runs = []
    for options in ({}, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}):
        trainer = recorder(tmp_path, **options)
        trainer.train()
        runs.append(trainer.seen)
    assert len(runs[0]) == 6  # two epochs
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_resumed_epoch_sees_the_pixels_of_that_epoch(tmp_path):
    # Step 4 is in epoch 1: there accelerate no longer tells the dataset about the epoch.
    full = recorder(tmp_path, save_strategy="steps", save_steps=4)
    full.train()
    resumed = recorder(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert len(resumed.seen) == 2
    assert all(torch.equal(a, b) for a, b in zip(full.seen[4:], resumed.seen, strict=True))


def test_processors_that_augmentation_cannot_work_with_are_refused():
    class Odd(ViTImageProcessorPil):
        def normalize(self, image, mean, std, **kwargs):
            return super().normalize(image, mean, std, **kwargs) ** 3

    with pytest.raises(ValueError, match=r"Odd is not linear in the color values"):
        ImageDataset(noisy(2), Odd(size={"height": 8, "width": 8}), augmentation=Augmentation({"flip": True}))


def test_images_of_different_sizes_are_refused():
    buffer = io.BytesIO()
    Image.new("RGB", (20, 9)).save(buffer, "PNG")
    split = noisy(1)
    rows = [split[0]["image"], {"bytes": buffer.getvalue(), "path": None}]
    split = Dataset.from_dict({"image": rows, "label": [0, 1]}, features=split.features)
    with pytest.raises(ValueError, match=r"different sizes \(\(3, 9, 7\), \(3, 9, 20\)\).*do_resize"):
        ImageDataset(split, processor(do_resize=False)).__getitems__([0, 1])


def test_a_bad_image_without_a_path_is_named_by_its_index():
    split = Dataset.from_dict({"image": [{"bytes": b"x", "path": None}], "label": [0]}, features=noisy(1).features)
    with pytest.raises(ValueError, match="Image 0 of the split of 1 images could not be read"):
        ImageDataset(split, processor())[0]


def test_a_bad_image_is_named_by_its_path(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"junk")
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "cat.png")}], "label": [0]}
    with pytest.raises(ValueError, match=r"/cat\.png could not be read"):
        ImageDataset(Dataset.from_dict(rows, features=noisy(1).features), processor())[0]


def test_a_dataset_that_decodes_its_images_is_a_split_too():
    split = noisy(4)
    decoded = split.cast_column("image", datasets.Image())
    assert isinstance(decoded[0]["image"], Image.Image)
    for options in ({}, {"augmentation": Augmentation({"flip": True})}):
        one, other = (ImageDataset(rows, processor(), **options)[1] for rows in (split, decoded))
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and one["labels"] == other["labels"]


def test_what_is_no_split_is_refused():
    data, text = load_images("digits"), Dataset.from_dict({"image": noisy(2)["image"][:], "label": ["a", "b"]})
    numbers = noisy(4).cast_column("label", datasets.Value("int64"))
    lazy = noisy(4).with_transform(lambda rows: rows)
    for what in (data, "digits", Path("x"), datasets.DatasetDict(train=data.train), text, numbers, lazy, [1], None):
        with pytest.raises(ValueError, match=rf"got a {type(what).__name__}.*load_images\(source\)\.train"):
            ImageDataset(what, processor())
    assert ImageDataset(numbers, processor(), num_labels=3)[2]["labels"] == noisy(4)[2]["label"]
