"""Measure students by more than accuracy, next to their teacher and the model that they would replace.

  hf-kdtl evaluate --models runs/mine/student --teacher runs/teacher/model --dataset my_images \\
      --baseline runs/mine/alone-seed42/model --output_dir runs/evaluation
  hf-kdtl evaluate --models runs/a/student runs/b/student --dataset my_images --degradations jpeg gaussian_blur

Students without a head are judged by their embeddings: kNN, a linear probe and recall on labelled images, agreement
and CKA with the teacher.

With --multi_label true: mAP and F1 of models with several labels an image.

With --max_drop 2 it passes, or fails with exit code 1 (for scripts and CI): a student passes where all of the 95%
interval of its accuracy, compared on the same images, is at most 2 points below the teacher's.

Nothing is trained and nothing is chosen: evaluate on the test split once, when everything else is decided.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import builders, embedding_evaluation, folders, several_labels
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.candidates import Evaluation, open_candidates
from hf_kdtl.commands.common.runs import say
from hf_kdtl.commands.common.speed import DEFAULT, FORMS
from hf_kdtl.data.degradations import DEGRADATIONS, SEVERITIES, degradation
from hf_kdtl.data.loading import ImageData
from hf_kdtl.evaluation.results import FILE, load_results, update_results
from hf_kdtl.models.fingerprint import fingerprint
from hf_kdtl.models.teachers.backbone import is_headless_path
from hf_kdtl.reports.embedding import embedding_lines
from hf_kdtl.reports.evaluation_sections import FIGURES
from hf_kdtl.reports.evaluation_summary import passed, verdict_table, verdicts
from hf_kdtl.reports.figures.patches import PATCHES
from hf_kdtl.reports.run_report import SPLITS, table, write_report
from hf_kdtl.utils.options import check_known

QUICK_SEVERITIES = (1, 3, 5)


@dataclass
class EvaluateOptions:
    """Which models, and how much is measured."""

    models: list[str] = field(metadata={"help": "Folders or Hub names of the students to be judged."})
    teacher: str | None = field(default=None, metadata={"help": "A folder or Hub name."})
    templates: list[str] | None = field(
        default=None, metadata={"help": "Of a teacher of images and texts: its texts, as in distill."}
    )
    baseline: str | None = field(
        default=None, metadata={"help": "A folder or Hub name: the model that is in use and would be replaced."}
    )
    split: str = field(default="test", metadata={"help": "Images to judge by.", "choices": list(SPLITS)})
    max_drop: float | None = field(
        default=None,
        metadata={
            "help": "Points of accuracy that a student may lose against the teacher (without one: the baseline). The "
            "report says pass or fail; the exit code is 1 unless every student passes."
        },
    )
    degradations: list[str] = field(
        default_factory=lambda: ["quick"],
        metadata={
            "help": "none, quick (severities 1, 3, 5 on 512 images), full (1 to 5 on 1000), or some of "
            f"{', '.join(DEGRADATIONS)}."
        },
    )
    severities: list[int] | None = field(default=None, metadata={"help": "Some of 1 to 5, in place of those."})
    images: int | None = field(
        default=None,
        metadata={"help": "Degraded images and likeness to the teacher are measured on this many, drawn with seed 0."},
    )
    speed: list[str] = field(
        default_factory=lambda: list(DEFAULT),
        metadata={"help": f"Forms to time: some of {', '.join(FORMS)}; or all, none. Compiling takes a minute."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the evaluation that output_dir holds."}
    )

    @property
    def chosen(self) -> list[str]:
        """The degradations by name. Raises ValueError for what there is not."""
        names = list(dict.fromkeys(self.degradations))
        if len(names) == 1 and names[0] in ("all", "full", "quick", "none"):
            names = [] if names == ["none"] else list(DEGRADATIONS)
        for name in names:
            for severity in self.chosen_severities:
                degradation(name).check(severity)
        return names

    @property
    def chosen_severities(self) -> list[int]:
        """The severities, rising."""
        default = QUICK_SEVERITIES if self.degradations == ["quick"] else SEVERITIES
        return sorted(set(default if self.severities is None else self.severities))

    @property
    def number(self) -> int:
        """Images of the longer measurements. Raises ValueError for none."""
        if self.images is not None and self.images < 1:
            raise ValueError(f"images is {self.images}, expected 1 or more.")
        return self.images or (1000 if self.degradations in (["all"], ["full"]) else 512)

    @property
    def forms(self) -> list[str]:
        """The forms whose speed is measured. Raises ValueError for an unknown one."""
        if self.speed in (["all"], ["none"]):
            return list(FORMS) if self.speed == ["all"] else []
        for form in self.speed:
            check_known("form of --speed", form, FORMS)
        return list(dict.fromkeys(self.speed))


def check_max_drop(options: EvaluateOptions) -> None:
    """Raises ValueError for a drop that is negative, or against nothing."""
    if options.max_drop is None:
        return
    if options.max_drop < 0:
        raise ValueError(f"max_drop is {options.max_drop}, expected 0 or more points, such as 2.")
    if options.teacher is None and options.baseline is None:
        raise ValueError("max_drop needs a model to compare with; add --teacher or --baseline.")


def main(argv: Sequence[str] | None = None) -> int:
    """Judge every model; write results.json, report and figures. Returns the exit code: 1 where a student fails."""
    cli.quiet()
    types = (EvaluateOptions, DataOptions, DistillationConfig)
    options, data_options, config = cli.parse(*types, argv=argv, doc=__doc__)
    names, number, forms, folder = options.chosen, options.number, options.forms, folders.folder_of(config)
    check_max_drop(options)
    check_folder(folder, options.overwrite_output_dir)
    typed, headless = cli.typed_names(*types, argv=argv), any(map(is_headless_path, options.models))
    builders.check_read(typed, () if headless else ("train_images", "labels_per_class"))
    run = folders.describe_run("evaluate_student", config, options, data_options)
    with config.main_process_first(local=False):
        data = builders.read_splits(data_options)  # a bad image is found in the first pass over its split
    notes: list[str] = []
    references = {"teacher": options.teacher, "baseline": options.baseline}
    if headless:
        embedding_evaluation.check(options, typed, data)
        data = builders.fewer_images(data, data_options)
        judged = embedding_evaluation.open_candidates(options.models, references, notes)
        for one in judged:
            notes += builders.split_notes(one.path, data, data_options, one.name)
        return judge_embeddings(judged, data, number, config, run, builders.facts(data, data_options), notes)
    if data.multi_label:
        several_labels.check(typed)
    candidates = open_candidates(options.models, references, data, notes, options.templates)
    for candidate in candidates:
        notes += builders.split_notes(candidate.path, data, data_options, candidate.name)
    summaries = {one.name: f"{one.path}: {builders.summary(one.model)}" for one in candidates}
    say(config, *builders.describe_data(data), *(f"{who}: {what}" for who, what in summaries.items()))
    say(config, *(f"- {sentence}" for sentence in notes), folders.place(run))
    if config.process_index == 0:
        clear(folder)  # after everything that can be refused was checked
    if data.multi_label:
        value = several_labels.section(candidates, data, options.split, config)
    else:
        evaluation = Evaluation(candidates, data, options.split, number, config, forms)
        say(config, evaluation.time_needed(names, options.chosen_severities))
        value = evaluation.section(names, options.chosen_severities) | {"max_drop": options.max_drop}
    for candidate in candidates:
        value["models"][candidate.name]["fingerprint"] = fingerprint(candidate.model)
    facts, pairing = builders.facts(data, data_options), summaries | {"notes": notes}
    return reported(config, {"run": run, "data": facts, "evaluation": value, "pairing": pairing})


def reported(config: DistillationConfig, sections: dict[str, Any]) -> int:
    """Write results.json and the report, by the first process, and print the outcome. Returns the exit code."""
    if config.process_index > 0:
        return 0
    folder = folders.folder_of(config)
    for section, value in sections.items():
        update_results(folder, section, value)
    report, results = write_report(folder), load_results(folder)
    answers = verdicts(results.evaluation)
    if results.is_evaluation:
        shown = [verdict_table(results.evaluation), *(line.replace("**", "") for line in answers.values())]
    else:
        lines = embedding_lines(results) or [table(results.evaluation)]
        shown = ["\n".join(lines)]
    say(config, *(f"\n{one}" for one in shown))
    say(config, f"\nThe report is {report}. In a browser: {report.with_suffix('.html')}.")
    return 0 if all(map(passed, answers.values())) else 1


def judge_embeddings(
    candidates: list[embedding_evaluation.EmbeddingCandidate],
    data: ImageData,
    number: int,
    config: DistillationConfig,
    run: dict[str, Any],
    facts: dict[str, Any],
    notes: list[str],
) -> int:
    """Judge students without a head, by the first process. Returns the exit code."""
    summaries = {one.name: f"{one.path}: {builders.summary(one.network)}" for one in candidates}
    say(config, *builders.describe_data(data), *(f"{who}: {what}" for who, what in summaries.items()))
    say(config, *(f"- {sentence}" for sentence in notes), folders.place(run))
    if config.process_index > 0:
        return 0
    clear(folders.folder_of(config))
    value = embedding_evaluation.section(candidates, data, number, config)
    return reported(config, {"run": run, "data": facts, "embedding": value, "pairing": summaries | {"notes": notes}})


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises ValueError where a folder holds a training, reports of the user, or an evaluation that is not to be
    replaced."""
    if not (files := written(folder)):
        return
    folders.check_written(folder, files, "evaluate_student")
    if not overwrite:
        raise ValueError(
            f"{folder} holds an evaluation. Replace it with --overwrite_output_dir true, or name another folder with "
            "--output_dir."
        )


def written(folder: Path) -> list[Path]:
    """What an evaluation has written into a folder, results.json last."""
    pictures = [path for what in FIGURES for path in (*folder.glob(f"{what}.png"), *folder.glob(f"{what}-*.png"))]
    found = [*(folder / name for name in (PATCHES, "report.md", "report.html")), *pictures, folder / FILE]
    return [path for path in found if path.exists()]


def clear(folder: Path) -> None:
    """Remove an earlier evaluation: its pictures may be more than those of the new one."""
    for path in written(folder):
        path.unlink()


if __name__ == "__main__":
    sys.exit(cli.run(main))
