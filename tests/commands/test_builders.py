"""What a command opens: a saved model with its own head or a new one, and the image processor beside it."""

import shutil
from dataclasses import fields
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import ViTImageProcessor

from hf_kdtl import make_student
from hf_kdtl.commands import cut, export, fit_representation
from hf_kdtl.commands.common import builders, candidates
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.data.loading import ImageData, load_images
from hf_kdtl.evaluation.results import update_results
from hf_kdtl.models.labels import class_names
from tests.support.tiny import build

NAMES = ["a", "b", "c"]


def _saved(names, part=lambda model: model, where="saved"):
    model = build("vit", num_labels=len(names), image_size=16)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    part(model).save_pretrained(where)
    return model


@pytest.mark.parametrize(
    ("known", "kept", "note"),
    [
        (["a", "b", "c"], True, ""),
        (["c", "a", "b"], True, ""),
        (["LABEL_0", "LABEL_1", "LABEL_2"], True, "does not name its 3 classes"),
        (["x", "y", "z"], False, "has a head for 3 other classes: it gets a new one for the 3 of the data"),
        (["x", "y"], False, "has a head for 2 other classes: it gets a new one for the 3 of the data"),
        (["LABEL_0", "LABEL_1"], False, "has a head for 2 other classes"),
    ],
)
def test_the_head_is_kept_or_new_as_the_note_says(known, kept, note):
    saved, notes = _saved(known), []
    torch.manual_seed(0)
    model = builders.pretrained("saved", NAMES, notes)
    same = model.classifier.weight.shape == saved.classifier.weight.shape
    assert (same and torch.equal(model.classifier.weight, saved.classifier.weight)) is kept
    assert torch.equal(model.vit.layers[1].mlp.fc1.weight, saved.vit.layers[1].mlp.fc1.weight)
    assert sorted(class_names(model.config)) == NAMES and model.classifier.out_features == 3
    assert [note in found for found in notes] == [True] * bool(note)
    torch.manual_seed(0)
    assert torch.equal(builders.pretrained("saved", NAMES, []).classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("known", [["a", "b", "c"], ["LABEL_0", "LABEL_1", "LABEL_2"], ["x", "y"]])
def test_a_backbone_without_a_head_gets_one_and_a_note(known):
    notes = []
    _saved(known, lambda model: model.vit)
    assert builders.pretrained("saved", NAMES, notes).classifier.out_features == 3
    assert len(notes) == 1 and ("no trained head in its file" in notes[0] or "it gets a new one" in notes[0])


def test_a_backbone_that_lacks_weights_is_an_error():
    _saved(NAMES).config.save_pretrained("half")
    tensors = {f"module.{name}": value for name, value in build("vit", image_size=16).state_dict().items()}
    torch.save(tensors, Path("half", "pytorch_model.bin"))
    with pytest.raises(ValueError, match=r"the model 'half' begin with 'module\.'"):
        builders.pretrained("half", NAMES, [])


def test_what_is_evaluated_must_have_a_head():
    _saved(NAMES, lambda model: model.vit)
    with pytest.raises(ValueError, match=r"student 'saved' has no trained head in its file"):
        candidates._open("student", "student", "saved", ImageData(None, None, None, NAMES, [], "x"), [])


def test_repeated_names_keep_their_places_in_an_evaluation():
    """The second crane is not the first."""
    _saved(["crane", "dog", "crane"])
    data = ImageData(Dataset.from_dict({"label": []}), None, None, ["crane", "dog", "crane"], [], "x")
    assert candidates._open("student", "student", "saved", data, []).order == [0, 1, 2]


def test_an_absent_processor_is_made_from_the_config_with_a_note_and_an_unreadable_one_is_an_error():
    model, notes = _saved(NAMES), []
    assert builders.processor_of("saved", model, notes).size == {"height": 16, "width": 16}
    assert "no image processor is saved with saved" in notes[0]
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1] * 3).save_pretrained("saved")
    assert list(builders.processor_of("saved", model, notes).image_mean) == [0.1] * 3 and len(notes) == 1
    Path("saved", "preprocessor_config.json").write_text('{"image_mean": [0.485')
    with pytest.raises(OSError, match=r"could not be read from preprocessor_config\.json"):
        builders.processor_of("saved", model, notes)


