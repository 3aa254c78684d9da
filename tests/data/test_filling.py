"""A run that writes its store while it trains is the one from a store that was written beforehand."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_kdtl import DistillationTrainer
from hf_kdtl.data.filling import FillingTeacher
from hf_kdtl.data.store import Request, StoreWriter
from hf_kdtl.models import Needs, Teacher
from hf_kdtl.models.teachers import StoredTeacher
from hf_kdtl.models.teachers.store import partial
from tests.models.teachers.test_stored import teacher, tree, write
from tests.support.helpers import Images, config, largest_difference, weights
from tests.support.tiny import build

NEEDS = Needs(logits=True, hidden_states=frozenset({2}))
OBJECTIVES = [{"name": "task"}, {"name": "logit_kd"}, {"name": "hidden_states", "layers": [[1, 2]]}]


class Viewed(Images):
    """Images whose pixels change with the pass over them, mod V."""

    view_seed, views, epoch = 0, 2, 0

    class image_processor:
        to_json_string = staticmethod(lambda: "{}")

    def view_facts(self):
        return {"augmentation": {"shift": 1}}

    def source_index(self, i):
        return int(i)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def image_view(self, i):
        return getattr(i, "number", self.epoch) % self.views

    def __getitem__(self, i):
        item = super().__getitem__(int(i))
        return item | {"pixel_values": item["pixel_values"].roll(self.image_view(i), -1)}

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def filling(folder="auto", data=None, process=0, model=None, begin=True, **options):
    request = Request(NEEDS, views=2, teacher_batch=4, **options)
    writer = StoreWriter(folder, model or teacher(), data or Viewed(22), request)
    if begin:
        writer.begin(filling=True)
    return FillingTeacher(writer, process)


def trained(source, steps, out="out", resume=None, data=None, save_steps=7):
    torch.manual_seed(0)
    settings = config(out, OBJECTIVES, max_steps=steps, per_device_train_batch_size=6, save_steps=save_steps, seed=3)
    settings.save_strategy, settings.lr_scheduler_type = "steps", "constant"
    trainer = DistillationTrainer(build("vit"), settings, teacher=source, train_dataset=data or Viewed(22))
    trainer.train(resume_from_checkpoint=resume)
    return weights(trainer.model)


def calls(source):
    """How many images the live teacher is shown, chunks of 4 counted whole."""
    seen = []
    source.live().classifier().register_forward_pre_hook(lambda module, args, kwargs: seen.append(1), with_kwargs=True)
    return seen


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_run_that_fills_its_store_is_the_run_from_a_store_written_before(precision, monkeypatch):
    monkeypatch.setattr("hf_kdtl.data.store.MOST_IMAGES", 8)
    monkeypatch.setattr(partial, "SECONDS", 0)  # to the disk after each batch
    write(data=Viewed(22), needs=NEEDS, views=2, precision=precision)
    auto = filling(precision=precision)
    seen = calls(auto)
    before, after = trained("store", 16), trained(auto, 16)  # 4 batches a pass: 4 passes over 2 views
    assert largest_difference(before, after) == 0
    runs = len(seen)
    trained(auto, 4, out="again")
    assert 8 * 2 <= runs <= 8 * 2 + 2 and len(seen) == runs, "the teacher ran for two passes and never again"
    auto.flush()
    assert tree("auto") == tree("store")
    assert StoredTeacher("auto").manifest == StoredTeacher("store").manifest


def test_an_interrupted_run_is_continued_whatever_was_kept(monkeypatch):
    write(data=Viewed(22), needs=NEEDS, views=2)
    whole = trained("store", 14, out="whole")
    with monkeypatch.context() as patch:
        patch.setattr(FillingTeacher, "keep", lambda self: None)
        trained(filling(), 7)  # nothing was flushed: all of it is lost
    assert not list(Path("auto").glob("filled-*"))
    resumed = trained(filling(), 14, resume="out/checkpoint-7")
    assert largest_difference(whole, resumed) == 0
    trained(filling("kept"), 7, out="other")  # flushed before the checkpoint
    known = filling("kept").rows.filled
    assert known.sum() == 22 + 18 and "91 % are there" in filling("kept").summary()
    again = filling("kept")
    assert largest_difference(whole, trained(again, 14, out="other", resume="other/checkpoint-7")) == 0
    again.flush()
    assert tree("kept") == tree("store")


def test_processes_share_a_store_and_take_over_what_the_others_wrote():
    data, shown = Viewed(22), Images(22).pixels
    one, two = filling(data=data), filling(data=data, process=1, begin=False)
    write(data=Viewed(22), needs=NEEDS, views=2)
    whole = StoredTeacher("store")
    for view in range(2):
        pixels = shown.roll(view, -1)
        for part, rows in ((one, torch.arange(11)), (two, torch.arange(9, 22))):
            batch = {"image_index": rows, "image_view": torch.full_like(rows, view)}
            found, expected = (source.capture(pixels[rows], NEEDS, batch).logits for source in (part, whole))
            assert torch.equal(found, expected)
    assert one.rows.filled.sum() == 22
    one.flush()
    two.flush()
    assert tree("auto") == tree("store")
    one.flush()
    assert one.rows.filled.all() and tree("auto") == tree("store")


def test_another_order_of_classes_and_a_disk_that_is_full(monkeypatch):
    model = build("vit", seed=5, layers=3)
    model.config.id2label, model.config.label2id = {0: "b", 1: "c", 2: "a"}, {"b": 0, "c": 1, "a": 2}
    student = build("vit")
    student.config.id2label, student.config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    auto, batch = filling(model=Teacher(model)), {"image_index": torch.arange(4), "image_view": torch.zeros(4).long()}
    auto.match(student, None, True)
    x = Images(22).pixels[:4]
    twice = [auto.capture(x, Needs(logits=True), batch).logits for _ in range(2)]
    live = Teacher(model, teacher_batch=4)
    live.match(student, None, True)
    assert torch.equal(*twice) and torch.equal(twice[0], live.capture(x, Needs(logits=True)).logits)
    assert np.array_equal(
        auto.reader.read(["logits"], np.arange(4), np.zeros(4, int))["logits"], live.model(x).logits.numpy()
    )

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"the disk is full at .*\.filling\. What is complete is kept"):
        filling("elsewhere")
    assert not list(Path("elsewhere").rglob("*.filling"))
