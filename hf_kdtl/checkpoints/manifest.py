"""The files of a checkpoint: listed with their checksums, and verified.

In addition to Trainer's files a checkpoint has a manifest of them, with size and checksum, written after all the
others; `trainer_state.json` gets its name last. So an interrupted save lacks it, and what was truncated, changed or
lost later is found by its checksum. Nothing is unpickled to find out. The manifest also names the run and the
time, so that two runs in one folder are not confused.
"""

from __future__ import annotations

import errno
import json
import os
import time
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

import hf_kdtl

FILES = "checkpoint_files.json"
UNLISTED = f"{TRAINER_STATE_NAME}.part"
"""The name of `trainer_state.json` until the manifest is written."""
_LOADED = (".safetensors", ".safetensors.index.json", "pytorch_model.bin", "distillation_state.json")
_FIELDS = {"run": str, "time": int, "written_with": dict, "files": dict}


def verify(folder: str | Path, contents: bool = True) -> list[str]:
    """What is wrong with a checkpoint: one text for each file, naming it. Empty where the checkpoint is complete.

    Args:
        folder: the checkpoint.
        contents: also read every file and compare its checksum.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return ["there is no such folder"]
    if not (folder / TRAINER_STATE_NAME).exists():
        return [f"{TRAINER_STATE_NAME} is missing: its save was not finished"]
    try:
        files, state = read_manifest(folder)["files"].items(), _read(folder / TRAINER_STATE_NAME)
    except (OSError, ValueError) as error:
        return [str(error)]
    checked = [_problem(folder / name, size, checksum, contents) for name, (size, checksum) in files]
    if not any(checked) and not isinstance(state.get("global_step"), int):
        checked.append(f"{TRAINER_STATE_NAME} has no global_step")
    return [problem for problem in checked if problem]


def verify_read(folder: str | Path) -> list[str]:
    """As `verify`, of what is read where the model alone is loaded: weights and the objectives' tensors as they were
    written, and settings that can be read."""
    folder = Path(folder)
    if not folder.is_dir():
        return ["there is no such folder"]
    try:
        files = read_manifest(folder)["files"].items()
        for name, _ in files:
            if Path(name).name in (CONFIG_NAME, ADAPTER_CONFIG_NAME):
                _read(folder / name)
    except (OSError, ValueError) as error:
        return [str(error)]
    needed = [(folder / name, size, checksum) for name, (size, checksum) in files if name.endswith(_LOADED)]
    return [problem for path, size, checksum in needed if (problem := _problem(path, size, checksum, True))]


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """A checkpoint's manifest: its `files`, its `run`, its `time`, what it was `written_with`.

    Raises:
        ValueError: when it is missing or not what was written.
    """
    content = _read(Path(folder, FILES))
    typed = all(isinstance(content.get(name), kind) for name, kind in _FIELDS.items())
    if not typed or not all(
        isinstance(v, list) and [type(n) for n in v] == [int, int] for v in content["files"].values()
    ):
        raise ValueError(f"{FILES} is not what was written")
    if TRAINER_STATE_NAME not in content["files"]:
        raise ValueError(f"{FILES} does not list {TRAINER_STATE_NAME}: it is not what was written")
    return content


def write_manifest(folder: Path, processes: int, needed: list[str], run: str = "", **facts: Any) -> None:
    """List the files of a checkpoint with size and checksum, when all are written; then `UNLISTED` gets its name.

    Args:
        folder: the checkpoint.
        processes, **facts: recorded under `written_with`.
        needed: files that must be there.
        run: the run that it belongs to.

    Raises:
        FileNotFoundError: when one of `needed` is not there.
    """
    if lost := [name for name in needed if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{lost} of {folder} were not written. Processes that do not share output_dir need save_on_each_node=True."
        )
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / FILES]
    sums = {path.relative_to(folder).as_posix(): [path.stat().st_size, _checksum(path)] for path in files}
    if UNLISTED in sums:
        sums[TRAINER_STATE_NAME] = sums.pop(UNLISTED)
    content = {"version": 1, "run": run, "time": time.time_ns(), "files": sums}
    content["written_with"] = _software() | {"processes": processes} | facts
    (folder / FILES).write_text(json.dumps(content, indent=2) + "\n")
    if (folder / UNLISTED).exists():
        os.replace(folder / UNLISTED, folder / TRAINER_STATE_NAME)


def changed_since(folder: Path, **facts: Any) -> str:
    """What has changed since this checkpoint was written, as text; empty where nothing has. A fact that it does not
    record is not compared."""
    before, now = read_manifest(folder)["written_with"], json.loads(json.dumps(_software() | facts))
    left = {name: value for name, value in now.items() if name in before}
    was, here = _flat({name: before[name] for name in left}), _flat(left)
    return ", ".join(
        f"{name} {was.get(name)} (now {here.get(name)})" for name in {**here, **was} if was.get(name) != here.get(name)
    )


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Facts inside facts under dotted names.

    >>> _flat({"seed": 1, "size": {"height": 32}})
    {'seed': 1, 'size.height': 32}
    """
    found: dict[str, Any] = {}
    for name, value in facts.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def fsync_tree(folder: Path) -> None:
    """Flush a checkpoint to disk, so that it survives a loss of power.

    Raises:
        OSError: where the disk only now reports that it is full; the checkpoint is then not complete.
    """
    for path in [*folder.rglob("*"), folder, folder.parent]:
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):  # else this file system cannot be asked to
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
                raise


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing: it was lost, or hf_kdtl's trainer did not write this checkpoint")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not what was written")
    return content


def _problem(path: Path, size: int, checksum: int, contents: bool) -> str:
    """What is wrong with a file that was written with this size and checksum; empty where nothing is."""
    if not path.is_file():
        return f"{path.name} is missing"
    if (found := path.stat().st_size) != size:
        return f"{path.name} has {found} bytes, and was written with {size}"
    try:
        changed = contents and _checksum(path) != checksum
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return f"{path.name} is not as it was written: its checksum is another" if changed else ""


def _checksum(path: Path) -> int:
    """CRC-32: against accidents, at a fraction of the time of the writing."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _software() -> dict[str, Any]:
    names = ("torch", "transformers", "accelerate")
    return {"hf_kdtl": hf_kdtl.__version__, **{name: metadata.version(name) for name in names}}
