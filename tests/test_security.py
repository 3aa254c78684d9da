"""What SECURITY.md promises. Nothing foreign runs or fills the memory, no name breaks out of where it stands."""

import ast
import io
import json
import os
import pickle
import re
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageFile

from hf_kdtl import DistillationConfig
from hf_kdtl.checkpoints.manifest import write_manifest
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.data.decoding import decode
from hf_kdtl.data.loading import load_images
from hf_kdtl.evaluation.results import read_results
from hf_kdtl.models import Teacher
from tests.commands.conftest import QUICK, command, images, teacher  # noqa: F401
from tests.support.helpers import trainer
from tests.support.tiny import build

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("hf_kdtl", "recipes", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess", "importlib", "runpy", "code"}
HARMLESS = {"importlib.metadata", "importlib.util.find_spec"}
CALLS = {"eval", "exec", "compile", "__import__", "input"}
ATTRIBUTES = {"torch.save", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def dangers(source: str) -> list[str]:
    """What of a program reads or writes pickles, runs other programs, or turns text into code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            first = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = [f"{first}{alias.name}" for alias in node.names]
            found += [name for name in names if name.split(".")[0] in MODULES and name not in HARMLESS]
        if isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in CALLS | ATTRIBUTES or "trust_remote_code" in keywords:
                found.append(name)
            if name == "torch.load" and keywords.get("weights_only") != "True":
                found.append(name)
            if name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
                found.append(name)
    return found + re.findall("trust_remote_code", source)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_no_foreign_code(path):
    source = path.read_text("utf-8")
    if path.name == "resolve.py":  # it says no where the caller says nothing; transformers would ask on the terminal
        assert source.count("untrusted(") == 1 + 2 and "return {TRUST: False} | options" in source
        assert "TRUST: True" not in source
        source = source.replace('TRUST = "trust_remote_code"', "")
    if path.name == "processor_files.py":
        assert source.count("untrusted(") == len(re.findall(r"Auto\w+\.from_pretrained\((?!<)", source)) == 1
    if path.name == "text_head.py":
        assert source.count("untrusted(") == len(re.findall(r"Auto\w+\.from_pretrained\(", source)) == 1
    assert dangers(source) == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from dill import dumps", "torch.load(x)", "torch.load(x, weights_only=False)",
     "torch.save(x, y)", "yaml.load(x)", "eval(x)", "exec(x)", "__import__(x)", "import importlib",
     "from importlib import import_module", "import subprocess", "os.system(x)", "np.load(x, allow_pickle=True)",
     "f(trust_remote_code=True)", "options['trust_remote_code'] = yes"],
)  # fmt: skip
def test_that_walk_sees_what_it_looks_for(source):
    assert dangers(source)
    assert (
        dangers("torch.load(x, weights_only=True); yaml.safe_load(x); np.load(x); from importlib import metadata")
        == []
    )


class Evil:
    """A pickle of it makes the file `ran` when it is read."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def test_a_checkpoint_with_a_pickle_that_acts_does_not_act():
    trainer("out", build("vit"), max_steps=1, save_strategy="steps", save_steps=1).train()
    folder = Path("out/checkpoint-1")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        full = (folder / name).read_bytes()
        torch.save(Evil(), folder / name)
        write_manifest(folder, 1, [])  # whoever altered it, altered the checksums too
        again = trainer("out", build("vit"), max_steps=2)
        try:
            again.train(resume_from_checkpoint=str(folder))
        except (ValueError, pickle.UnpicklingError) as error:
            assert name in str(error) or "weights_only" in str(error).replace("Weights only", "weights_only")
        else:
            assert name == "training_args.bin"  # nobody reads it
        assert not Path("ran").exists(), name
        assert torch.load(folder / name, weights_only=False) == 0 and Path("ran").exists()  # it would have acted
        Path("ran").unlink()
        (folder / name).write_bytes(full)


# ---- Settings ----


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['touch ran']", "learning_rate: !!python/object/apply:os.system ['touch ran']",
     "a: &a [x]\nb: !!python/name:os.system ''"],
)  # fmt: skip
def test_yaml_makes_no_objects(text):
    Path("evil.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"evil\.yaml is not valid YAML"):
        cli.parse(DistillationConfig, argv=["--config", "evil.yaml"])
    assert not Path("ran").exists()


def test_no_setting_reaches_trust_remote_code(command, images):  # noqa: F811
    distill, evaluate = command("distill").main, command("evaluate").main
    for main in (distill, evaluate, command("train_teacher").main, command("push").main):
        with pytest.raises(ValueError, match=r"unknown flag: '--trust_remote_code'|required"):
            main(["--trust_remote_code", "true"])
    new = ["--dataset", "images", "--objectives", '[{"name": "task"}]', *QUICK, "--output_dir", "out"]
    for config in ({"model_type": "vit", "trust_remote_code": True}, {"model_type": "evil"}):
        with pytest.raises(ValueError, match=r"unknown (field|model_type)"):
            distill([*new, "--student_config", json.dumps(config)])
    for name in ("system", "Evil", "__import__('os')"):
        with pytest.raises(ValueError, match="unknown objective"):
            DistillationConfig("out", objectives=[{"name": name}])
        with pytest.raises(ValueError, match="unknown gradient rule"):
            DistillationConfig("out", gradient_rule={"name": name})
    assert not Path("out").exists()


def test_code_next_to_a_model_is_not_run():
    folder = Path("evil")
    folder.mkdir()
    code = "import pathlib\npathlib.Path('ran').touch()\n"
    (folder / "modeling_evil.py").write_text(code)
    names = {"AutoConfig": "modeling_evil.C", "AutoModelForImageClassification": "modeling_evil.M"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": names}))
    with pytest.raises((ValueError, OSError)):
        Teacher.from_pretrained("evil")
    assert not Path("ran").exists()


# ---- Images ----


def png(width, height, *chunks, bits=1, rows=b""):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    inner = b"".join(chunk(kind, content) for kind, content in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + inner + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_an_image_that_unpacks_to_gigabytes_is_refused_before_it_is_decoded(command, images, monkeypatch):  # noqa: F811
    def unpack(*_):
        raise AssertionError("it was decoded")

    bomb = png(30000, 30000, rows=bytes(3751) * 300)  # 112 MB as bits, 2.7 GB as RGB
    Path("images/red/bomb.png").write_bytes(bomb)
    assert len(bomb) < 5000
    with monkeypatch.context() as patched:
        patched.setattr(ImageFile.ImageFile, "load", unpack)
        with pytest.raises(ValueError, match=r"bomb\.png was refused.*900000000 pixels.*scale it down, or raise PIL"):
            decode(bomb, "bomb.png")
        with pytest.raises(ValueError, match="was refused"):  # where Pillow itself only warns
            decode(png(10000, 10000), "bomb.png")
    with pytest.raises(ValueError, match=r"images/red/bomb\.png was refused"):
        load_images("images").check_readable()
    left = load_images("images", on_bad_image="skip")
    assert "1 of 37 images of train could not be read" in left.notes[0]


def test_text_in_an_image_that_unpacks_to_more_is_refused():
    text = b"Comment\0\0" + zlib.compress(bytes(4_000_000))
    with pytest.raises(ValueError, match=r"text\.png could not be read.*too large"):
        decode(png(1, 1, (b"zTXt", text), rows=b"\0\0"), "text.png")
    assert decode(png(1, 1, (b"tEXt", b"Comment\0short"), rows=b"\0\0"), "text.png").size == (1, 1)


def test_the_limit_is_the_users(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(ValueError, match="exceeds limit of 4 pixels"):
        decode(png(3, 2, rows=b"\0\0" * 2), "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6)
    assert decode(png(3, 2, rows=b"\0\0" * 2), "small.png").size == (3, 2)


def test_16_bit_grey_takes_no_multiple_of_its_size():
    side = 3000
    file = png(side, side, bits=16, rows=(b"\0" + b"\xff" * 2 * side) * side)
    tracemalloc.start()
    try:
        assert decode(file, "grey.png").getextrema() == ((255, 255),) * 3
        assert tracemalloc.get_traced_memory()[1] < 6 * side * side  # as float64 at once: 24
    finally:
        tracemalloc.stop()


# ---- Names ----

NAMES = ["../x", "c\nd\x1b[31m", "<b onload=x>|$x_{$", "/etc/passwd", "](http://evil)", "# h", "​\u202ecat", "=1+1"]


def named_images():
    """A saved dataset with these class names, three pictures each."""
    draw = np.random.default_rng(0)
    files, labels = [], []
    for label in range(len(NAMES)):
        for _ in range(8):
            file = io.BytesIO()
            Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
            files.append({"bytes": file.getvalue(), "path": f"{NAMES[label]}/a\n\x1b[2J.png"})
            labels.append(label)
    features = Features({"image": ImageFeature(decode=False), "label": ClassLabel(names=NAMES)})
    Dataset.from_dict({"image": files, "label": labels}, features=features).save_to_disk("named")
    return "named"


def test_names_of_files_cannot_write_to_the_terminal(command, capsys):  # noqa: F811
    data = load_images(named_images())
    row = data.train[0]["image"] | {"bytes": b"no image"}
    with pytest.raises(ValueError) as caught:
        decode(row["bytes"], row["path"])
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)

    def fail():
        raise ValueError(f"the class {NAMES[1]!s} is wrong")

    assert cli.run(fail) == 2
    command("common.runs").say(type("Config", (), {"process_index": 0}), f"the class {NAMES[1]}", "| a |\n| b |")
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert "the class c d[31m is wrong" in printed.err and printed.out.endswith("| a |\n| b |\n")


@pytest.mark.slow
def test_names_of_classes_cannot_break_report_pictures_or_folders(command, capsys, tmp_path, monkeypatch):  # noqa: F811
    work = tmp_path / "one/two"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    named_images()
    config = {"model_type": "vit", "image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 64}
    flags = ["--dataset", "named", *QUICK]
    command("train_teacher").main([*flags, "--model_config", json.dumps(config), "--output_dir", "taught"])
    command("distill").main([*flags, "--teacher", "taught/model", "--student_layers", "1", "--output_dir", "out"])
    models = ["--models", "out/student", "--teacher", "taught/model", "--degradations", "none"]
    command("evaluate").main([*flags, *models, "--output_dir", "judged"])
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert {path.name for path in work.iterdir()} == {"named", "taught", "out", "judged"}
    assert [path.name for path in tmp_path.iterdir()] == ["one"] and len(list((tmp_path / "one").iterdir())) == 1
    known = re.compile(r"[\w.-]+")
    assert all(known.fullmatch(path.name) for path in work.rglob("*"))
    for folder in ("out", "judged"):
        lines = Path(folder, "report.md").read_text().splitlines()
        assert not [line for line in lines if re.search(r"(?<!\\)<b onload|\x1b|^# h|(?<!\\)\]\(http", line)], folder
        assert set(read_results(folder)["data"]["classes"]) == set(NAMES)
        assert all(Image.open(picture).size for picture in Path(folder).glob("*.png"))


def test_every_promise_names_a_test_that_is_there():
    promises = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if line.startswith("- **")]
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)
    assert len(promises) >= 8 and len(named) >= len(promises)
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(), (path, test)
