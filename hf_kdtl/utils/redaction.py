"""Paths of this machine in what is published: they tell of a machine and its user, and are cut to their last part."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

# A folder's name may hold one blank (John Smith), the last part none: what follows it is the sentence.
_PART = r"[^\s'\",;:/\\]+"
_ROOT = r"(?:~[\w.-]*[/\\]|/|[A-Za-z]:[/\\]|\.\.?[/\\])"
_PATH = re.compile(rf"(?<![\w.:/\\])(?:file://)?{_ROOT}(?:(?:{_PART}(?: {_PART})?)?[/\\])*({_PART})[/\\]?")
CLASSES = "classes"


def without_paths(text: str) -> str:
    """A text with each path of this machine cut to its last part.

    >>> without_paths("the teacher '/home/me/runs/vit' is small, owner/name is not a path")
    "the teacher 'vit' is small, owner/name is not a path"
    """
    if "\n" not in text and (Path(text).is_absolute() or PureWindowsPath(text).is_absolute()):
        return PureWindowsPath(text).name or text  # a path that may hold blanks
    for folder in own_folders():
        text = text.replace(f"{folder}/", "")
    return _PATH.sub(lambda found: found[1], text)


def anonymous(value: Any) -> Any:
    """JSON whose texts name files and folders by their last part alone; the names of classes stay what they are.

    >>> anonymous({"teacher": "/home/me/my models/vit", "note": "read from ~/my/cats, cut 1/2", "classes": ["/m/01"]})
    {'teacher': 'vit', 'note': 'read from cats, cut 1/2', 'classes': ['/m/01']}
    """
    if isinstance(value, dict):
        return {key: item if key == CLASSES else anonymous(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [anonymous(item) for item in value]
    return without_paths(value) if isinstance(value, str) else value


def own_folders() -> Iterator[Path]:
    """The working folder and the home folder, as far as their names tell anything; the latter as seen from above it
    too, for who works there."""
    home = Path.home()
    above = [Path(*home.parts[-2:])] if len(home.parts) > 2 else []
    return (folder for folder in (Path.cwd(), home, *above) if len(folder.parts) > 1)
