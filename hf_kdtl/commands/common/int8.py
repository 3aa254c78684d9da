"""The int8 file of `hf-kdtl export`: calibrated, scored on all of test, and refused where it loses too much."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_kdtl.commands.common import builders
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.data.digests import digests
from hf_kdtl.evaluation.cost import device_name
from hf_kdtl.evaluation.json_records import FILE
from hf_kdtl.evaluation.records import Export
from hf_kdtl.evaluation.results import read_results, update_results
from hf_kdtl.export import CALIBRATION_IMAGES, OnnxModel, quantize_onnx
from hf_kdtl.hub.model_card import write_card
from hf_kdtl.reports.export_section import export_sentence, export_table
from hf_kdtl.reports.run_report import write_report

BATCH = 64


def check_one_label(several: bool) -> None:
    """Raises ValueError for a student or images with several labels an image, of which there is no accuracy."""
    if several:
        raise ValueError(
            "--int8 is kept by its accuracy on test images, and these have several labels an image. Leave --int8 out; "
            "the float32 file is compared with the student itself."
        )


def check(max_drop: float, typed: Iterable[str], options: DataOptions) -> None:
    """What --int8 needs.

    Raises:
        ValueError: saying what to type.
    """
    check_one_label(options.multi_label)
    if "dataset" not in typed:
        raise ValueError(
            "--int8 is calibrated on training images and scored on test images, and none were given: type --dataset "
            "<those of the student>, and its --split_seed."
        )
    if max_drop < 0:
        raise ValueError(f"max_drop is {max_drop}, expected 0 or more points, such as 0.5.")


class Images:
    """What a file is calibrated on and scored on: the splits, in the student's order of classes."""

    def __init__(self, source: str, student: Any, options: DataOptions):
        data, processor = builders.open_data(options).in_order(student), builders.processor_of(source, student)
        number = len(data.train)
        rows = sorted({i * number // CALIBRATION_IMAGES for i in range(CALIBRATION_IMAGES)})
        self.calibration = builders.batch_of(builders.pixels(data.train, processor), rows)
        self.test = builders.pixels(data.test, processor)
        self.digest = digests({"test": data.test})["test"]
        self.notes = builders.split_notes(source, data, options, "the student")
        self.scores: dict[str, float] = {}

    def accuracy(self, model: Any) -> float:
        """Of a file, on all test images with a label."""
        right = labelled = 0
        for start in tqdm(range(0, len(self.test), BATCH), desc="test images", leave=False, disable=None):
            rows = self.test.__getitems__(list(range(start, min(start + BATCH, len(self.test)))))
            labels = torch.tensor([int(row["labels"]) for row in rows])
            predicted = model(pixel_values=torch.stack([row["pixel_values"] for row in rows])).logits.argmax(1)
            right += int((predicted == labels).sum())
            labelled += int((labels >= 0).sum())
        return right / max(labelled, 1)


def path_of(output: Path) -> Path:
    """student.onnx -> student.int8.onnx"""
    return output.with_name(f"{output.stem}.int8{output.suffix or '.onnx'}")


def written(output: Path, images: Images, max_drop: float) -> OnnxModel:
    """The int8 file of a float32 one, in its place once it is accurate enough.

    Raises:
        ValueError: when it loses more than `max_drop` points.
    """
    part = path_of(output).with_name(f"{path_of(output).name}.part")
    try:
        tqdm.write(f"int8: calibrating on {len(images.calibration)} training images, scoring both on all test images.")
        quantize_onnx(output, images.calibration, part)
        model = OnnxModel(part)
        exact, found = (images.accuracy(one) for one in (OnnxModel(output), model))
        if (lost := 100 * (exact - found)) > max_drop:
            raise ValueError(
                f"in int8 the student loses {lost:.2f} points of test accuracy ({100 * exact:.2f} % in float32, "
                f"{100 * found:.2f} % in int8), more than --max_drop {max_drop:g}: {path_of(output)} was not written, "
                f"{output} was. Train it for int8 (hf-kdtl distill --quantize int8), or allow more: --max_drop "
                f"{lost + 0.1:.1f}."
            )
        part.replace(path_of(output))
    finally:
        part.unlink(missing_ok=True)
    images.scores = {"onnx": exact, "int8": found}
    return model


def report(
    output: Path, images: Images, forms: dict[str, Any], timing: dict[str, Any], max_drop: float, source: str
) -> None:
    """Print what int8 costs, and write it to the student's run where there is one with these test images: results,
    report and card."""
    section = {
        "accuracy": images.scores,
        "file_bytes": {"onnx": output.stat().st_size, "int8": path_of(output).stat().st_size},
        "images": len(images.test),
        "calibration_images": len(images.calibration),
        "max_drop": max_drop,
        "speed": timing,
        "device": device_name(torch.device("cpu")),
    }
    record = Export.of(section)
    tqdm.write(f"\n{export_table(record)}\n\n{export_sentence(record)}")
    folder = Path(source).parent
    if Path(source).name != "student" or not (folder / FILE).is_file():
        return
    found = read_results(folder)
    if found.get("run", {}).get("recipe") != "distill":
        return
    if found.get("data", {}).get("digests", {}).get("test") != images.digest:
        return tqdm.write(
            f"Not written to {folder}: these are not the test images of that run. Type the --dataset, --split_seed, "
            "--validation_fraction and --test_fraction of the run, with --overwrite true."
        )
    update_results(folder, "export", section | {"fingerprint": found["models"]["student"]["fingerprint"]})
    write_report(folder)
    tqdm.write(f"Written to {folder / 'report.md'} and {write_card(folder)}.")
