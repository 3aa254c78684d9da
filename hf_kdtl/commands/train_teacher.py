"""Train or fine-tune an image classifier, to be a teacher for hf-kdtl distill.

  hf-kdtl train-teacher --config digits_teacher
  hf-kdtl train-teacher --model google/vit-base-patch16-224 --dataset my_images --output_dir runs/teacher
  hf-kdtl train-teacher --dataset my_images --output_dir runs/teacher \\
      --model_config '{"model_type": "vit", "image_size": 32, "patch_size": 4}'

It leaves in output_dir: model/ (a plain transformers model with its image processor), report.md and results.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import set_seed

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import advice, builders, folders, runs, timing
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.chosen import Chosen, put_in, restored
from hf_kdtl.commands.common.defaults import listing
from hf_kdtl.commands.common.folders import folder_of
from hf_kdtl.commands.common.next_command import command, settings_of_init, split_flags, student_flags
from hf_kdtl.commands.common.runs import TASK, say
from hf_kdtl.config import DEFAULT_OBJECTIVES
from hf_kdtl.data.loading import ImageData
from hf_kdtl.evaluation.metrics import paired_scores
from hf_kdtl.evaluation.results import load_results, update_results
from hf_kdtl.reports.run_report import SPLITS, note, table, write_report


@dataclass
class TeacherOptions:
    """Which model, and what to do with an output_dir that is in use."""

    model: str | None = field(default=None, metadata={"help": "A folder or Hub name, to be fine-tuned."})
    model_config: dict | str | None = field(
        default=None, metadata={"help": 'To train from random weights, as JSON: {"model_type": "vit", ...}.'}
    )
    image_size: int | None = field(default=None, metadata={"help": "Pixels, for a model_config that has no size."})
    time_budget: str | None = field(default=None, metadata={"help": "As many steps as fit: 20min."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Remove the run that output_dir holds."})


def build(options: TeacherOptions, data: ImageData, notes: list[str]) -> tuple[Any, Any, ImageData]:
    """(model, image processor, the data in the model's class order)."""
    if (options.model is None) == (options.model_config is None):
        raise ValueError("expected one of --model <folder or Hub name> and --model_config '{\"model_type\": ...}'.")
    if options.model is None:
        settings = cli.mapping("model_config", options.model_config)
        model = builders.answering(builders.from_config(settings, data.label_names, "model_config"), data)
        return model, builders.new_processor(model.config, options.image_size), data
    model = builders.answering(builders.pretrained(options.model, data.label_names, notes), data)
    return model, builders.processor_of(options.model, model, notes), data.in_order(model)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, train, evaluate, write results.json and report.md."""
    cli.quiet()
    types = (TeacherOptions, DataOptions, DistillationConfig)
    options, data_options, config = cli.parse(*types, argv=argv, doc=__doc__)
    typed = cli.typed_names(*types, argv=argv)
    budget = timing.check_budget(options.time_budget, typed)
    if config.objectives == DEFAULT_OBJECTIVES:
        config.objectives = TASK
    put_in(restored(config, typed) or [], config, data_options, typed)
    run = folders.describe_run("train_teacher", config, options, data_options)
    folders.check_folder(config, run, options.overwrite_output_dir)
    with config.main_process_first(local=False):
        data = builders.open_data(data_options)
    train(options, data_options, config, data, typed, budget)


def train(
    options: TeacherOptions,
    data_options: DataOptions,
    config: DistillationConfig,
    data: ImageData,
    typed: set[str],
    budget: float | None,
) -> None:
    """From the settings to the final model, its scores and the report."""
    notes: list[str] = []
    set_seed(config.seed)
    model, processor, data = build(options, data, notes)
    if options.model is not None:
        notes += builders.split_notes(options.model, data, data_options, "the model")
    kind = "random" if options.model is None else "pretrained"
    chosen = Chosen(
        model, kind, data.train, len(data.train), processor, typed, config, data_options, budget is not None
    )

    def make(settings: DistillationConfig, model: Any = None) -> Any:
        return runs.make_trainer(
            build(options, data, [])[0] if model is None else model,
            settings,
            processor,
            "teacher",
            train_dataset=builders.pixels(data.train, processor, data_options, config=config),
            eval_dataset=builders.pixels(data.validation, processor),
        )

    runs.check_one_batch(make(config, model))
    duration = timing.settle_steps(chosen, [make], 1, budget)
    trainer = make(config, model)
    run = folders.describe_run("train_teacher", config, options, data_options)
    sections = {
        "run": run,
        "defaults": chosen.record(),
        "data": builders.facts(data, data_options),
        "objectives": config.objectives,
        "pairing": {"model": builders.summary(model), "notes": notes},
    }
    folders.begin(trainer, sections)
    say(config, *builders.describe_data(data), builders.summary(model), *notes, *listing(chosen.defaults))
    say(config, folders.place(run), *duration)
    runs.train_and_save(trainer, "teacher")
    evaluate(config, data, processor)
    if config.process_index == 0:
        write_report(folder_of(config))
        say(config, *summary(config, data_options, processor), *ending(config, data, chosen))


def evaluate(config: DistillationConfig, data: ImageData, processor: Any) -> None:
    """Score validation and, now that nothing is chosen any more, test."""
    model = runs.load(folder_of(config))
    datasets = {split: builders.pixels(getattr(data, split), processor) for split in SPLITS}
    found = {split: paired_scores(*runs.predict(model, dataset, config)) for split, dataset in datasets.items()}
    cost = runs.measure({"teacher": (model, datasets["test"])}, config)["teacher"]
    value = {"models": {"teacher": cost | {"runs": {str(config.seed): found}}}}
    if config.process_index == 0:
        update_results(folder_of(config), "evaluation", value | {"batch_size": config.per_device_eval_batch_size})


def summary(config: DistillationConfig, data_options: DataOptions, processor: Any) -> list[str]:
    """The table, where the model is, and the next command."""
    folder = folder_of(config)
    results = load_results(folder)
    flags = [split_flags(data_options), student_flags(runs.load(folder), processor), "--baseline true"]
    cpu = "true" if config.use_cpu else None
    student = command("distill", *flags, teacher=folder / "model", output_dir=folder.parent / "student", use_cpu=cpu)
    if settings := settings_of_init(folder / "model"):
        student = command("distill", config=settings)
    return [
        f"\n{table(results.evaluation)}\n\n{note(results)}",
        f"\nThe model is in {folder / 'model'}, the report in {folder / 'report.md'}. Next, a student of it:\n",
        f"  {student}",
    ]


def ending(config: DistillationConfig, data: ImageData, chosen: Chosen) -> list[str]:
    """What is off with the finished run."""
    results = load_results(folder_of(config))
    return advice.of_run(results, data.validation["label"][:], chosen.steps)


if __name__ == "__main__":
    sys.exit(cli.run(main))
