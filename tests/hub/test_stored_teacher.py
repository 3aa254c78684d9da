"""A store of teacher outputs goes to the Hub and is read back by its name, bitwise; nothing of this machine does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import DatasetCard

from hf_kdtl.data.store import Request, StoreWriter
from hf_kdtl.hub.provenance import origin_of_source
from hf_kdtl.hub.stored_teacher import publish_store, published
from hf_kdtl.models import Needs, Teacher
from hf_kdtl.models.teachers import StoredTeacher, as_source
from hf_kdtl.models.teachers.store import named
from hf_kdtl.models.teachers.store.manifest import FILE, read_manifest
from tests.hub.client import hub  # noqa: F401
from tests.hub.server import TOKEN
from tests.support.helpers import Images
from tests.support.tiny import build

NEEDS = Needs(logits=True, pooled=True)
SECRET = {"dataset": "private/folder/of images", "teacher": "runs/secret/model", "objectives": ["task", "logit_kd"],
          "precision": "float32"}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_downloaded(monkeypatch):
    monkeypatch.setattr(named, "_downloaded", {})


@pytest.fixture
def store():
    folder = Path("runs/secret/model")
    build("vit", seed=5, layers=3).save_pretrained(folder)
    writer = StoreWriter(
        "store", Teacher.from_pretrained(folder), Images(22), Request(NEEDS, settings=SECRET, license="mit")
    )
    writer.begin()
    writer.write()
    return Path("store")


def test_a_published_store_is_read_by_its_name_and_names_nothing_of_this_machine(hub, store, tmp_path):  # noqa: F811
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    publish_store(store, "outputs")
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    files = hub.files("datasets/tester/outputs")
    assert {"README.md", FILE, "rows.npy", "digests.npy", "logits/view-0000/000000.npy", "teacher/config.json"} < set(
        files
    )
    for secret in ("secret", "private", str(tmp_path), TOKEN):
        assert not [name for name, content in hub.uploaded().items() if secret.encode() in content], secret
    read, pixels, batch = as_source("tester/outputs"), Images(22).pixels, {"image_index": torch.arange(22)}
    assert isinstance(read, StoredTeacher) and read.live() is None and "its path was not known" in read.notes[-1]
    here = StoredTeacher(store).capture(pixels, NEEDS, batch)
    found = read.capture(pixels, NEEDS, batch)
    assert torch.equal(found.logits, here.logits) and torch.equal(found.pooled, here.pooled)
    assert "not stored in tester/outputs; type hf-kdtl cache --output <a folder of your own>" in read.unserved(
        Needs(hidden_states=frozenset({0}))
    )
    read.check_data(Images(22))
    with pytest.raises(
        ValueError, match="image 0 of the training data is another one than in the store tester/outputs"
    ):
        other = Images(22)
        other.pixels = other.pixels + 1
        read.check_data(other)
    assert origin_of_source(read) == {"name": None, "hub": False, "revision": None, "licence": "mit"}


def test_its_card_says_what_is_in_it(hub, store):  # noqa: F811
    publish_store(store, "tester/outputs", license="apache-2.0")
    card = DatasetCard.load("tester/outputs")
    assert card.data.license == "apache-2.0" and "knowledge-distillation" in card.data.tags
    assert "chosen by the publisher (that of the teacher is mit)" in card.text
    for text in (
        "the outputs of a ViTForImageClassification", "22 training images in 1 view each",
        "a model that is not on the Hub", "--teacher tester/outputs",
        "| logits | 3 | float32 | 0.012 |", "objectives task, logit_kd",
        "not augmented", "forwards of 64 images", "view_seed 0", "**Images:** not named",
    ):  # fmt: skip
        assert text in " ".join(card.text.split()), text
    manifest = read_manifest(store)
    public = replace(manifest.teacher, name_or_path="google/vit-base-patch16-224", revision="abc")
    named_ = published(replace(manifest, teacher=public, settings=SECRET | {"dataset": "uoft-cs/cifar10"}))
    assert named_.teacher == public and named_.settings["dataset"] == "uoft-cs/cifar10"


def test_what_is_refused_before_anything_goes_up(hub, store):  # noqa: F811
    manifest = json.loads((store / FILE).read_text())
    manifest["teacher"]["license"] = "cc-by-nd-4.0"
    (store / FILE).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"cc-by-nd-4\.0, which allows no derivatives, and a store of its outputs"):
        publish_store(store, "tester/outputs")
    manifest["teacher"]["license"] = None
    (store / FILE).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"the teacher's license is not known.*--license"):
        publish_store(store, "tester/outputs")
    hub.add("tester/vit", {"config.json": b"{}"})
    with pytest.raises(
        ValueError, match=r"is also a model, which --teacher tester/vit would open.*--repo_id tester/vit-"
    ):
        publish_store(store, "tester/vit", license="mit")
    assert as_source_of_model_first(hub)
    hub.add("datasets/tester/photos", {"photo.png": b"x"})
    with pytest.raises(ValueError, match=r"holds photo.png, and no store.json of a store.*--repo_id"):
        publish_store(store, "tester/photos", license="mit")
    (store / "logits/view-0000/000000.npy").unlink()
    with pytest.raises(ValueError, match=r"is not complete: 1 of 2 shards are missing\. Continue it: hf-kdtl cache"):
        publish_store(store, "tester/outputs", license="mit")
    assert not [line for line in hub.log if "/commit/" in line]


def as_source_of_model_first(hub):  # noqa: F811
    """Where a name is a model's and a store's, it is the model's."""
    hub.add("datasets/tester/vit", {FILE: b"{}"})
    return named.find_store("tester/vit") is None and named.find_store("tester/nothing") is None


def test_a_grown_store_is_published_over_the_old_one(hub, store):  # noqa: F811
    publish_store(store, "tester/outputs")
    shutil.rmtree(store)
    writer = StoreWriter("store", Teacher(build("vit", seed=5, layers=3)), Images(9), Request(Needs(logits=True)))
    writer.begin()
    writer.write()
    publish_store(store, "tester/outputs", license="mit")
    files = hub.files("datasets/tester/outputs")
    assert "logits/view-0000/000000.npy" in files and "pooled/view-0000/000000.npy" not in files
    assert StoredTeacher("tester/outputs").manifest.images == 9
