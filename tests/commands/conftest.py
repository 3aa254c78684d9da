"""A folder of tiny generated images, a tiny teacher for them, and the commands as functions."""

import importlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessor

from hf_kdtl.commands.common import scores
from hf_kdtl.reports.figures.samples import choose_samples
from tests.support.figures import coarse_figures  # noqa: F401
from tests.support.tiny import build

ROOT = Path(__file__).parents[2]
NAMES = ["blue", "green", "red"]
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CONFIG = {"model_type": "vit", "image_size": 16, "patch_size": 8} | VIT
CELLS = ["red;green", "red", "none", "green;blue", "blue", "green"]
QUICK = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--use_cpu", "true"]
QUICK += ["--per_device_eval_batch_size", "4", "--disable_tqdm", "true", "--save_steps", "1"]


@pytest.fixture(autouse=True)
def _figures(coarse_figures, monkeypatch):  # noqa: F811
    """What figures look like is tested in tests/reports; drawing them takes half of a run of two steps."""
    monkeypatch.setattr(scores, "IMAGES", 1)
    monkeypatch.setattr(scores, "choose_samples", partial(choose_samples, count=2))


@pytest.fixture
def command():
    """command("distill") is the module hf_kdtl.commands.distill."""
    return lambda name: importlib.import_module(f"hf_kdtl.commands.{name}")


@pytest.fixture
def images():
    """images/<class>/<number>.png: 12 noisy images of one colour for each of three classes."""
    draw = np.random.default_rng(0)
    for channel, name in enumerate(["red", "green", "blue"]):
        folder = Path("images", name)
        folder.mkdir(parents=True)
        for number in range(12):
            pixels = draw.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return "images"


@pytest.fixture
def table():
    """The flags of images.csv: 48 images with several labels."""
    draw, lines = np.random.default_rng(0), ["file,label"]
    for i in range(48):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(f"{i}.png")
        lines.append(f'{i}.png,"{CELLS[i % 6]}"')
    Path("images.csv").write_text("\n".join(lines) + "\n")
    return ["--dataset", "images.csv", "--multi_label", "true"]


@pytest.fixture
def teacher():
    """A saved model of three blocks, which lists the classes in another order than the folder."""
    model = build("vit", image_size=16, layers=3)
    model.config.id2label = dict(enumerate(["green", "red", "blue"]))
    model.config.label2id = {name: index for index, name in model.config.id2label.items()}
    model.save_pretrained("teacher")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("teacher")
    return "teacher"
