"""A store by its folder, or by the name of a dataset repository on the Hub that holds one."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from hf_kdtl.models.teachers.store.manifest import DIGESTS, FILE, ROWS, is_store

FILES = (FILE, ROWS, DIGESTS, "teacher/*.json", "teacher/*.safetensors", "*/view-*/*.npy")
"""What of a repository is read."""
_downloaded: dict[str, Path] = {}


def find_store(teacher: str | Path, **where: Any) -> Path | None:
    """The folder of a store; one of that name on the Hub is downloaded, once a process. None where it is no store:
    also where the name is that of a model, which is the teacher then.

    Args:
        teacher: a folder, or the name of a dataset repository.
        where: revision and token of the repository.

    Raises:
        OSError: for a repository that one may not read.
    """
    folder, name = Path(teacher).expanduser(), str(teacher)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return folder if is_store(folder) else None
    key = f"{name}@{where.get('revision')}"
    if key not in _downloaded:
        if _is_there(name, "config.json", "model", where) or not _is_there(name, FILE, "dataset", where):
            return None
        found = snapshot_download(name, repo_type="dataset", allow_patterns=list(FILES), **where)
        _downloaded[key] = Path(found)
    return _downloaded[key]


def is_stores(path: str) -> bool:
    """Whether a file at this path of a repository belongs to a store."""
    return any(fnmatch(path, pattern) for pattern in FILES)


def _is_there(name: str, file: str, kind: str, where: dict[str, Any]) -> bool:
    try:
        hf_hub_download(name, file, repo_type=kind, **where)
    except GatedRepoError:  # there, and it says itself what to do
        if kind == "model":
            return True
        raise
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError, OfflineModeIsEnabled):
        return False
    return True
