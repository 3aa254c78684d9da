"""What a checkpoint holds in addition to the student: named parts, each with `state_dict` and `load_state_dict`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from hf_kdtl.checkpoints.student import described_by_config, load_student
from hf_kdtl.models.adapters import adapted
from hf_kdtl.models.teachers.start import StartingPoint
from hf_kdtl.utils.distributed import load_full_state_dict

logger = logging.get_logger(__name__)

VERSION = 1
TENSORS = "distillation_state"
"""The name of the part that holds the objectives' tensors."""
STATE_JSON = "distillation_state.json"
START = "start"
"""The folder next to a run's checkpoints that holds its starting point, where an objective needs it."""


class CheckpointPart(Protocol):
    """Something that training needs again. A new one is a class with these two methods, and a line in
    `DistillationTrainer._checkpoint_parts`."""

    def state_dict(self) -> Any:
        """JSON data, or a mapping of tensors; None where there is nothing to save."""

    def load_state_dict(self, state: Any) -> None:
        """Restore it. `state` is None where the checkpoint has none. Raises ValueError where the two do not match."""


def save_parts(folder: str | Path, parts: Mapping[str, CheckpointPart]) -> None:
    """Write the parts: tensors to `<name>.safetensors`, anything else under its name in distillation_state.json."""
    data: dict[str, Any] = {"version": VERSION}
    for name, part in parts.items():
        state = part.state_dict()
        if isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values()):
            if state:
                save_file({k: v.contiguous() for k, v in state.items()}, Path(folder, f"{name}.safetensors"))
        elif state is not None:
            data[name] = state
    Path(folder, STATE_JSON).write_text(json.dumps(data, indent=2) + "\n")


def load_parts(folder: str | Path, parts: Mapping[str, CheckpointPart]) -> None:
    """Restore the parts that `save_parts` wrote.

    Raises:
        ValueError: when the folder holds none, or they do not match this run.
    """
    data = _read_json(folder) if parts else {}
    for name, part in parts.items():
        tensors = Path(folder, f"{name}.safetensors")
        try:
            part.load_state_dict(load_file(tensors) if tensors.is_file() else data.get(name))
        except ValueError as error:
            raise ValueError(f"cannot resume from {folder}: {error}") from error


class ObjectiveEntries:
    """The list of objectives: a checkpoint belongs to the run that has the same names and keys."""

    def __init__(self, entries: list[dict[str, Any]]):
        self.entries = entries

    def state_dict(self) -> list[dict[str, Any]]:
        return self.entries

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        if _names(state) != _names(self.entries):
            raise ValueError(
                f"it was trained with the objectives {_names(state)} and this run has {_names(self.entries)}. Resume "
                "with the same objectives, or start a new run from the checkpoint's weights."
            )
        for before, now in zip(state, self.entries, strict=True):
            if before != now:
                logger.warning(f"the checkpoint was trained with the objective {before}; continuing with {now}.")


class ObjectiveTensors:
    """The objectives' parameters and buffers.

    Args:
        trainer: whose distiller has them; it is built late, so this and the following parts ask for it late.
        full: their gathered tensors, where they are sharded and being saved.
    """

    def __init__(self, trainer: Any, full: Mapping[str, Tensor] | None = None):
        self.trainer, self.full = trainer, full

    def state_dict(self) -> Mapping[str, Tensor]:
        return self.trainer.distiller.objectives.state_dict() if self.full is None else self.full

    def load_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        load_full_state_dict(self.trainer.distiller.objectives, state or {})


class StartState:
    """The weights that the student started from: a folder next to the checkpoints, and their hash in each checkpoint.

    Args:
        trainer: whose distiller has the starting point, or none.
        folder: where the run keeps it.
    """

    def __init__(self, trainer: Any, folder: Path):
        self.trainer, self.folder = trainer, folder

    def state_dict(self) -> str | None:
        start = self.trainer.distiller.start
        if start is not None:
            start.save(self.folder)
        return None if start is None else start.fingerprint

    def load_state_dict(self, state: str | None) -> None:
        if self.trainer.distiller.start is None:
            return
        try:
            start = self._kept()
            found = start.fingerprint
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{self.folder} cannot be read ({error}). The run saved its starting point there: restore the folder, "
                "or start a new run from the checkpoint's weights."
            ) from error
        if state != found:
            raise ValueError(
                f"the weights in {self.folder} are not those that it started from: another run has used this folder "
                "since, or they were damaged. Restore the run's own starting point, or start a new run from the "
                "checkpoint's weights."
            )
        self.trainer.distiller.sources["start"] = start

    def _kept(self) -> StartingPoint:
        student = self.trainer.model
        if adapted(student):
            return StartingPoint(student)  # the base model, which adapters leave as it was
        if not self.folder.is_dir():
            raise ValueError(
                f"{self.folder} is missing. The run saved its starting point there, which its objectives compare the "
                "student with: restore the folder, or start a new run from the checkpoint's weights."
            )
        if described_by_config(student):
            start = StartingPoint.from_path(self.folder, student, self.trainer.processing_class)
        else:  # changed by hand, and so is its start
            start = self.trainer.distiller.start.in_its_shape(lambda model: load_student(model, self.folder))
        start.kept = self.folder
        return start.to(self.trainer.accelerator.device)


class LayerRatesState:
    """The learning rates of the layers; a run with them has other param groups than one without."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any] | None:
        rates = self.trainer.layer_rates
        return None if rates is None else rates.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        rates = self.trainer.layer_rates
        if (state is None) != (rates is None):
            found, now = (("no layer_rates", "has them"), ("layer_rates", "has none"))[state is not None]
            raise ValueError(
                f"it was trained with {found} and this run {now}. Resume with the same layer_rates, or start a new "
                "run from the checkpoint's weights."
            )
        if rates is not None:
            rates.load_state_dict(state)


class GradientRuleState:
    """The history of a gradient rule. Another rule, or none, may continue; it is reported."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any] | None:
        gradients = self.trainer.gradient_rule
        return None if gradients is None else gradients.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        gradients = self.trainer.gradient_rule
        found, now = None if state is None else state["options"], None if gradients is None else gradients.options
        if found != now:
            logger.warning(f"the checkpoint was trained with the gradient_rule {found}; continuing with {now}.")
        elif gradients is not None:
            gradients.load_state_dict(state)


def _read_json(folder: str | Path) -> dict[str, Any]:
    path = Path(folder, STATE_JSON)
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {STATE_JSON}: it is not a checkpoint of DistillationTrainer. Start from its weights "
            "instead: AutoModelForImageClassification.from_pretrained."
        )
    state = json.loads(path.read_text())
    if (found := state["version"]) > VERSION:
        raise ValueError(
            f"{path} has version {found} and this hf_kdtl reads up to {VERSION}: a newer hf_kdtl wrote it. Install "
            "that one to resume."
        )
    return state


def _names(entries: list[dict[str, Any]]) -> list[str]:
    return [f"{entry.get('key', entry['name'])} ({entry['name']})" for entry in entries]
