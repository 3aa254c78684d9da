"""Which checkpoint of a run's folder to resume from, which to keep, and which to remove."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Literal

from hf_kdtl.checkpoints.manifest import read_manifest, verify


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a run's folder, complete or not, by step."""
    found = [p for p in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=_step)


def latest_complete(folder: str | Path) -> tuple[Path | None, dict[Path, list[str]]]:
    """The latest complete checkpoint of the run that wrote to a folder last, and why each later one is not it."""
    damaged: dict[Path, list[str]] = {}
    runs = {checkpoint: _written(checkpoint) for checkpoint in checkpoints(folder)}
    newest = max(runs, key=lambda path: runs[path], default=None)
    for checkpoint, run in reversed(runs.items()):
        if not (wrong := verify(checkpoint)) and newest is not None and run[1] != runs[newest][1]:
            wrong = [f"it is of another run, and {newest.name} was written after it"]
        if not wrong:
            return checkpoint, damaged
        damaged[checkpoint] = wrong
    return None, damaged


def resolve_checkpoint(asked: str | Path | Literal[True], folder: str | Path) -> tuple[Path, dict[Path, list[str]]]:
    """The checkpoint to continue from, and what is wrong with those that are skipped for it.

    Args:
        asked: True for the latest complete one, or the path of one.
        folder: where True searches.

    Raises:
        ValueError: when the requested one is not complete, or none is: naming the files, and the alternative.
    """
    run = Path(folder) if asked is True else Path(asked).parent
    restore_backup(run)
    if asked is not True and not (wrong := verify(asked)):
        return Path(asked), {}
    last, damaged = latest_complete(run)
    if asked is not True:
        instead = f"The latest complete one is {last}." if last else f"No other one in {run} is complete."
        raise ValueError(f"{asked} is not a complete checkpoint: {'; '.join(wrong)}. {instead}")
    if last is None:
        found = "; ".join(f"{c.name}: {', '.join(wrong)}" for c, wrong in damaged.items()) or "there is none"
        raise ValueError(
            f"No complete checkpoint in {run} ({found}). Train without resume_from_checkpoint to start from the "
            "beginning, or give the path of one."
        )
    return last, damaged


def to_prune(newest: Path, limit: int | None, best: str | None, damaged: frozenset[Path]) -> list[Path]:
    """The checkpoints to remove so that `limit` are left: the newest and the best always stay.

    Damaged ones go first, then those of later steps (of another run, or of one that was resumed before them), then the
    oldest. Not by time as in Trainer, where a copied folder, or one written to again, is the newest.
    """
    keep = {newest.resolve()} | ({Path(best).resolve()} if best is not None and Path(best).is_dir() else set())
    others = [path for path in checkpoints(newest.parent) if path.resolve() not in keep]
    complete = {path: path not in damaged and not verify(path, contents=False) for path in others}
    others.sort(key=lambda path: (complete[path], _step(path) < _step(newest), _step(path)))
    spare = len(others) - max(0, limit - len(keep)) if limit is not None and limit > 0 else 0
    return [*others[: max(0, spare)], *([_old(newest)] if _old(newest).exists() else [])]


def back_up(folder: Path) -> None:
    """Rename an older checkpoint of the same step: they must not mix, and it stays until the new one is complete."""
    if folder.exists():
        shutil.rmtree(_old(folder), ignore_errors=True)
        folder.rename(_old(folder))


def restore_backup(run: Path) -> None:
    """Undo `back_up` where the new checkpoint was not completed."""
    for old in run.glob("checkpoint-*.old"):
        new = old.with_suffix("")
        if verify(new):
            shutil.rmtree(new, ignore_errors=True)
            old.rename(new)
        else:
            shutil.rmtree(old, ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")


def _written(folder: Path) -> tuple[int, str]:
    """When a checkpoint was written, and by which run: from the manifest, since a copy has other times."""
    try:
        content = read_manifest(folder)
    except (OSError, ValueError):
        return 0, ""
    return content["time"], content["run"]


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
