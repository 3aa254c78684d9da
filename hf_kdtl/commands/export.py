"""Write a student as an ONNX file, check that it answers as the student does, time both; with --int8 also in int8.

  pip install 'hf_kdtl[export]'
  hf-kdtl export --student runs/student/student --output student.onnx
  hf-kdtl export --student runs/student/student --output student.onnx --int8 true --dataset my_images --max_drop 0.5

The file takes pixel_values (batch, channels, height, width) as the student's image processor makes them, and gives
logits (batch, classes), in float32 and for any batch; of a student without a head image_embedding (batch, width),
which the classifiers of its family read, and last_hidden_state. It appears only when these are the student's to 1e-4,
at batch 1 and 5, on random pixels. --int8 writes student.int8.onnx as well, calibrated on 256 training images, once
the accuracy of both on all test images is known: one that loses more than --max_drop points is refused.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import builders, int8
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.speed import speeds
from hf_kdtl.evaluation.records import Speed
from hf_kdtl.export import BATCHES, TOLERANCE, OnnxModel, check_installed, export_onnx, largest_difference
from hf_kdtl.models.labels import is_multi_label
from hf_kdtl.models.teachers.backbone import is_headless_path, open_backbone
from hf_kdtl.models.teachers.resolve import open_classifier
from hf_kdtl.reports.evaluation_summary import speed_table


@dataclass
class ExportOptions:
    """What to export, and where to."""

    student: str = field(metadata={"help": "A folder or Hub name, with or without a classifier."})
    output: str = field(metadata={"help": "The file to write, such as student.onnx."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the pixels; by default what the student's image processor makes."}
    )
    batch_size: int = field(default=16, metadata={"help": "Images a forward, of the second timing; the first has 1."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the files where they exist."})
    int8: bool = field(default=False, metadata={"help": "Also <output>.int8.onnx, calibrated on --dataset."})
    max_drop: float = field(default=1.0, metadata={"help": "Points of test accuracy that int8 may lose."})


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, export, compare, time."""
    cli.quiet()
    types = (ExportOptions, DataOptions)
    options, data_options = cli.parse(*types, argv=argv, doc=__doc__)
    output = Path(options.output)
    check(options, output)
    typed = cli.typed_names(*types, argv=argv)
    builders.check_read(typed, () if options.int8 else ("train_images", "labels_per_class"))
    if options.int8:
        int8.check(options.max_drop, typed, data_options)
    source = builders.existing(options.student)
    student = opened(source, options.int8)
    pixels = random_pixels(source, student, options)
    tqdm.write(f"{builders.summary(student)}: exporting for pixels {tuple(pixels.shape[1:])} and any batch.")
    exported, difference = written(student, pixels, output)
    tqdm.write(f"{output}: {output.stat().st_size / 1e6:.1f} MB, largest difference of an output {difference:.1e}.\n")
    forms: dict[str, Any] = {"onnx": exported}
    images = None
    if options.int8:
        images = int8.Images(source, student, data_options)
        for note in images.notes:
            tqdm.write(note)
        forms["int8"] = int8.written(output, images, options.max_drop)
    timing = timed(student, forms, pixels[: max(options.batch_size, 1)])
    tqdm.write(
        f"{speed_table(Speed.of(timing))}\n\nMedian of a forward on the CPU, threads: {torch.get_num_threads()}."
    )
    if images is not None:
        int8.report(output, images, forms, timing, options.max_drop, source)


def opened(source: str, quantized: bool) -> Any:
    """The student, a classifier or without a head.

    Raises:
        ValueError: for int8 without a head, or with several labels an image.
    """
    headless = is_headless_path(source)
    if headless and quantized:
        raise ValueError(
            f"--int8 is kept by its accuracy on test images, and the student {source} has no classifier. Leave --int8 "
            f"out, or give it a head first: hf-kdtl train-teacher --model {quote(source)} --dataset <labelled images>."
        )
    student = (open_backbone if headless else open_classifier)(source, role="the student", dtype=torch.float32)
    for note in student.unread:
        tqdm.write(note)
    int8.check_one_label(quantized and is_multi_label(student.model))
    return student.model.eval()


def check(options: ExportOptions, output: Path) -> None:
    """What can be wrong before the model is read.

    Raises:
        ValueError: saying what to type.
    """
    check_installed()
    if output.is_dir():
        raise ValueError(f"{output} is a folder; expected a file: --output {quote(str(output / 'student.onnx'))}.")
    for file in (output, *([int8.path_of(output)] if options.int8 else [])):
        if file.exists() and not options.overwrite:
            raise ValueError(f"{file} exists. Give another --output, or replace it: --overwrite true.")
    for name in ("image_size", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected 1 or more.")


def random_pixels(source: str, student: Any, options: ExportOptions) -> Tensor:
    """Normal noise of the size of the student's pixels, the same at each call."""
    size: tuple[int, ...] = (3, options.image_size, options.image_size) if options.image_size else ()
    if not size:
        blank = Image.new("RGB", (64, 64))
        size = tuple(builders.processor_of(source, student)(blank, return_tensors="pt")["pixel_values"].shape[1:])
    return torch.randn(max(options.batch_size, *BATCHES), *size, generator=torch.Generator().manual_seed(0))


def written(student: Any, pixels: Tensor, output: Path) -> tuple[OnnxModel, float]:
    """The file, moved to its place once it agrees with the student, and by how much it does not.

    Raises:
        ValueError: when it does not agree.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f"{output.name}.part")
    try:
        export_onnx(student, pixels, part)
        exported = OnnxModel(part)
        difference = largest_difference(student, exported, pixels)
        if difference > TOLERANCE:
            raise ValueError(
                f"the exported {type(student).__name__} is {difference:.1e} away from the student, expected "
                f"{TOLERANCE:.0e} at most: nothing was written. Try another version of torch or of onnxruntime."
            )
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
    return exported, difference


def timed(student: Any, forms: dict[str, Any], pixels: Tensor) -> dict[str, Any]:
    """The section `speed` of the student in torch and as the files, which take turns."""
    made = {("student", form): model for form, model in forms.items()}
    return speeds({"student": (student, pixels)}, ["eager", *forms], made)


if __name__ == "__main__":
    sys.exit(cli.run(main))
