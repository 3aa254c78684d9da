"""Train or fine-tune an image classifier: a teacher for hf-kdtl distill.

hf-kdtl train-teacher --config digits_teacher
hf-kdtl train-teacher --model google/vit-base-patch16-224 --dataset my_images --output_dir runs/teacher
hf-kdtl train-teacher --model_config '{"model_type": "vit", "image_size": 32, "patch_size": 4}' ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import builders, runs
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.runs import TASK, say
from hf_kdtl.config import DEFAULT_OBJECTIVES
from hf_kdtl.data.loading import ImageData
from hf_kdtl.evaluation.metrics import paired_scores
from hf_kdtl.evaluation.results import read_results, update_results
from hf_kdtl.reports.run_report import SPLITS, note, table, write_report


@dataclass
class TeacherOptions:
    """Which model, and what to do with an output_dir that is in use."""

    model: str | None = field(default=None, metadata={"help": "A folder or Hub name, to be fine-tuned."})
    model_config: dict | str | None = field(
        default=None, metadata={"help": 'To train from random weights, as JSON: {"model_type": "vit", ...}.'}
    )
    image_size: int | None = field(default=None, metadata={"help": "Pixels, for a model_config that has no size."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Remove the run that output_dir holds."})


def build(options: TeacherOptions, data: ImageData, notes: list[str]) -> tuple[Any, Any, ImageData]:
    """(model, image processor, the data in the model's class order)."""
    if (options.model is None) == (options.model_config is None):
        raise ValueError("expected one of --model <folder or Hub name> and --model_config '{\"model_type\": ...}'.")
    if options.model is None:
        settings = cli.mapping("model_config", options.model_config)
        model = builders.from_config(settings, data.label_names, "model_config")
        return model, builders.new_processor(model.config, options.image_size), data
    model = builders.pretrained(options.model, data.label_names, notes)
    return model, builders.processor_of(options.model, model, notes), data.in_order(model)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, train, evaluate, write results.json and report.md."""
    cli.quiet()
    options, data_options, config = cli.parse(TeacherOptions, DataOptions, DistillationConfig, argv=argv, doc=__doc__)
    if config.objectives == DEFAULT_OBJECTIVES:
        config.objectives = TASK
    run = runs.described("train_teacher", config, options, data_options)
    runs.check_folder(config, run, options.overwrite_output_dir)
    with config.main_process_first(local=False):
        data = builders.open_data(data_options)
    notes: list[str] = []
    set_seed(config.seed)
    model, processor, data = build(options, data, notes)
    trainer = runs.make_trainer(
        model,
        config,
        processor,
        "teacher",
        train_dataset=builders.pixels(data.train, processor, data_options, config.seed),
        eval_dataset=builders.pixels(data.validation, processor),
    )
    runs.try_once(trainer)
    sections = {
        "run": run,
        "data": builders.facts(data, data_options),
        "objectives": config.objectives,
        "pairing": {"model": builders.summary(model), "notes": notes},
    }
    runs.begin(trainer, sections)
    say(config, *builders.told(data), builders.summary(model), *notes, runs.place(run))
    runs.train_and_save(trainer, "teacher")
    evaluate(config, data, processor)
    if config.process_index == 0:
        write_report(config.output_dir)
        say(config, *farewell(config, options, data_options))


def evaluate(config: DistillationConfig, data: ImageData, processor: Any) -> None:
    """Score validation and, now that nothing is chosen any more, test."""
    model = runs.load(config.output_dir)
    datasets = {split: builders.pixels(getattr(data, split), processor) for split in SPLITS}
    found = {split: paired_scores(*runs.predict(model, dataset, config)) for split, dataset in datasets.items()}
    cost = runs.measured({"teacher": (model, datasets["test"])}, config)["teacher"]
    value = {"models": {"teacher": cost | {"runs": {str(config.seed): found}}}}
    if config.process_index == 0:
        update_results(config.output_dir, "evaluation", value | {"batch_size": config.per_device_eval_batch_size})


def farewell(config: DistillationConfig, options: TeacherOptions, data_options: DataOptions) -> list[str]:
    """Where everything is, the table, and the next command."""
    folder, results = Path(config.output_dir), read_results(config.output_dir)
    return [
        f"\n{table(results)}\n\n{note(results)}",
        f"\nThe model is in {folder / 'model'}, the report in {folder / 'report.md'}. Next, a student of it:\n",
        f"  {runs.interpreter()} hf-kdtl distill --teacher {folder / 'model'} --dataset {data_options.dataset} "
        f"{builders.student_hint(runs.load(folder))} --baseline true --output_dir runs/student",
    ]


if __name__ == "__main__":
    sys.exit(cli.run(main))
