"""A store is its teacher, bitwise; what it is not made from, and what was damaged, is refused by name."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.data.store import Request, StoreWriter
from hf_kdtl.models import Needs, Teacher
from hf_kdtl.models.teachers import StoredTeacher, as_source
from hf_kdtl.models.teachers.store import shards, signals
from hf_kdtl.models.teachers.store.manifest import Manifest, differences, read_manifest
from tests.support.helpers import Images, config, largest_difference, weights
from tests.support.tiny import build

EVERYTHING = Needs(logits=True, pooled=True, hidden_states=frozenset({0, 2}), attention_rows=frozenset({2}))
OBJECTIVES = {
    "class outputs": [{"name": "task"}, {"name": "logit_kd"}],
    "features": [{"name": "hidden_states", "layers": [[1, 2]]}, {"name": "attention_transfer", "layers": [[0, 0]]}],
    "attention rows": [{"name": "attention_map", "layers": [[1, 2]]}],
    "embedding": [{"name": "task"}, {"name": "lwf"}],
}


def teacher(**options):
    return Teacher(build("vit", seed=5, layers=3), **options)


def write(folder="store", data=None, needs=EVERYTHING, model=None, **options):
    writer = StoreWriter(folder, model or teacher(), data or Images(22), Request(needs, teacher_batch=4, **options))
    writer.begin()
    writer.write()
    return StoredTeacher(folder)


def trained(source, objectives, data, steps=50, **settings):
    torch.manual_seed(0)  # the projectors
    settings |= {"max_steps": steps, "per_device_train_batch_size": 6, "logging_strategy": "no"}
    settings = config("out", objectives, **settings)
    trainer = DistillationTrainer(build("vit"), settings, teacher=source, train_dataset=data)
    trainer.train()
    return weights(trainer.model)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.mark.parametrize("objectives", OBJECTIVES.values(), ids=OBJECTIVES)
def test_fifty_steps_from_a_store_are_those_of_its_teacher_bitwise(objectives):
    data = Images(22)
    write()
    stored, live = (trained(source, objectives, data) for source in ("store", teacher(teacher_batch=4)))
    assert largest_difference(stored, live) == 0
    other = trained(Teacher(build("vit", seed=6, layers=3), teacher_batch=4), objectives, data, steps=5)
    assert largest_difference(stored, other) > 1e-5


@pytest.mark.parametrize("of", ["energy", "class"])
def test_layer_rates_are_measured_from_a_store_as_from_its_teacher(of):
    rates = {"mode": "discrepancy", "map": of, "every": 2, "layers": [[0, 0], [1, 2]]}
    store = write(needs=Needs(logits=True, hidden_states=frozenset({0, 2}), attention_rows=frozenset({0, 2})))
    entries, data = [{"name": "task"}, {"name": "logit_kd"}], Images(22)
    stored, live, plain = (
        trained(source, entries, data, 8, layer_rates=options)
        for source, options in ((store, rates), (teacher(teacher_batch=4), rates), (teacher(teacher_batch=4), None))
    )
    assert largest_difference(stored, live) == 0 and largest_difference(stored, plain) > 1e-7
    lacks = write("lacks", needs=Needs(logits=True))
    name = "hidden_states-0, hidden_states-2" if of == "energy" else "attention_rows-0, attention_rows-2"
    with pytest.raises(ValueError, match=rf"layer_rates: {name} of the teacher are not stored in lacks; type hf-kdtl"):
        trained(lacks, entries, data, 1, layer_rates=rates)


def test_a_teacher_in_chunks_gives_what_it_gives_in_one_batch_to_rounding():
    x = Images(11).pixels
    whole, chunked = (one.capture(x, EVERYTHING) for one in (teacher(), teacher(teacher_batch=4)))
    for signal in signals.signals(EVERYTHING):
        assert signal.of(chunked).shape == signal.of(whole).shape
        torch.testing.assert_close(signal.of(chunked), signal.of(whole))
    again = teacher(teacher_batch=4).capture(x.flip(0), EVERYTHING)  # each image has other neighbours
    assert all(torch.equal(s.of(again).flip(0), s.of(chunked)) for s in signals.signals(EVERYTHING))
    attention = teacher(teacher_batch=4).capture(x, Needs(attention=frozenset({1}))).attention[1]
    assert attention.query.shape[0] == 11
    live, sizes = teacher(teacher_batch=4), []
    live.classifier().register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs.get("pixel_values", args[0] if args else ()))),
        with_kwargs=True,
    )
    live.capture(x, Needs(logits=True))
    assert set(sizes) == {4}, "the last chunk is filled up: a forward of another size has other bits"
    with pytest.raises(ValueError, match="teacher_batch is 0; expected a whole number of at least 1"):
        teacher(teacher_batch=0)


def test_rows_and_views_are_looked_up_whatever_the_order():
    manifest = Manifest({"logits": shards_kind((3,))}, 3, [4, 4, 2], 4, 4)
    rows = np.array([7, 3, 20, 21, 22, 30, 31, 5, 1, 2], np.int64)
    values = np.random.default_rng(0).normal(size=(3, 10, 3)).astype(np.float32)
    folder = Path("hand")
    for view in range(3):
        for block, first in enumerate((0, 4, 8)):
            file = shards.ShardFile(folder, manifest, shards.Shard("logits", view, block))
            file.add(values[view, first : first + 4])
            file.close()
    np.save(folder / "rows.npy", rows)
    (folder / "store.json").write_text(manifest.to_json())
    assert read_manifest(folder) == manifest
    reader = shards.Reader(folder)
    place, view = np.random.default_rng(1).integers(0, [[10], [3]], (2, 200))
    assert np.array_equal(reader.read(["logits"], rows[place], view)["logits"], values[view, place])
    for p, v in zip(place, view, strict=True):  # one by one by a shorter way
        assert np.array_equal(reader.read(["logits"], rows[[p]], np.array([v]))["logits"], values[v, [p]])
    for row, one in ((4, 0), (-1, 0), (7, 3), (7, -1), (99, 0)):
        with pytest.raises(ValueError, match=r"has 10 images and not the rows|has the views 0 to 2"):
            reader.read(["logits"], np.array([row]), np.array([one]))


def shards_kind(shape):
    return signals.Kind(shape, "float32")


@pytest.mark.parametrize("k", [1, 2])
def test_top_k_keeps_the_largest_and_the_mass_of_the_rest(k):
    z = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 3
    spread = signals.spread(*signals.top(z, k), 7)
    torch.testing.assert_close(spread.logsumexp(-1), z.logsumexp(-1))
    assert torch.equal(spread.topk(k).values, z.topk(k).values)
    rest = spread.gather(1, z.argsort(descending=True)[:, k:])
    torch.testing.assert_close(rest, rest[:, :1].expand_as(rest))


def test_half_precision_and_top_k_are_within_their_bounds():
    full = write()
    data, rows = Images(22), np.arange(22)
    zero = np.zeros_like(rows)
    half = write("half", precision="float16")
    assert half.manifest.bytes * 2 == full.manifest.bytes
    for name in full.manifest.kinds:
        a, b = (one.reader.read([name], rows, zero)[name] for one in (full, half))
        assert np.abs(a - b).max() <= np.abs(a).max() * 2**-11 + 2**-24
    top = write("top", needs=Needs(logits=True), top_k=1)
    batch = {"image_index": torch.arange(22)}
    z, spread = (one.capture(data.pixels, Needs(logits=True), batch).logits for one in (full, top))
    assert torch.equal(z.argmax(-1), spread.argmax(-1)) and not torch.equal(z, spread)


@pytest.mark.parametrize("shards_done", [0, 1, 4])
def test_a_store_that_was_interrupted_is_continued_to_the_same_bytes(shards_done, monkeypatch):
    monkeypatch.setattr("hf_kdtl.data.store.MOST_IMAGES", 8)
    write("whole")
    assert len(StoredTeacher("whole").manifest.blocks) == 3
    closed, close = [], shards.ShardFile.close

    def dies(file):
        if len(closed) == shards_done:
            raise KeyboardInterrupt
        closed.append(close(file))

    with monkeypatch.context() as patched:
        patched.setattr(shards.ShardFile, "close", dies)
        with pytest.raises(KeyboardInterrupt):
            write()
    assert any(name.endswith(".part") for name in tree("store"))
    with pytest.raises(ValueError, match=rf"is not complete: {shards_done} of 15 shards are written\. Continue it"):
        as_source("store")
    write()
    assert tree("store") == tree("whole")
    assert isinstance(as_source("store"), StoredTeacher) and isinstance(
        Teacher.from_pretrained("store"), StoredTeacher
    )


def test_two_writers_share_the_shards(monkeypatch):
    monkeypatch.setattr("hf_kdtl.data.store.MOST_IMAGES", 8)
    write("whole")
    writers = [StoreWriter("store", teacher(), Images(22), Request(EVERYTHING, teacher_batch=4)) for _ in range(2)]
    counts = [writer.images_to_write(rank, 2) for rank, writer in enumerate(writers)]
    assert counts == [14, 8]
    writers[0].begin()
    tasks = [writer._tasks() for writer in writers]
    for rank, writer in enumerate(writers):
        monkeypatch.setattr(writer, "_tasks", lambda rank=rank: tasks[rank])
        writer.write(rank, 2)
    assert tree("store") == tree("whole")


def test_a_grown_store_is_that_which_was_written_at_once(monkeypatch):
    monkeypatch.setattr("hf_kdtl.data.store.MOST_IMAGES", 8)
    write("grown", needs=Needs(logits=True))
    before = tree("grown")
    write("grown")
    assert {k: v for k, v in before.items() if k != "store.json"}.items() <= tree("grown").items()
    write("whole")
    assert tree("grown") == tree("whole")
    write("grown", data=Images(30))
    longer = StoredTeacher("grown")
    assert longer.manifest.blocks == [8, 8, 6, 8]
    everything = Images(30)
    read = longer.capture(everything.pixels, EVERYTHING, {"image_index": torch.arange(30)})
    live = teacher(teacher_batch=4).capture(everything.pixels, EVERYTHING)
    assert all(torch.equal(s.of(read), s.of(live)) for s in signals.signals(EVERYTHING))


# ---- What is refused ----


def test_every_field_of_the_fingerprint_is_compared_by_name():
    data = {"view_seed": 0, "augmentation": {"flip": True}, "view_version": 1}
    stored = {"teacher": "a", "classes": ["x"], "data": data}
    assert differences(stored, stored) == []
    for change, text in (
        ({"teacher": "b"}, "teacher is 'a' in the store and 'b' here"),
        ({"classes": ["x", "y"]}, "classes is ['x'] in the store and ['x', 'y'] here"),
        ({"data": data | {"view_seed": 3}}, "data.view_seed is 0 in the store and 3 here"),
        ({"data": data | {"view_version": 2}}, "data.view_version is 1 in the store and 2 here"),
        (
            {"data": data | {"augmentation": {}}},
            "data.augmentation.flip is True in the store and not set here",
        ),
    ):
        assert differences(stored, stored | change) == [text]


def test_another_teacher_class_or_image_is_refused():
    store = write()
    with pytest.raises(ValueError, match=r"made from something else: teacher is '\w+' in the store and '\w+' here"):
        write(model=Teacher(build("vit", seed=6, layers=3)))
    with pytest.raises(ValueError, match="made from something else: teacher_batch is 4 in the store and 8 here"):
        StoreWriter("store", teacher(), Images(22), Request(EVERYTHING, teacher_batch=8))
    with pytest.raises(ValueError, match="of another teacher: teacher is"):
        store.check_teacher(Teacher(build("vit", seed=6, layers=3)))
    with pytest.raises(ValueError, match="the student has 5 classes and the teacher 3"):
        store.match(build("vit", num_labels=5), None, compare_classes=True)
    other = Images(22)
    other.pixels = other.pixels + 1
    with pytest.raises(ValueError, match="image 0 of the training data is another one than in the store"):
        store.check_data(other)
    with pytest.raises(ValueError, match=r"8 of the 30 training images are not there, such as row 22"):
        store.check_data(Images(30))
    with pytest.raises(ValueError, match="the data lacks 2 of them"):
        write(data=Images(20))


def test_every_changed_image_is_found_before_its_outputs_are_used():
    """Of more images than are looked at beforehand: when it is first read, also by a worker, or when it is grown."""
    write(data=Images(150), needs=Needs(logits=True))
    message = "image 1 of the training data is another one than in the store"
    for changed in ([1], [0, 1]):
        other = Images(150)
        other.pixels[changed] += 1
        for workers in (0, 1):
            with pytest.raises(ValueError, match=message if changed == [1] else "image 0 of the training data"):
                trained("store", [{"name": "logit_kd"}], other, 25, dataloader_num_workers=workers)
    other = Images(150)
    other.pixels[1] += 1
    before = tree("store")
    with pytest.raises(ValueError, match=message):
        write(data=other, needs=Needs(pooled=True))
    assert tree("store") == before
    trained("store", [{"name": "logit_kd"}], torch.utils.data.Subset(other, range(2, 150)), 25)
    part = torch.utils.data.Subset(Images(150), [149, 3, 77, 20, 21, 22])
    live = trained(Teacher(build("vit", seed=5, layers=3), teacher_batch=4), [{"name": "logit_kd"}], part, 2)
    assert largest_difference(trained("store", [{"name": "logit_kd"}], part, 2), live) < 1e-6


def test_a_view_and_a_row_that_are_not_there_are_refused():
    store, pixels = write(), Images(2).pixels
    batch = {"image_index": torch.tensor([0, 1]), "image_view": torch.tensor([0, 3])}
    with pytest.raises(ValueError, match=r"has the views 0 to 0, and view 3 is asked for\. Set the data's views to 1"):
        store.capture(pixels, EVERYTHING, batch)
    with pytest.raises(ValueError, match=r"has 22 images and not the rows \[90\] of the data"):
        store.capture(pixels, EVERYTHING, {"image_index": torch.tensor([0, 90])})
    with pytest.raises(ValueError, match="has one view of an image, and view 1 is asked for"):
        write("two", views=2)


def test_a_truncated_shard_and_a_full_disk_are_named(monkeypatch):
    write()
    path = Path("store/logits/view-0000/000000.npy")
    path.write_bytes(path.read_bytes()[:-3])
    for use in (as_source, lambda folder: write(folder)):
        with pytest.raises(ValueError, match=r"000000\.npy has \d+ bytes, expected \d+: it was truncated or changed"):
            use("store")
    path.unlink()

    writer = StoreWriter("store", teacher(), Images(22), Request(EVERYTHING, teacher_batch=4))
    writer.begin()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"the disk is full at .*What is complete is kept: free some space"):
        writer.write()


def test_what_can_never_be_stored_says_why_and_what_is_missing_what_to_type():
    store = write(needs=Needs(logits=True))
    assert store.unserved(Needs(logits=True)) == ""
    assert (
        "hidden_states-1 of the teacher is not stored in store; type hf-kdtl cache --output store"
        in store.unserved(Needs(logits=True, hidden_states=frozenset({1})))
    )
    for needs, why in (
        (Needs(attention=frozenset({0})), "queries, keys and values of every token are needed"),
        (Needs(block_calls=frozenset({0})), "called again with other weights"),
        (Needs(input_gradient=True), 'add "sketch": 64'),
        (Needs(weights=True), "only the start has"),
    ):
        assert f"it cannot be stored, because {signals.unstorable(needs)}." == store.unserved(needs)
        assert why in store.unserved(needs)


def test_an_evaluation_is_shown_to_the_live_teacher_where_it_is_still_there():
    data = Images(22)
    model = build("vit", seed=5, layers=3)
    model.save_pretrained("model")
    store = write(model=Teacher.from_pretrained("model"))
    settings = {"eval_objectives": True, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    results = []
    for source in (store, Teacher.from_pretrained("model")):
        runner = DistillationTrainer(
            build("vit"),
            config("out", [{"name": "task"}, {"name": "logit_kd"}], **settings),
            teacher=source,
            train_dataset=data,
            eval_dataset=Images(6),
        )
        runner.train()
        results.append(runner.evaluate()["eval_logit_kd"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert store.classifier() is not None and store.fingerprint == Teacher(model).fingerprint
    moved = StoredTeacher("store")
    moved.manifest = replace(moved.manifest, teacher=replace(moved.manifest.teacher, name_or_path="gone/model/here"))
    assert moved.classifier() is None and "is not used for evaluation" in moved.notes[-1]
    with pytest.raises(ValueError, match=r"could not be opened to show it to them. Leave eval_objectives out"):
        moved.capture(data.pixels, Needs(logits=True), {})


def test_a_stored_sketch_trains_as_the_live_one_bitwise():
    data, objectives = Images(22), [{"name": "jacobian", "sketch": 6, "fraction": 0.5}, {"name": "task"}]
    needs = DistillationConfig("out", objectives=objectives).build_objectives()["jacobian"].needs(None)[1]
    write(needs=needs)
    stored, live = (trained(source, objectives, data, 6) for source in ("store", teacher(teacher_batch=4)))
    assert largest_difference(stored, live) == 0
    without = trained(teacher(teacher_batch=4), [{"name": "jacobian", "fraction": 0.5}, {"name": "task"}], data, 6)
    assert largest_difference(stored, without) > 1e-5


@pytest.mark.parametrize("k", [3, 4])
def test_as_many_class_outputs_as_there_are_classes_are_stored_without_top_k(k):
    with pytest.raises(ValueError, match=f"top_k is {k} and the teacher has 3 classes; leave it out"):
        write(needs=Needs(logits=True), top_k=k)
