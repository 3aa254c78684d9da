"""Run the teacher once, over every training image in several views, and store its outputs for training.

  hf-kdtl cache --config mine.yaml --views 50 --output cache/
  hf-kdtl cache --teacher runs/teacher/model --dataset my_images --student_flops 0.5 --objectives task logit_kd \\
      --augmentation '{"crop": 4, "flip": true}' --views 50 --precision float16 --output cache/
  hf-kdtl distill --config mine.yaml --teacher cache/
  hf-kdtl cache --info cache/

It takes the settings of hf-kdtl distill, for the student decides which layers pair and which pixels are seen; with
--image_size in place of a student, objectives on class outputs can be stored. With --unlabelled alone it is for a run
without labels. It stores what the objectives need and nothing else. Interrupted, the same command continues. With the
--output of an existing store it adds what is new: --views 80, more images, --objectives with other needs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import builders, pretraining, stored, storing
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.distill_options import DistillOptions
from hf_kdtl.commands.common.experiment import Experiment
from hf_kdtl.commands.common.runs import say
from hf_kdtl.commands.common.store_text import described, next_steps
from hf_kdtl.commands.common.timing import words
from hf_kdtl.data.store import Request, StoreWriter
from hf_kdtl.hub.license import license_of
from hf_kdtl.models import Teacher
from hf_kdtl.models.forward.capture import Needs
from hf_kdtl.models.teachers import shown
from hf_kdtl.models.teachers.store.manifest import GB, is_store, read_manifest
from hf_kdtl.utils.options import check_option, is_integer


@dataclass
class CacheOptions(DistillOptions):
    """What to store, and where."""

    output: str | None = field(default=None, metadata={"help": "The folder of the store."})
    precision: str = field(default="float32", metadata={"help": "float32, or float16: half the size."})
    top_k: int | None = field(default=None, metadata={"help": "Keep the largest class outputs alone; by default all."})
    max_gb: float = field(default=storing.MAX_GB, metadata={"help": "Stop where the store would be larger."})
    info: str | None = field(default=None, metadata={"help": "Show what is in this store, and write nothing."})


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, show size and time, write what is missing."""
    cli.quiet()
    types = (CacheOptions, DataOptions, DistillationConfig)
    options, _, config = cli.parse(*types, argv=argv, doc=__doc__)
    if options.info is not None:
        return say(config, described(options.info))
    if options.output is None:
        raise ValueError("found no --output; expected the folder of the store, such as --output cache/.")
    storing.check_folder(Path(options.output))
    flags, settings = with_stored_settings(options.output, cli.typed_values(*types, argv=argv))
    options, data_options, config = cli.parse(*types, argv=flags)
    _check(options)
    writer = planned(options, data_options, config, set(settings), settings)
    missing, seconds = writer.bytes_to_write(), writer.seconds_to_write() / config.world_size
    say(config, f"{described(writer.manifest)}\nTo write: {missing / GB:.2f} GB, about {words(seconds)}.")
    storing.check_size(writer, missing, options.max_gb)
    storing.barrier()
    if config.process_index == 0:
        writer.begin()
    storing.barrier()
    _write(writer, config)
    storing.barrier()
    say(config, f"Written. Train from it:\n  {next_steps(options.output, settings)}")


