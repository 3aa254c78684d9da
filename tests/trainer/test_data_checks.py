"""Datasets inside Subset, ConcatDataset and a user's wrapper, and image processors that are not the student's."""

import io
import logging

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset, random_split
from transformers import CLIPImageProcessor, ViTImageProcessor

from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.data import ImageDataset
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.data.indexed import IndexedDataset
from hf_kdtl.data.store import Request, StoreWriter
from hf_kdtl.models import Needs, Teacher
from hf_kdtl.models.labels import dataset_class_names
from hf_kdtl.models.teachers import OwnPixels, StoredTeacher
from hf_kdtl.models.teachers.store.images import TrainingImages
from hf_kdtl.trainer.callbacks import SetDatasetEpoch
from tests.support.helpers import config
from tests.support.tiny import build

TASK = [{"name": "task"}]


def processor(mean=0.5, size=32, **options):
    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=[mean] * 3, **options)


def images(count=8, its=None, **options):
    draw, rows = np.random.default_rng(0), []
    for _ in range(count):
        image = Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        image.save(buffer := io.BytesIO(), "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    split = datasets.Dataset.from_dict({"image": rows}, datasets.Features(image=datasets.Image(decode=False)))
    names = datasets.ClassLabel(names=["a", "b", "c"])
    split = split.add_column("label", [0, 1, 2, -100] * (count // 4), feature=names).add_column("row", range(count))
    return ImageDataset(split, its or processor(), **options)


class Wrapper(torch.utils.data.Dataset):
    """What users write around a dataset."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset[i]


WRAPPERS = {
    "subset": lambda data: Subset(data, [6, 1, 3, 2]),
    "random_split": lambda data: random_split(data, [4, 4])[0],
    "joined": lambda data: ConcatDataset([Subset(data, [0, 1]), Subset(data, [2, 3])]),
    "wrapper": lambda data: Wrapper(Subset(data, [6, 1, 3, 2])),
}
wrapped = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def trainer(folder, data, teacher=None, evaluated=None, its=None, **settings):
    settings = config(folder, [{"name": "logit_kd"}] if teacher else TASK, **({"max_steps": 1} | settings))
    return DistillationTrainer(
        build("vit"), settings, teacher=teacher, train_dataset=data, eval_dataset=evaluated, processing_class=its
    )


# ---- What is asked of the dataset inside ----


@wrapped
def test_every_epoch_shows_other_views_also_inside_a_wrapper(tmp_path, wrap):
    data = images(augmentation=Augmentation({"resized_crop": [0.3, 0.6]}))
    for carried in (False, True):
        runner, seen = trainer(tmp_path, wrap(data), max_steps=2, per_device_train_batch_size=4), []
        step = runner.training_step
        if carried:
            runner._get_dataloader = lambda dataset, *args, get=runner._get_dataloader, **more: get(
                IndexedDataset(dataset), *args, **more
            )
            runner.data_collator = lambda items: torch.utils.data.default_collate([one.item for one in items])
        runner.training_step = lambda model, inputs, *rest, step=step, seen=seen: (
            seen.append(inputs["pixel_values"].sum((1, 2, 3)).sort().values),
            step(model, inputs, *rest),
        )[1]
        runner.train()
        assert len(seen) == 2 and not torch.allclose(*seen, atol=1e-3)


@wrapped
def test_another_view_seed_is_refused_also_inside_a_wrapper(tmp_path, wrap):
    with pytest.raises(ValueError, match=r"view_seed is 0 in the config and 3 in train_dataset"):
        trainer(tmp_path, wrap(images(view_seed=3)))


@wrapped
def test_a_labelled_share_inside_a_wrapper_is_refused(tmp_path, wrap):
    with pytest.raises(ValueError, match=r"labelled_share is set inside a .*split\.select\(rows\).*=0\.5"):
        trainer(tmp_path, wrap(images(labelled_share=0.5)))


@wrapped
def test_classes_and_the_teachers_pixels_are_those_inside(wrap):
    teacher = Teacher(build("vit", image_size=48), processor(size=48))
    OwnPixels(teacher).check_data(wrap(images(teacher_processor=processor(size=48))))
    for other in (None, processor(0.3, 48)):
        with pytest.raises(ValueError, match=r"teacher_pixels is 'own'|by another image processor"):
            OwnPixels(teacher).check_data(wrap(images(teacher_processor=other)))
    assert dataset_class_names(wrap(images())) == ["a", "b", "c"]


def test_rows_and_views_are_those_inside_and_joined_rows_are_told_apart():
    data = images(augmentation=Augmentation({"flip": True}))
    SetDatasetEpoch().on_epoch_begin(
        None, type("", (), {"epoch": 2.0})(), None, torch.utils.data.DataLoader(IndexedDataset(Subset(data, [5])))
    )
    rows = [
        (one.row, one.view) for one in IndexedDataset(Subset(Subset(data, [7, 5, 2]), [1, 2])).__getitems__([0, 1])
    ]
    assert rows == [(5, 2), (2, 2)]
    same = ConcatDataset([Subset(data, [5]), Subset(data, [2])])
    assert [one.row for one in IndexedDataset(same).__getitems__([0, 1])] == [5, 2]
    several = IndexedDataset(ConcatDataset([data, images()]))
    assert [(one.row, one.view) for one in several.__getitems__([1, 9])] == [(1, 2), (9, 0)]
    with pytest.raises(ValueError, match=r"joins datasets whose rows are not distinguished.*concatenate_datasets"):
        TrainingImages(ConcatDataset([data, images()]))


def test_a_store_of_all_images_serves_a_subset_of_them(tmp_path):
    data = images(augmentation=Augmentation({"flip": True}))
    needs = Request(Needs(logits=True), views=2, teacher_batch=4)
    teacher = Teacher(build("vit", seed=5))
    writer = StoreWriter(tmp_path / "store", teacher, data, needs)
    writer.begin()
    writer.write()
    store, part = StoredTeacher(tmp_path / "store"), Subset(data, [6, 1, 3, 2])
    store.match(build("vit"), None, compare_classes=True)
    store.check_data(part)
    assert data.views == 2
    part_writer = StoreWriter(tmp_path / "part", teacher, part, needs)
    part_writer.begin()
    part_writer.write()
    batch = {"image_index": torch.tensor([6, 2]), "image_view": torch.tensor([1, 0])}
    found = [StoredTeacher(tmp_path / name).capture(torch.zeros(2, 3, 32, 32), Needs(logits=True), batch)
             for name in ("store", "part")]  # fmt: skip
    torch.testing.assert_close(found[0].logits, found[1].logits)
    with pytest.raises(ValueError, match=r"is of other pixels: .*view_seed is 0 in the store and 3 here"):
        StoredTeacher(tmp_path / "store").check_data(Subset(images(view_seed=3), [1]))


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_data_keeps_its_number_of_views_beside_a_store_of_two(tmp_path, asked):
    flip = Augmentation({"flip": True})
    writer = StoreWriter(
        tmp_path, Teacher(build("vit")), images(augmentation=flip), Request(Needs(logits=True), views=2)
    )
    writer.begin()
    writer.write()
    data, store = images(augmentation=flip, views=asked), StoredTeacher(tmp_path)
    if asked == 3:
        with pytest.raises(ValueError, match=r"shows 3 views of an image, and the store .* has 2\. Give .* views=2"):
            store.check_data(data)
    else:
        store.check_data(data)
    assert data.views == asked


def test_a_resumed_run_says_what_else_is_not_as_it_was(tmp_path, caplog):
    teacher, other = (Teacher(build("vit", seed=seed), processor(0.3)) for seed in (5, 6))
    flip = Augmentation({"flip": True})
    run = {"its": processor(), "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, images(augmentation=flip), teacher, **run).train()
    more = run | {"max_steps": 2, "save_strategy": "no"}
    trainer(tmp_path, images(augmentation=flip), teacher, **more).train(resume_from_checkpoint=True)
    assert "was written with" not in caplog.text
    data = images(16, augmentation=Augmentation({"crop": 2}), view_seed=3, its=processor(0.4))
    more |= {"its": processor(0.4), "view_seed": 3, "lr_scheduler_type": "cosine"}
    trainer(tmp_path, data, other, **more).train(resume_from_checkpoint=True)
    assert "resuming, but not bit-identical" in caplog.text
    for said in (
        "view_seed 0 (now 3)", "training images 8 (now 16)", "data.augmentation.flip True (now None)",
        "data.image_processor.image_mean [0.5, 0.5, 0.5] (now [0.4, 0.4, 0.4])",
        "lr_scheduler_type linear (now cosine)",
        f"teacher.weights {teacher.fingerprint} (now {other.fingerprint})",
    ):  # fmt: skip
        assert said in caplog.text


# ---- Image processors that are not the student's ----


@wrapped
def test_training_pixels_of_another_processor_are_refused(tmp_path, wrap):
    teacher = Teacher(build("vit", seed=5), processor(0.3))
    for other, name in ((processor(0.1), "image_mean"), (processor(resample=3), "resample")):
        with pytest.raises(ValueError, match=rf"train_dataset makes its pixels by another.*processing_class: {name} "):
            trainer(tmp_path, wrap(images(its=other)), teacher, its=processor())
    assert trainer(tmp_path, wrap(images()), teacher, its=processor())


def test_joined_datasets_of_two_processors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="than that of train_dataset: image_mean differ"):
        trainer(tmp_path, ConcatDataset([images(), images(its=processor(0.1))]))


def test_evaluation_pixels_of_another_processor_are_refused_also_later(tmp_path, caplog):
    data, other = images(), images(its=processor(0.9))
    for its in (processor(), None):
        for evaluated in (other, {"x": data, "y": Subset(other, [0])}):
            with pytest.raises(ValueError, match=r"for evaluation are made by another .*: image_mean differ"):
                trainer(tmp_path, data, evaluated=evaluated, its=its)
        runner = trainer(tmp_path, data, its=its)
        for use in (runner.evaluate, runner.predict):
            with pytest.raises(ValueError, match=r"for evaluation are made by another"):
                use(other)
    logging.getLogger("transformers").propagate = True
    try:
        runner.evaluate(images(its=processor(resample=3)))
    finally:
        logging.getLogger("transformers").propagate = False
    assert "shown otherwise than by that of train_dataset: resample" in caplog.text


def test_the_same_processor_in_another_form_is_the_same(tmp_path):
    saved = processor()
    saved.save_pretrained(tmp_path)
    again = ViTImageProcessor.from_pretrained(tmp_path)
    both = type("Both", (), {"image_processor": again, "save_pretrained": lambda *_: None})()  # of images and texts
    for its in (saved, again, both):
        assert trainer(tmp_path, images(), Teacher(build("vit", seed=5)), images(), its=its)
    clip = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False, image_mean=[0.5] * 3)
    with pytest.raises(ValueError, match="image_processor_type"):
        trainer(tmp_path, images(its=clip), its=saved)


def test_without_a_processor_data_of_any_kind_trains_as_before(tmp_path):
    for data in (images(), images(its=processor(0.1)), Subset(images(), [0, 1, 2, 4])):
        assert trainer(tmp_path, data, evaluated=data).train().global_step == 1
    assert DistillationConfig(str(tmp_path)).view_seed == 0
