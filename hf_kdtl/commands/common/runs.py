"""What the recipes do with what they built: claim a folder, train once, predict, say what happened."""

from __future__ import annotations

import copy
import dataclasses
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import default_data_collator
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import IntervalStrategy

import hf_kdtl
from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.commands.common import adapters
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.evaluation.cost import images_per_second, parameters
from hf_kdtl.evaluation.metrics import compute_metrics
from hf_kdtl.evaluation.results import FILE, read_results, update_results
from hf_kdtl.models.adapters import adapted
from hf_kdtl.models.teachers.resolve import open_classifier

YES = ("true", "yes", "1")
TASK = [{"name": "task"}]
# Settings that change where and how fast a run goes, and not what comes out.
FREE = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "seed", "seeds", "baseline", "disable_tqdm",
        "dataloader_num_workers", "save_total_limit", "use_cpu", "push_to_hub", "hub_model_id",
        "hub_private_repo", "hub_revision", "license")  # fmt: skip


class Progress(ProgressCallback):
    """Trainer's bar with the last values beside it, instead of a line of text for each of them."""

    def __init__(self, title: str = ""):
        super().__init__()
        self.title, self.shown = title, {}

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.shown |= {key: f"{logs[key]:.3f}" for key in ("loss", "eval_accuracy") if key in (logs or {})}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown, refresh=False)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        # A second bar only where there is time to read it.
        if len(eval_dataloader or ()) > 20:
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)


def make_trainer(model: Any, config: DistillationConfig, processor: Any, title: str = "", **parts: Any) -> Any:
    """A DistillationTrainer as all recipes use it."""
    trainer = DistillationTrainer(model, config, processing_class=processor, compute_metrics=compute_metrics, **parts)
    if not config.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress(title))
    return trainer


def for_run(
    config: DistillationConfig, folder: str | Path, seed: int, objectives: list[dict], taught: bool = True
) -> DistillationConfig:
    """The settings of one run of several: another folder, seed and objectives, the rest as it was. Without a teacher
    there are no layer_rates that compare with one."""
    settings = copy.copy(config)
    settings.output_dir, settings.seed, settings.objectives = str(folder), seed, objectives
    settings.push_to_hub = False  # the recipe does, once, at its end
    if not taught and settings.rate_options is not None and settings.rate_options.measured:
        settings.layer_rates = None
    built = settings.build_objectives().values()
    if all(objective.role == "task" for objective in built):
        settings.gradient_rule = None  # nothing to protect the task from
    if all(objective.source == "teacher" for objective in built):
        settings.start = None
    return settings


def try_once(trainer: Any) -> None:
    """Run one batch through everything, so that what does not fit is told before anything is written or removed."""
    trainer.model.eval()  # in train mode BatchNorm would remember them
    number = min(len(trainer.train_dataset), max(2, trainer.args.per_device_train_batch_size))
    trainer.objective_terms(default_data_collator([trainer.train_dataset[i] for i in range(number)]))


# ---- The run folder ----


def resumes(config: DistillationConfig) -> bool:
    """Whether `resume_from_checkpoint` asks to continue, by true or by a checkpoint's path."""
    return str(config.resume_from_checkpoint).lower() not in ("none", "false", "no", "")


def check_folder(config: DistillationConfig, run: dict[str, Any], overwrite: bool) -> None:
    """Stop where output_dir holds another run, unless it is to be continued or overwritten; continuing wins.

    Raises:
        ValueError: saying what to type; also when the run to continue has other settings.
    """
    folder = Path(config.output_dir)
    if not remains(folder):
        return
    if resumes(config):
        found = read_results(folder) if (folder / FILE).is_file() else {"run": run, "objectives": config.objectives}
        before = found["run"]
        if (listed := found.get("objectives", config.objectives)) != config.objectives:
            raise ValueError(
                f"{folder} was begun with the objectives {listed} and is now asked to continue with "
                f"{config.objectives}. Set them back, or use another --output_dir."
            )
        for name in sorted({*before["settings"], *run["settings"]} - {*FREE}):
            was, is_now = (found["settings"].get(name, "the default") for found in (before, run))
            if was != is_now:
                raise ValueError(
                    f"{folder} was begun with {name} {was!r} and is now asked to continue with {is_now!r}. Set it "
                    "back, begin anew with --overwrite_output_dir true --resume_from_checkpoint no, or use another "
                    "--output_dir."
                )
    elif not overwrite:
        raise ValueError(
            f"{folder} holds another run. Continue it with --resume_from_checkpoint true, remove it with "
            "--overwrite_output_dir true, or name another folder with --output_dir."
        )


