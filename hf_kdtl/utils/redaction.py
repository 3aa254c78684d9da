"""Paths of this machine in what is published: they name a machine and its user, and are cut to their last part.

Two things are paths: an absolute one anywhere in a text, and the value of a setting that names a local folder, with
every place that repeats it. Other words with slashes ("train/validation/test", "owner/name", "1/2") are text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

# A folder's name may hold one blank (John Smith), the last part none: what follows it is the sentence.
_PART = r"[^\s'\",;:/\\]+"
_ROOT = r"(?:~[\w.-]*[/\\]|/|[A-Za-z]:[/\\]|\.\.?[/\\])"
_PATH = re.compile(rf"(?<![\w.:/\\])(?:file://)?{_ROOT}(?:(?:{_PART}(?: {_PART})?)?[/\\])*({_PART})[/\\]?")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
_MODEL_FOLDERS = ("model", "student")  # inside a run's folder, whose name says more
CLASSES = "classes"


def without_paths(text: str, local: Iterable[str] = ()) -> str:
    """A text with each absolute path, and each path below one of the folders `local`, cut to its last part.

    >>> without_paths("the teacher '/home/me/runs/vit' is small, owner/name and train/validation/test are no paths")
    "the teacher 'vit' is small, owner/name and train/validation/test are no paths"
    >>> without_paths("runs/vit/model has no image processor", ["runs/vit/model"])
    'vit has no image processor'
    """
    if "\n" not in text and (Path(text).is_absolute() or PureWindowsPath(text).is_absolute()):
        return PureWindowsPath(text).name or text  # a path that may hold blanks
    for folder in sorted({*map(str, own_folders()), *local}, key=len, reverse=True):
        below = re.compile(rf"(?<![\w./\\-]){re.escape(folder.rstrip('/'))}(?![\w-])((?:[/\\][\w.-]*\w)*)[/\\]?")
        text = below.sub(lambda found, folder=folder: local_name(found[1] or folder), text)  # type: ignore[misc]
    return _PATH.sub(lambda found: found[1], text)


def local_name(path: str) -> str:
    """What a local path is called where it is published: its last part, of a run's model the run.

    >>> local_name("runs/vit/model/"), local_name("C:\\\\data\\\\cats")
    ('vit', 'cats')
    """
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..", "~")]
    if len(parts) > 1 and parts[-1] in _MODEL_FOLDERS:
        return parts[-2]
    return parts[-1] if parts else path


def is_local(value: str) -> bool:
    """Whether a setting's value is a local path: it exists here, or has slashes and can be no name on the Hub.

    >>> is_local("runs/vit/model"), is_local("owner/name"), is_local("cosine"), is_local("https://host.org/a/b")
    (True, False, False, False)
    """
    if not ("/" in value or "\\" in value) or "://" in value.removeprefix("file://") or "\n" in value:
        return False
    return (_HUB_NAME.fullmatch(value) is None and " " not in value) or Path(value).exists()


def local_paths(value: Any) -> set[str]:
    """The local paths among the values of settings: see `is_local`."""
    if isinstance(value, dict):
        return set().union(*map(local_paths, value.values()))
    if isinstance(value, list | tuple):
        return set().union(*map(local_paths, value))
    return {value} if isinstance(value, str) and is_local(value) else set()


def anonymous(value: Any, local: Iterable[str] = ()) -> Any:
    """JSON whose texts name files and folders by their last part alone, as `without_paths`; the names of classes stay.

    >>> anonymous({"teacher": "/home/me/my models/vit", "note": "read from ~/my/cats, cut 1/2", "classes": ["/m/01"]})
    {'teacher': 'vit', 'note': 'read from cats, cut 1/2', 'classes': ['/m/01']}
    """
    if isinstance(value, dict):
        return {key: item if key == CLASSES else anonymous(item, local) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [anonymous(item, local) for item in value]
    return without_paths(value, local) if isinstance(value, str) else value


def relative_paths(text: str) -> str:
    """A text whose paths below the working folder and the home folder are relative to them, for a run's own files."""
    for folder, short in ((Path.cwd(), ""), (Path.home(), "~/")):
        if len(folder.parts) > 1:
            below = re.compile(rf"(?<![\w.~-]){re.escape(f'{folder}{os.sep}')}")  # not inside of a longer path
            text = below.sub(short, text)
    return text


def own_folders() -> Iterator[Path]:
    """The working folder and the home folder, unless they are top-level; the latter also relative to
    the folder above it."""
    home = Path.home()
    above = [Path(*home.parts[-2:])] if len(home.parts) > 2 else []
    return (folder for folder in (Path.cwd(), home, *above) if len(folder.parts) > 1)
