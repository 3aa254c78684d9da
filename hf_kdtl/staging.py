"""What of a student may be published, as a clean folder: allow-listed files, without paths, searched for secrets."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCard, get_token

from hf_kdtl.cards.markdown import without_paths
from hf_kdtl.evaluation.results import FILE

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
           "adapter_model.safetensors", "adapter_config.json")  # fmt: skip
SETTINGS = ("config.json", "adapter_config.json", "preprocessor_config.json", "processor_config.json")
CARD = "README.md"
_PICTURE = re.compile(r"!\[[^\]]*\]\(([\w.-]+\.png)\)")
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")


def stage(
    student: str | Path,
    target: str | Path,
    card: ModelCard,
    results: dict[str, Any],
    pictures: str | Path | None = None,
    token: str | None = None,
) -> Path:
    """Make the folder that goes to the Hub, and return it: the student's weights and settings, card and results.

    Nothing else is taken along: no optimizer, no random states, no pickle. Settings and results are written anew
    without paths of this machine.

    Args:
        student: a folder with config.json and weights in safetensors, or with an adapter.
        target: an empty folder.
        card: becomes README.md; pictures that it shows are taken from the folder `pictures`.
        results: becomes results.json.
        token: is searched for, with the one that is logged in.

    Raises:
        FileNotFoundError: when there is no student in safetensors.
        ValueError: for an adapter whose base model is a folder of this machine; for a token or a path of this
            machine in what would go up.
    """
    student, target = Path(student), Path(target)
    for path in sorted(path for path in student.iterdir() if path.is_file()):
        if path.name in SETTINGS:
            _write(target / path.name, _mended(path))
        elif is_weights(path.name):
            shutil.copyfile(path, target / path.name)
    _check_whole(student, {path.name for path in target.iterdir()})
    _write(target / FILE, anonymous(results))
    (target / CARD).write_text(str(card), encoding="utf-8")
    for name in _PICTURE.findall(str(card)):
        if pictures is not None and Path(pictures, name).is_file():
            shutil.copyfile(Path(pictures, name), target / name)
    for path in target.iterdir():
        refuse_secrets(path.name, _searchable(path), token)
    return target


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights of a student, or says where they are."""
    return any(fnmatch(name, pattern) for pattern in WEIGHTS)


def anonymous(value: Any) -> Any:
    """JSON whose texts name files and folders by their last part alone: paths tell of a machine and its user.

    >>> anonymous({"teacher": "/home/me/my models/vit", "note": "read from ~/my/cats, cut 1/2"})
    {'teacher': 'vit', 'note': 'read from cats, cut 1/2'}
    """
    if isinstance(value, dict):
        return {key: anonymous(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [anonymous(item) for item in value]
    if not isinstance(value, str):
        return value
    if "\n" not in value and (Path(value).is_absolute() or PureWindowsPath(value).is_absolute()):
        return PureWindowsPath(value).name or value  # a path that may hold blanks
    for folder in _own_folders():
        value = value.replace(f"{folder}/", "")
    return without_paths(value)


def refuse_secrets(what: str, content: bytes, token: str | None = None) -> None:
    """Raises ValueError when a text that is to be published holds a token or a folder of this machine."""
    found = [one.encode() for one in (token, get_token()) if one]
    if _TOKEN.search(content) or any(secret in content for secret in found):
        raise ValueError(f"{what} holds an access token; nothing was published. Remove it, and revoke the token.")
    for folder in _own_folders():
        if f"{folder}/".encode() in content:
            raise ValueError(
                f"{what} names {folder}, a folder of this machine; nothing was published. Remove it: what is "
                "published should say nothing about whose machine made it."
            )


def _own_folders() -> Iterator[Path]:
    """The working folder and the home folder, as far as their names tell anything; the latter as seen from above it
    too, for who works there."""
    home = Path.home()
    above = [Path(*home.parts[-2:])] if len(home.parts) > 2 else []
    return (folder for folder in (Path.cwd(), home, *above) if len(folder.parts) > 1)


def _mended(path: Path) -> Any:
    settings = json.loads(path.read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path") if path.name == "adapter_config.json" else None
    if base is not None and _is_local(base):
        raise ValueError(
            f"the student is an adapter on {Path(base).name!r}, a folder of this machine, and nobody else could open "
            "it; nothing was published. Publish the base model first and set base_model_name_or_path in "
            "adapter_config.json to its name on the Hub, or merge: model.merge_and_unload().save_pretrained(<folder>)."
        )
    return _nameless(settings)


def _nameless(settings: Any) -> Any:
    """Without `_name_or_path` where it is a folder, in nested configs too."""
    if isinstance(settings, list):
        return [_nameless(item) for item in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        name: _nameless(value) for name, value in settings.items() if name != "_name_or_path" or not _is_local(value)
    }


def _is_local(name: Any) -> bool:
    """Whether a model's name is a path: it exists here, or is no name that the Hub could have."""
    return Path(str(name)).expanduser().exists() or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) is None


def _check_whole(student: Path, names: Collection[str]) -> None:
    weights = any(name.endswith(".safetensors") for name in names)
    if weights and ("config.json" in names or "adapter_config.json" in names):
        return
    found = ", ".join(sorted(path.name for path in student.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"{student} holds {found}; expected a student's config.json and model.safetensors (a .bin file is a pickle "
        "and is not published: save it anew with save_pretrained)."
    )


def _searchable(path: Path) -> bytes:
    """The content of a file; of weights the header, which is all of it that can hold text."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
