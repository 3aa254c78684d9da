"""Storing a teacher's outputs, beforehand (`cache`) or while a run trains (`distill --cache auto`)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.distill_options import DistillOptions
from hf_kdtl.commands.common.experiment import Experiment
from hf_kdtl.commands.common.folders import resumes
from hf_kdtl.commands.common.store_text import too_large
from hf_kdtl.data.filling import FillingTeacher
from hf_kdtl.data.store import Request, StoreWriter
from hf_kdtl.hub.license import license_of
from hf_kdtl.models.forward.capture import Needs
from hf_kdtl.models.teachers import shown
from hf_kdtl.models.teachers.store import signals
from hf_kdtl.models.teachers.store.manifest import GB, ROWS, is_store

VIEWS, TEACHER_BATCH = 20, 64
MAX_GB = 20.0  # of a store, unless --max_gb allows more
CUTS = ("layers", "heads", "mlp", "width", "flops", "parameters", "importance")
STUDENTS = ("student", "student_config", *(f"student_{name}" for name in CUTS))
HOW = ("output", "info", "max_gb", "seeds", "baseline", "time_budget", "overwrite_output_dir", "cache")
"""Settings that say where and how a command runs, not what is stored."""
FURTHER = ("objectives", "layer_rates", "view_seed", "start", "teacher_pixels")
"""Settings of DistillationConfig that say what is stored."""


def settings_of(typed: Mapping[str, Any], *kinds: Any) -> dict[str, Any]:
    """Of the settings that were typed, those that say what is stored."""
    names = {f.name for kind in kinds for f in fields(kind)} - {*HOW} | {*FURTHER}
    return {name: _plain(value) for name, value in typed.items() if name in names and value is not None}


def _plain(value: Any) -> Any:
    """A list that holds one JSON text, as flags give it, is that text."""
    one = isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) and value[0].startswith("[")
    return value[0] if one else value


def needs_of(trainer: Any) -> Needs:
    """What a trainer's objectives and layer rates read of the teacher.

    Raises:
        ValueError: for one whose needs cannot be stored, naming it.
    """
    distiller, needs = trainer.distiller, Needs()
    for key in distiller.objectives:
        objective = distiller.objective(key)
        if objective.source == "teacher" and objective.needs_teacher:
            plan = distiller.plans.get("teacher")
            own = objective.needs(plan)[1] | Needs(logits=objective.compares_classes)
            sample = objective.sample_needs(plan) if objective.sample else Needs()
            needs |= storable(f"objective {key!r}", own | sample)
    if distiller.rates is not None:
        needs |= storable("layer_rates", distiller.rates.source_needs[1])
    return needs


def storable(who: str, needs: Needs) -> Needs:
    """The needs as they are stored. Raises ValueError where they cannot be, naming who has them."""
    if reason := signals.unstorable(needs):
        raise ValueError(f"{who}: it cannot be stored, because {reason}.")
    return signals.storable(needs)


def check_folder(folder: Path) -> None:
    """Raises ValueError where a store would lie among other files, some of which it would replace or remove."""
    begun = is_store(folder) or (folder / ROWS).is_file()  # which is written first
    if not begun and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"{folder} holds other files than a store; name a new or an empty folder for it.")


def check_size(writer: StoreWriter, missing: float, max_gb: float | None = None) -> None:
    """Raises ValueError where it is more than --max_gb or the disk holds, with what would shrink it."""
    if max_gb is not None and missing > max_gb * GB:
        raise ValueError(
            f"the store would take {missing / GB:.2f} GB more and --max_gb is {max_gb:g}: "
            f"{too_large(writer.manifest, missing, max_gb * GB)}, or raise --max_gb."
        )
    place = next(path for path in (writer.folder, *writer.folder.resolve().parents) if path.exists())
    if missing > (free := shutil.disk_usage(place).free):
        raise ValueError(
            f"the store would take {missing / GB:.2f} GB more and the disk of {writer.folder} has {free / GB:.2f} GB "
            f"free: {too_large(writer.manifest, missing, free)}, or name another disk "
            f"({'--cache' if max_gb is None else '--output'})."
        )


def fill(experiment: Experiment, typed: Mapping[str, Any]) -> FillingTeacher:
    """Give an experiment's runs a teacher whose outputs are stored as they are met: `distill --cache auto`.

    Args:
        typed: {setting: value} that the user gave.

    Raises:
        ValueError: for a teacher that is not one live model, and as `needs_of`, `check_size` and `StoreWriter`.
    """
    options, data_options, config = experiment.options, experiment.data_options, experiment.config
    teacher = experiment.teacher
    if teacher is None or experiment.stores or options.teacher == "self":
        found = "several teachers" if len(experiment.teachers) > 1 else f"teacher {options.teacher!r}"
        raise ValueError(f"--cache stores what one live model gives, and found {found}; leave it out.")
    check_folder(folder := store_folder(experiment))
    trainer = experiment.trainer("distilled", experiment.seeds[0], experiment.folder)
    needs = needs_of(trainer)
    teacher.match(trainer.model, experiment.processor, compare_classes=False)  # in its own order of classes
    teacher.to(config.device)
    augmented = trainer.train_dataset.augmentation
    views = (data_options.views or VIEWS) if augmented is not None else 1
    batch = options.teacher_batch or config.per_device_train_batch_size
    augmentation = {} if augmented is None else augmented.config
    settings = settings_of(typed, DistillOptions, DataOptions)
    settings |= {"augmentation": augmentation, "dataset": data_options.dataset, "views": views, "teacher_batch": batch}
    request = Request(needs, views, batch, settings=settings, license=license_of(str(options.teacher)))
    source: Any = shown(teacher, config.teacher_pixels)
    writer = StoreWriter(folder, source, trainer.train_dataset, request)
    check_size(writer, writer.bytes_to_write())
    barrier()
    if config.process_index == 0:
        writer.begin(filling=True)
    barrier()
    filling = experiment.stores["teacher"] = FillingTeacher(writer, config.process_index)
    if experiment.chosen is not None:  # the steps may be chosen again, and the views may not
        experiment.chosen.typed["augmentation"] = data_options.augmentation
    experiment.notes.append(_repeats(experiment, writer))
    return filling


def store_folder(experiment: Experiment) -> Path:
    """Of `--cache auto`, in output_dir: what is left there by a run that is removed goes too."""
    options, config = experiment.options, experiment.config
    if options.cache != "auto":
        return Path(str(options.cache))
    folder = experiment.folder / "cache"
    if options.overwrite_output_dir and not resumes(config) and config.process_index == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return folder


def _repeats(experiment: Experiment, writer: StoreWriter) -> str:
    """What the store will save."""
    passes, every = passes_of(experiment)
    taught = round(every / passes)
    views, size = writer.manifest.views, writer.manifest.bytes / GB
    runs = f"{passes:.1f} passes" if taught == 1 else f"{taught} runs of {passes:.1f} passes"
    where = "output_dir/cache" if experiment.options.cache == "auto" else "the folder of --cache"
    text = f"--cache: {views} views of {writer.manifest.images} images, {size:.2f} GB in {where}; {runs}"
    if every > views:
        return f"{text}, of which the teacher runs in about {100 * views / every:.0f} %."
    return (
        f"{text}: no view recurs, so nothing is saved here; another run with --teacher <that folder> reads it. Fewer "
        f"--views recur, such as {max(1, int(passes // 2))}."
    )


def passes_of(experiment: Experiment) -> tuple[float, float]:
    """Passes over the images: of one run, and of all that have a teacher."""
    config = experiment.config
    batches = experiment.images.batches(config.per_device_train_batch_size)
    passes = experiment.steps() * config.world_size * config.gradient_accumulation_steps / batches
    return passes, passes * len(experiment.seeds) * sum(arm.taught for arm in experiment.arms.values())


def barrier() -> None:
    """Wait for the other processes, where there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
