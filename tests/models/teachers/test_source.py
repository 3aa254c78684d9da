"""The protocol of teacher signals: sources that the package does not know train, or are refused, as live ones are."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset
from transformers import ViTImageProcessor

from hf_kdtl import DistillationTrainer
from hf_kdtl.data import ImageDataset
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.models import Capture, Needs, Teacher
from hf_kdtl.models.teachers.source import SignalSource, SourceInfo
from tests.data.test_dataset import noisy
from tests.support.helpers import Images, config, largest_difference, weights
from tests.support.tiny import build

PACKAGE = Path(__file__).parents[3] / "hf_kdtl"
KD = [{"name": "logit_kd"}]


class Stored(SignalSource):
    """Class outputs by the row of the training data, and nothing else."""

    needs_index = True

    def __init__(self, logits):
        self.logits, self.notes, self.asked = logits, [], []

    def match(self, student, processing_class, compare_classes):
        pass

    def unserved(self, needs):
        missing = replace(needs, logits=False)
        return f"the store has no more than class outputs, and this reads {missing}." if missing else ""

    def capture(self, pixel_values, needs, batch=None):
        self.asked += batch["image_index"].tolist()
        return Capture(logits=torch.stack([self.logits[i] for i in batch["image_index"].tolist()]))

    def provenance(self):
        return SourceInfo("Stored")

    fingerprint = "stored"


class Headless(Teacher):
    """A live model without class outputs."""

    def unserved(self, needs):
        return "the teacher has no classifier; compare features, as hidden_states does." if needs.logits else ""

    def capture(self, pixel_values, needs, batch=None):
        return replace(super().capture(pixel_values, needs, batch), logits=None, outputs=None)


class Pair(Teacher):
    """Features of one model, class outputs of another."""

    def __init__(self, features, answers):
        super().__init__(features)
        self.answers = Teacher(answers)

    def capture(self, pixel_values, needs, batch=None):
        mine = super().capture(pixel_values, replace(needs, logits=False), batch)
        its = self.answers.capture(pixel_values, Needs(logits=True), batch)
        return replace(mine, logits=its.logits)


class Several(SignalSource):
    """Models by name, which objectives take their signals from."""

    def __init__(self, **teachers):
        self.teachers, self.notes = {name: Teacher(model) for name, model in teachers.items()}, []

    def match(self, student, processing_class, compare_classes):
        for teacher in self.teachers.values():
            teacher.match(student, processing_class, compare_classes)

    def members(self):
        return self.teachers

    def provenance(self):
        return SourceInfo("Several")


def stored(model, data):
    with torch.no_grad():
        return dict(enumerate(model(data.pixels).logits))


def trained(folder, teacher, objectives=KD, data=None, **settings):
    settings = {"max_steps": 3, "per_device_train_batch_size": 4} | settings
    runner = DistillationTrainer(
        build("vit"), config(folder, objectives, **settings), teacher=teacher, train_dataset=data or Images(16)
    )
    runner.train()
    return runner


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"dataloader_num_workers": 1}], ids=str)
def test_a_store_trains_as_the_model_that_it_was_made_of(tmp_path, settings):
    model, data = build("vit", seed=5), Images(16)
    store = Stored(stored(model, data))
    by_store = trained(tmp_path / "a", store, data=data, **settings)
    live = trained(tmp_path / "b", model, data=data, **settings)
    assert largest_difference(weights(by_store.model), weights(live.model)) < 1e-6
    assert len(set(store.asked)) > 4 and store.asked != sorted(store.asked)


def test_a_table_and_a_subset_carry_the_rows_that_they_stand_for(tmp_path):
    data, model = Images(16), build("vit", seed=5)
    table = Dataset.from_dict({"pixel_values": data.pixels.tolist(), "labels": data.labels.tolist()}).with_format(
        "torch"
    )

    class Odd(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return data[2 * i + 1]

        def source_index(self, i):
            return 2 * i + 1

    for given in (table, Odd()):
        store = Stored(stored(model, data))
        by_store = trained(tmp_path / "a", store, data=given)
        live = trained(tmp_path / "b", model, data=given)
        assert largest_difference(weights(by_store.model), weights(live.model)) < 1e-6
    assert all(i % 2 for i in store.asked)


def test_batches_carry_row_and_view_of_images_that_recur(tmp_path):
    """With workers and in a resumed epoch: labelled images recur, and each pass shows the next of 3 views."""
    rows = {"image": noisy(12)["image"], "label": [0, 1, 2] + [-100] * 9, "row": list(range(40, 52))}
    split = Dataset.from_dict(rows)
    split = split.cast_column("label", ClassLabel(names=list("abc")))
    processor = ViTImageProcessor(size={"height": 32, "width": 32})

    class Views(Stored):
        def capture(self, pixel_values, needs, batch=None):
            both = torch.stack([batch["image_index"], batch["image_view"]], 1)
            self.seen = [*getattr(self, "seen", []), *map(tuple, both.tolist())]
            return Capture(logits=torch.zeros(len(pixel_values), 3))

    def run(**where):
        data = ImageDataset(
            split, processor, augmentation=Augmentation({"flip": True}), views=3, labelled_share=0.5, view_seed=5
        )
        settings = {"max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
        settings |= {"view_seed": 5, "dataloader_num_workers": 1}
        runner = DistillationTrainer(
            build("vit"), config(tmp_path, KD, **settings), teacher=(store := Views(None)), train_dataset=data
        )
        runner.train(**where)
        return store.seen[2:]  # two were looked at before training

    whole = run()
    views = {row: [view for one, view in whole if one == row] for row in range(40, 52)}
    assert [len(views[row]) for row in range(40, 43)] == [4, 4, 4] and views[45] == [0]
    assert all(seen == [0, 1, 2, 0][: len(seen)] for seen in views.values())
    assert run(resume_from_checkpoint=str(tmp_path / "checkpoint-2")) == whole[8:]
    with pytest.raises(ValueError, match="view_seed is 0 in the config and 5 in train_dataset"):
        trained(tmp_path, build("vit", seed=5), data=ImageDataset(split, processor, view_seed=5))


def test_resuming_asks_a_store_for_the_same_images(tmp_path):
    data = Images(16)
    logits = stored(build("vit", seed=5), data)
    every = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    full = trained(tmp_path, first := Stored(logits), data=data, **every)
    runner = DistillationTrainer(
        build("vit"),
        config(tmp_path, KD, per_device_train_batch_size=4, **every),
        teacher=(second := Stored(logits)),
        train_dataset=data,
    )
    runner.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    looked = 2  # images before training
    assert second.asked[looked:] == first.asked[looked + 8 :] and len(second.asked) == looked + 8
    assert largest_difference(weights(full.model), weights(runner.model)) == 0


def test_what_a_source_does_not_give_is_refused_by_name_before_training(tmp_path):
    data, model = Images(16), build("vit", seed=5)
    store = Stored(stored(model, data))
    with pytest.raises(ValueError, match=r"objective 'jacobian': the store has no more than class outputs"):
        trained(tmp_path, store, [{"name": "jacobian"}], data)
    with pytest.raises(ValueError, match=r"objective 'hidden_states': the blocks of Stored are not known"):
        trained(tmp_path, store, [{"name": "hidden_states"}], data)
    for name in ("logit_kd", "jacobian", "dist", "noisy_kd", "lwf"):
        with pytest.raises(ValueError, match=rf"objective '{name}': .*no classifier"):
            trained(tmp_path, Headless(model), [{"name": name}], data)
    trained(tmp_path, Headless(model), [{"name": "hidden_states"}, {"name": "attention_jacobian"}], data)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data)

    with pytest.raises(ValueError, match="looked up by the row of each image, and Stream has none"):
        trained(tmp_path, store, data=Stream())


def test_two_models_as_one_source_and_by_name(tmp_path):
    one, other = build("vit", seed=5), build("vit", seed=6)
    both = [{"name": "logit_kd"}, {"name": "hidden_states"}]
    joined = trained(tmp_path / "a", Pair(one, other), both)
    named = [{"name": "logit_kd", "teacher": "b"}, {"name": "hidden_states", "teacher": "a"}]
    apart = trained(tmp_path / "b", Several(a=one, b=other), named)
    assert largest_difference(weights(joined.distiller), weights(apart.distiller)) < 1e-6
    swapped = [{"name": "logit_kd", "teacher": "a"}, {"name": "hidden_states", "teacher": "b"}]
    crossed = trained(tmp_path / "c", Several(a=one, b=other), swapped)
    assert largest_difference(weights(apart.model), weights(crossed.model)) > 1e-5
    with pytest.raises(ValueError, match=r"objective 'logit_kd': .*'teacher'.*\['a', 'b'\]"):
        trained(tmp_path / "d", Several(a=one, b=other), KD)


def test_only_the_teachers_package_reads_a_teachers_model():
    owners = {"teacher", "source", "saved", "start", "held"}
    reads = []
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "models" / "teachers"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "model":
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                reads += [f"{path.relative_to(PACKAGE)}:{node.lineno}"] if owner in owners else []
    assert not reads
