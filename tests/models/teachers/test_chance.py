"""A teacher at chance is noticed, once, and one that knows something is not."""

import pytest
import torch

from hf_kdtl.models.forward.capture import Capture
from hf_kdtl.models.teachers.chance import ChanceCheck
from tests.support.helpers import Images, trainer
from tests.support.tiny import build


def _labels(number=128, classes=4, seed=0):
    return torch.randint(0, classes, (number,), generator=torch.Generator().manual_seed(seed))


def _logits(labels, right, classes=4, seed=1):
    """Answers of which a share is right and the rest drawn."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, classes, labels.shape, generator=generator)
    known = torch.rand(labels.shape, generator=generator) < right
    return torch.nn.functional.one_hot(torch.where(known, labels, drawn), classes).float()


def _warned(caplog, logits, labels, batch=16):
    caplog.clear()
    check = ChanceCheck()
    for part, its in zip(logits.split(batch), labels.split(batch), strict=True):
        check.add(Capture(logits=part), its)
    return [record.getMessage() for record in caplog.records if "at chance" in record.getMessage()]


def test_answers_that_are_drawn_are_at_chance(caplog):
    labels = _labels(256)
    assert len(_warned(caplog, _logits(labels, 0.0), labels)) == 1  # and not again
    assert not _warned(caplog, _logits(labels, 0.5), labels)


def test_the_commonest_class_alone_is_at_chance(caplog):
    labels = torch.tensor([0] * 96 + [1] * 32)
    constant = torch.tensor([[1.0, 0.0]]).expand(128, 2)
    (message,) = _warned(caplog, constant, labels)
    assert "right on 96 of the first 128 labelled images, and guessing would be on 96" in message


def test_classes_in_another_order_are_worse_than_chance(caplog):
    labels = _labels()
    assert _warned(caplog, _logits((labels + 1) % 4, 1.0), labels)


def test_unlabelled_images_do_not_count_and_distributions_do(caplog):
    labels = torch.cat([_labels(), torch.full((128,), -100)])
    logits = torch.cat([_logits(_labels(), 1.0), _logits(_labels(), 0.0)])
    assert not _warned(caplog, logits, labels)
    soft = torch.nn.functional.one_hot(_labels(), 4) * 0.8 + 0.05
    assert not _warned(caplog, logits[:128], soft) and _warned(caplog, logits[128:], soft)


@pytest.mark.parametrize("labels", [None, torch.zeros(128, 1), torch.rand(128), torch.full((128,), 9)])
def test_labels_of_other_kinds_are_left_to_those_who_read_them(labels):
    ChanceCheck().add(Capture(logits=torch.randn(128, 4)), labels)


def test_one_class_alone_says_nothing(caplog):
    assert not _warned(caplog, torch.tensor([[1.0, 0.0]]).expand(128, 2), torch.zeros(128, dtype=torch.long))


@pytest.mark.parametrize(("objective", "warns"), [("logit_kd", True), ("hidden_states", False)])
def test_in_training(tmp_path, caplog, objective, warns):
    """The labels of these images are drawn, so no teacher knows them."""
    entries = [{"name": "task"}, {"name": objective}]
    settings = {"per_device_train_batch_size": 64, "num_train_epochs": 2}
    models = build("vit", layers=1), build("vit", layers=1, seed=5)
    runner = trainer(tmp_path, *models, Images(128), entries, **settings)
    runner.train()
    assert ("it answers at chance" in caplog.text) is warns
