"""Writing and reading checkpoints: a clean student, and beside it what only the training needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_kdtl.gradient_rules import GradientAccumulator
from hf_kdtl.models.adapters import adapted
from hf_kdtl.models.teachers.start import StartingPoint
from hf_kdtl.optim.layer_rates import LayerRates
from hf_kdtl.utils.distributed import load_full_state_dict, unsharded_class

logger = logging.get_logger(__name__)

VERSION = 1
STATE_JSON = "distillation_state.json"
STATE_TENSORS = "distillation_state.safetensors"
START = "start"
"""The folder beside a run's checkpoints that holds what its student started from, where an objective needs it."""


def save_distillation_state(
    folder: str | Path,
    tensors: dict[str, Tensor],
    entries: list[dict[str, Any]],
    rates: LayerRates | None = None,
    gradients: GradientAccumulator | None = None,
    start: StartingPoint | None = None,
) -> None:
    """Write the objectives' tensors (safetensors); the list they were made from, the layers' rates and what a gradient
    rule met (JSON)."""
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    if tensors:
        save_file(tensors, Path(folder, STATE_TENSORS))
    state: dict[str, Any] = {"version": VERSION, "objectives": entries}
    if rates is not None:
        state["layer_rates"] = rates.state_dict()
    if gradients is not None:
        state["gradient_rule"] = gradients.state_dict()
    if start is not None:
        state["start"] = start.fingerprint
    Path(folder, STATE_JSON).write_text(json.dumps(state, indent=2) + "\n")


def load_distillation_state(folder: str | Path, objectives: nn.ModuleDict, entries: list[dict[str, Any]]) -> None:
    """Load the objectives that `save_distillation_state` wrote, strictly.

    Raises:
        ValueError: when the checkpoint is of other objectives, or its file is missing.
    """
    check_objectives(folder, entries)
    for before, now in zip(_state(folder)["objectives"], entries, strict=True):
        if before != now:
            logger.warning(f"{folder} was trained with the objective {before}; it goes on with {now}.")
    tensors = load_file(Path(folder, STATE_TENSORS)) if Path(folder, STATE_TENSORS).is_file() else {}
    load_full_state_dict(objectives, tensors)


def check_objectives(folder: str | Path, entries: list[dict[str, Any]]) -> None:
    """Raises ValueError when a checkpoint is of other objectives."""
    saved = _state(folder)["objectives"]
    if _names(saved) != _names(entries):
        raise ValueError(
            f"{folder} was trained with the objectives {_names(saved)} and this run has {_names(entries)}. Resume "
            "with the same objectives, or start a new run from the checkpoint's weights."
        )


def load_start(trainer: Any, folder: str | Path) -> StartingPoint:
    """What the student of a checkpoint's run started from, as the run kept it beside its checkpoints.

    Raises:
        ValueError: when it is missing, cannot be read, or is not what the checkpoint was held to.
    """
    kept = Path(folder).parent / START
    try:
        start = _kept_start(trainer, kept)
        found = start.fingerprint
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{kept} cannot be read ({error}): the run kept there what its student started from. Put it back as it "
            "was, or start a new run from the checkpoint's weights."
        ) from error
    if _state(folder).get("start") != found:
        raise ValueError(
            f"the weights in {kept} are not those that {folder} started from: another run was begun in this folder "
            "since, or they were damaged. Put the start of the checkpoint's own run there, or start a new run from "
            "its weights."
        )
    return start


def _kept_start(trainer: Any, folder: Path) -> StartingPoint:
    """What the student of a run that is resumed started from, as the run kept it.

    Raises:
        ValueError: when it is not there.
    """
    student = trainer.model
    if adapted(student):
        return StartingPoint(student)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is missing: the run kept there what its student started from, and its objectives hold the "
            "student to it. Put the folder back beside the checkpoints, or start a new run from the checkpoint's "
            "weights."
        )
    start = StartingPoint.from_path(folder, student, trainer.processing_class)
    start.kept = folder
    return start.to(trainer.accelerator.device)


def load_layer_rates(folder: str | Path, rates: LayerRates | None) -> None:
    """Go on with the layers' rates of a checkpoint.

    Raises:
        ValueError: when only one of checkpoint and run has any (their optimizers have other param groups), or they
            are of other layers or another mode.
    """
    saved = _state(folder).get("layer_rates")
    if (saved is None) != (rates is None):
        found, now = (("no layer_rates", "has them"), ("layer_rates", "has none"))[saved is not None]
        raise ValueError(
            f"{folder} was trained with {found} and this run {now}. Resume with the same layer_rates, or start a new "
            "run from the checkpoint's weights."
        )
    if rates is not None and saved is not None:
        rates.load_state_dict(saved)


def load_gradient_rule(folder: str | Path, options: Any, gradients: GradientAccumulator | None) -> None:
    """Go on with the history of a checkpoint's gradient rule. Another rule, or none, is said."""
    saved = _state(folder).get("gradient_rule")
    found, now = None if saved is None else saved["options"], None if gradients is None else gradients.options
    if found != now:
        logger.warning(f"{folder} was trained with the gradient_rule {found}; it goes on with {options}.")
    elif gradients is not None and saved is not None:
        gradients.load_state_dict(saved)


def load_student(student: PreTrainedModel, folder: str | Path) -> None:
    """Load a checkpoint's weights into the student, every one of them.

    Through `from_pretrained`, because the names in a file are not the names in a model: transformers saves ViT, DeiT
    and DINOv2 under their older names and maps them on loading, and Trainer 5.23 does not (it loads the file with
    strict=False, so every block stays as it was, with one warning).

    Raises:
        ValueError: when the checkpoint is of another architecture, or lacks a tensor.
    """
    _check_architecture(student, Path(folder, "config.json"))
    loaded: Any = unsharded_class(student).from_pretrained(folder, output_loading_info=True)
    saved, info = loaded
    # Only what is missing or does not fit: from_pretrained would leave it at its random initial value.
    lost = sorted(info["missing_keys"]) + [str(item) for item in info["mismatched_keys"]]
    if lost or info["unexpected_keys"]:
        raise ValueError(
            f"{folder} does not fit {unsharded_class(student).__name__}: missing or of another shape {lost[:5]}, "
            f"unexpected {sorted(info['unexpected_keys'])[:5]}. Resume with the student that the checkpoint was made "
            "from."
        )
    load_full_state_dict(student, saved.state_dict())


def _check_architecture(student: PreTrainedModel, path: Path) -> None:
    saved, now = json.loads(path.read_text()), unsharded_class(student).__name__
    found = (saved.get("architectures") or [now])[0]
    if found != now:
        raise ValueError(
            f"{path.parent} holds a {found} ({saved.get('model_type')}) and the student is a {now}. Resume with the "
            "student that the checkpoint was made from."
        )


def _state(folder: str | Path) -> dict[str, Any]:
    path = Path(folder, STATE_JSON)
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {STATE_JSON}: it is not a checkpoint of DistillationTrainer. Start from its weights "
            "instead: AutoModelForImageClassification.from_pretrained."
        )
    state = json.loads(path.read_text())
    if (found := state["version"]) > VERSION:
        raise ValueError(
            f"{path} is of version {found} and this hf_kdtl reads up to {VERSION}: it was written by a newer one. "
            "Install that one to resume."
        )
    return state


def _names(entries: list[dict[str, Any]]) -> list[str]:
    return [f"{entry.get('key', entry['name'])} ({entry['name']})" for entry in entries]
