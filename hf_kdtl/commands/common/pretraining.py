"""hf-kdtl distill without any label: a student without a head learns a teacher's features from a folder of images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModel, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_kdtl import DistillationConfig, make_student
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import builders, folders, pretrained, runs, stored, timing
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.chosen import Chosen
from hf_kdtl.commands.common.defaults import listing
from hf_kdtl.commands.common.embedding_scores import check_labels, embeddings
from hf_kdtl.commands.common.folders import folder_of
from hf_kdtl.commands.common.streams import COUNTS_AS, Streamed, check_streaming
from hf_kdtl.commands.common.students import check_one_student
from hf_kdtl.commands.common.teachers import loading_options
from hf_kdtl.config import DEFAULT_OBJECTIVES
from hf_kdtl.data.duplicates import check_duplicates
from hf_kdtl.data.unlabelled import open_images
from hf_kdtl.evaluation import embeddings as ee
from hf_kdtl.models import Teacher
from hf_kdtl.models.teachers import StoredTeacher
from hf_kdtl.models.teachers.backbone import check_trainable, open_student
from hf_kdtl.models.teachers.sharded import sharded_options
from hf_kdtl.utils.options import check_known

FEATURES: list[dict[str, Any]] = [{"name": "feature_kd"}]
HELD_OUT = 2000


def asked(options: Any, config: DistillationConfig, typed: Iterable[str]) -> bool:
    """Whether a run has no labels to train by: --unlabelled, and no objective that reads labels or class outputs.

    Where nothing but --unlabelled says which images, the objectives are by default those on features.

    Raises:
        ValueError: for --streaming of any other run.
    """
    free = options.unlabelled not in (None, "rest")
    if free and config.objectives == DEFAULT_OBJECTIVES and not {"dataset", "objectives"} & {*typed}:
        config.objectives = FEATURES
    free = free and not any(one.compares_classes or one.needs_labels for one in config.build_objectives().values())
    if options.streaming and not free:
        raise ValueError(
            "--streaming is of runs without labels: type --unlabelled <shards> --teacher <a vision model>, and no "
            "objective that reads labels or class outputs."
        )
    return free


@dataclass
class Neighbours:
    """`compute_metrics` of a run on embeddings: kNN accuracy of the evaluation's images among labelled ones."""

    dataset: Any
    batch: int
    trainer: Any = None
    names: ClassVar = ["knn"]

    def __call__(self, predictions: Any) -> dict[str, float]:
        model = self.trainer.model
        mode = model.training
        bank, labels = embeddings(model.eval(), self.dataset, self.batch)
        model.train(mode)
        return {"knn": ee.knn_accuracy(bank, labels, predictions.predictions, predictions.label_ids)}


