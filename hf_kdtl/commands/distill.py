"""Train a student from a teacher, and compare it with the same student trained alone.

  hf-kdtl distill --config digits
  hf-kdtl distill --teacher runs/teacher/model --dataset my_images --student_flops 0.5 --output_dir runs/student \\
      --baseline true --seeds 1 2 3
  accelerate launch --config_file ddp.yaml -m hf_kdtl.commands.distill --config mine.yaml

It leaves in output_dir: student/ (a plain transformers model), report.md, results.json, pictures, and a folder a run.
After Ctrl-C the same command with --resume_from_checkpoint true continues. With --push_to_hub true the student is
published at the end, after access and license were checked at the start.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_kdtl import DistillationConfig
from hf_kdtl.commands import push
from hf_kdtl.commands.common import (
    advice,
    builders,
    chosen,
    folders,
    pretraining,
    runs,
    scores,
    stored,
    storing,
    timing,
)
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.defaults import listing
from hf_kdtl.commands.common.distill_options import DistillOptions
from hf_kdtl.commands.common.experiment import Experiment, in_words
from hf_kdtl.commands.common.next_command import classify, command, split_flags
from hf_kdtl.commands.common.runs import say
from hf_kdtl.commands.common.stages import train_run
from hf_kdtl.commands.common.store_worth import store_worth
from hf_kdtl.commands.common.students import student_start
from hf_kdtl.evaluation.cost import parameters
from hf_kdtl.evaluation.results import FILE, load_results, read_results, update_results
from hf_kdtl.hub.card_tables import evaluated_student
from hf_kdtl.hub.provenance import models_section
from hf_kdtl.models.fingerprint import fingerprint
from hf_kdtl.models.teachers.resolve import open_classifier
from hf_kdtl.models.teachers.source import called
from hf_kdtl.reports.run_report import difference, note, table, write_report


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, train every run, evaluate, write results.json, report.md and pictures."""
    cli.quiet()
    types = (DistillOptions, DataOptions, DistillationConfig)
    options, data_options, config = cli.parse(*types, argv=argv, doc=__doc__)
    typed = cli.typed_values(*types, argv=argv)
    budget = timing.check_budget(options.time_budget, typed)
    folders.check_resumes_all(config)
    chosen.put_in(chosen.restored(config, typed) or [], config, data_options, typed)
    free = pretraining.asked(options, config, typed)
    run = folders.describe_run("distill", config, options, data_options)
    folders.check_folder(config, run, options.overwrite_output_dir)
    check_cache(options, free)
    pushing = push.planned(config, options.teacher_paths.values(), options.student)
    if free:
        pretraining.main(options, data_options, config, set(typed))
    else:
        train(Experiment(options, data_options, config, typed, in_parts=True), typed, budget, argv)
    if pushing is not None:
        say(config, push.published(push.push(pushing, config.hub_token), pushing))


def train(
    experiment: Experiment, typed: Mapping[str, Any], budget: float | None, argv: Sequence[str] | None = None
) -> None:
    """Every run of a student with labels, and what they are worth."""
    options, config = experiment.options, experiment.config
    filling = None if options.cache is None else storing.fill(experiment, typed)
    begin(experiment, budget, argv)
    for arm, seed, folder in experiment.runs():
        train_run(experiment, arm, seed, folder)
        if filling is not None:
            filling.flush()
    experiment.open_teacher()
    scores.evaluate(experiment)
    if config.process_index == 0:
        record_fingerprint(experiment)
        write_report(experiment.folder)
        say(config, *summary(experiment), *ending(experiment))


def check_cache(options: DistillOptions, pretraining: bool) -> None:
    """Raises ValueError for runs whose teacher's outputs are not stored as they are met."""
    if options.cache is not None and (pretraining or options.stages > 1):
        why = "pretraining without labels" if pretraining else "--stages, whose students pair other layers,"
        raise ValueError(f"--cache is not for {why}; leave it out.")


