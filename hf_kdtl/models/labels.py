"""Which column of the teacher's logits is which class of the student: by name, never by position alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from unicodedata import normalize

import numpy as np

from hf_kdtl.models.forward.embedding import is_headless
from hf_kdtl.utils.wrapped import inside


def class_names(config: Any) -> list[str] | None:
    """Names by class index, or None where they are transformers' defaults (LABEL_0, LABEL_1, ...).

    The keys of `id2label` may be numbers or their text ("0", as JSON has them), and count from 0 or from 1.

    Raises:
        ValueError: for other keys.
    """
    if config.id2label is None:  # PVT's config leaves it so
        return None
    names = [str(name) for _, name in sorted(_by_index(config.id2label).items())]
    numbers = [int(name[6:]) for name in names if re.fullmatch(r"LABEL_\d+", name)]
    return None if len(numbers) == len(names) and numbers == sorted(numbers) else names


def _by_index(id2label: dict[Any, Any]) -> dict[int, Any]:
    keys = list(id2label)
    numbers = [int(key) if re.fullmatch(r"\d+", str(key)) else -1 for key in keys]
    first = min(numbers, default=0)
    if first not in (0, 1) or sorted(numbers) != list(range(first, first + len(keys))):
        hint = " Is it label2id?" if all(isinstance(value, int) for value in id2label.values()) else ""
        raise ValueError(f"id2label has the keys {keys[:5]}; expected the class indices 0 to {len(keys) - 1}.{hint}")
    return {number - first: id2label[key] for number, key in zip(numbers, keys, strict=True)}


MULTI_LABEL = "multi_label_classification"


def is_multi_label(model: Any) -> bool:
    """Whether a model has several labels an image, by its config's problem_type."""
    return getattr(getattr(model, "config", None), "problem_type", None) == MULTI_LABEL


def set_class_names(config: Any, names: Sequence[str]) -> None:
    """Write class names into a model's config, by index."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


def same_classes(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two lists hold the same class names, in any order; composed and decomposed accents are the same."""
    return sorted(_composed(one)) == sorted(_composed(other))


def label_order(wanted: Sequence[str], found: Sequence[str], who: tuple[str, str] = ("student", "teacher")) -> Any:
    """order[k]: where in `found` the class `wanted[k]` stands; None where the two lists are equal.

    Equal lists may repeat a name (ImageNet has "crane" and "maillot" twice); in another order that is ambiguous.

    Raises:
        ValueError: when the classes differ or cannot be distinguished, showing them.
    """
    ours, its = _composed(wanted), _composed(found)
    if ours == its:
        return None
    if set(ours) != set(its):
        raise ValueError(
            f"{who[0]} and {who[1]} have different classes. Only the {who[0]}: {_few(set(ours) - set(its))}. Only the "
            f"{who[1]}: {_few(set(its) - set(ours))}. Use a {who[1]} with these classes, rename its config.id2label, "
            "or use objectives that compare no class outputs."
        )
    if repeated := {name for names in (ours, its) for name in names if names.count(name) > 1}:
        raise ValueError(
            f"the classes {_few(repeated)} occur more than once, and {who[0]} and {who[1]} list them in different "
            "orders, so they cannot be distinguished by name. Give each class a name of its own in config.id2label."
        )
    return [its.index(name) for name in ours]


def classes_of(student: Any) -> Any:
    """The config of a student, which says what its classes are. Raises TypeError where there is none."""
    if (config := getattr(student, "config", None)) is None:
        raise TypeError(
            f"the student is a {type(student).__name__} without a config, which says what its classes are: set "
            "student.config = transformers.PretrainedConfig(id2label={0: ..., 1: ...}), or use objectives that "
            "compare no class outputs."
        )
    return config


def match_labels(student: Any, teacher: Any) -> tuple[list[int] | None, str]:
    """Columns of the teacher's logits in the student's class order, from the two model configs.

    Returns:
        (order, note): order is None where the columns already agree, else order[k] is the teacher's column for the
        student's class k; the note says in a sentence what was matched and how.

    Raises:
        ValueError: when the classes differ, showing what only one side has.
    """
    names_s, names_t = class_names(student), class_names(teacher)
    if names_s is None or names_t is None:
        who = "the student" if names_s is None else "the teacher"
        unnamed = "student and teacher have" if names_s is None and names_t is None else f"{who} has"
        if student.num_labels != teacher.num_labels:
            raise ValueError(
                f"the student has {student.num_labels} classes and the teacher {teacher.num_labels} (num_labels of "
                f"their configs, also where a head was replaced by hand), and {unnamed} no class names. Give the "
                "student the teacher's classes (id2label=teacher.config.id2label), or use objectives that compare no "
                "class outputs."
            )
        return None, f"labels matched by position: {unnamed} no class names."
    order = label_order(names_s, names_t)
    doubt = "".join(_contradiction(config, who) for config, who in ((student, "student"), (teacher, "teacher")))
    if order is None:
        return None, f"labels match by name, in the same order.{doubt}"
    how = "labels match by name in another order: the teacher's logits are re-ordered to the student's."
    return order, how + doubt


