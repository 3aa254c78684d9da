"""Measure students by more than accuracy, next to their teacher and the model that they would replace.

  hf-kdtl evaluate --models runs/mine/student --teacher runs/teacher/model --dataset my_images \\
      --baseline runs/mine/alone-seed42/model --output_dir runs/evaluation
  hf-kdtl evaluate --models runs/a/student runs/b/student --dataset my_images --degradations jpeg gaussian_blur

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
from hf_kdtl.commands.common import builders, folders
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.candidates import Evaluation, open_candidates
from hf_kdtl.commands.common.runs import say
from hf_kdtl.data.degradations import DEGRADATIONS, SEVERITIES, degradation
from hf_kdtl.data.loading import ImageData, load_images
from hf_kdtl.evaluation.results import FILE, load_results, read_results, update_results
from hf_kdtl.models.fingerprint import fingerprint
from hf_kdtl.reports.evaluation_sections import FIGURES
from hf_kdtl.reports.evaluation_summary import verdict_table
from hf_kdtl.reports.run_report import SPLITS, write_report


@dataclass
class EvaluateOptions:
    """Which models, and how much is measured."""

    models: list[str] = field(metadata={"help": "Folders or Hub names of the students to be judged."})
    teacher: str | None = field(default=None, metadata={"help": "A folder or Hub name."})
    baseline: str | None = field(
        default=None, metadata={"help": "A folder or Hub name: the model that is in use and would be replaced."}
    )
    split: str = field(default="test", metadata={"help": "Images to judge by.", "choices": list(SPLITS)})
    degradations: list[str] = field(
        default_factory=lambda: ["all"], metadata={"help": f"all, none, or some of {', '.join(DEGRADATIONS)}."}
    )
    severities: list[int] = field(default_factory=lambda: list(SEVERITIES), metadata={"help": "Some of 1 to 5."})
    images: int = field(
        default=1000,
        metadata={"help": "Degraded images and likeness to the teacher are measured on this many, drawn with seed 0."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the evaluation that output_dir holds."}
    )

    @property
    def chosen(self) -> list[str]:
        """The degradations by name. Raises ValueError for what there is not."""
        names = list(dict.fromkeys(self.degradations))
        if names in (["all"], ["none"]):
            names = list(DEGRADATIONS) if names == ["all"] else []
        for name in names:
            for severity in self.severities:
                degradation(name).check(severity)
        return names


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, judge every model, write results.json, report.md and pictures."""
    cli.quiet()
    options, data_options, config = cli.parse(EvaluateOptions, DataOptions, DistillationConfig, argv=argv, doc=__doc__)
    names, folder = options.chosen, folders.folder_of(config)
    if options.images < 1:
        raise ValueError(f"images is {options.images}, expected 1 or more.")
    check_folder(folder, options.overwrite_output_dir)
    run = folders.describe_run("evaluate_student", config, options, data_options)
    with config.main_process_first(local=False):
        data = images_of(data_options)
    notes: list[str] = []
    references = {"teacher": options.teacher, "baseline": options.baseline}
    candidates = open_candidates(options.models, references, data, notes)
    for candidate in candidates:
        notes += [note.replace("the teacher", candidate.name)
                  for note in builders.split_notes(candidate.path, data, data_options)]  # fmt: skip
    summaries = {one.name: f"{one.path}: {builders.summary(one.model)}" for one in candidates}
    say(config, *builders.describe_data(data), *(f"{who}: {what}" for who, what in summaries.items()))
    say(config, *(f"- {sentence}" for sentence in notes), folders.place(run))
    if config.process_index == 0:
        clear(folder)  # after everything that can be refused was checked
    evaluation = Evaluation(candidates, data, options.split, options.images, config)
    value = evaluation.section(names, sorted(set(options.severities)))
    for candidate in candidates:
        value["models"][candidate.name]["fingerprint"] = fingerprint(candidate.model)
    if config.process_index == 0:
        sections = {"run": run, "data": builders.facts(data, data_options), "evaluation": value}
        for section, found in (sections | {"pairing": summaries | {"notes": notes}}).items():
            update_results(folder, section, found)
        report = write_report(folder)
        say(config, f"\n{verdict_table(load_results(folder).evaluation)}", f"\nThe report is {report}.")


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises ValueError where a folder holds a training, or an evaluation that is not to be replaced."""
    if not (folder / FILE).is_file():
        return
    if (recipe := read_results(folder).get("run", {}).get("recipe")) != "evaluate_student":
        raise ValueError(f"{folder} holds a run of {recipe}; name another folder with --output_dir.")
    if not overwrite:
        raise ValueError(
            f"{folder} holds an evaluation. Replace it with --overwrite_output_dir true, or name another folder with "
            "--output_dir."
        )


def clear(folder: Path) -> None:
    """Remove an earlier evaluation: its pictures may be more than those of the new one."""
    pictures = [path for what in FIGURES for path in (*folder.glob(f"{what}.png"), *folder.glob(f"{what}-*.png"))]
    for path in (folder / FILE, folder / "report.md", *pictures):
        path.unlink(missing_ok=True)


def images_of(options: DataOptions) -> ImageData:
    """The splits. None is read now, as before a training: a bad image is found in the first pass over its split."""
    names = ("image_column", "label_column", "validation_fraction", "test_fraction", "on_bad_image")
    given: dict[str, Any] = {name: getattr(options, name) for name in names}
    return load_images(options.dataset, seed=options.split_seed, **given)


if __name__ == "__main__":
    sys.exit(cli.run(main))
