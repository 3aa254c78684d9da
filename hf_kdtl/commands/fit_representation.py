"""Compress a layer of a teacher into a few coefficients, for the objective `bregman`.

  hf-kdtl fit-representation --teacher runs/teacher/model --dataset my_images --k 8 --output_dir runs/layer
  hf-kdtl fit-representation --teacher runs/teacher/model --dataset my_images --output_dir runs/layer \\
      --of attention --layer 7 --explained 0.9

After Ctrl-C the same command with --resume true continues.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

import hf_kdtl
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import builders
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.folders import check_written
from hf_kdtl.commands.common.next_command import command, split_flags, student_flags
from hf_kdtl.data import ImageDataset
from hf_kdtl.data.decoding import decode_row
from hf_kdtl.evaluation.cost import device_name
from hf_kdtl.evaluation.representation import explained_by, extremes
from hf_kdtl.evaluation.results import FILE, read_results, same_value, update_results
from hf_kdtl.functional.bregman import Representation, fit
from hf_kdtl.models import Teacher
from hf_kdtl.models.bregman.layer import JSON, TENSORS, BregmanLayer, Provenance
from hf_kdtl.models.bregman.outputs import check_of, needs_of, outputs_of, width_of
from hf_kdtl.reports.figures.representation import PICTURE, representation_figure

RECIPE = "fit_representation"
ROWS, SHOWN, BEGUN = "rows.npy", "shown.txt", "directions.safetensors"
FREE = ("output_dir", "resume", "overwrite_output_dir", "batch_size", "tolerance", "passes")
SAMPLE = 4000  # rows that the picture is made from


@dataclass
class RepresentationOptions:
    """Which outputs of which teacher, and how many coefficients."""

    teacher: str = field(metadata={"help": "A folder or Hub name of an image classifier."})
    output_dir: str = field(metadata={"help": "Where the representation goes."})
    of: str = field(
        default="probabilities",
        metadata={"help": "probabilities, pooled, hidden_states or attention (class token's)."},
    )
    layer: int | None = field(default=None, metadata={"help": "Block of hidden_states and attention, from 0."})
    link: str | None = field(
        default=None, metadata={"help": "Of pooled: identity (default), tanh for a tanh pooler, leaky_relu."}
    )
    k: int | None = field(default=None, metadata={"help": "The number of coefficients."})
    explained: float | None = field(
        default=None, metadata={"help": "Instead of k: the share of the divergence to explain, such as 0.9."}
    )
    images: int | None = field(default=None, metadata={"help": "Of train; by default all of them."})
    batch_size: int = field(default=256, metadata={"help": "Images a forward of the teacher."})
    tolerance: float = field(default=1e-5, metadata={"help": "Stop where a pass brings less than this share."})
    passes: int = field(default=200, metadata={"help": "Passes over the outputs, at most."})
    resume: bool = field(default=False, metadata={"help": "Continue what output_dir holds."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Remove what output_dir holds."})


class Rows:
    """Outputs in a file, as batches on a device: read again at each pass, never held together."""

    def __init__(self, path: Path, device: torch.device, size: int = 8192):
        self.rows, self.device, self.size = np.load(path, mmap_mode="r"), device, size

    def __iter__(self) -> Iterator[Tensor]:
        for first in range(0, len(self.rows), self.size):
            yield torch.from_numpy(np.array(self.rows[first : first + self.size])).to(self.device)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, capture the outputs, fit, write the layer, its picture and results.json."""
    cli.quiet()
    types = (RepresentationOptions, DataOptions)
    options, data_options = cli.parse(*types, argv=argv, doc=__doc__)
    builders.check_read(cli.typed_names(*types, argv=argv))
    link, folder = check_of(options.of, options.layer, options.link), Path(options.output_dir)
    if (options.k is None) == (options.explained is None):
        raise ValueError("expected one of --k <number of coefficients> and --explained <share, such as 0.9>.")
    settings = {k: v for k, v in (asdict(options) | asdict(data_options)).items() if k not in FREE}
    remains = leftovers(folder, options, settings)
    teacher = Teacher.from_pretrained(builders.existing(options.teacher))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = builders.open_data(data_options)
    images = _images(options, teacher.to(device), data)
    width_of(options.of, options.layer, teacher.geometry(builders.batch_of(images, [0]).to(device)))  # or it says why
    for path in remains:  # after everything that can be refused was checked
        path.unlink()
    place = device_name(device)
    update_results(folder, "run", {"recipe": RECIPE, "settings": settings, "device": place})
    update_results(folder, "data", builders.facts(data, data_options))
    tqdm.write(
        f"{builders.summary(teacher.classifier())}: {options.of} of {len(images)} images, link {link}, {place}."
    )
    write_rows(teacher, images, options, folder, device)
    rows = Rows(folder / ROWS, device)
    found = fitted(rows, link, options, folder)
    facts = {"width": rows.rows.shape[1], "dataset": (folder / SHOWN).read_text(), "images": len(images)}
    provenance = Provenance.of_source(teacher, options.of, options.layer, version=hf_kdtl.__version__, **facts)
    BregmanLayer(found, provenance).save(folder)
    report(found, provenance, rows, images, folder)
    for name in (ROWS, SHOWN, BEGUN):
        Path(folder, name).unlink()
    flags = [split_flags(data_options), student_flags(teacher.classifier(), teacher.processing_class)]
    tqdm.write(summary(found, options, *flags))


