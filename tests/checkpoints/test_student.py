"""The student of a checkpoint is loaded into the live one, whoever wrote the file and however that one was made."""

import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification, ViTModel

from hf_kdtl.checkpoints import student as module
from hf_kdtl.checkpoints.student import described_by_config, load_student, weight_files
from tests.support.helpers import and_slow, largest_difference, weights
from tests.support.tiny import TINY, build

FAMILIES = and_slow(["vit", "swin", "clip", "resnet"], sorted(TINY.keys() - {"vit", "swin", "clip", "resnet"}))


@pytest.fixture
def without_config(monkeypatch):
    """Nothing is read through the config."""
    monkeypatch.setattr(module, "described_by_config", lambda student: False)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_found_under_the_name_that_it_is_saved_by(tmp_path, family, without_config):
    saved, live = build(family), build(family, seed=3)
    assert largest_difference(weights(saved), weights(live)) > 0.01
    saved.save_pretrained(tmp_path)
    load_student(live, tmp_path)
    assert largest_difference(weights(saved), weights(live)) == 0.0


def test_weights_in_several_files(tmp_path, without_config):
    saved, live = build("vit"), build("vit", seed=3)
    saved.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(weight_files(tmp_path)) > 2
    load_student(live, tmp_path)
    assert largest_difference(weights(saved), weights(live)) == 0.0
    lost = tmp_path / weight_files(tmp_path)[1]
    save_file(dict(list(load_file(lost).items())[1:]), lost, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"does not match ViTForImageClassification: missing or of another shape \['vit"
    ):
        load_student(live, tmp_path)


class Tied(ViTForImageClassification):
    _tied_weights_keys: ClassVar = {"second.weight": "classifier.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.second = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.second.weight = self.classifier.weight


def test_tied_weights_are_in_the_file_once_or_twice_and_stay_tied(tmp_path, without_config):
    saved, live = (Tied(build("vit", seed=seed).config) for seed in (0, 3))
    saved.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    assert {"classifier.weight", "second.weight"} - load_file(path).keys() == {"second.weight"}
    for _ in range(2):
        load_student(live, tmp_path)
        assert largest_difference(weights(saved), weights(live)) == 0.0
        assert live.second.weight is live.classifier.weight
        torch.nn.init.zeros_(live.classifier.weight)
        both = load_file(path)  # as processes that gather each tensor write it
        save_file(both | {"second.weight": both["classifier.weight"].clone()}, path, metadata={"format": "pt"})


def test_names_of_another_form_are_read_through_the_config(tmp_path):
    saved, live = build("vit"), build("vit", seed=3)
    saved.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    assert load_file(path).keys() != weights(saved).keys()
    save_file(weights(saved), path, metadata={"format": "pt"})
    load_student(live, tmp_path)
    assert largest_difference(weights(saved), weights(live)) == 0.0


def test_a_student_without_a_head_that_was_opened_from_a_classifier(tmp_path):
    build("vit").save_pretrained(tmp_path / "classifier")
    opened = ViTModel.from_pretrained(tmp_path / "classifier", add_pooling_layer=False)
    opened.save_pretrained(tmp_path / "student")
    live = ViTModel(opened.config, add_pooling_layer=False)
    load_student(live, tmp_path / "student")
    assert largest_difference(weights(opened), weights(live)) == 0.0


def test_two_tensors_that_a_file_cannot_tell_apart_are_refused(tmp_path, monkeypatch):
    """A name that save_pretrained gives to two tensors holds one of them."""
    student = build("vit")
    student.save_pretrained(tmp_path)
    names = module._saved_names(student)
    clash = names | {"classifier.bias": "classifier.weight"}
    monkeypatch.setattr(
        module, "_saved_names", lambda student: {n: s for n, s in clash.items() if n != "classifier.weight"}
    )
    monkeypatch.setattr(module, "described_by_config", lambda student: False)
    with pytest.raises(
        ValueError, match=r"shape \['classifier.weight', 'classifier.bias'\], unexpected \['classifier.bias"
    ):
        load_student(student, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_describes_what_was_made_of_it_and_nothing_is_drawn(family):
    student = build(family)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert described_by_config(student)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    student.register_buffer("more", torch.zeros(2))
    assert not described_by_config(student)
