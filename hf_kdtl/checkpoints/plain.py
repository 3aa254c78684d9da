"""A checkpoint that transformers' own Trainer wrote: without a manifest, and without what objectives keep."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME, logging

from hf_kdtl.checkpoints.manifest import FILES, verify_read
from hf_kdtl.checkpoints.student import weight_files

logger = logging.get_logger(__name__)


def plain_trainer_lacks(folder: str | Path) -> list[str] | None:
    """What a checkpoint of a plain Trainer's lacks to be continued from; None where it is not one."""
    folder = Path(folder)
    ours = [FILES, *(path.name for path in folder.glob("distillation_state*"))]
    if not (folder / TRAINER_STATE_NAME).is_file() or any((folder / name).exists() for name in ours):
        return None
    lost = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not (folder / name).is_file()]
    files = [ADAPTER_SAFE_WEIGHTS_NAME] if (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file() else weight_files(folder)
    lost += [name for name in files if not (folder / name).is_file()]
    return lost if files else [SAFE_WEIGHTS_NAME, *lost]


def accept_plain(asked: str, lost: list[str]) -> str:
    """The path of a plain Trainer's checkpoint, with a note.

    Raises:
        ValueError: when it lacks files.
    """
    if lost:
        raise ValueError(
            f"{asked} was written by a plain Trainer and lacks {', '.join(lost)}, so it cannot be continued from. "
            "Start a new run from its weights: from_pretrained."
        )
    logger.warning(
        f"{asked} was written by a plain Trainer: weights, optimizer and scheduler are continued. It lists no "
        "checksums, so damage to its files would not be found."
    )
    return asked


def verify_loaded(folder: str | Path) -> list[str]:
    """What is wrong with the best checkpoint for it to be loaded when training ends, whoever wrote it. A callback may
    have removed the optimizer's state, which takes twice the room of the weights, or have added to other files."""
    lost = plain_trainer_lacks(folder)
    if lost is None:
        return verify_read(folder)
    return [f"{name} is missing" for name in lost if name not in (OPTIMIZER_NAME, SCHEDULER_NAME)]
