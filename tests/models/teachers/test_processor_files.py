"""A saved image processor is absent, or is read as it was saved, or the message says what is wrong with its file."""

import json

import pytest
from transformers import ViTImageProcessor

from hf_kdtl.models import Teacher
from hf_kdtl.models.teachers.processor_files import open_processor
from hf_kdtl.models.teachers.start import StartingPoint
from tests.support.tiny import build

OWN = {"size": {"height": 32, "width": 32}, "image_mean": [0.485, 0.456, 0.406]}
FILE = "preprocessor_config.json"
REMOTE = json.dumps({"auto_map": {"AutoImageProcessor": "mine.Mine"}, "image_processor_type": "Mine"})


def test_an_absent_processor_is_none(tmp_path):
    build("vit").save_pretrained(tmp_path)
    assert open_processor(tmp_path) is None
    teacher = Teacher.from_pretrained(tmp_path)
    teacher.match(build("vit"), None, compare_classes=False)
    assert "no image processor" in teacher.notes[-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image_mean": [0.485', r"could not be read from preprocessor_config\.json.*Save it again"),
        ("", r"could not be read from preprocessor_config\.json"),
        ("{}", r"has none of .*image_mean.*every one would be a default"),
        ('{"tokenizer_class": "BertTokenizer"}', r"has none of .*image_mean"),
        ('{"do_resize": true, "image_meen": [0.4, 0.4, 0.4]}', r"'image_meen'; did you mean 'image_mean'"),
        ("[1, 2]", r"could not be read from preprocessor_config\.json"),
        ('{"image_processor_type": "MyProcessor"}', r"Unrecognized image processor.*of a class that transformers"),
        (REMOTE, r"code in the model's folder: pass trust_remote_code=True if you trust it"),
        ('{"image_processor_type": "ViTImageProcessor", "size": "big"}', r"could not be read"),
    ],
)
@pytest.mark.parametrize("who", ["teacher", "start"])
def test_an_unreadable_processor_is_an_error_and_nobody_is_asked(tmp_path, monkeypatch, who, content, message):
    build("vit").save_pretrained(tmp_path)
    (tmp_path / FILE).write_text(content)
    (tmp_path / "mine.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    openers = {
        "teacher": Teacher.from_pretrained,
        "start": lambda path: StartingPoint.from_path(path, build("vit"), None),
    }
    with pytest.raises(OSError, match=message):
        openers[who](tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_unreadable_file_of_the_newer_name_is_an_error(tmp_path):
    (tmp_path / "processor_config.json").write_text('{"image_processor": {')
    with pytest.raises(OSError, match=r"could not be read from processor_config\.json"):
        open_processor(tmp_path)


def test_the_processor_is_read_where_the_model_is(tmp_path):
    build("vit").save_pretrained(tmp_path / "inner")
    ViTImageProcessor(**OWN).save_pretrained(tmp_path / "inner")
    teacher = Teacher.from_pretrained(tmp_path, subfolder="inner")
    assert list(teacher.processing_class.image_mean) == OWN["image_mean"]
    (tmp_path / "inner" / FILE).write_text("{")
    with pytest.raises(OSError, match="could not be read"):
        Teacher.from_pretrained(tmp_path, subfolder="inner")


def test_the_options_of_the_model_reach_the_processor(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "hf_kdtl.models.teachers.processor_files.AutoImageProcessor.from_pretrained",
        lambda path, **options: seen.update(options),
    )
    open_processor("me/model", revision="v2", trust_remote_code=True, cache_dir="c", num_labels=3, dtype="auto")
    assert seen == {"revision": "v2", "trust_remote_code": True, "cache_dir": "c"}


def test_a_link_to_a_processor_that_is_gone_is_not_absence(tmp_path):
    build("vit").save_pretrained(tmp_path)
    (tmp_path / FILE).symlink_to(tmp_path / "gone.json")
    with pytest.raises(OSError, match=r"could not be read from preprocessor_config\.json"):
        Teacher.from_pretrained(tmp_path)


def test_further_settings_are_of_no_consequence(tmp_path):
    """Of other libraries, and of classes whose code is in the folder."""
    build("vit").save_pretrained(tmp_path)
    ViTImageProcessor(**OWN, crop_pct=0.9, do_reduce_labels=False, my_own_key=3).save_pretrained(tmp_path)
    assert list(open_processor(tmp_path).image_mean) == OWN["image_mean"]