def _contradiction(config: Any, who: str) -> str:
    """A sentence where label2id gives a name another index than id2label does."""
    for name, index in (getattr(config, "label2id", None) or {}).items():
        other = config.id2label.get(index, config.id2label.get(str(index)))
        if other is not None and name != other and name in config.id2label.values():
            return f" The {who}'s label2id says {name!r} is {index} and its id2label {other!r}: id2label was read."
    return ""


def dataset_class_names(dataset: Any) -> list[str] | None:
    """The names of label 0, 1, ... where a dataset has them: ImageDataset, features of `datasets`, torchvision, and
    what holds these (Subset, ConcatDataset, a wrapper with the attribute `dataset`).

    Raises:
        ValueError: when joined datasets list their classes differently.
    """
    if parts := inside(dataset):
        lists = [names for part in parts if (names := dataset_class_names(part)) is not None]
        if odd := [names for names in lists if _composed(names) != _composed(lists[0])]:
            raise ValueError(
                f"the datasets that are joined list their classes differently, {lists[0][:5]} and {odd[0][:5]}, so "
                "label 0 means two classes. Re-order one: hf_kdtl.data.loading.load_images(...).in_order(student)."
            )
        return lists[0] if lists else None
    inner = getattr(dataset, "split", None)  # of an ImageDataset; of a datasets.Dataset it is only a name
    features = [getattr(one, "features", None) for one in (inner, dataset)]
    labels = [one.get(key) for one in features if isinstance(one, Mapping) for key in ("label", "labels")]
    found = [*(getattr(one, "names", None) for one in labels), getattr(dataset, "classes", None)]
    return next((names for one in found if (names := _in_order(one))), None)


def _in_order(names: Any) -> list[str] | None:
    """Class names of a dataset's attribute, by index; None where it is something else, or has no order."""
    if isinstance(names, Mapping) and sorted(names.values(), key=str) == sorted(range(len(names)), key=str):
        names = sorted(names, key=names.__getitem__)  # {name: index}
    names = list(names) if isinstance(names, list | tuple | np.ndarray) else []
    return [str(name) for name in names] if names and all(isinstance(name, str) for name in names) else None


def adopt_class_names(model: Any, names: Sequence[str] | None) -> None:
    """Name the classes of a model that names none, after the data it is trained on or its teacher.

    Otherwise a teacher would be matched to it by position, and teach cat where the data says dog.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "id2label") or is_headless(model):
        return
    own = class_names(config)
    if own is None and names is not None and len(names) == config.num_labels:
        set_class_names(config, names)
    elif own is not None and list(config.id2label) != list(range(len(own))):
        set_class_names(config, own)


def class_problem(model: Any, dataset: Any) -> str | None:
    """Why label i of a dataset does not mean the model's class i, with what to type; None where it does."""
    config, data = getattr(model, "config", None), dataset_class_names(dataset)
    if is_headless(model):
        return None
    own = class_names(config) if data and config is not None else None
    if data is not None and own is None and config is not None and len(data) > config.num_labels:
        return (
            f"the data has {len(data)} classes ({_few(data, 5)}) and the student {config.num_labels} outputs. Give it "
            f"one a class: from_pretrained(..., num_labels={len(data)}, ignore_mismatched_sizes=True)."
        )
    if data is None or own is None:
        return None
    if not same_classes(data, own):
        ours, its = set(_composed(data)), set(_composed(own))
        return (
            f"the data's classes and the student's differ: only the data has {_few(ours - its, 5)}, only the student "
            f"{_few(its - ours, 5)}. Use a student with the data's classes (num_labels, id2label), or other data."
        )
    if _composed(data) == _composed(own):
        return None
    return (
        f"the data lists its classes as {data[:5]} and the student as {own[:5]}: label 0 would mean another class. "
        "Re-order the data: hf_kdtl.data.loading.load_images(...).in_order(student)."
    )


def _composed(names: Sequence[str]) -> list[str]:
    return [normalize("NFC", str(name)) for name in names]


def _few(names: set[str] | list[str], most: int = 10) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return (", ".join(map(repr, shown[:most])) or "none") + more
