"""One run of a command: its trainer, training to the final model, prediction, and the cost of the models."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, default_data_collator
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.commands.common import adapters, builders
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common.folders import YES, finished, folder_of, resumes
from hf_kdtl.evaluation.cost import images_per_second, parameters
from hf_kdtl.evaluation.metrics import compute_metrics, paired_scores
from hf_kdtl.evaluation.results import read_results, update_results
from hf_kdtl.hub.provenance import histories
from hf_kdtl.models.adapters import adapted
from hf_kdtl.models.labels import is_multi_label
from hf_kdtl.models.teachers.resolve import open_classifier
from hf_kdtl.trainer.sample import training_sample
from hf_kdtl.utils.options import check_known

TASK: list[dict[str, Any]] = [{"name": "task"}]


SHOWN = ("loss", "eval_accuracy", "eval_map", "eval_knn")


class Progress(ProgressCallback):
    """Trainer's bar with the last values at its end, instead of a line of text for each of them; for a terminal."""

    def __init__(self, title: str = ""):
        super().__init__()
        self.title = title
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.shown |= _shown(logs)
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown, refresh=False)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        # A second bar only where there is time to read it.
        if len(eval_dataloader or ()) > 20:
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)


class Lines(TrainerCallback):
    """A line for each value that is logged, where there is no terminal to draw a bar on."""

    def __init__(self, title: str = ""):
        self.title = title

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and (shown := _shown(logs)):
            values = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"{self.title}: step {state.global_step:,} of {state.max_steps:,}, {values}", flush=True)


def _shown(logs: dict[str, Any] | None) -> dict[str, str]:
    return {name: f"{logs[name]:.3f}" for name in SHOWN if name in (logs or {})}  # type: ignore[index]


def make_trainer(model: Any, config: DistillationConfig, processor: Any, title: str = "", **parts: Any) -> Any:
    """A DistillationTrainer as all commands use it."""
    parts = {"compute_metrics": compute_metrics} | parts
    _check_best_metric(model, config, parts["compute_metrics"])
    trainer = DistillationTrainer(model, config, processing_class=processor, **parts)
    if not config.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress(title) if sys.stderr.isatty() else Lines(title))
    return trainer


def _check_best_metric(model: Any, config: DistillationConfig, metrics: Any) -> None:
    """Refuse a metric_for_best_model that no evaluation has: Trainer looks for it after the first one."""
    if config.metric_for_best_model is None or config.eval_strategy == IntervalStrategy.NO:
        return
    names = ["loss", *(config.weights() if config.eval_objectives else ())]
    if metrics is compute_metrics:
        one_each = np.eye(min(model.config.num_labels, 6))  # top5 is of six classes and more
        names += paired_scores(one_each, one_each if is_multi_label(model) else one_each.argmax(1))
    elif metrics is not None:
        names += metrics.names
    check_known("metric_for_best_model", config.metric_for_best_model.removeprefix("eval_"), names)


def run_settings(
    config: DistillationConfig, folder: str | Path, seed: int, objectives: list[dict], taught: bool = True
) -> DistillationConfig:
    """The settings of one run of several: another folder, seed and objectives, the rest as it was. Without a teacher
    there are no layer_rates that compare with one."""
    settings = copy.copy(config)
    settings.output_dir, settings.seed, settings.objectives = str(folder), seed, objectives
    settings.push_to_hub = False  # the command does, once, at its end
    if not taught and settings.rate_options is not None and settings.rate_options.measured:
        settings.layer_rates = None
    built = settings.build_objectives().values()
    if all(objective.role == "task" for objective in built):
        settings.gradient_rule = None  # nothing to protect the task from
    if all(objective.source != "start" for objective in built):
        settings.start = None
    return settings


def check_one_batch(trainer: Any) -> None:
    """Run one batch through everything, so that what does not fit is an error before anything is written."""
    trainer.model.eval()  # in train mode BatchNorm would remember them
    batch = training_sample(trainer, max(2, trainer.args.per_device_train_batch_size))
    assert batch is not None  # the commands' data has an index
    trainer.objective_terms(next(iter(batch)))


