"""A saved model is opened with every weight of its file, or the message says which are missing and what to type."""

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from hf_kdtl import make_student
from hf_kdtl.models import Needs, Teacher
from hf_kdtl.models.teachers.backbone import open_student
from hf_kdtl.models.teachers.resolve import open_classifier
from hf_kdtl.models.teachers.start import StartingPoint
from tests.support.helpers import and_slow, largest_difference, trainer, weights
from tests.support.tiny import TINY, build

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"image_size": 16, "patch_size": 8}
HEADS = {"poolformer": "norm.", "cvt": "layernorm."}  # a norm that only the classifier has


def _save(folder, model, rename=lambda name: name, keep=lambda name: True):
    """A model with some of its tensors left out or under other names."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tensors = {rename(name): value for name, value in model.state_dict().items() if keep(name)}
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def _folder(path):
    path.mkdir()
    return path


def _openers(folder):
    student = build("vit")
    return {
        "teacher": lambda: Teacher.from_pretrained(folder),
        "start": lambda: StartingPoint.from_path(folder, student, None),
        "student": lambda: make_student(folder, 1),
        "model": lambda: open_classifier(folder),
    }


# ---- Weights that are not in the file ----


@pytest.mark.parametrize("who", ["teacher", "start", "student", "model"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rename": lambda name: f"module.{name}"}, r"begin with 'module\.'.*key_mapping=\{r'\^module\\\.': ''\}"),
        ({"rename": lambda name: f"_orig_mod.module.{name}"}, r"begin with '_orig_mod\.module\.'"),
        ({"keep": lambda name: "layers.1" not in name}, r"lacks 16 weights of ViT.*'?s backbone.*vit\.layers\.1\."),
        ({"keep": lambda name: "position" not in name}, r"lacks 1 weights.*position_embeddings"),
    ],
)
def test_missing_backbone_weights_are_an_error_everywhere(tmp_path, who, options, message):
    folder = _save(tmp_path, build("vit", seed=5), **options)
    with pytest.raises(ValueError, match=message):
        _openers(folder)[who]()


def test_the_key_mapping_of_the_message_loads_the_weights(tmp_path):
    model = build("vit", seed=5)
    folder = _save(tmp_path, model, lambda name: f"module.{name}")
    opened = open_classifier(folder, key_mapping={r"^module\.": ""})
    assert largest_difference(weights(opened.model), weights(model)) == 0 and not opened.new_head


def test_blocks_that_the_config_leaves_out_are_an_error(tmp_path):
    build("vit", layers=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"32 weights of further blocks.*make_student"):
        open_classifier(tmp_path, num_hidden_layers=1)


# ---- Weights in the file that the model does not have ----


def _with(folder, model, config=(), **tensors):
    """A saved model with other values in its config.json, and further tensors in its file."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
    return folder


@pytest.mark.parametrize("who", ["teacher", "start", "student", "model"])
def test_trained_weights_that_the_config_leaves_out_are_an_error_everywhere(tmp_path, who):
    model, no_bias = build("vit", seed=5), {"qkv_bias": False}
    for name, saved, config, tensors, message in [
        ("biases", model, no_bias, {}, r"holds weights that ViT.* leaves out.*k_proj\.bias.*such as qkv_bias"),
        ("alone", model.vit, no_bias, {}, r"k_proj\.bias"),
        ("scale", model, {}, {"vit.encoder.layer.0.ls.lambda": torch.ones(32)}, r"layers\.0\.ls\.lambda"),
        ("embedding", model, {}, {"vit.embeddings.registers": torch.ones(1, 4, 32)}, r"embeddings\.registers"),
    ]:
        folder = _with(tmp_path / name, saved, config, **tensors)
        with pytest.raises(ValueError, match=message):
            _openers(folder)[who]()


def test_weights_beside_the_model_are_noted(tmp_path):
    model = build("vit", seed=5)
    beside = {"decoder.0.weight": torch.ones(2), "vit.pooler.dense.bias": torch.ones(32), "logit_scale": torch.ones(1)}
    folder = _with(tmp_path, model, **beside, **{"vit.embeddings.mask_token": torch.ones(1, 1, 32)})
    opened, student = open_classifier(folder), build("vit")
    said = r"ViTForImageClassification does not have .*\(decoder, logit_scale, pooler: 3\).*correct its config\.json"
    assert re.search(said, opened.notes[0]) and largest_difference(weights(opened.model), weights(model)) == 0
    for source in (Teacher.from_pretrained(folder), StartingPoint.from_path(folder, student, None)):
        before = list(source.notes)
        source.match(student, None, compare_classes=True)
        assert re.search(said, before[0]) and source.notes[0] == before[0]


