"""Look at your images and write settings for them, with the reason of each: for a teacher, and for a student of it.

  hf-kdtl init my_images
  hf-kdtl init my_images --teacher runs/teacher/model

It writes my_images_teacher.yaml (unless there is a teacher) and my_images.yaml into this folder, and prints what it
found, what it chose and what to type next. It asks nothing and never writes over a file.
"""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import builders
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.chosen import LOOKED_AT, has_attention, has_color
from hf_kdtl.commands.common.defaults import SMALL_IMAGE, Case, choose, yaml_value
from hf_kdtl.commands.common.next_command import command, student_settings
from hf_kdtl.data import ImageData
from hf_kdtl.data.decoding import decode_row
from hf_kdtl.data.several import SEVERAL
from hf_kdtl.evaluation.cost import parameters
from hf_kdtl.models.teachers.resolve import open_classifier

# Pre-trained teachers for photographs: (name, parameters).
WITH_GPU = ("google/vit-base-patch16-224", 86_000_000)
WITHOUT_GPU = ("facebook/deit-small-patch16-224", 22_000_000)
FEW = 10  # images of a class

Lines = list[tuple[str, Any, str]]  # name, value, reason


@dataclass
class InitOptions:
    """The teacher, if you have one."""

    teacher: str | None = field(default=None, metadata={"help": "A folder or Hub name: a classifier of these images."})


@dataclass(frozen=True)
class Found:
    """What the images are like."""

    images: int
    classes: int
    smallest: int
    largest: int
    width: int
    height: int
    color: bool
    several: bool = False

    @classmethod
    def of(cls, data: ImageData) -> Found:
        """By all labels of train, and by some of its images."""
        if data.multi_label:
            counts = (np.array(data.train[SEVERAL][:]) == 1).sum(0).tolist()
        else:
            counts = list(Counter(label for label in data.train["label"] if label >= 0).values())
        rows = np.linspace(0, len(data.train) - 1, min(LOOKED_AT, len(data.train))).astype(int)
        cells = data.train.select(rows)["image"]
        sizes = [decode_row(cell, int(i), len(data.train)).size for i, cell in zip(rows, cells, strict=True)]
        width, height = (int(median(side)) for side in zip(*sizes, strict=True))
        images = len(data.train), len(data.label_names), min(counts), max(counts)
        return cls(*images, width, height, has_color(data.train), data.multi_label)

    def sentences(self) -> list[str]:
        """For the terminal, and for the head of the file."""
        each = f"{self.smallest} to {self.largest}" if self.smallest < self.largest else f"{self.smallest}"
        notes = [
            f"{self.images:,} training images of {self.classes} classes, {each} of each.",
            f"Images of about {self.width} x {self.height} pixels, {'in color' if self.color else 'without color'}.",
        ]
        if self.smallest < FEW:
            notes.append(f"A class has {self.smallest} images: expect little of it, or add some.")
        if self.largest > 10 * self.smallest:
            better = "macro_f1, not at micro_f1" if self.several else "mean_class_accuracy, not at accuracy"
            notes.append(f"The classes differ much in size: look at {better} alone.")
        return notes


def main(argv: Sequence[str] | None = None) -> None:
    """Look at the images, write the files, print what to type.

    Raises:
        FileExistsError: where one of the files is there already; then none is written.
    """
    cli.quiet()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--dataset")
    types = (InitOptions, DataOptions)
    options, data_options = cli.parse(*types, argv=words, doc=__doc__)
    typed = data_settings(data_options, cli.typed_names(*types, argv=words))
    source = Path(data_options.dataset).absolute()
    here = Path.cwd().resolve()
    if source.is_dir() and here.is_relative_to(source.resolve()):
        raise ValueError(
            f"this folder lies in the images, and what is written here would be among them. Type cd "
            f"{shlex.quote(str(source.resolve().parent))}, then {command('init', source.resolve().name)}."
        )
    data = builders.open_data(data_options)
    found, name = Found.of(data), source.name.split(".")[0].replace("*", "images") or "images"
    files = settings_files(name, found, options.teacher, data, typed)
    if there := [file for file in files if Path(file).exists()]:
        raise FileExistsError(f"{' and '.join(there)} exists here and is left as it is; move it away for a new one.")
    for file, text in files.items():
        Path(file).write_text(text, encoding="utf-8")
    lines = [*builders.describe_data(data), *(f"- {sentence}" for sentence in found.sentences())]
    print(cli.printable("\n".join([*lines, "", f"Wrote {' and '.join(files)}. Type next:", *next_commands(files)])))