def train_and_save(trainer: Any, name: str, results: str | Path | None = None) -> None:
    """Train, unless the run is finished; write curve and rates to results.json as `name`, and save the final model.

    The model is moved to its place last, complete, with its image processor and without a pickle: then the run is
    finished. Adapters are merged into it, and also saved alone in `adapter/`.
    """
    folder = folder_of(trainer.args)
    if finished(folder):
        return say(trainer.args, f"{name}: finished before, kept.")
    log = _train(trainer, trainer.args)
    if adapted(trainer.model):
        adapters.keep(trainer, folder)
    else:
        trainer.save_model(str(folder / "model.part"))
    if trainer.is_world_process_zero():
        results = results or folder
        for section, value in {"curves": log, **histories(trainer)}.items():
            update_results(results, section, read_results(results).get(section, {}) | {name: value})
        (folder / "model.part" / "training_args.bin").unlink(missing_ok=True)
        shutil.rmtree(folder / "model", ignore_errors=True)
        os.replace(folder / "model.part", folder / "model")
    trainer.accelerator.wait_for_everyone()


def _train(trainer: Any, config: DistillationConfig) -> list[dict[str, Any]]:
    """Train, from the checkpoint that is asked for or the last complete one; return Trainer's log."""
    folder, asked = folder_of(config), str(config.resume_from_checkpoint)
    path: str | bool = resumes(config)
    if path and asked.lower() not in YES:
        path = asked
    elif path:
        # None yet, or only one whose save was interrupted: start over. The trainer verifies what there is.
        path = any(folder.glob("checkpoint-*/trainer_state.json"))
    trainer.train(resume_from_checkpoint=path)
    timing = ("runtime", "per_second", "total_flos")
    has_section = ("lr_multiplier/", "lr_discrepancy/", "gradient_rule/")
    entries = trainer.state.log_history
    return [{k: v for k, v in e.items() if not (k.endswith(timing) or k.startswith(has_section))} for e in entries]


def load(folder: str | Path) -> Any:
    """A finished run's model."""
    return open_classifier(Path(folder, "model")).model


class _Predictor(DistillationTrainer):
    """Gives logits in the model's order of classes; the labels pass through, and the caller brings both in one."""

    def get_test_dataloader(self, test_dataset):
        return Trainer.get_test_dataloader(self, test_dataset)


def predict(model: Any, dataset: Any, config: DistillationConfig) -> tuple[np.ndarray, np.ndarray]:
    """(logits, labels) of a dataset, on every process."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = default_data_collator(rows)
        return batch | {"pixel_values": batch["pixel_values"].to(model.dtype)}  # a teacher may be in half precision

    settings = run_settings(config, folder_of(config), config.seed, TASK, taught=False)
    settings.eval_strategy, settings.layer_rates = IntervalStrategy.NO, None  # a frozen teacher has no rates
    settings.save_strategy = SaveStrategy.NO
    trainer = _Predictor(model, settings, data_collator=collate)
    trainer.remove_callback(ProgressCallback)
    output = trainer.predict(dataset)
    logits, labels = output.predictions, output.label_ids
    assert isinstance(labels, np.ndarray)
    return (logits[0] if isinstance(logits, tuple) else logits), labels


def measure(models: dict[str, tuple[Any, Any]], config: DistillationConfig) -> dict[str, dict[str, float]]:
    """{name: {"parameters": ..., "images_per_second": ...}} from {name: (model, dataset)}."""
    size, device = config.per_device_eval_batch_size, config.device
    batches = {}
    for name, (model, dataset) in models.items():
        pixels = builders.batch_of(dataset, (i % len(dataset) for i in range(size)))
        batches[name] = model.to(device), pixels.to(device, model.dtype)
    speeds = images_per_second(batches)
    return {
        name: {"parameters": parameters(model), "images_per_second": speeds[name]}
        for name, (model, _) in models.items()
    }


def say(config: DistillationConfig, *lines: str) -> None:
    """Print, on the main process."""
    if config.process_index == 0:
        tqdm.write(cli.printable("\n".join(lines)))


def untracked(config: DistillationConfig) -> DistillationConfig:
    """The settings of a run that logs, saves and shows nothing, and is evaluated only where it is asked for."""
    settings = copy.copy(config)
    settings.eval_strategy, settings.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    settings.logging_strategy, settings.report_to = IntervalStrategy.NO, []
    settings.load_best_model_at_end, settings.resume_from_checkpoint = False, None
    settings.push_to_hub, settings.disable_tqdm = False, True
    return settings