def test_pre_trained_models_open_with_their_other_parts_unread(tmp_path):
    sizes = {**SIZES, "decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    beit = BeitConfig(**SIZES, vocab_size=9, use_mask_token=True)
    for name, model, part in [
        ("beit", BeitForMaskedImageModeling(beit), "layernorm, lm_head: 4"),
        ("mae", ViTMAEForPreTraining(ViTMAEConfig(**sizes, decoder_intermediate_size=8)), "decoder: 23"),
    ]:
        model.save_pretrained(tmp_path / name)
        assert f"({part})" in open_student(tmp_path / name).notes[0]
        assert f"({part})" in Teacher.from_pretrained(tmp_path / name).notes[0]


def test_another_image_size_is_an_error_although_sizes_are_ignored(tmp_path):
    build("vit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"position_embeddings \(1, 17, 32\) in place of \(1, 65, 32\)"):
        open_classifier(tmp_path, image_size=64, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("name", and_slow(["vit", "beit", "dinov2", "resnet", "levit"], ["swin", "poolformer", "cvt"]))
def test_a_backbone_alone_has_no_head(tmp_path, name):
    model = TINY[name]()
    backbone = getattr(model, model.base_model_prefix)
    backbone.save_pretrained(tmp_path)
    opened = open_classifier(tmp_path, keep_head=False)
    found = getattr(opened.model, model.base_model_prefix)
    assert largest_difference(weights(found), weights(backbone)) == 0
    own = ("classifier", HEADS.get(name, "classifier"))
    assert opened.new_head and all(key.startswith(own) for key in opened.new_head)
    assert "no trained head in its file" in opened.notes[0]
    with pytest.raises(ValueError, match=r"class outputs would be random.*hf-kdtl train-teacher"):
        open_classifier(tmp_path)


def test_a_missing_head_is_an_error_where_class_outputs_are_read(tmp_path):
    model = build("vit", seed=5)
    model.vit.save_pretrained(tmp_path / "backbone")
    cut = _save(_folder(tmp_path / "classifier"), model, keep=lambda name: "classifier" not in name)
    for folder, reason in (
        (tmp_path / "backbone", "ViTModel, has no classifier"),
        (cut, "no trained head in its file"),
    ):
        teacher = Teacher.from_pretrained(folder)
        with pytest.raises(ValueError, match=f"the teacher.*{reason}.*hf-kdtl train-teacher"):
            trainer(tmp_path, build("vit"), teacher)
        with pytest.raises(ValueError, match=reason):
            teacher.capture(torch.randn(1, 3, 32, 32), Needs(logits=True))
    for cut in (teacher, folder):
        with pytest.raises(ValueError, match="class outputs would be random"):
            make_student(cut, 1)


def test_a_missing_head_is_no_error_where_no_class_output_is_read(tmp_path):
    build("vit", seed=5).vit.save_pretrained(tmp_path / "t")
    runner = trainer(tmp_path, build("vit"), tmp_path / "t", objectives=[{"name": "hidden_states"}], max_steps=1)
    assert runner.train().training_loss > 0


def test_a_head_of_another_size_is_a_missing_head(tmp_path):
    build("vit", num_labels=10).save_pretrained(tmp_path)
    teacher = Teacher.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert teacher.new_head == ["classifier.bias", "classifier.weight"]
    with pytest.raises(ValueError, match=r"classifier\.bias.*leave num_labels and ignore_mismatched_sizes out"):
        teacher.match(build("vit"), None, compare_classes=True)
    with pytest.raises(
        OSError, match=r"thus raising an error\.\)\. The sizes asked for \(\{'num_labels': 3\}\) are not the file's"
    ):
        Teacher.from_pretrained(tmp_path, num_labels=3)


def test_what_a_note_says_is_not_printed_as_a_table_too(tmp_path):
    build("vit").vit.save_pretrained(tmp_path)
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(handler)
    try:
        open_classifier(tmp_path, keep_head=False)
        assert not seen
        type(build("vit")).from_pretrained(tmp_path)
        assert "LOAD REPORT" in seen[0]  # left as it was for others
    finally:
        logger.removeHandler(handler)


def test_a_complete_model_opens_without_a_warning(tmp_path):
    for name in ("vit", "levit", "efficientnet", "siglip"):
        model = build(name)
        model.save_pretrained(tmp_path / name)
        opened = open_classifier(tmp_path / name)
        assert not opened.new_head and not opened.notes
        assert largest_difference(weights(opened.model), weights(model)) == 0


# ---- What cannot be opened ----


def test_code_of_a_model_is_not_run_and_nobody_is_asked(tmp_path, monkeypatch):
    names = {"AutoConfig": "evil.C", "AutoModelForImageClassification": "evil.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": names}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    with pytest.raises(OSError, match="pass trust_remote_code=True if you trust it"):
        open_classifier(tmp_path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the start's path .*nowhere.* does not exist"):
        StartingPoint.from_path(tmp_path / "nowhere", build("vit"), None)
    build("vit").save_pretrained(tmp_path / "model")
    with pytest.raises(OSError, match=r"Did you mean .*model\?"):
        open_classifier(tmp_path)
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("content", ["version https://git-lfs.github.com/spec/v1", "half"])
def test_damaged_weights_are_explained(tmp_path, content):
    build("vit").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000] if content == "half" else content.encode())
    for open_it in (lambda: Teacher.from_pretrained(tmp_path), lambda: open_classifier(tmp_path)):
        with pytest.raises(OSError, match=r"could not be opened .*cut off, or a pointer of git-lfs"):
            open_it()


def test_an_adapter_without_its_model_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    for who, open_it in _openers(tmp_path).items():
        with pytest.raises(ValueError, match=r"holds a PEFT adapter without its base model.*merge_and_unload"):
            pytest.fail(f"{who}: {open_it()}")


def test_what_is_no_saved_model_is_explained(tmp_path):
    model = build("vit")
    model.save_pretrained(tmp_path / "wrong")
    file = tmp_path / "wrong" / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.weight"] = tensors["classifier.weight"][:2].clone()
    save_file(tensors, file, {"format": "pt"})
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model, tmp_path / "pickled" / "pytorch_model.bin")
    for folder, message in [
        ("wrong", r"config\.json says other sizes than the file has"),
        ("pickled", r"more than tensors, such as a model pickled whole.*save_pretrained"),
        ("wrong/config.json", r"is a file; expected the folder that it is in: .*wrong\."),
    ]:
        with pytest.raises(OSError, match=message) as error:
            Teacher.from_pretrained(tmp_path / folder)
        assert "\n" not in str(error.value)