class Pretraining:
    """A run of `distill` for each seed, of a student without a head, on images without labels."""

    def __init__(
        self,
        options: Any,
        data_options: DataOptions,
        config: DistillationConfig,
        typed: set[str],
        in_parts: bool = False,
    ):
        """`in_parts`: under FSDP2 no process reads the teacher whole, but where a student is cut out of it."""
        self.options, self.data_options, self.config, self.typed = options, data_options, config, typed
        self.folder, self.seeds, self.notes = folder_of(config), options.seeds or [config.seed], list[str]()
        _check(options, config)
        if list(options.teacher_paths) != ["teacher"]:
            raise ValueError("a run without labels takes one teacher: type --teacher <folder or Hub name>.")
        path = options.teacher_paths["teacher"]
        if options.streaming:
            check_streaming(options, data_options, config, typed)
        self.stream: Streamed | None = None
        self.teacher: Any = self._opened(path, in_parts)
        self.live: Teacher | None = self.teacher
        if isinstance(self.teacher, StoredTeacher):
            self.live = self.teacher.live()
            self.typed = typed = stored.take_views({"teacher": self.teacher}, data_options, config, typed) or typed
        with config.main_process_first(local=False):
            self.train, self.held_out = self._images()
            self.labelled = builders.open_data(data_options) if "dataset" in typed else None
        if self.labelled is not None:
            check_labels(self.labelled)
            if self.stream is None:
                held = {name: getattr(self.labelled, name) for name in ("validation", "test")}
                check_duplicates(held | {"unlabelled": self.train}, self.notes)
        student = self.new_student()
        self.processor = self._processor(student)
        if "metric_for_best_model" not in typed:
            config.metric_for_best_model = "knn" if self.labelled is not None else "loss"
        known = {*typed, "metric_for_best_model"}
        kind = "random" if options.student_config else "pretrained" if options.student else "cut"
        budgeted, images = options.time_budget is not None, len(self.train) if self.stream is None else COUNTS_AS
        self.chosen = Chosen(student, kind, self.train, images, self.processor, known, config, data_options, budgeted)
        self.student_summary = builders.summary(student)

    def _opened(self, path: str, in_parts: bool) -> Any:
        options = self.options
        pool: Any = options.teacher_pool or "auto"
        loading = loading_options(options.teacher_dtype, cli.mapping("teacher_options", options.teacher_options))
        if in_parts and not options.cut_flags and not options.teacher_options:  # else copied, or placed otherwise
            _ = self.config.device  # begins the processes' group
            loading |= sharded_options(path)
        teacher = Teacher.from_pretrained(path, pool=pool, **loading)
        if teacher.facts().sharded:
            self.notes.append("the teacher is spread over the processes: pictures leave it out.")
        if isinstance(teacher, StoredTeacher) and pool != "auto":
            raise ValueError(f"teacher_pool is {pool!r}, and a store keeps what auto gives; leave it out.")
        return teacher

    def _images(self) -> tuple[Dataset, Dataset]:
        data = self.data_options
        if self.options.streaming:
            if self.teacher.needs_index:
                raise ValueError(
                    "the teacher is a store, which is looked up by the row of each image, and a stream has none. Name "
                    "the teacher itself, or leave --streaming out."
                )
            self.stream = Streamed(self.options.unlabelled, data, self.options.shuffle_buffer, self.notes)
            if any(one.needs_index for one in self.config.build_objectives().values()):
                self.notes.append("In a stream no image's own entry is left out of the bank of similarity.")
            return self.stream.held_out, self.stream.held_out  # the first, to look at
        images = open_images(
            self.options.unlabelled,
            image_column=data.image_column,
            on_bad_image=data.on_bad_image,  # type: ignore[arg-type]
            high_bit_depth=data.high_bit_depth,  # type: ignore[arg-type]
            notes=self.notes,
        )
        number = min(HELD_OUT, int(len(images) * data.validation_fraction))
        if number < 2 or len(images) - number < 2:
            raise ValueError(f"{len(images)} images without labels are too few; expected 16 or more.")
        order = np.random.default_rng(data.split_seed).permutation(len(images))
        self.notes.append(f"{number} of them are held out, for eval_loss.")
        return images.select(np.sort(order[number:])), images.select(np.sort(order[:number]))

    def new_student(self) -> Any:
        """The student before training."""
        options = self.options
        check_one_student(options)
        if options.student is not None:
            opened = open_student(options.student, dtype=torch.float32)
            self.notes += [note for note in opened.notes if note not in self.notes]  # opened again for each seed
            return opened.model
        if options.student_config is not None:
            settings = dict(cli.mapping("student_config", options.student_config))
            kind = settings.pop("model_type", None)
            check_known("model_type in student_config", kind, list(CONFIG_MAPPING))
            student = AutoModel.from_config(AutoConfig.for_model(kind, **settings))
            check_trainable(student)
            return student
        if options.student_layers is None:
            raise ValueError("a student of a run without labels is cut by --student_layers alone.")
        if self.live is None:
            raise ValueError("the student is cut out of the teacher, which is not where it was when it was stored.")
        return make_student(self.live, options.student_layers).float()

    def _processor(self, student: Any) -> Any:
        if self.options.student is not None:
            return builders.processor_of(self.options.student, student, self.notes)
        if self.options.cut_flags and self.teacher.processing_class is not None:
            return self.teacher.processing_class
        return builders.new_processor(student.config, self.options.image_size)

    def trainer(self, seed: int, folder: Path, config: DistillationConfig | None = None) -> Any:
        """The trainer of one run."""
        set_seed(seed)
        student = self.new_student()
        settings = runs.run_settings(config or self.config, folder, seed, self.config.entries)
        labelled, metrics = self.labelled, None
        if labelled is not None:
            metrics = Neighbours(builders.pixels(labelled.train, self.processor), settings.per_device_eval_batch_size)
        shown = self.held_out if labelled is None else labelled.validation
        trainer = runs.make_trainer(
            student, settings, self.processor, f"seed {seed}", teacher=self.teacher, compute_metrics=metrics,
            train_dataset=self._pixels(settings),
            eval_dataset=builders.pixels(shown, self.processor),
        )  # fmt: skip
        if metrics is not None:
            metrics.trainer = trainer
        return trainer

    def _pixels(self, settings: DistillationConfig) -> Any:
        if self.stream is not None:
            return self.stream.pixels(self.processor, self.data_options, settings)
        return builders.pixels(self.train, self.processor, self.data_options, config=settings)

    def folder_of_seed(self, seed: int) -> Path:
        """The folder of a run."""
        return self.folder / f"distilled-seed{seed}"


def _check(options: Any, config: DistillationConfig) -> None:
    """Refuse the settings of `distill` that a run without labels does not follow."""
    reasons = {
        "baseline": "it trains the student on its labels alone, and there are none",
        "adapter": "all of the student is trained; an adapter can be trained on labels afterwards",
        "stages": "a student without labels is cut once, by --student_layers",
    }
    for name, reason in reasons.items():
        value = getattr(options, name)
        if value and not (name == "stages" and value == 1):
            raise ValueError(f"{name} is {value!r} in a run without labels: {reason}. Leave it out.")


def main(options: Any, data_options: DataOptions, config: DistillationConfig, typed: set[str]) -> None:
    """Train every seed, keep the best by validation, and write results.json, report.md and pictures."""
    run = folders.describe_run("distill", config, options, data_options)
    budget = timing.check_budget(options.time_budget, typed)
    study = Pretraining(options, data_options, config, typed, in_parts=True)
    first = study.trainer(study.seeds[0], study.folder)
    runs.check_one_batch(first)
    maker = [lambda settings: study.trainer(study.seeds[0], folder_of(settings), settings)]
    duration = timing.settle_steps(study.chosen, maker, len(study.seeds), budget)
    live = study.teacher.modules()
    models = {"teacher": builders.summary(live[0]) if live else study.teacher.summary()}
    models |= {"student": study.student_summary}
    notes = [*study.teacher.notes, *first.distiller.notes]
    folders.begin(first, pretrained.sections(study, run, models, notes, first))
    runs.say(
        config, *(f"{who}: {what}" for who, what in models.items()), *(f"- {note}" for note in [*study.notes, *notes])
    )
    runs.say(config, *listing(study.chosen.defaults), folders.place(run), *duration)
    for seed in study.seeds:
        trainer = study.trainer(seed, study.folder_of_seed(seed))
        runs.train_and_save(trainer, study.folder_of_seed(seed).name, study.folder)
    if config.process_index == 0 or study.teacher.facts().sharded:  # of which each process holds a part
        pretrained.finish(study)