def leftovers(folder: Path, options: RepresentationOptions, settings: dict[str, Any]) -> list[Path]:
    """What is to be removed from output_dir first: nothing where a fit continues.

    Raises:
        ValueError: when it holds another fit, or the same with other settings, or what no fit has written; saying
            what to type.
    """
    remains = [p for name in (ROWS, SHOWN, BEGUN, JSON, TENSORS, PICTURE, FILE) if (p := folder / name).exists()]
    if remains:
        check_written(folder, remains, RECIPE)
    if options.resume and remains:
        before = read_results(folder)["run"]["settings"]
        for name, value in settings.items():
            if not same_value(before.get(name), value):
                raise ValueError(
                    f"{folder} was begun with {name} {before.get(name)!r} and is asked to continue with {value!r}. "
                    "Set it back, or start over: --resume false --overwrite_output_dir true."
                )
        if (folder / JSON).is_file():
            raise ValueError(f"{folder} is finished; nothing is left to do.")
        return []
    if remains and not options.overwrite_output_dir:
        raise ValueError(
            f"{folder} holds another fit. Continue it with --resume true, remove it with --overwrite_output_dir true, "
            "or name another folder."
        )
    return remains


def _images(options: RepresentationOptions, teacher: Teacher, data: Any) -> ImageDataset:
    total, number = len(data.train), options.images
    if number is not None and not 2 <= number <= total:
        raise ValueError(f"images is {number}, expected 2 to {total} (all of train).")
    chosen = data.train if number is None else data.train.shuffle(seed=0).select(range(number))
    processor = teacher.processing_class or builders.new_processor(teacher.classifier().config)
    return ImageDataset(chosen, processor)


@torch.no_grad()
def write_rows(
    teacher: Teacher, images: ImageDataset, options: RepresentationOptions, folder: Path, device: torch.device
) -> None:
    """Run the teacher once over the images and keep its outputs, (n, d) in float32, unless it was done before.

    To a file and not to memory: the hidden states of 50,000 images are some 10 GB.
    """
    if (folder / SHOWN).is_file():
        return tqdm.write("the teacher's outputs are there from before.")
    needs, digest, part, done = needs_of(options.of, options.layer), hashlib.blake2b(digest_size=16), None, 0
    for first in tqdm(range(0, len(images), options.batch_size), desc="Teacher", leave=False, disable=None):
        pixels = builders.batch_of(images, range(first, min(first + options.batch_size, len(images))))
        digest.update(pixels.numpy().data)
        got = outputs_of(teacher.capture(pixels.to(device), needs), options.of, options.layer).float().cpu()
        rows = got.flatten(0, -2).numpy()
        if part is None:
            shape = (len(images) * len(rows) // len(pixels), rows.shape[1])
            part = np.lib.format.open_memmap(folder / ROWS, mode="w+", dtype=np.float32, shape=shape)
        part[done : done + len(rows)] = rows
        done += len(rows)
    assert part is not None
    part.flush()
    (folder / SHOWN).write_text(digest.hexdigest())  # last: the rows are complete


def fitted(rows: Rows, link: str, options: RepresentationOptions, folder: Path) -> Representation:
    """The fit, with a bar over its passes. The directions are saved after each, so that it can resume from there."""
    start = None
    if options.k is not None and (folder / BEGUN).is_file():
        start = load_file(folder / BEGUN)["directions"]
        tqdm.write("the fit resumes from its saved directions.")

    def kept(step: int, now: Representation) -> None:
        bar.update()
        bar.set_postfix(k=now.directions.shape[1], explained=f"{now.explained:.4f}")
        save_file({"directions": now.directions.cpu().contiguous()}, folder / f"{BEGUN}.part")
        (folder / f"{BEGUN}.part").replace(folder / BEGUN)

    k = options.k if options.k is not None else options.explained
    assert k is not None
    with tqdm(desc="Fit", unit=" passes", leave=False, disable=None) as bar:
        return fit(rows, k, link, tolerance=options.tolerance, passes=options.passes, start=start, callback=kept)


def report(found: Representation, provenance: Provenance, rows: Rows, images: ImageDataset, folder: Path) -> None:
    """The section `representation` of results.json, and the picture."""
    stride = -(-len(rows.rows) // SAMPLE)  # every so many-th row: of hidden states all kinds of tokens
    sample = torch.from_numpy(np.array(rows.rows[::stride])).to(rows.device)
    shares = explained_by(found, sample)
    value = {"link": found.link.name, "k": len(shares), "explained": found.explained, "divergence": found.divergence}
    value |= {"baseline": found.baseline, "spectrum": found.spectrum, "explained_by_first": shares}
    update_results(folder, "representation", value | {"provenance": asdict(provenance)})
    if provenance.of == "probabilities":
        names = provenance.classes or [f"class {i}" for i in range(provenance.width)]
        return representation_figure(folder / PICTURE, found, shares, names=names)
    per_image = len(rows.rows) // provenance.images
    owners = [i * stride // per_image for i in range(len(sample))]
    ends = extremes(found.encode(sample), owners)
    sheets = [([_image(images, i) for i in low], [_image(images, i) for i in high]) for low, high in ends]
    representation_figure(folder / PICTURE, found, shares, sheets=sheets)


def _image(images: ImageDataset, index: int) -> Any:
    return decode_row(images.split[index]["image"], index, len(images))


def summary(found: Representation, options: RepresentationOptions, *flags: str) -> str:
    """What came out, and the next command."""
    entry = {"name": "bregman", "weight": float(f"{1 / found.baseline:.2g}"), "representation": options.output_dir}
    folder = Path(options.output_dir)
    objectives = json.dumps(["task", entry])
    student = command(
        "distill", *flags, teacher=options.teacher, objectives=objectives, output_dir=folder.parent / "student"
    )
    return (
        f"\n{found.directions.shape[1]} coefficients explain {100 * found.explained:.2f} % of the divergence "
        f"({found.baseline:.4f} from the mean). It is in {options.output_dir}, its picture in "
        f"{Path(options.output_dir, PICTURE)}. Next, a student that imports it:\n\n  {student}"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
