"""Commands to print that work from the folder the user is in."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from hf_kdtl.models.blocks import stated_depth, vision_config
from hf_kdtl.models.cutting.families import family_of

# Options that say which images a split holds; the others concern training alone.
SPLIT_OPTIONS = ("dataset", "image_column", "label_column", "validation_fraction", "test_fraction", "split_seed",
                 "on_bad_image", "high_bit_depth", "multi_label")  # fmt: skip

# What a saved config says of its classes and of its file, and not of its shape.
LABELS_AND_FILES = ("id2label", "label2id", "num_labels", "architectures", "dtype", "transformers_version",
                    "problem_type", "model_type", "_name_or_path")  # fmt: skip


def typed(path: Path | str) -> str:
    """A path as one types it: relative where it lies below the working directory."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)


def python() -> str:
    """The Python that is running: by name where the shell would find it, else by its path."""
    name = Path(sys.executable).name  # python, or python3 where the program was started by its console script
    return name if shutil.which(name) == sys.executable else shlex.quote(typed(sys.executable))


def program() -> str:
    """`hf-kdtl` of this environment: by name where the shell would find it, else by its path."""
    script = Path(sys.executable).with_name("hf-kdtl")
    if shutil.which("hf-kdtl") == str(script):
        return "hf-kdtl"
    return shlex.quote(typed(script)) if script.exists() else f"{python()} -m hf_kdtl"


def command(name: str, *flags: str, **settings: Any) -> str:
    """A command line.

    Args:
        flags: as they stand, between the name and the settings.
        settings: `--name value` for those that are not None; paths as the user typed them.
    """
    given = [f"--{key} {shlex.quote(typed(str(value)))}" for key, value in settings.items() if value is not None]
    return " ".join([program(), name, *flags, *given])


def classify(student: Path, image: Path) -> str:
    """A command line that classifies an image."""
    model, path = (json.dumps(str(one), ensure_ascii=False) for one in (student, image))  # text of Python too
    code = f'from transformers import pipeline; print(pipeline("image-classification", {model})({path}))'
    return f"{python()} -c {shlex.quote(code)}"


def settings_of_init(teacher: Path) -> Path | None:
    """The settings for a student of this teacher that `hf-kdtl init` wrote into the working directory; else None."""
    file = Path(teacher.parent.name.removesuffix("_teacher") + ".yaml")
    line = f"teacher: {json.dumps(typed(teacher), ensure_ascii=False)}"
    return file if file.is_file() and line in file.read_text(encoding="utf-8").splitlines() else None


def split_flags(options: Any) -> str:
    """The flags that cut the same splits out of the same images: the dataset, and what differs from its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    values = {name: getattr(options, name) for name in SPLIT_OPTIONS}
    given = {name: value for name, value in values.items() if name == "dataset" or value != defaults[name]}
    return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in given.items())


def student_flags(model: Any, processor: Any) -> str:
    """Flags for a student of about half of `model`."""
    settings = student_settings(model.config, processor)
    return " ".join(
        f"--{name} {shlex.quote(json.dumps(value)) if isinstance(value, dict) else value}"
        for name, value in settings.items()
    )


def student_settings(config: Any, processor: Any) -> dict[str, Any]:
    """Settings for a student of about half of a model: half of its FLOPs where heads can go one by one, since it then
    keeps more of what its teacher knows than with half of the blocks (benchmarks/results/cut.md), else half of its
    blocks, or random weights with stages half as deep.

    Args:
        config: of the model.
        processor: of the model; for a student_config that has no size.
    """
    depths, depth = stated_depth(config)
    family = family_of(config)
    if depths is None and depth and family is not None and family.heads == "any":
        return {"student_flops": 0.5}
    if depths is None and depth:
        return {"student_layers": max(1, depth // 2)}
    default = type(config)()
    valid = default.to_dict().keys() - {*LABELS_AND_FILES}
    kept = {name: value for name, value in config.to_diff_dict().items() if name in valid}
    halves = {"depths": [max(1, number // 2) for number in depths]} if depths and "depths" in kept else {}
    settings = {"student_config": {"model_type": config.model_type} | kept | halves}
    size = getattr(processor, "size", None) or {}
    side = None if getattr(vision_config(default), "image_size", None) else size.get("height")
    return settings if side is None else settings | {"image_size": side}
