"""The folder of a run: whose it is, what to remove, and the first sections of its results.json."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig

import hf_kdtl
from hf_kdtl import DistillationConfig
from hf_kdtl.evaluation.cost import device_name
from hf_kdtl.evaluation.results import FILE, read_results, same_value, update_results

YES = ("true", "yes", "1")
INPUTS = ("model", "teacher", "student", "start", "dataset", "unlabelled")  # settings that name what is read
# Settings that change where and how fast a run goes, and not what comes out.
FREE = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "seed", "seeds", "baseline", "disable_tqdm",
        "budget", "max_trials", "dataloader_num_workers", "save_total_limit", "use_cpu", "push_to_hub", "hub_model_id",
        "hub_private_repo", "hub_revision", "license")  # fmt: skip


def folder_of(config: DistillationConfig) -> Path:
    """`output_dir`, which __post_init__ has set."""
    return Path(str(config.output_dir))


def resumes(config: DistillationConfig) -> bool:
    """Whether `resume_from_checkpoint` asks to continue, by true or by a checkpoint's path."""
    return str(config.resume_from_checkpoint).lower() not in ("none", "false", "no", "")


def check_folder(config: DistillationConfig, run: dict[str, Any], overwrite: bool) -> None:
    """Stop where output_dir holds another run, unless it is to be continued or overwritten; continuing wins.

    Raises:
        ValueError: saying what to type; also when the run to continue has other settings, and when something would be
            removed that the command was given or that is no run's.
    """
    folder = folder_of(config)
    if not (files := run_files(folder)):
        return
    if resumes(config) and (folder / FILE).is_file():
        check_written(folder, files, run["recipe"])
        return _check_same_settings(folder, config, run)
    if lost := _inputs_below([folder, *files], config, run):
        raise ValueError(
            f"{folder} holds {' and '.join(lost)}, which this command was given and would replace. Name another "
            "folder with --output_dir."
        )
    if resumes(config):
        return
    check_written(folder, files)
    if not overwrite:
        raise ValueError(
            f"{folder} holds another run. Continue it with --resume_from_checkpoint true, remove it with "
            "--overwrite_output_dir true, or name another folder with --output_dir."
        )


def check_written(folder: Path, files: Sequence[Path], recipe: str | None = None) -> None:
    """Check that files, which a command would replace, are those of a run; of this recipe, where one is named.

    Raises:
        ValueError: where there is no results.json, so that they are the user's own; or it is another recipe's.
    """
    if not (folder / FILE).is_file():
        names = ", ".join(path.name for path in files)
        raise ValueError(
            f"{folder} holds {names} and no {FILE}, so they are of no run and would be lost. Move them away, or name "
            "another folder with --output_dir."
        )
    found = read_results(folder).get("run", {}).get("recipe")
    if recipe is not None and found != recipe:
        raise ValueError(f"{folder} holds a run of {found}; name another folder with --output_dir.")


def _inputs_below(places: Sequence[Path], config: DistillationConfig, run: dict[str, Any]) -> list[str]:
    """Of the paths that a command was given, those that are one of these places or lie below it."""
    values = [run["settings"].get(name) for name in INPUTS]
    values += [entry.get("representation") for entry in config.entries]
    paths = [path for one in values if one for path in (one.values() if isinstance(one, dict) else [one])]
    return [
        path for path in paths if any(Path(path).expanduser().resolve().is_relative_to(p.resolve()) for p in places)
    ]


def _check_same_settings(folder: Path, config: DistillationConfig, run: dict[str, Any]) -> None:
    results = read_results(folder)
    if not same_value(before := results.get("objectives", config.objectives), config.objectives):
        raise ValueError(
            f"{folder} was begun with the objectives {before} and is now asked to continue with {config.objectives}. "
            "Set them back, or use another --output_dir."
        )
    old, new = results.get("run", run)["settings"], run["settings"]
    for name in sorted({*old, *new} - {*FREE}):
        was, now = (settings.get(name, "the default") for settings in (old, new))
        if not same_value(was, now):
            raise ValueError(
                f"{folder} was begun with {name} {was!r} and is now asked to continue with {now!r}. Set it back, "
                "start over with --overwrite_output_dir true --resume_from_checkpoint no, or use another --output_dir."
            )