def test_every_option_of_the_splits_reaches_them(monkeypatch):
    given = {field.name: object() for field in fields(DataOptions)}
    called = {}
    monkeypatch.setattr(builders, "load_images", lambda source, **options: called.update(source=source, **options))
    builders.read_splits(SimpleNamespace(**given))
    assert called.pop("source") is given["dataset"] and called.pop("seed") is given["split_seed"]
    known = {*signature(load_images).parameters} - {"source", "seed"}
    assert called == {name: given[name] for name in known}


def _noted(model="t/model", **given):
    options = DataOptions(**given)
    return builders.split_notes(model, builders.read_splits(options), options)


def test_a_model_that_has_seen_test_images_is_noted(images):
    options = DataOptions(dataset=images)
    update_results("t", "data", builders.facts(builders.read_splits(options), options))
    for same in ("images", "./images", "images/", str(Path("images").absolute())):
        assert _noted(dataset=same) == []
        for model in ("t/model", "t/alone-seed42/model"):
            (found,) = _noted(model, dataset=same, split_seed=7)
            assert "it may have seen images that are test images here. Use the same three settings." in found
    shutil.copy("images/red/0.png", "images/red/00.png")
    (found,) = _noted(dataset="images")
    assert "when it held other images" in found and "Train the teacher again" in found
    assert _noted("elsewhere/model", dataset="images") == _noted(dataset="digits") == []
    update_results("t", "run", {"recipe": "evaluate_student"})  # it trained nothing
    assert _noted(dataset="images") == []


def test_a_test_split_that_no_setting_cuts_is_the_same_with_any(images):
    shutil.copytree(images, "photos/test")
    Path(images).rename("photos/train")
    options = DataOptions(dataset="photos")
    update_results("t", "data", facts := builders.facts(builders.read_splits(options), options))
    assert _noted(dataset="photos", split_seed=7) == []
    update_results("t", "data", {name: value for name, value in facts.items() if name != "digests"})
    assert len(_noted(dataset="photos", split_seed=7)) == 1  # results of an earlier version say no more


@pytest.mark.parametrize(
    ("source", "expected"), [("owner/pets", True), ("digits", False), ("here/*", False), ("~", False)]
)
def test_a_source_that_is_no_path_here_is_on_the_hub(source, expected):
    Path("here/one").mkdir(parents=True)
    assert builders.is_on_hub(source) == expected


@pytest.mark.parametrize(
    ("main", "flags", "setting"),
    [
        (cut.main, [], "views"),
        (cut.main, ["--train_images", "9", "--dataset", "digits"], "train_images"),
        (export.main, ["--output", "s.onnx"], "views"),
        (export.main, ["--output", "s.onnx", "--labels_per_class", "9"], "labels_per_class"),
        (fit_representation.main, ["--of", "probabilities", "--k", "2"], "views"),
    ],
)
def test_settings_of_training_images_are_refused_where_nothing_is_trained(main, flags, setting):
    model = "--student" if main is export.main else "--teacher"
    output = [] if main is export.main else ["--output_dir", "out"]
    given = flags if setting in " ".join(flags) else [*flags, "--views", "2"]
    with pytest.raises(ValueError, match=f"^{setting} is about training images, and nothing is trained here"):
        main([model, "nowhere", *output, *given])


def test_the_config_of_a_student_cut_by_heads_makes_one_of_its_shape():
    teacher = build("vit", num_attention_heads=4)
    cut = make_student(teacher, heads=1)
    own = ("id2label", "label2id", "architectures", "transformers_version", "dtype")
    settings = {name: value for name, value in cut.config.to_dict().items() if name not in own}
    made = builders.from_config(settings, NAMES, "student_config")
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in cut.named_parameters()}
    with pytest.raises(ValueError, match="unknown field of student_config: 'head_dim'"):
        builders.from_config({"model_type": "swin", "head_dim": 8}, NAMES, "student_config")
