"""What the commands take from a store of teacher outputs: views, and the way to the model behind it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.hub import license as licenses
from hf_kdtl.models.teachers import StoredTeacher, Teacher
from hf_kdtl.models.teachers.store.manifest import read_manifest
from hf_kdtl.models.teachers.store.named import find_store


def opened(
    options: Any, open_live: Callable[[dict[str, str]], dict[str, Teacher]], notes: list[str]
) -> tuple[dict[str, Teacher], dict[str, StoredTeacher]]:
    """{name: live teacher}, of a store the one it was written from where that is still there; {name: store}."""
    paths = options.teacher_paths
    stores = {name: StoredTeacher(path) for name, path in paths.items() if find_store(path) is not None}
    teachers = open_live({name: path for name, path in paths.items() if name not in stores})
    teachers |= {name: live for name, store in stores.items() if (live := store.live()) is not None}
    for teacher in teachers.values():
        teacher.teacher_batch = options.teacher_batch or teacher.teacher_batch
    notes += [note for store in stores.values() for note in store.notes]
    return teachers, stores


def source(teachers: Mapping[str, Teacher], stores: Mapping[str, StoredTeacher]) -> Any:
    """What a trainer is given: the only teacher, or a mapping; None without any."""
    found: dict[str, Any] = {**teachers, **stores}
    return found.get("teacher") if found.keys() <= {"teacher"} else found


def take_views(
    stores: Mapping[str, StoredTeacher],
    data_options: DataOptions,
    config: DistillationConfig,
    typed: Iterable[str] | None,
) -> set[str] | None:
    """Give the run the views of its stores where nothing else was typed; the names that count as typed now."""
    given = set(typed or ())
    for settings in (store.manifest.settings for store in stores.values()):
        if "augmentation" in settings and "augmentation" not in given:
            data_options.augmentation = json.dumps(settings["augmentation"]) if settings["augmentation"] else None
        if "view_seed" not in given:
            config.view_seed = settings.get("view_seed", config.view_seed)
        given |= {"augmentation"} & settings.keys()
    return None if typed is None else given


def model_path(teacher: str) -> str:
    """The folder or Hub name of a teacher's model; of a store, the one it was written from."""
    store = find_store(teacher)
    return teacher if store is None else read_manifest(store).teacher.name_or_path or teacher


def license_of(teacher: str, token: str | None = None) -> str | None:
    """The license of a teacher's model; of a store, the one that it kept."""
    store = find_store(teacher)
    kept = None if store is None else read_manifest(store).teacher.license
    return kept or licenses.license_of(model_path(teacher), token)


def flags(settings: dict[str, Any]) -> list[str]:
    """The settings of a store as the flags of its command."""
    found: list[str] = []
    for name, value in settings.items():
        several = isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)
        texts = [one if isinstance(one, str) else json.dumps(one) for one in (value if several else [value])]
        found += [f"--{name}", *texts]
    return found