def _check_same_images(folder: Path, data: dict[str, Any]) -> None:
    before = read_results(folder).get("data", {}) if (folder / FILE).is_file() else {}
    kept = [(before.get(what, {}), data.get(what, {})) for what in ("sizes", "digests")]
    other = dict.fromkeys(key for old, new in kept for key in old if old[key] != new.get(key, old[key]))
    if other:
        raise ValueError(
            f"{data['source']} has other images or labels ({', '.join(other)}) than when {folder} was begun: what was "
            "trained before may have seen images that are test images now. Set them back, or use another --output_dir."
        )


def check_resumes_all(config: DistillationConfig) -> None:
    """Raises ValueError when one checkpoint is named, where a list of runs is to be continued."""
    if resumes(config) and str(config.resume_from_checkpoint).lower() not in YES:
        raise ValueError(
            f"resume_from_checkpoint is {config.resume_from_checkpoint!r}; each run here continues from its own last "
            "checkpoint: type --resume_from_checkpoint true. To start from other weights, use --student <folder>."
        )


def run_files(folder: Path) -> list[Path]:
    """What a command has written into a folder; a user's other files are not among it."""
    pictures = (
        "arms",
        "curves",
        "layer_rates",
        "gradient_rule",
        "sheet",
        "attention",
        "gradients",
        "example",
        "tune",
        "labels",
    )
    patterns = (FILE, "report.md", "report.html", *(f"{name}.png" for name in pictures), "model", "model.part",
                "student", "checkpoint-*", "start", "start.part", "alone-seed*", "labelled-seed*",
                "distilled-seed*", "runs.jsonl", "tune.md", "best.yaml", "probe.md")  # fmt: skip
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def clear(folder: Path) -> None:
    """Remove what `run_files` lists; last results.json, which says that the rest may be removed."""
    for path in reversed(run_files(folder)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def describe_run(recipe: str, config: DistillationConfig, *options: Any) -> dict[str, Any]:
    """The section `run` of results.json: what was set, and the kind of device. Nothing that names a machine or a user.

    Raises:
        ValueError: for push_to_hub, where the command trains no student.
    """
    if config.push_to_hub and recipe != "distill":
        raise ValueError(
            f"hf-kdtl {recipe.replace('_', '-')} publishes nothing; leave out push_to_hub. A student: hf-kdtl push."
        )
    settings = {name: value for group in (*options, config) for name, value in changed(group).items()}
    hidden = ("output_dir", "objectives", "hub_token", "push_to_hub_token")  # objectives have their own section
    return {
        "recipe": recipe,
        "settings": {name: value for name, value in settings.items() if name not in hidden},
        "processes": config.world_size,
        "device": device_name(config.device),
        "versions": {"hf_kdtl": hf_kdtl.__version__, **_versions("torch", "transformers", "accelerate", "datasets")},
    }


def changed(options: Any) -> dict[str, Any]:
    """The settings that are not their field's default.

    Not by comparing with a new config: making a second one resets accelerate's state, and on several processes every
    one of them is then alone.
    """
    values = options.to_dict() if hasattr(options, "to_dict") else dataclasses.asdict(options)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    known = AcceleratorConfig().to_dict()  # less one key, which TrainingArguments takes out
    defaults["accelerator_config"] = {key: known[key] for key in values.get("accelerator_config", ())}
    # What __post_init__ turns into one another.
    off: tuple[Any, ...] = (None, False, "", "none", [], {}, dataclasses.MISSING)
    return {
        name: values[name]
        for name, default in defaults.items()
        if name in values and values[name] != default and not (values[name] in off and default in off)
    }


def _versions(*names: str) -> dict[str, str]:
    return {name: metadata.version(name) for name in names}


def begin(trainer: Any, sections: dict[str, Any]) -> None:
    """Make output_dir this run's: what another one left is removed unless it is continued, and results.json begun.

    Raises:
        ValueError: where the run to continue was begun on other images or labels.
    """
    config = trainer.args
    if resumes(config):
        _check_same_images(
            folder_of(config), sections["data"]
        )  # by each process: the first writes what the others read
    if config.process_index == 0:
        if not resumes(config):
            clear(folder_of(config))
        for name, value in sections.items():
            update_results(folder_of(config), name, value)
    trainer.accelerator.wait_for_everyone()


def place(run: dict[str, Any]) -> str:
    """The number of processes and the device, for the terminal."""
    return f"{run['processes']} process{'es' if run['processes'] > 1 else ''}, {run['device']}"


def finished(folder: str | Path) -> bool:
    """Whether a run has its final model, which is put in place last."""
    return Path(folder, "model", "config.json").is_file()
