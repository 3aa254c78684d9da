"""A teacher that sees the files at its own size."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from hf_kdtl import DistillationTrainer
from hf_kdtl.data import ImageDataset
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.data.filling import FillingTeacher
from hf_kdtl.data.store import Request, StoreWriter
from hf_kdtl.models import Needs, Teacher
from hf_kdtl.models.forward.perturbations import Sketch
from hf_kdtl.models.teachers import OwnPixels, StoredTeacher
from hf_kdtl.models.teachers.pixels import test_image as photograph
from tests.support.helpers import config, largest_difference, weights
from tests.support.tiny import build

OWN = {"teacher_pixels": "own", "per_device_train_batch_size": 4, "max_steps": 2}
KD = [{"name": "logit_kd"}]


def square(side, **options):
    return ViTImageProcessor(size={"height": side, "width": side}, **options)


STUDENT, TEACHER = square(32), square(48, image_mean=[0.3] * 3, image_std=[0.2] * 3)


def split(count=8):
    rows = []
    for number in range(count):
        image = Image.fromarray(np.roll(photograph(90, 120), 9 * number, 1))
        image.save(buffer := io.BytesIO(), "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features(image=datasets.Image(decode=False))
    labels, names = [0, 1, 2, 0] * 2, datasets.ClassLabel(names=["a", "b", "c"])
    return datasets.Dataset.from_dict({"image": rows}, features=features).add_column("label", labels, feature=names)


def images(teacher_processor=TEACHER, processor=STUDENT):
    augmentation = Augmentation({"resized_crop": [0.4, 0.9], "flip": True, "color_jitter": 0.3, "mixup": 0.3})
    return ImageDataset(split(), processor, augmentation=augmentation, teacher_processor=teacher_processor, views=1)


def trained(folder, data, objectives=KD, teacher=None, **settings):
    teacher = teacher or Teacher(build("vit", seed=5, image_size=48), TEACHER)
    runner = DistillationTrainer(
        build("vit"), config(folder, objectives, **(OWN | settings)),
        teacher=teacher, train_dataset=data, processing_class=STUDENT,
    )  # fmt: skip
    runner.train()
    return runner


def test_the_teachers_pixels_are_those_that_its_own_data_set_shows():
    alone = ImageDataset(split(), TEACHER, augmentation=images().augmentation)
    student = ImageDataset(split(), STUDENT, augmentation=images().augmentation)
    for both, its, mine in zip(images(), alone, student, strict=True):
        assert both["teacher_pixel_values"].shape == (3, 48, 48)
        assert torch.equal(both["teacher_pixel_values"], its["pixel_values"])
        assert torch.equal(both["pixel_values"], mine["pixel_values"])
    plain = ImageDataset(split(), STUDENT, teacher_processor=TEACHER)[3]
    assert torch.equal(plain["teacher_pixel_values"], ImageDataset(split(), TEACHER)[3]["pixel_values"])


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1}], ids=str)
def test_training_shows_the_teacher_its_own_pixels(tmp_path, settings):
    model = build("vit", seed=5, image_size=48)
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True)
    objectives = [{"name": "logit_kd"}, {"name": "hidden_states"}]
    runner = trained(tmp_path / "a", images(), objectives, Teacher(model, TEACHER), **settings)
    known = [item["teacher_pixel_values"] for item in images()]
    batch = seen[-1]
    assert all(any(torch.equal(one, other) for other in known) for one in batch) and len(batch) == 4
    shared = trained(tmp_path / "b", images(), objectives, teacher_pixels="shared", **settings)
    assert largest_difference(weights(runner.model), weights(shared.model)) > 1e-6


OBJECTIVES = [{"name": "logit_kd"}, {"name": "hidden_states", "layers": [[1, 1]]}]


def stored(folder, data, **options):
    source = OwnPixels(Teacher(build("vit", seed=5, image_size=48), TEACHER))
    source.match(build("vit"), STUDENT, compare_classes=False)
    needs = options.pop("needs", Needs(logits=True, hidden_states=frozenset({1})))
    return StoreWriter(folder, source, data, Request(needs, views=1, teacher_batch=4, **options))


def test_a_store_of_its_own_pixels_is_the_live_teacher_bitwise_and_needs_no_second_resize(tmp_path):
    writer = stored("store", images())
    writer.begin()
    writer.write()
    live = Teacher(build("vit", seed=5, image_size=48), TEACHER, teacher_batch=4)
    runs = [
        trained(tmp_path / str(number), data, OBJECTIVES, source, max_steps=6, **settings)
        for number, (data, source, settings) in enumerate((
            (images(), live, {}),
            (images(teacher_processor=None), StoredTeacher("store"), {}),
            (images(teacher_processor=None), StoredTeacher("store"), {"teacher_pixels": "shared"}),  # as it is stored
            (images(), filling(), {}),
        ))
    ]  # fmt: skip
    assert [largest_difference(weights(runs[0].model), weights(run.model)) for run in runs] == [0, 0, 0, 0]
    store = StoredTeacher("store")
    assert store.own and "saw the files at its own size" in store.summary()
    store.check_data(images(teacher_processor=None, processor=square(32, image_mean=[0.2] * 3)))  # not what it saw
    with pytest.raises(ValueError, match=r"only training data has them\. Leave eval_objectives out"):
        store.capture(torch.zeros(1, 3, 32, 32), Needs(logits=True), {})
    with pytest.raises(ValueError, match=r"it differentiates by the student's pixels.*shared"):
        stored("other", images(), needs=Needs(sketches=frozenset({Sketch(4)})))
    with pytest.raises(ValueError, match="train_dataset has no pixels for the teacher"):
        stored("other", images(teacher_processor=None))
    plain = Teacher(build("vit", seed=5, image_size=48), TEACHER)
    plain.match(build("vit"), STUDENT, compare_classes=False)
    shared = StoreWriter("shared", plain, images(), Request(Needs(logits=True), views=1, teacher_batch=4))
    shared.begin()
    shared.write()
    with pytest.raises(ValueError, match=r"the store shared is of the student's pixels\. Set teacher_pixels: shared"):
        trained(tmp_path / "x", images(), KD, StoredTeacher("shared"))
    with pytest.raises(ValueError, match=r"data\.teacher_pixels is 'own' in the store and not set here"):
        StoreWriter("store", plain, images(), Request(Needs(logits=True), views=1, teacher_batch=4))


def filling():
    writer = stored("filled", images())
    writer.begin(filling=True)
    return FillingTeacher(writer)


def test_what_cannot_see_other_pixels_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"objective 'jacobian': it differentiates by the student's pixels.*shared"):
        trained(tmp_path, images(), [{"name": "jacobian"}])
    with pytest.raises(ValueError, match=r"train_dataset has no pixels for the teacher\. Use ImageDataset"):
        trained(tmp_path, images(teacher_processor=None))
    with pytest.raises(ValueError, match="by another image processor"):
        trained(tmp_path, images(teacher_processor=square(40)))
    with pytest.raises(ValueError, match="Teacher without its image processor; expected one live teacher"):
        trained(tmp_path, images(), teacher=Teacher(build("vit", seed=5)))
    with pytest.raises(ValueError, match=r"unknown teacher_pixels: 'owm'\. Did you mean 'own'"):
        trained(tmp_path, images(), teacher_pixels="owm")
