"""Paths of this machine in what is published: they tell of a machine and its user, and are cut to their last part."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

# A folder's name may hold one blank (John Smith), the last part none: what follows it is the sentence.
_PART = r"[^\s'\",;:/\\]+"
_ROOT = r"(?:~[\w.-]*[/\\]|/|[A-Za-z]:[/\\]|\.\.?[/\\])"
_PATH = re.compile(rf"(?<![\w.:/\\])(?:file://)?{_ROOT}(?:(?:{_PART}(?: {_PART})?)?[/\\])*({_PART})[/\\]?")
# A path without a root: words joined by slashes. With one slash alone it may be a name on the Hub, or a fraction.
_RELATIVE = re.compile(r"(?<![\w.:/\\@~-])[\w.-]*[^\W\d_][\w.-]*(?:[/\\][\w.-]+)+")
_INNER = ("model", "student")  # what a run calls the folder of its model: the run's name tells more
CLASSES = "classes"


def without_paths(text: str) -> str:
    """A text with each path of this machine cut to its last part.

    >>> without_paths("the teacher '/home/me/runs/vit' is small, owner/name is not a path")
    "the teacher 'vit' is small, owner/name is not a path"
    >>> without_paths("the teacher runs/vit/model is small")
    'the teacher vit is small'
    """
    if "\n" not in text and (Path(text).is_absolute() or PureWindowsPath(text).is_absolute()):
        return PureWindowsPath(text).name or text  # a path that may hold blanks
    for folder in own_folders():
        text = text.replace(f"{folder}/", "")
    return _RELATIVE.sub(_shortened, _PATH.sub(lambda found: found[1], text))


def local_name(path: str) -> str:
    """What a local path is called where it is published: its last part, of a run's model the run.

    >>> local_name("runs/vit/model/"), local_name("C:\\\\data\\\\cats")
    ('vit', 'cats')
    """
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..", "~")]
    if len(parts) > 1 and parts[-1] in _INNER:
        return parts[-2]
    return parts[-1] if parts else path


def _shortened(found: re.Match[str]) -> str:
    """A relative path by its name: what exists here, or has a slash too many for a name on the Hub."""
    path, end = found[0].rstrip("."), found[0][len(found[0].rstrip(".")) :]
    if len(re.findall(r"[/\\]", path)) < 2 and not Path(path).exists():
        return found[0]
    return local_name(path) + end


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


def relative_paths(text: str) -> str:
    """A text whose paths below the working folder and the home folder are relative to them, for a run's own files."""
    for folder, short in ((Path.cwd(), ""), (Path.home(), "~/")):
        if len(folder.parts) > 1:
            text = text.replace(f"{folder}{os.sep}", short)
    return text


def own_folders() -> Iterator[Path]:
    """The working folder and the home folder, as far as their names tell anything; the latter as seen from above it
    too, for who works there."""
    home = Path.home()
    above = [Path(*home.parts[-2:])] if len(home.parts) > 2 else []
    return (folder for folder in (Path.cwd(), home, *above) if len(folder.parts) > 1)
