"""Every code block of the documentation: shell lines are read by the commands' own parsers, Python is run."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainingArguments, ViTImageProcessor, set_seed

from hf_kdtl import DistillationConfig, make_student
from hf_kdtl.__main__ import COMMANDS
from hf_kdtl.commands import configs
from hf_kdtl.commands.common import arguments, shipped
from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.models import Teacher
from hf_kdtl.objectives import OBJECTIVES
from tests.support.tiny import build

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}
BLOCK = re.compile(r"(?:<!-- run by (\S+) -->\n)?^```(\S*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
DIRECTIVE = re.compile(r"^\{[\w-]+\}$")
PLAIN = {"text", "yaml"}
SHELL = ("accelerate", "cd", "git", "hf", "hf-kdtl", "make", "pip", "python")


def blocks(page, language):
    """(the test that runs it, if it is not this one; the code) of each block."""
    return [(by, code) for by, found, code in BLOCK.findall(PAGES[page].read_text()) if found == language]


def shell_lines(code):
    joined = re.sub(
        r"'[^'\n]*(?:\n[^'\n]*)+'", lambda found: found[0].replace("\n", " "), re.sub(r"\\\n\s*", "", code)
    )
    lines = joined.splitlines()
    return [part.strip() for line in lines for part in line.split("&&") if part.strip() and not line.startswith("#")]


COMMAND_LINES = [(page, line) for page in PAGES for _, code in blocks(page, "bash") for line in shell_lines(code)]
PYTHON = [page for page in PAGES if any(not by for by, _ in blocks(page, "python"))]
TRAINS = {page for page in PYTHON if any(".train()" in code for _, code in blocks(page, "python"))}


@pytest.mark.parametrize("page", PAGES)
def test_a_block_is_of_a_kind_that_is_tested(page):
    for by, language, _ in BLOCK.findall(PAGES[page].read_text()):
        assert language in PLAIN | {"python", "bash"} or DIRECTIVE.match(language), language
        assert not by or (ROOT / by.split("::")[0]).exists(), by


class Parsed(Exception):
    """Raised in place of running the command."""


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES, ids=[f"{page}-{line[:40]}" for page, line in COMMAND_LINES])
def test_the_commands_of_a_page_are_read_by_their_parsers(page, line, monkeypatch, tmp_path, capsys):
    program, *words = shlex.split(line, comments=True)
    assert program in SHELL, line
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if program == "python" and words[0] != "-c":
        module = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
        assert (ROOT / module).exists(), module
    if program == "accelerate":
        assert words[0] == "launch"
        files = [word for word in words if word.endswith(".yaml")]
        assert all(Path(file).stem in shipped.launch_files() for file in files)
        module = words.index("-m") + 1
        assert words[module].startswith("hf_kdtl.commands.")
        program, words = "hf-kdtl", [words[module].split(".")[-1].replace("_", "-"), *words[module + 1 :]]
    if program != "hf-kdtl":
        return
    monkeypatch.chdir(tmp_path)  # configs copy writes here
    name, *flags = words
    if name == "configs":
        return configs.main(flags)
    if name.startswith("-"):
        return
    real = arguments.parse

    def parse(*types, **settings):
        real(*types, **settings)
        raise Parsed

    monkeypatch.setattr(arguments, "parse", parse)
    asked = {"--help", "--help-all"} & set(flags)
    # `bregman` opens its representation with its settings, when the line before has made one
    with pytest.raises(SystemExit if asked else (Parsed, FileNotFoundError)):
        COMMANDS[name]()(flags)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """What the pages assume: my_images, runs/teacher/model, a photograph."""
    folder = tmp_path_factory.mktemp("pages")
    random = np.random.default_rng(0)
    for name in ("cat", "dog", "emu", "unlabelled"):
        (folder / "my_images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "my_images" / name / f"{i}.png")
    Image.fromarray(pixels).save(folder / "photo.jpg")
    teacher = build("vit", layers=12)
    teacher.config.id2label = {0: "emu", 1: "dog", 2: "cat"}  # not the order of the folders
    for place in ("runs/teacher/model", "path/to/your-fine-tuned-vit"):
        teacher.save_pretrained(folder / place)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / place)
    return folder


def names(folder):
    """What a page's blocks take for granted."""
    set_seed(0)
    source = Teacher.from_pretrained("runs/teacher/model")
    student = make_student(source, layers=2)
    data = load_images("my_images").in_order(student)
    processor = source.processing_class
    train, validation = (ImageDataset(split, processor) for split in (data.train, data.validation))
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    return {
        "teacher": source,
        "teacher_model": source.classifier(),
        "student": student,
        "model": student,
        "data": data,
        "images": train,
        "train": train,
        "validation": validation,
        "batches": [(pixels, labels)] * 2,
        "objectives": ["task", "logit_kd"],
        "processor": processor,
        "teacher_processor": processor,
        "student_processor": processor,
        "Augmentation": Augmentation,
    }


def shorten(monkeypatch, cls):
    """Two steps, no progress bar and no reports, whatever a page asks for."""
    real = cls.__init__

    def init(self, *args, **settings):
        settings.pop("num_train_epochs", None)
        real(self, *args, **{"max_steps": 2, "report_to": [], "disable_tqdm": True} | settings)

    monkeypatch.setattr(cls, "__init__", init)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in TRAINS - {"README.md"} else []) for page in PYTHON]
)
def test_the_python_of_a_page_runs(page, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    shorten(monkeypatch, DistillationConfig)
    shorten(monkeypatch, TrainingArguments)
    before = dict(OBJECTIVES)
    space = names(workspace)
    try:
        for by, code in blocks(page, "python"):
            if not by:
                exec(compile(code, page, "exec"), space)
    finally:
        for name in set(OBJECTIVES) - set(before):
            del OBJECTIVES[name]
    if page == "README.md":
        assert re.search(r"^0\.\d+$", capsys.readouterr().out, re.MULTILINE)  # it prints an accuracy
