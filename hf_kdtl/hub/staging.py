"""What of a student may be published, as a clean folder: allow-listed files, without paths, searched for secrets."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard, get_token

from hf_kdtl.evaluation.records import Results
from hf_kdtl.evaluation.results import FILE, to_json
from hf_kdtl.hub.card_results import published
from hf_kdtl.hub.card_tables import models_of
from hf_kdtl.utils.redaction import own_folders

FULL = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "config.json")
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
SETTINGS = ("config.json", "adapter_config.json", "preprocessor_config.json", "processor_config.json")
CARD = "README.md"
_PICTURE = re.compile(r"!\[[^\]]*\]\(([\w.-]+\.png)\)")
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")


def stage_student(
    student: str | Path,
    target: str | Path,
    card: ModelCard,
    results: dict[str, Any],
    pictures: str | Path | None = None,
    token: str | None = None,
) -> Path:
    """Make the folder that goes to the Hub, and return it: the student's weights and settings, card and results.

    Nothing else is published: no optimizer, no random states, no pickle, and of a full model and an adapter in one
    folder the one that the results are of. Settings and results are written again without paths of this machine.

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
    other = FULL if is_adapter(student, results) else ADAPTER
    for path in sorted(path for path in student.iterdir() if path.is_file() and not _fits(path.name, other)):
        if path.name in SETTINGS:
            _write(target / path.name, sanitized(path))
        elif is_students(path.name):
            shutil.copyfile(path, target / path.name)
    _check_complete(student, {path.name for path in target.iterdir()})
    _write(target / FILE, to_json(published(results)))
    (target / CARD).write_text(str(card), encoding="utf-8")
    for name in _PICTURE.findall(str(card)):
        if pictures is not None and Path(pictures, name).is_file():
            shutil.copyfile(Path(pictures, name), target / name)
    for path in target.iterdir():
        refuse_secrets(path.name, _searchable(path), token)
    return target


def is_students(name: str) -> bool:
    """Whether a file of this name holds weights of a student, or says what they are."""
    return _fits(name, (*FULL, *ADAPTER))


def is_adapter(student: Path, results: dict[str, Any]) -> bool:
    """Whether the student in a folder is an adapter: as its results say, and where they do not, what lies there."""
    if models_of(Results.of(results)).student.adapters:
        return models_of(Results.of(results)).student.saved_as_adapter
    full = any(_fits(path.name, FULL) and path.suffix == ".safetensors" for path in student.iterdir())
    return (student / "adapter_config.json").is_file() and not full


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def refuse_secrets(what: str, content: bytes, token: str | None = None) -> None:
    """Raises ValueError when a text that is to be published holds a token or a folder of this machine."""
    found = [one.encode() for one in (token, get_token()) if one]
    if _TOKEN.search(content) or any(secret in content for secret in found):
        raise ValueError(f"{what} holds an access token; nothing was published. Remove it, and revoke the token.")
    for folder in own_folders():
        # As it is, and as JSON and an address of a file write what is not ASCII.
        ways = (f"{folder}/", json.dumps(f"{folder}/")[1:-1], quote(f"{folder}/"))
        if any(way.encode() in content for way in ways):
            raise ValueError(
                f"{what} names {folder}, a folder of this machine; nothing was published. Remove it: what is "
                "published should say nothing about whose machine made it."
            )


def sanitized(path: Path) -> Any:
    """A file of settings without paths of this machine."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    if path.name == "adapter_config.json":
        check_base(settings.get("base_model_name_or_path"))
    return _drop_local_names(settings)


def check_base(base: str | None) -> None:
    """Raises ValueError for an adapter whose base model nobody else could open: a folder, or one without a name."""
    if base and not _is_local(base):
        return
    what = f"{Path(base).name!r}, a folder of this machine" if base else "a model without a name"
    raise ValueError(
        f"the student is an adapter on {what}, and nobody else could open it; nothing was published. Publish the base "
        "model first and set base_model_name_or_path in adapter_config.json (before training: "
        "model.peft_config[...].base_model_name_or_path) to its name on the Hub, or merge: "
        "model.merge_and_unload().save_pretrained(<folder>)."
    )


def _drop_local_names(settings: Any) -> Any:
    """Without `_name_or_path` where it is a folder, in nested configs too."""
    if isinstance(settings, list):
        return [_drop_local_names(item) for item in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        name: _drop_local_names(value)
        for name, value in settings.items()
        if name != "_name_or_path" or not _is_local(value)
    }


def _is_local(name: Any) -> bool:
    """Whether a model's name is a path: it exists here, or is no name that the Hub could have."""
    return Path(str(name)).expanduser().exists() or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) is None


def _check_complete(student: Path, names: Collection[str]) -> None:
    weights = any(name.endswith(".safetensors") for name in names)
    if weights and ("config.json" in names or "adapter_config.json" in names):
        return
    found = ", ".join(sorted(path.name for path in student.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"{student} holds {found}; expected a student's config.json and model.safetensors, or its adapter_config.json "
        "and adapter_model.safetensors (a .bin file is a pickle and is not published: save it again with "
        "save_pretrained)."
    )


def _searchable(path: Path) -> bytes:
    """The content of a file; of weights the header, which is all of it that can hold text."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
