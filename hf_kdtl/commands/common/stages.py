"""Progressive cutting: the student is cut in several steps, and trained after each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import builders, runs
from hf_kdtl.commands.common.cutting import planned, scored
from hf_kdtl.commands.common.experiment import Experiment
from hf_kdtl.evaluation.results import read_results, update_results
from hf_kdtl.models import Teacher
from hf_kdtl.models.cutting.families import sizes_between, sizes_of
from hf_kdtl.models.student import build, plan_sizes


def train_run(experiment: Experiment, arm: str, seed: int, folder: Path) -> None:
    """Train one run of an experiment, in the stages that were asked for.

    Stage i of S cuts the student of the stage before, the first one the teacher, to sizes on the way to the final
    ones (each stage by the same factor), and trains it for 1 / S of the steps. All but the last lie in stage-<i> below
    the run's folder; an interrupted run continues with the stage that it was in.
    """
    stages = experiment.options.stages
    if stages == 1:
        return runs.train_and_save(experiment.trainer(arm, seed, folder), folder.name, experiment.folder)
    if experiment.options.adapter is not None:
        raise ValueError("--stages trains all weights of each stage's student; leave --adapter out.")
    before, rows = None, []
    for stage in range(1, stages + 1):
        place = folder if stage == stages else folder / f"stage-{stage}"
        student, plan = _student(experiment, before, stage)
        config = _settings(experiment, stage)
        rows.append({"stage": stage, "kept": plan.in_words(), "parameters": plan.after.parameters}
                    | {"flops": plan.after.flops, "steps": config.max_steps})  # fmt: skip
        trainer = experiment.trainer(arm, seed, place, config, student)
        runs.say(config, f"{folder.name}, stage {stage} of {stages}: {plan.in_words()}")
        runs.train_and_save(trainer, _name(folder, stage, stages), experiment.folder)
        before = place
    if experiment.config.process_index == 0:
        _join(experiment.folder, folder.name, rows)


def _student(experiment: Experiment, before: Path | None, stage: int) -> tuple[Any, Any]:
    """The student of a stage, cut out of the model of the stage before, and its plan."""
    options, teacher = experiment.options, experiment.teacher
    assert options.cut is not None and teacher is not None
    final, _ = planned(teacher, options.cut, experiment.data)
    model = teacher.classifier() if before is None else runs.load(before)
    sizes = sizes_between(teacher.classifier().config, final.full, final.sizes, stage / options.stages)
    scores = None
    if sizes != sizes_of(model):
        source = Teacher(copy.deepcopy(model), experiment.processor)
        scores = scored(source, options.cut.importance, experiment.data)
    plan = plan_sizes(model, sizes, scores)
    return builders.named(build(model, plan, scores).float(), experiment.data.label_names), plan


def _settings(experiment: Experiment, stage: int) -> DistillationConfig:
    """The settings of a stage: its share of the steps, and of the warm-up."""
    config, stages = copy.copy(experiment.config), experiment.options.stages
    total = experiment.steps()
    if total < stages:
        raise ValueError(f"{total} steps for {stages} stages; expected one each at least: type --max_steps.")
    config.max_steps = total // stages + (total % stages if stage == stages else 0)
    if config.warmup_steps >= 1:
        config.warmup_steps = int(config.warmup_steps // stages)
    for name in ("eval_steps", "save_steps"):  # else a short stage would end without a best model
        value = getattr(config, name)
        if value is not None and value > config.max_steps:
            setattr(config, name, config.max_steps)
    return config


def _name(folder: Path, stage: int, stages: int) -> str:
    return folder.name if stage == stages else f"{folder.name}-stage{stage}"


def _join(results: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """One curve of all stages, steps counted through, and the section `stages`."""
    found = read_results(results)
    curves, log, first = dict(found["curves"]), [], 0
    for row in rows:
        part = curves.pop(f"{name}-stage{row['stage']}", None)
        part = curves[name] if part is None else part
        log += [entry | {"step": entry["step"] + first, "stage": row["stage"]} for entry in part]
        first += row["steps"]
    if any("stage" in entry for entry in curves[name]):
        return  # joined before: the run was finished and is continued
    update_results(results, "curves", curves | {name: log})
    update_results(results, "stages", found.get("stages", {}) | {name: rows})
