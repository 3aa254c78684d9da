"""Every YAML in hf_kdtl/configs is readable by its command, and says what a reader needs first."""

import pytest

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common.shipped import training_files
from tests.support.representations import made_up
from tests.support.tiny import build

CONFIGS = list(training_files().values())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(command, path):
    if path.stem == "bregman":
        made_up(build("vit"), "probabilities").save("runs/bregman_layer")
    module, options = ("train_teacher", "TeacherOptions") if "teacher" in path.stem else ("distill", "DistillOptions")
    holder = command("common.experiment" if module == "distill" else module)
    types = (getattr(holder, options), command("common.builders").DataOptions, DistillationConfig)
    extra = ["--teacher", "x"] if module == "distill" else []
    cli.parse(*types, argv=["--config", str(path), *extra])
    text = path.read_text()
    for needed in ("# What it is for:", "# How to run it", "# What it costs:", "# The number to expect:"):
        assert needed in text
    assert text.startswith("#") and max(map(len, text.splitlines())) < 120


def test_there_are_configs():
    assert {path.stem for path in CONFIGS} >= {"digits_teacher", "digits", "folder", "cifar10"}