def next_commands(files: Mapping[str, str]) -> list[str]:
    """A command for each file, in order."""
    return [
        f"  {command('train-teacher' if file.endswith('_teacher.yaml') else 'distill', config=file)}" for file in files
    ]


def settings_files(
    name: str, found: Found, teacher: str | None, data: ImageData, typed: dict[str, Any]
) -> dict[str, str]:
    """{file: its text}."""
    common: Lines = [(option, value, "") for option, value in typed.items()]
    files = {}
    if teacher is None:
        model, case, student = new_teacher(found, data)
        lines = [*common, *model, ("output_dir", f"runs/{name}_teacher", "")]
        files[f"{name}_teacher.yaml"] = text("The teacher", found, lines, case, typed)
        teacher = f"runs/{name}_teacher/model"
    else:
        opened = open_classifier(builders.existing(teacher)).model
        student = student_settings(opened.config, builders.processor_of(teacher, opened))
        side = builders.processor_of(teacher, opened).size.get("height", SMALL_IMAGE + 1)
        case = case_of("cut", has_attention(opened), parameters(opened), found, side)
    cut = "student_config" not in student
    how = "half of the teacher's arithmetic, copied" if "student_flops" in student else "half of its blocks, copied"
    how = how if cut else "random weights, stages half as deep as the teacher's"
    case = case_of("cut" if cut else "random", case.transformer, case.parameters, found, case.side)
    lines = [*common, ("teacher", teacher, ""), *((key, value, how) for key, value in student.items())]
    lines += [
        ("objectives", [{"name": "task", "weight": 0.1}, {"name": "logit_kd", "weight": 0.9, "temperature": 4.0}],
         "the labels, and the teacher's answers"),
        ("seeds", [1], "[1, 2, 3] for an interval"),
        ("baseline", True, "also the student alone: what the teacher is worth"),
        ("output_dir", f"runs/{name}", ""),
    ]  # fmt: skip
    files[f"{name}.yaml"] = text("The student", found, lines, case, typed)
    return files


def data_settings(options: DataOptions, typed: set[str]) -> dict[str, Any]:
    """The dataset, and what was typed of the images."""
    values = vars(options) | {"augmentation": cli.mapping("augmentation", options.augmentation)}
    return {name: value for name, value in values.items() if name == "dataset" or name in typed}


def new_teacher(found: Found, data: ImageData) -> tuple[Lines, Case, dict[str, Any]]:
    """(its settings, its case, those of its student): pre-trained for photographs, small and new for small images."""
    side = min(found.width, found.height)
    if side > SMALL_IMAGE:
        name, size = WITH_GPU if torch.cuda.is_available() else WITHOUT_GPU
        gpu = "" if torch.cuda.is_available() else ", small because this machine has no GPU"
        why = f"pre-trained on photographs{gpu}; downloaded once"
        return [("model", name, why)], case_of("pretrained", True, size, found, 224), {"student_flops": 0.5}
    side = 16 if side <= 16 else 32 if side <= 32 else 64
    shape = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 192}
    config = {"model_type": "vit", "image_size": side, "patch_size": side // (4 if side == 16 else 8)} | shape
    model = builders.from_config(config, data.label_names, "model_config")
    case = case_of("random", True, parameters(model), found, side)
    return [("model_config", config, "small images need a small model")], case, student_settings(model.config, None)


def case_of(kind: str, transformer: bool, size: int, found: Found, side: int) -> Case:
    """What the rules look at."""
    metric = "map" if found.several else "accuracy"
    return Case(kind, transformer, size, found.images, side, found.color, metric=metric)


def text(title: str, found: Found, lines: Lines, case: Case, typed: Mapping[str, Any]) -> str:
    """A settings file: what was found, the settings, and the defaults as lines that can be edited."""
    head = [f"{title}, by hf-kdtl init. Every line can be edited; a flag overrides it.", "", *found.sentences()]
    chosen = [(default.name, default.value, default.reason) for default in choose(case, typed)]
    shown = [f"# {line}".rstrip() for line in head] + [_line(*one) for one in lines]
    return "\n".join([*shown, "", *(_line(*one) for one in chosen), ""])


def _line(name: str, value: Any, reason: str) -> str:
    shown = yaml_value(value)
    return f"{name}: {shown}" + f"  # {reason}" * bool(reason)


if __name__ == "__main__":
    sys.exit(cli.run(main))
