"""The students and the runs of `distill` and `preflight`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import adapters, builders, runs, stored
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.chosen import Chosen
from hf_kdtl.commands.common.cutting import planned
from hf_kdtl.commands.common.distill_options import DistillOptions
from hf_kdtl.commands.common.folders import folder_of
from hf_kdtl.commands.common.labels import training_images
from hf_kdtl.commands.common.students import new_student, student_processor, student_start
from hf_kdtl.commands.common.teachers import loading_options, name_classes, open_teachers, scorable
from hf_kdtl.models import Needs, Teacher
from hf_kdtl.models.teachers.source import called
from hf_kdtl.trainer.teacher_checks import check_teacher_usage


def in_words(name: str) -> str:
    """What results and reports call a teacher, by the name of its source: "teacher", or "teacher a" of several."""
    return name if name == "teacher" else f"teacher {name}"


@dataclass
class Arm:
    """A way of training the student, of which there is a run for each seed."""

    objectives: list[dict[str, Any]]
    taught: bool = True
    unlabelled: bool = True  # whether images without labels are trained on, where there are any


def check_labelled(options: DistillOptions, typed: Iterable[str] | None) -> None:
    """Raises ValueError for images without labels beside none with labels that the user named."""
    if options.unlabelled not in (None, "rest") and "dataset" not in (typed or ["dataset"]):
        raise ValueError(
            "--unlabelled adds images to labelled ones, and these objectives read labels or class outputs: type "
            "--dataset <labelled images> (digits are built in), or --objectives feature_kd, which reads neither."
        )


class Experiment:
    """All runs of `distill`: for each seed the student with its teacher and (baseline) alone, weights the same.

    With images without labels there are three arms: alone and distilled on the labelled images (`labelled`), and
    distilled on all (`distilled`). All train for the same number of steps.
    """

    def __init__(
        self,
        options: DistillOptions,
        data_options: DataOptions,
        config: DistillationConfig,
        typed: Iterable[str] | None = None,
        in_parts: bool = False,
    ):
        """With `typed`, the names that the user gave, all other settings become the defaults of the commands.

        `in_parts`: under FSDP2 no process reads a teacher whole, but where its weights are copied (a cut student) or
        it does not run on every process alike (--cache)."""
        self.options, self.config = options, config
        self.in_parts = in_parts and not options.cut_flags and options.cache is None and not options.teacher_options
        self.folder = folder_of(config)
        self.seeds = options.seeds or [config.seed]
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}, expected different ones.")
        self.notes: list[str] = []
        check_labelled(options, typed)
        is_self = options.teacher == "self"
        check_teacher_usage(options.teacher, config)  # before any is read
        names = ("class_names", "templates", "teacher_dtype", "teacher_options")
        if not options.teacher_paths and (given := [name for name in names if getattr(options, name) is not None]):
            raise ValueError(f"--{given[0]} is of a saved teacher; add --teacher <folder>, or leave it out.")
        self.teachers, self.stores = stored.opened(options, self._open, self.notes)
        self.parted = {name for name, teacher in self.teachers.items() if teacher.facts().sharded}
        typed = stored.take_views(self.stores, data_options, config, typed)
        with config.main_process_first(local=False):
            data = builders.open_data(data_options)
        name_classes(self.teachers, data)
        student = new_student(options, self.teacher, data, self.notes)
        if is_self:
            adapters.check_self(student, options.student, config)
        # A teacher of other classes (lwf) cannot be scored on these.
        self.scored = {name: one for name, one in self.teachers.items() if scorable(student, one)}
        self.notes += [f"{called(n)} is spread over the processes: pictures leave it out." for n in self.parted]
        for name, teacher in self.teachers.items():
            if name not in self.scored:
                headless = teacher.unserved(Needs(logits=True))
                why = "has no trained head" if headless else "answers in other classes"
                self.notes.append(f"{called(name)} {why}: it is not scored on these images.")
        self.data = data.in_order(student)
        self.images = training_images(self.data, options, data_options, self.notes)
        self.arms = self._arms()
        self.data_options = data_options
        self.processor = student_processor(options, self.teacher, student, self.notes)
        self.chosen = None if typed is None else self._choose(student, typed)
        self.notes += self.images.note(config.per_device_train_batch_size)
        self.student_summary, self.kept = builders.summary(student), None
        if options.cut is not None and self.teacher is not None:
            self.kept = planned(self.teacher, options.cut, data)[0].in_words()
            self.student_summary += f", cut out of the teacher: {self.kept}"

    def _open(self, paths: dict[str, str]) -> dict[str, Teacher]:
        compared = {one.source for one in self.config.build_objectives().values() if one.compares_classes}
        options = self.options
        loading = loading_options(options.teacher_dtype, cli.mapping("teacher_options", options.teacher_options))
        texts = options.class_names, options.templates
        if self.in_parts:
            _ = self.config.device  # begins the processes' group
        return open_teachers(paths, compared, *texts, self.in_parts, **loading) if paths else {}

    @property
    def teacher(self) -> Teacher | None:
        """The only teacher; None of several."""
        return self.teachers.get("teacher")

    @property
    def source(self) -> Any:
        """What a trainer is given as its teacher."""
        if self.options.teacher == "self":
            return "self"
        return stored.source(self.teachers, self.stores)

    def _choose(self, student: Any, typed: Iterable[str]) -> Chosen:
        kind = "adapter" if self.options.adapter else student_start(self.options, student)["how"]
        train, batch = self.images.all, 32  # any: of an epoch that repeats images only the length counts
        images = len(train) if self.images.unlabelled is None else batch * self.images.batches(batch)
        budgeted = self.options.time_budget is not None
        settings = self.config, self.data_options
        return Chosen(student, kind, train, images, self.processor, typed, *settings, budgeted)

    def _arms(self) -> dict[str, Arm]:
        """The student alone comes first, the one that is kept last."""
        config = self.config
        arms = {"distilled": Arm(config.entries)}
        if not self.options.baseline:
            return arms
        if config.rate_options is not None and config.rate_options.measured:
            self.notes.append("the student alone has no teacher to measure layer_rates by: one learning rate there.")
        task = [entry | {"weight": 1.0} for entry in config.entries if entry["name"] == "task"]
        if self.images.unlabelled is not None:
            arms = {"labelled": Arm(config.entries, unlabelled=False)} | arms
        return {"alone": Arm(task or runs.TASK, taught=False, unlabelled=False)} | arms

    def trainer(
        self,
        arm: str,
        seed: int,
        folder: Path,
        config: DistillationConfig | None = None,
        student: Any = None,
    ) -> Any:
        """The trainer of one run, and with it the student, which depends on the seed alone and not on the arm.

        `config` and `student` replace those of the experiment.
        """
        self._reopen_sharded()
        set_seed(seed)
        student = self.new_student() if student is None else student
        this = self.arms[arm]
        settings = runs.run_settings(config or self.config, folder, seed, this.objectives, this.taught)
        if settings.max_steps <= 0 and self.images.unlabelled is not None:
            settings.max_steps = self.steps()  # an epoch of the labelled images alone is shorter
        images, share = self.images.labelled, None
        if this.unlabelled:
            images, share = self.images.all, self.images.share
        return runs.make_trainer(
            student,
            settings,
            self.processor,
            f"{arm}, seed {seed}",
            teacher=self.source if this.taught else None,
            train_dataset=builders.pixels(
                images, self.processor, self.data_options, share, settings, self.source if this.taught else None
            ),
            eval_dataset=builders.pixels(self.data.validation, self.processor),
        )

    def new_student(self) -> Any:
        """The student before training."""
        return new_student(self.options, self.teacher, self.data, [])

    def steps(self) -> int:
        """Optimizer steps of the student that is kept: of all arms, so that they can be compared."""
        config = self.config
        if config.max_steps > 0:
            return config.max_steps
        batches = self.images.batches(config.per_device_train_batch_size)
        a_step = config.world_size * config.gradient_accumulation_steps
        return math.ceil(config.num_train_epochs * math.ceil(batches / a_step))

    def open_teacher(self) -> None:
        """The teacher to score: of `--teacher self`, the student as it started. During training no copy is held."""
        self._reopen_sharded()
        if self.source == "self":
            assert self.options.student is not None
            teacher = Teacher.from_pretrained(self.options.student)
            self.teachers = self.scored = {"teacher": teacher}
            if not scorable(teacher.classifier(), teacher):
                self.scored = {}

    def _reopen_sharded(self) -> None:
        """Read the teachers again that were read whole, and that a run has left sharded (FSDP2)."""
        sharded = [n for n, one in self.teachers.items() if one.facts().sharded and n not in self.parted]
        self.teachers |= self._open({name: self.options.teacher_paths[name] for name in sharded})
        name_classes(self.teachers, self.data)
        self.scored = {name: self.teachers[name] for name in self.scored}

    def makers(self) -> list[Callable[[DistillationConfig], Any]]:
        """For each arm, its trainer with given settings."""
        seed = self.seeds[0]

        def maker(arm: str) -> Callable[[DistillationConfig], Any]:
            return lambda config: self.trainer(arm, seed, folder_of(config), config)

        return [maker(arm) for arm in self.arms]

    def runs(self) -> list[tuple[str, int, Path]]:
        """(arm, seed, folder) of every run."""
        return [(arm, seed, self.folder / f"{arm}-seed{seed}") for seed in self.seeds for arm in self.arms]