def with_stored_settings(output: str, typed: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The command's flags, and those of them that say what is stored: what was typed, and of an existing store what it
    was written with."""
    kept = storing.settings_of(typed, CacheOptions, DataOptions)
    before = read_manifest(output).settings if is_store(output) else {}
    if any(name in kept for name in storing.STUDENTS):
        before = {name: value for name, value in before.items() if name not in storing.STUDENTS}
    settings = before | kept
    rest = {name: value for name, value in typed.items() if name not in kept and value is not None}
    return stored.flags(settings | rest), settings


def planned(
    options: CacheOptions,
    data_options: DataOptions,
    config: DistillationConfig,
    typed: set[str],
    settings: dict[str, Any],
) -> StoreWriter:
    """The writer of a store for these settings.

    Raises:
        ValueError: for an objective whose needs cannot be stored, naming it.
    """
    if options.teacher_paths.keys() != {"teacher"}:
        raise ValueError(f"teacher is {options.teacher!r}; expected one model: --teacher <a folder or Hub name>.")
    own = {"dataset": data_options.dataset}
    if pretraining.asked(options, config, typed):
        own = {"objectives": json.dumps(config.objectives)}
        needs, data, processor, teacher, student = _without_labels(options, data_options, config, typed)
    elif options.cut_flags or options.student is not None or options.student_config is not None:
        needs, data, processor, teacher, student = _with_student(options, data_options, config, typed)
    else:
        needs, data, processor, teacher, student = _without_student(options, data_options, config)
    augmentation = {} if data.augmentation is None else data.augmentation.config
    settings |= {"augmentation": augmentation} | own
    teacher.match(student, processor, compare_classes=False)  # in its own order of classes
    teacher.to(config.device)
    views = data_options.views or storing.VIEWS if augmentation else 1
    batch = options.teacher_batch or storing.TEACHER_BATCH
    its_license = license_of(str(options.teacher))
    request = Request(needs, views, batch, options.precision, options.top_k, settings, its_license)
    source: Any = shown(teacher, config.teacher_pixels)
    return StoreWriter(str(options.output), source, data, request)


def _with_student(
    options: CacheOptions, data_options: DataOptions, config: DistillationConfig, typed: set[str]
) -> tuple[Needs, Any, Any, Teacher, Any]:
    """What the objectives of this student need, and what it trains on."""
    experiment = Experiment(options, data_options, config, typed)
    assert experiment.teacher is not None
    trainer = experiment.trainer("distilled", experiment.seeds[0], Path(str(options.output)))
    needs = storing.needs_of(trainer)
    return needs, trainer.train_dataset, experiment.processor, experiment.teacher, trainer.model


def _without_labels(
    options: CacheOptions, data_options: DataOptions, config: DistillationConfig, typed: set[str]
) -> tuple[Needs, Any, Any, Teacher, Any]:
    """What the objectives of a run without labels need, and what it trains on: not the images it holds out."""
    if options.teacher_pool not in (None, "auto"):
        raise ValueError(f"teacher_pool is {options.teacher_pool!r}, and a store keeps what auto gives; leave it out.")
    study = pretraining.Pretraining(options, data_options, config, typed)
    trainer = study.trainer(study.seeds[0], Path(str(options.output)))
    return storing.needs_of(trainer), trainer.train_dataset, study.processor, study.teacher, trainer.model


def _without_student(
    options: CacheOptions, data_options: DataOptions, config: DistillationConfig
) -> tuple[Needs, Any, Any, Teacher, Any]:
    """What objectives need that no student changes."""
    full_size = config.teacher_pixels == "own"
    if options.image_size is None and not full_size:
        raise ValueError(
            "found no student; its pixels are what the teacher is shown. Type the student's flags as for hf-kdtl "
            "distill (--student, --student_config or --student_layers), or --image_size <pixels> (or --teacher_pixels "
            "own)."
        )
    needs = Needs()
    for key, objective in config.build_objectives().items():
        if objective.needs_plan and objective.needs_teacher:
            raise ValueError(
                f"objective {key!r} pairs layers of a student with the teacher's; type the student's flags too: "
                "--student, --student_config or --student_layers."
            )
        if objective.source == "teacher" and objective.needs_teacher:
            own = objective.needs(None)[1] | Needs(logits=objective.compares_classes)
            needs |= storing.storable(f"objective {key!r}", own)
    data = builders.open_data(data_options)
    teacher = Teacher.from_pretrained(str(options.teacher))
    processor = teacher.processing_class if full_size else None
    if options.image_size is not None or processor is None:
        processor = builders.new_processor(SimpleNamespace(image_size=options.image_size), options.image_size)
    images = builders.pixels(data.train, processor, data_options, config=config, teacher=teacher)
    return needs, images, processor, teacher, nn.Identity()


def _write(writer: StoreWriter, config: DistillationConfig) -> None:
    rank, processes = config.process_index, config.world_size
    images = writer.images_to_write(rank, processes)
    with tqdm(total=images, unit="image", desc="teacher", disable=rank != 0 or config.disable_tqdm or None) as bar:
        writer.write(rank, processes, config.dataloader_num_workers, bar.update)


def _check(options: CacheOptions) -> None:
    for name in ("teacher_batch", "top_k"):
        value = getattr(options, name)
        check_option("hf-kdtl cache", name, value, value is None or is_integer(value), "a whole number of at least 1")
    precise = options.precision in ("float32", "float16")
    check_option("hf-kdtl cache", "precision", options.precision, precise, "float32 or float16")


if __name__ == "__main__":
    sys.exit(cli.run(main))
