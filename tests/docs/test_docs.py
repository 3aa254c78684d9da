"""What the documents say is what the code is."""

import re
from pathlib import Path

from hf_kdtl.config import ENTRY_KEYS
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.objectives.table import objective_table

ROOT = Path(__file__).parents[2]


def test_the_readme_has_the_table_of_the_registry():
    text = (ROOT / "README.md").read_text()
    (table,) = re.findall(r"<!-- objectives -->\n(.*)\n<!-- /objectives -->", text, re.DOTALL)
    assert table == objective_table(), "python -m hf_kdtl.objectives.table"


def test_every_method_has_an_entry_in_papers():
    text = (ROOT / "PAPERS.md").read_text()
    for name in OBJECTIVES:
        assert f"### `{name}`" in text, name


def test_the_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path


def test_options_do_not_collide_with_the_keys_of_an_entry():
    import inspect

    for name, kind in OBJECTIVES.items():
        assert not set(inspect.signature(kind).parameters) & set(ENTRY_KEYS), name


def test_the_readme_snippet_runs_as_it_is_written(tmp_path):
    import numpy as np
    from PIL import Image
    from transformers import AutoModelForImageClassification, ViTImageProcessor

    from tests.support.tiny import build

    teacher = build("vit", layers=12)
    teacher.config.id2label = {0: "emu", 1: "dog", 2: "cat"}  # not the order of the folders
    teacher.save_pretrained(tmp_path / "teacher")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "teacher")
    random = np.random.default_rng(0)
    for name in ("cat", "dog", "emu"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = code.replace("path/to/your-fine-tuned-vit", "./teacher").replace("path/to/folder-of-images", "./images")
    exec(code.replace("num_train_epochs=10", "num_train_epochs=1, report_to=[], disable_tqdm=True"), {})
    student = AutoModelForImageClassification.from_pretrained(tmp_path / "runs" / "mine")
    assert student.config.num_hidden_layers == 6 and student.config.id2label[0] == "emu"
