"""The student of a checkpoint, loaded into the live one: every tensor, or none."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from hf_kdtl.utils.distributed import load_full_state_dict, unsharded_class

logger = logging.get_logger(__name__)

_Matched = tuple[dict[str, Tensor], list[str], list[str]]
"""The tensors of a checkpoint by the student's names, what it lacks, and what it has too many."""


def load_student(student: PreTrainedModel, folder: str | Path) -> None:
    """Load a checkpoint's weights into the student, every one of them.

    The names in a file are not the names in a model: transformers saves ViT, DeiT and DINOv2 under their older names
    and maps them on loading, and Trainer 5.23 does not (it loads the file with strict=False, so every block stays as
    it was, with one warning). So each tensor is looked up under the name that `save_pretrained` gives it. That also
    holds for a student whose architecture was changed by hand, which `from_pretrained` cannot make.

    Raises:
        ValueError: when the checkpoint is of another architecture, or lacks a tensor.
    """
    _check_architecture(student, Path(folder, "config.json"))
    tensors, missing, unexpected = _by_saved_names(student, Path(folder))
    if (missing or unexpected) and described_by_config(student):
        tensors, missing, unexpected = _by_config(student, folder)
    if missing or unexpected:
        raise ValueError(
            f"{folder} does not match {unsharded_class(student).__name__}: missing or of another shape {missing[:5]}, "
            f"unexpected {unexpected[:5]}. Resume with the student that the checkpoint was made from."
        )
    load_full_state_dict(student, tensors)


def described_by_config(student: PreTrainedModel) -> bool:
    """Whether the student's class makes the same tensors of its config, as `from_pretrained` does. Not those of one
    whose layers were exchanged, removed or added afterwards. Nothing is allocated."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            made = unsharded_class(student)(copy.deepcopy(student.config))
    except TypeError:  # it is made of more than a config
        return False
    except Exception:  # it cannot be made without memory: not known
        return True
    return _shapes(made.state_dict()) == _shapes(student.state_dict())


def note_undescribed(student: Any) -> None:
    """Warn of a student that its checkpoints' config does not describe."""
    if isinstance(student, PreTrainedModel) and not described_by_config(student):
        logger.warning(
            f"the config of this {unsharded_class(student).__name__} does not describe it, so from_pretrained cannot "
            "open its checkpoints: they load into a model that was made by the same code alone, on resuming or by "
            "hf_kdtl.checkpoints.student.load_student(model, folder)."
        )


def weight_files(folder: Path) -> list[str]:
    """The names of the files with a model's weights, as its folder states them; empty where it states none."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    return sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []


def _by_saved_names(student: PreTrainedModel, folder: Path) -> _Matched:
    own, names = student.state_dict(keep_vars=True), _saved_names(student)
    held = {name: tensor for file in weight_files(folder) for name, tensor in load_file(folder / file).items()}
    # By identity: of tied weights, which are one parameter, a file has one.
    found = {id(own[live]): held[name] for live, name in names.items() if name in held}
    tensors = {live: found[id(tensor)] for live, tensor in own.items() if id(tensor) in found}
    return tensors, _unlike(own, tensors), sorted(held.keys() - names.values())


def _saved_names(student: PreTrainedModel) -> dict[str, str]:
    """{name in the student: name in its file}; without tensors that are saved in another form."""
    marks = {name: torch.empty(tensor.shape, device="meta") for name, tensor in student.state_dict().items()}
    live = {id(mark): name for name, mark in marks.items()}
    saved = revert_weight_conversion(student, dict(marks))
    return {live[id(mark)]: name for name, mark in saved.items() if id(mark) in live}


def _by_config(student: PreTrainedModel, folder: str | Path) -> _Matched:
    """Through `from_pretrained`, which also reads the names that another version of transformers writes."""
    loaded: Any = unsharded_class(student).from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True
    )
    saved, info = loaded
    own, tensors = student.state_dict(), saved.state_dict()
    # What is missing or does not fit has a random value there.
    missing = sorted(info["missing_keys"]) + [str(item) for item in info["mismatched_keys"]] + _unlike(own, tensors)
    return tensors, missing, sorted(info["unexpected_keys"]) + sorted(tensors.keys() - own.keys())


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _unlike(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    shapes = _shapes(found)
    return [name for name, tensor in own.items() if shapes.get(name) != tensor.shape]


def _check_architecture(student: PreTrainedModel, path: Path) -> None:
    saved, now = json.loads(path.read_text()), unsharded_class(student).__name__
    found = (saved.get("architectures") or [now])[0]
    if found != now:
        raise ValueError(
            f"{path.parent} holds a {found} ({saved.get('model_type')}) and the student is a {now}. Resume with the "
            "student that the checkpoint was made from."
        )
