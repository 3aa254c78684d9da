"""Each field of what a store was made from, changed once, is refused by its name."""

import copy

import pytest

from hf_kdtl.data import ImageDataset
from hf_kdtl.data import views as replayed
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.data.store import Request, StoreWriter
from hf_kdtl.models import Needs, Teacher
from hf_kdtl.models.teachers import StoredTeacher
from tests.data.test_dataset import noisy
from tests.data.test_dataset import processor as small
from tests.support.tiny import build

AUGMENTATION = {"flip": True, "mixup": 0.2}


def processor(**settings):
    return small(size={"height": 32, "width": 32}, **settings)


def images(split=None, augmentation=AUGMENTATION, view_seed=0, **settings):
    split = noisy(8) if split is None else split
    drawn = {"augmentation": Augmentation(augmentation), "view_seed": view_seed, "views": 2}
    return ImageDataset(split, processor(**settings), **drawn)


def teacher(seed=5, names=("a", "b", "c"), **settings):
    model = build("vit", seed=seed)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    return Teacher(model, processor(**settings))


def write(model, data):
    model.match(build("vit", seed=1), data.image_processor, compare_classes=False)
    writer = StoreWriter("store", model, data, Request(Needs(logits=True), views=2, teacher_batch=4))
    writer.begin()
    writer.write()
    return StoredTeacher("store")


OF_DATA = {
    "view_seed": {"view_seed": 1},
    "augmentation": {"augmentation": {"flip": False, "mixup": 0.2}},
    "image_processor": {"image_mean": [0.1, 0.2, 0.3]},
    "partners": {"split": noisy(7)},
    "view_version": {},
}
OF_TEACHER = {
    "teacher": {"seed": 6},
    "teacher_processor": {"image_std": [0.1, 0.2, 0.3]},
    "classes": {"names": ("a", "c", "b")},
}


def test_each_field_of_the_fingerprint_changed_once_is_named(monkeypatch):
    store = write(teacher(), images())
    fingerprint = store.manifest.fingerprint
    assert fingerprint.keys() == {"data", *OF_TEACHER} and fingerprint["data"].keys() == OF_DATA.keys(), "test each"
    store.check_data(images())
    for name, changes in OF_DATA.items():
        with monkeypatch.context() as patched:
            if name == "view_version":
                patched.setattr(replayed, "VIEW_VERSION", -1)
            with pytest.raises(ValueError, match=rf"is of other pixels: data\.{name}[.\w]* is .* in the store and .*"):
                StoredTeacher("store").check_data(images(**changes))
            with pytest.raises(ValueError, match=rf"made from something else: data\.{name}[.\w]* is "):
                write(teacher(), images(**changes))
    for name, changes in OF_TEACHER.items():
        with pytest.raises(ValueError, match=rf"is of another teacher: {name}[.\w]* is .* in the store and .* here"):
            store.check_teacher(teacher(**changes))
        with pytest.raises(ValueError, match=rf"made from something else: {name}[.\w]* is "):
            write(teacher(**copy.deepcopy(changes)), images())


@pytest.mark.parametrize("content", ["", "{}", '{"format": 99}', "[1]", '{"format": 1, "kinds": 3}'])
def test_a_manifest_that_is_damaged_is_named(content):
    write(teacher(), images())
    with open("store/store.json", "w") as file:
        file.write(content)
    with pytest.raises(ValueError, match=r"store/store\.json is not the manifest of a store of teacher outputs"):
        StoredTeacher("store")