def check_whole_list(config: DistillationConfig) -> None:
    """Raises ValueError when one checkpoint is named, where a list of runs is to be continued."""
    if resumes(config) and str(config.resume_from_checkpoint).lower() not in YES:
        raise ValueError(
            f"resume_from_checkpoint is {config.resume_from_checkpoint!r}; each run here continues from its own last "
            "checkpoint: type --resume_from_checkpoint true. To start from other weights, use --student <folder>."
        )


def remains(folder: Path) -> list[Path]:
    """What a recipe has written into a folder; a user's other files are not among it."""
    pictures = ("curves", "layer_rates", "gradient_rule", "sheet", "attention", "gradients", "example")
    patterns = (FILE, "report.md", *(f"{name}.png" for name in pictures), "model", "model.part", "student",
                "checkpoint-*", "start", "start.part", "alone-seed*", "distilled-seed*")  # fmt: skip
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def clear(folder: Path) -> None:
    """Remove what `remains` lists."""
    for path in remains(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def described(recipe: str, config: DistillationConfig, *options: Any) -> dict[str, Any]:
    """The section `run` of results.json: what was set, and what it ran on. Nothing that names a machine or a user.

    Raises:
        ValueError: where a recipe is to push that trains no student.
    """
    if config.push_to_hub and recipe != "distill":
        raise ValueError(
            f"hf-kdtl {recipe.replace('_', '-')} publishes nothing; leave out push_to_hub. A student: hf-kdtl push."
        )
    settings = {name: value for group in (*options, config) for name, value in _changed(group).items()}
    device = torch.cuda.get_device_name() if config.device.type == "cuda" else f"{platform.machine()} CPU"
    hidden = ("output_dir", "objectives", "hub_token", "push_to_hub_token")  # objectives have their own section
    return {
        "recipe": recipe,
        "settings": {name: value for name, value in settings.items() if name not in hidden},
        "processes": config.world_size,
        "device": device if config.device.type == "cuda" else f"{device}, {_count(torch.get_num_threads(), 'thread')}",
        "versions": {"hf_kdtl": hf_kdtl.__version__, **_versions("torch", "transformers", "accelerate", "datasets")},
    }


def _changed(options: Any) -> dict[str, Any]:
    """The settings that are not their field's default.

    Not by comparing with a new config: making a second one resets accelerate's state, and on several processes every
    one of them is then alone.
    """
    values = options.to_dict() if hasattr(options, "to_dict") else dataclasses.asdict(options)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    known = AcceleratorConfig().to_dict()  # less one key, which TrainingArguments takes out
    defaults["accelerator_config"] = {key: known[key] for key in values.get("accelerator_config", ())}
    off = (None, False, "", "none", [], {}, dataclasses.MISSING)  # what __post_init__ turns into one another
    return {
        name: values[name]
        for name, default in defaults.items()
        if name in values and values[name] != default and not (values[name] in off and default in off)
    }


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{plural if number > 1 else ''}"


def _versions(*names: str) -> dict[str, str]:
    return {name: metadata.version(name) for name in names}


def begin(trainer: Any, sections: dict[str, Any]) -> None:
    """Make output_dir this run's: what another one left is removed unless it is continued, and results.json begun."""
    config = trainer.args
    if config.process_index == 0:
        if not resumes(config):
            clear(Path(config.output_dir))
        for name, value in sections.items():
            update_results(config.output_dir, name, value)
    trainer.accelerator.wait_for_everyone()


def place(run: dict[str, Any]) -> str:
    """Where a run runs, in a few words."""
    return f"{_count(run['processes'], 'process', 'es')}, {run['device']}"


def interpreter() -> str:
    """How to type the Python that is running: by its path where it lies below the working directory."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else "python"


# ---- One run ----


def finished(folder: str | Path) -> bool:
    """Whether a run has its final model, which is put in place last."""
    return Path(folder, "model", "config.json").is_file()


def train_and_save(trainer: Any, name: str, results: str | Path | None = None) -> None:
    """Train, unless it was done before; note curve and rates in results.json as `name`, and keep the final model.

    The model is put in place last, whole, with its image processor and without a pickle: then the run is finished.
    Adapters are merged into it, and kept beside it in `adapter/`.
    """
    folder = Path(trainer.args.output_dir)
    if finished(folder):
        return say(trainer.args, f"{name}: finished before, kept.")
    log = _train(trainer, trainer.args)
    if adapted(trainer.model):
        adapters.keep(trainer, folder)
    else:
        trainer.save_model(str(folder / "model.part"))
    if trainer.is_world_process_zero():
        results = results or folder
        sections = {"curves": log}
        if (rates := trainer.layer_rates) is not None:
            sections["layer_rates"] = {"options": dataclasses.asdict(rates.options), "history": rates.history}
        if (gradients := trainer.gradient_rule) is not None:
            sections["gradient_rule"] = gradients.state_dict()
        for section, value in sections.items():
            update_results(results, section, read_results(results).get(section, {}) | {name: value})
        (folder / "model.part" / "training_args.bin").unlink(missing_ok=True)
        shutil.rmtree(folder / "model", ignore_errors=True)
        os.replace(folder / "model.part", folder / "model")
    trainer.accelerator.wait_for_everyone()


def _train(trainer: Any, config: DistillationConfig) -> list[dict[str, Any]]:
    """Train, from the checkpoint that is asked for or the last one there is; return Trainer's log."""
    folder, asked = config.output_dir, str(config.resume_from_checkpoint)
    path: str | bool = resumes(config)
    if path and asked.lower() not in YES:
        path = asked
    elif path:
        # None yet, or only one whose save was broken off: begin anew. A damaged one is the trainer's to judge.
        path = any(Path(folder).glob("checkpoint-*/trainer_state.json"))
    trainer.train(resume_from_checkpoint=path)
    timing = ("runtime", "per_second", "total_flos")
    own = ("lr_multiplier/", "lr_discrepancy/", "gradient_rule/")  # have a section
    entries = trainer.state.log_history
    return [{k: v for k, v in e.items() if not (k.endswith(timing) or k.startswith(own))} for e in entries]


def load(folder: str | Path) -> Any:
    """A finished run's model."""
    return open_classifier(Path(folder, "model")).model


def predict(model: Any, dataset: Any, config: DistillationConfig) -> tuple[np.ndarray, np.ndarray]:
    """(logits, labels) of a dataset, on every process."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = default_data_collator(rows)
        return batch | {"pixel_values": batch["pixel_values"].to(model.dtype)}  # a teacher may be in half precision

    settings = for_run(config, config.output_dir, config.seed, TASK, taught=False)
    settings.eval_strategy, settings.layer_rates = IntervalStrategy.NO, None  # a frozen teacher has no rates
    trainer = DistillationTrainer(model, settings, data_collator=collate)
    trainer.remove_callback(ProgressCallback)
    output = trainer.predict(dataset)
    logits = output.predictions
    return (logits[0] if isinstance(logits, tuple) else logits), output.label_ids


def measured(models: dict[str, tuple[Any, Any]], config: DistillationConfig) -> dict[str, dict[str, float]]:
    """{name: {"parameters": ..., "images_per_second": ...}} from {name: (model, dataset)}."""
    size, device = config.per_device_eval_batch_size, config.device
    batches = {}
    for name, (model, dataset) in models.items():
        rows = dataset.__getitems__([i % len(dataset) for i in range(size)])
        batches[name] = model.to(device), default_data_collator(rows)["pixel_values"].to(device, model.dtype)
    speeds = images_per_second(batches)
    return {
        name: {"parameters": parameters(model), "images_per_second": speeds[name]}
        for name, (model, _) in models.items()
    }


def say(config: DistillationConfig, *lines: str) -> None:
    """Print, on the main process."""
    if config.process_index == 0:
        tqdm.write(cli.printable("\n".join(lines)))
