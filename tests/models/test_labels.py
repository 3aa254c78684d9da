"""Classes are compared by name: whatever the keys of id2label, accents and repeated names are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, Image
from transformers import PretrainedConfig
from transformers.modeling_outputs import ImageClassifierOutput

from hf_kdtl.data.dataset import ImageDataset
from hf_kdtl.models import Teacher
from hf_kdtl.models.labels import class_names, dataset_class_names, label_order, match_labels, set_class_names
from tests.support.helpers import Images, trainer
from tests.support.tiny import build

IMAGENET = ["crane", "dog", "crane"]  # 134 and 517 of ImageNet-1k; "maillot" is 638 and 639


def named(names, seed=0):
    model = build("vit", num_labels=len(names), seed=seed)
    model.config.id2label = names if isinstance(names, dict) else dict(enumerate(names))
    return model


@pytest.mark.parametrize(
    "id2label",
    [
        {0: "a", 1: "b", 2: "c"},
        {"0": "a", "1": "b", "2": "c"},  # as JSON and transformers' run_image_classification.py have them
        {1: "a", 2: "b", 3: "c"},
        {"1": "a", "2": "b", "3": "c"},
        {2: "c", 0: "a", 1: "b"},
        {
            "2": "c",
            "10": "k",
            **{str(i): name for i, name in enumerate("ab")},
            **{str(i): name for i, name in zip(range(3, 10), "defghij", strict=True)},
        },
    ],
)
def test_keys_of_id2label(tmp_path, id2label):
    names = [*"abcdefghijk"[: len(id2label)]]
    model = named(id2label)
    assert class_names(model.config) == names
    runner = trainer(tmp_path, model, named(names, seed=5), data=Images(4))
    assert runner.teacher.order is None
    assert runner.model.config.id2label == dict(enumerate(names))  # a pipeline of this model reads it by number


@pytest.mark.parametrize(
    ("id2label", "message"),
    [
        ({"cat": 0, "dog": 1}, r"keys \['cat', 'dog'\]; expected the class indices 0 to 1\. Is it label2id\?"),
        ({0: "cat", 2: "dog"}, "expected the class indices 0 to 1"),
        ({2: "cat", 3: "dog"}, "expected the class indices 0 to 1"),
        ({"0": "cat", 0: "dog"}, "expected the class indices 0 to 1"),
    ],
)
def test_other_keys_are_refused(id2label, message):
    with pytest.raises(ValueError, match=message):
        class_names(SimpleNamespace(id2label=id2label, num_labels=2))


def test_the_same_list_with_repeated_names_is_the_same_classes(tmp_path):
    runner = trainer(tmp_path, named(IMAGENET), named(IMAGENET, seed=5))
    assert runner.teacher.order is None and "same order" in runner.teacher.notes[0]


def test_repeated_names_in_another_order_cannot_be_distinguished():
    with pytest.raises(ValueError, match=r"'crane' occur more than once.*a name of its own"):
        label_order(IMAGENET, ["dog", "crane", "crane"])
    with pytest.raises(ValueError, match="'crane' occur more than once"):
        label_order(IMAGENET, ["dog", "crane"])


def test_composed_and_decomposed_accents_are_one_name():
    composed, decomposed = (
        ["caf\u00e9", "dog", "\u00f1and\u00fa"],
        ["\u0000dog"[1:], "n\u0303andu\u0301", "cafe\u0301"],
    )
    assert label_order(composed, decomposed) == [2, 0, 1]
    assert label_order(composed, ["cafe\u0301", "dog", "n\u0303andu\u0301"]) is None


def _data(names, labels=(0, 0, 1, 1)):
    features = Features({"pixel_values": Array3D((3, 32, 32), "float32"), "labels": ClassLabel(names=names)})
    pixels = torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": [*labels]}, features=features)


def _sure(model, index):
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(10.0 * torch.eye(2)[index])
    return model


def test_an_unnamed_student_takes_the_names_of_the_data_before_it_meets_the_teacher(tmp_path):
    """0 is dog in the data and cat to the teacher; both models are sure of dog. Nothing is left to learn."""
    student, teacher = _sure(build("vit", num_labels=2), 0), _sure(named(["cat", "dog"], seed=5), 1)
    runner = trainer(tmp_path, student, teacher, data=_data(["dog", "cat"]))
    assert runner.model.config.id2label == {0: "dog", 1: "cat"} and runner.teacher.order == [1, 0]
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.zeros(4, dtype=torch.long)}
    assert all(value.abs().max() < 1e-3 for value in runner.objective_terms(batch).values())


def test_a_student_of_model_init_takes_them_too(tmp_path):
    from hf_kdtl import DistillationTrainer
    from tests.support.helpers import config

    runner = DistillationTrainer(
        model_init=lambda: build("vit", num_labels=2), args=config(tmp_path, max_steps=1),
        teacher=named(["cat", "dog"], seed=5), train_dataset=_data(["dog", "cat"]),
    )  # fmt: skip
    runner.train()
    assert runner.model.config.id2label == {0: "dog", 1: "cat"} and runner.teacher.order == [1, 0]


def test_an_unnamed_student_of_unnamed_data_takes_the_names_of_its_teacher(tmp_path):
    runner = trainer(tmp_path, build("vit"), named(["a", "b", "c"], seed=5))
    assert class_names(runner.model.config) == ["a", "b", "c"] and "by position" in runner.teacher.notes[0]


def test_a_teacher_of_other_classes_than_the_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Only the teacher: 'fox'"):
        trainer(tmp_path, build("vit", num_labels=2), named(["cat", "fox"], seed=5), data=_data(["cat", "dog"]))


def test_evaluation_data_in_another_order_than_training_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label 0 would mean another class"):
        trainer(tmp_path, build("vit", num_labels=2), data=_data(["dog", "cat"]), eval_dataset=_data(["cat", "dog"]))


def test_where_a_dataset_has_its_names():
    data = _data(["dog", "cat"])
    folder = SimpleNamespace(classes=["dog", "cat"])  # torchvision's ImageFolder
    features = Features(image=Image(decode=False), label=ClassLabel(names=["dog", "cat"]))
    split = Dataset.from_dict({"image": [{"bytes": b"", "path": None}], "label": [0]}, features=features)
    for dataset in (data, ImageDataset(split, None), torch.utils.data.Subset(data, [0]), folder):
        assert dataset_class_names(dataset) == ["dog", "cat"]
    assert dataset_class_names(Images(2)) is None and dataset_class_names(None) is None


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("classes", np.array(["dog", "fox", "cat"]), ["dog", "fox", "cat"]),
        ("classes", {"cat": 2, "dog": 0, "fox": 1}, ["dog", "fox", "cat"]),
        ("classes", {"cat": 3, "dog": 1, "fox": 2}, None),
        ("classes", {"dog", "cat", "fox"}, None),  # in no order
        ("classes", torch.arange(3), None),
        ("classes", 3, None),
        ("classes", [], None),
        ("features", torch.zeros(2, 3), None),
        ("features", [1, 2], None),
        ("train_sampler", torch.utils.data.SequentialSampler(range(4)), None),
    ],
)
def test_other_attributes_of_a_users_dataset_are_no_class_names(tmp_path, name, value, expected):
    data = Images(4)
    setattr(data, name, value)
    assert dataset_class_names(data) == expected
    trainer(tmp_path, build("vit"), data=data, max_steps=1, per_device_train_batch_size=2).train()


def test_a_head_that_is_not_what_the_config_says():
    student, teacher = (SimpleNamespace(id2label=None, num_labels=n) for n in (3, 5))
    with pytest.raises(ValueError, match="the student has 3 classes and the teacher 5"):
        match_labels(student, teacher)


def test_a_teacher_without_a_config_is_refused():
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3))
    with pytest.raises(TypeError, match=r"a Sequential without a config; expected an image classifier.*pixel_values"):
        Teacher(plain).match(build("vit"), None, compare_classes=True)
    wrapped = torch.nn.Module()
    wrapped.module = build("vit")
    with pytest.raises(TypeError, match=r"Pass teacher\.module"):
        Teacher(wrapped).match(build("vit"), None, compare_classes=True)


def test_data_that_is_given_later_is_compared_too(tmp_path):
    runner = trainer(tmp_path, named(["cat", "dog"]), data=_data(["cat", "dog"]), eval_dataset=_data(["cat", "dog"]))
    other = _data(["dog", "cat"])
    for judge in (runner.evaluate, runner.predict):
        judge(_data(["cat", "dog"]))
        with pytest.raises(ValueError, match="label 0 would mean another class"):
            judge(other)


def test_joined_datasets_have_their_names(tmp_path):
    joined = torch.utils.data.ConcatDataset([_data(["dog", "cat"]), _data(["dog", "cat"])])
    with pytest.raises(ValueError, match="label 0 would mean another class"):
        trainer(tmp_path, named(["cat", "dog"]), data=joined)
    joined = torch.utils.data.ConcatDataset([_data(["cat", "dog"]), _data(["dog", "cat"])])
    with pytest.raises(ValueError, match="are joined list their classes differently"):
        trainer(tmp_path, named(["cat", "dog"]), data=joined)


def test_more_classes_than_outputs_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the data has 3 classes .*the student 2 outputs.*num_labels=3"):
        trainer(tmp_path, build("vit", num_labels=2), data=_data(["a", "b", "c"]))


def test_label2id_that_contradicts_id2label_is_noted(tmp_path):
    teacher = named(["cat", "dog"], seed=5)
    assert "label2id" not in trainer(tmp_path, named(["cat", "dog"]), teacher).teacher.notes[0]
    teacher.config.label2id = {"cat": 1, "dog": 0}
    notes = trainer(tmp_path, named(["cat", "dog"]), teacher).teacher.notes
    assert "The teacher's label2id says 'cat' is 1 and its id2label 'dog': id2label was read." in notes[0]


def test_default_names_in_another_order_are_names():
    """As a user writes them who knows that the outputs are permuted; in their own order they name nothing."""
    student, teacher = build("vit"), build("vit", seed=5)
    assert class_names(teacher.config) is None
    set_class_names(student.config, ["LABEL_2", "LABEL_0", "LABEL_1"])
    assert class_names(student.config) == ["LABEL_2", "LABEL_0", "LABEL_1"]
    set_class_names(teacher.config, ["LABEL_1", "LABEL_2", "LABEL_0"])
    assert match_labels(student.config, teacher.config)[0] == [1, 2, 0]


def test_a_student_without_a_config_is_refused_and_the_cure_works(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3 * 32 * 32, 3)

        def forward(self, pixel_values):
            return ImageClassifierOutput(logits=self.head(pixel_values.flatten(1)))

    student, kd = Net(), [{"name": "logit_kd"}]
    with pytest.raises(TypeError, match=r"is a Net without a config.*set student\.config = "):
        trainer(tmp_path, student, build("vit", seed=5), objectives=kd)
    student.config = PretrainedConfig(id2label={0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"})
    trainer(tmp_path, student, build("vit", seed=5), objectives=kd, max_steps=1).train()