def begin(experiment: Experiment, budget: float | None, argv: Sequence[str] | None = None) -> None:
    """Check one batch, claim output_dir, and write and print what is known before training."""
    options, data_options, config = experiment.options, experiment.data_options, experiment.config
    first = experiment.trainer("distilled", experiment.seeds[0], experiment.folder)
    runs.check_one_batch(first)
    assert experiment.chosen is not None
    duration = timing.settle_steps(experiment.chosen, experiment.makers(), len(experiment.seeds), budget)
    run = folders.describe_run("distill", config, options, data_options)
    notes = [*experiment.notes, *(first.teacher.notes if first.teacher else []), *first.distiller.notes]
    notes += seen_before(experiment)
    members = first.teacher.members() if first.teacher else {}
    live = {name: model for name, one in members.items() if (model := one.classifier()) is not None}
    models = {in_words(name): builders.summary(model) for name, model in live.items()}
    models |= {"student": experiment.student_summary}
    sections = {
        "run": run,
        "defaults": experiment.chosen.record(),
        "data": builders.facts(experiment.data, data_options, experiment.images.unlabelled)
        | experiment.images.facts(config.per_device_train_batch_size),
        "objectives": config.objectives,
        "models": models_section(first, student_start(options, first.model, experiment.kept)),
        "pairing": models | {"notes": notes},
    }
    folders.begin(first, sections)
    say(config, *builders.describe_data(experiment.data), *(f"{role}: {text}" for role, text in models.items()))
    say(config, *(f"- {sentence}" for sentence in notes), *listing(experiment.chosen.defaults))
    say(config, folders.place(run), *duration)
    long = not experiment.chosen.continued and experiment.chosen.steps >= timing.WORTH_MEASURING
    if long and (worth := store_worth(experiment, first, argv)):
        say(config, worth)


def seen_before(experiment: Experiment) -> list[str]:
    """A warning for each model that the student learns or starts from and that has seen test images."""
    options = experiment.options
    models = {called(name): stored.model_path(path) for name, path in options.teacher_paths.items()}
    models |= {} if options.student is None else {"the student": options.student}
    given = experiment.data, experiment.data_options
    return [note for who, path in models.items() for note in builders.split_notes(path, *given, who)]


def record_fingerprint(experiment: Experiment) -> None:
    """Write the hash of the weights of student/, by which an evaluation recognizes this student."""
    section = read_results(experiment.folder)["models"]
    model = open_classifier(experiment.folder / "student").model
    section["student"]["fingerprint"] = fingerprint(model)
    if section["student"]["adapters"] is not None:  # student/ is a plain model, with the adapters in its weights
        section["student"] |= {"merged": True, "parameters": parameters(model)}
    update_results(experiment.folder, "models", section)
    say(experiment.config, *without_other_student(experiment.folder, section["student"]["fingerprint"]))


def without_other_student(folder: Path, weights: str) -> list[str]:
    """Take out of results.json what was measured of another student, which the run kept before it had more seeds."""
    results, notes = load_results(folder), []
    measured: dict[str, Any] = {} if results.export is None else {"export": results.export}
    if (judged := results.student_evaluation) is not None:
        measured["student_evaluation"] = evaluated_student(judged.evaluation)
    for name, found in measured.items():
        if found.fingerprint != weights:
            update_results(folder, name, None)
            notes.append(f"{name} in {folder / FILE} was of another student and is taken out; measure this one again.")
    return notes


def summary(experiment: Experiment) -> list[str]:
    """The table, the difference, where the student is, and the next commands."""
    results, folder = load_results(experiment.folder), experiment.folder
    image, student = folder / "example.png", folder / "student"
    return [
        f"\n{table(results.evaluation)}\n\n{note(results)}",
        difference(results),
        f"\nThe student is in {student}, the report in {folder / 'report.md'}. Next, evaluate it, or use it:\n",
        f"  {evaluation_command(experiment, results.evaluation.student_seed)}",
        f"  {classify(student, image)}",
    ]


def ending(experiment: Experiment) -> list[str]:
    """What is off with the finished runs."""
    assert experiment.chosen is not None
    labels = experiment.data.validation["label"][:]
    return advice.of_run(load_results(experiment.folder), labels, experiment.chosen.steps)


def evaluation_command(experiment: Experiment, seed: int | None) -> str:
    """`hf-kdtl evaluate` for the student of this seed, on the same splits."""
    options, folder = experiment.options, experiment.folder
    first = next(iter(experiment.scored), None)
    paths = {name: stored.model_path(path) for name, path in options.teacher_paths.items()}
    teacher = options.student if options.teacher == "self" else paths.get(first or "")
    alone = folder / f"alone-seed{seed}" / "model"
    texts = [" ".join(["--templates", *map(shlex.quote, options.templates)])] if options.templates else []
    return command(
        "evaluate",
        split_flags(experiment.data_options),
        *texts,
        models=folder / "student",
        teacher=teacher if experiment.scored else None,
        baseline=alone if options.baseline else None,
        output_dir=folder / "evaluation",
        overwrite_output_dir="true" if (folder / "evaluation").exists() else None,
        use_cpu="true" if experiment.config.use_cpu else None,
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
