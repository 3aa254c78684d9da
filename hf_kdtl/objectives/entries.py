"""What an entry of the config's `objectives` says in addition to its objective's options: its key and its weight."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.objectives.base import Objective
from hf_kdtl.utils.options import check_known, check_option, is_number

AUTO = "auto"
ENTRY_KEYS = ("name", "key", "weight", "role", "teacher")
"""What any entry may hold in addition to the objective's own options."""
LOGGED = ("loss", "grad_norm", "learning_rate", "epoch", "step", "total_flos", "num_input_tokens_seen", "runtime",
          "samples_per_second", "steps_per_second", "model_preparation_time")  # fmt: skip
"""What Trainer logs under these names, also behind `eval_`."""


def entry_key(entry: Mapping[str, Any]) -> str:
    """The key that names an entry's term: its `key`, by default its `name`."""
    if "name" not in entry:
        raise ValueError(f"objectives: {dict(entry)} has no name; expected one of {', '.join(OBJECTIVES)}.")
    key = entry.get("key", entry["name"])
    if not isinstance(key, str) or not key or "." in key:
        raise ValueError(f"objectives: key is {key!r}; expected a word without dots, for the log.")
    if hasattr(nn.ModuleDict, key):  # in which the objectives are held by their keys
        raise ValueError(f"objectives: key is {key!r}, which torch's modules use; take {key + '_1'!r}.")
    if key in LOGGED or key.endswith("_share"):
        raise ValueError(f"objectives: key is {key!r}, which is another number in the log; take {key + '_term'!r}.")
    return key


def entry_weight(entry: Mapping[str, Any]) -> float:
    """The weight of an entry, by default 1; nan where it is "auto", which training measures.

    >>> entry_weight({"name": "logit_kd", "weight": 0.9}), entry_weight({"name": "logit_kd", "weight": "auto"})
    (0.9, nan)
    """
    if auto_ratio(entry) is not None:
        return math.nan
    weight = entry.get("weight", 1.0)
    expected = 'a number of at least 0, "auto", or {"auto": 0.5}'
    check_option(f"objective {entry_key(entry)!r}", "weight", weight, is_number(weight) and weight >= 0, expected)
    return float(weight)


def auto_ratio(entry: Mapping[str, Any]) -> float | None:
    """r of a weight `{"auto": r}`, 1 of "auto"; None where the weight is a number.

    >>> auto_ratio({"name": "logit_kd", "weight": {"auto": 0.5}})
    0.5

    Raises:
        ValueError: for an r that is not above 0, or a mapping with another key.
    """
    weight = entry.get("weight", 1.0)
    if weight == AUTO:
        return 1.0
    if not isinstance(weight, Mapping):
        return None
    ratio = weight.get(AUTO)
    valid = set(weight) == {AUTO} and is_number(ratio) and float(ratio or 0.0) > 0
    check_option(f"objective {entry_key(entry)!r}", "weight", weight, valid, '{"auto": <a number above 0>}')
    return float(ratio or 1.0)


def check_weights(entries: Iterable[Mapping[str, Any]]) -> None:
    """Raises ValueError where every weight is 0, or one is "auto" and none is a number above 0 to compare it with."""
    entries = list(entries)
    weights = [entry_weight(entry) for entry in entries]
    if not any(weights):
        raise ValueError("objectives: every weight is 0, so nothing would be learned; set one above 0.")
    measured = [entry_key(entry) for entry, weight in zip(entries, weights, strict=True) if math.isnan(weight)]
    if measured and not any(weight > 0 for weight in weights):
        raise ValueError(
            f"objectives: the weight of {', '.join(measured)} is auto, which is measured against the first entry that "
            'has a number above 0, and there is none. Give one, such as {"name": "task", "weight": 1.0}.'
        )


def build_entry(entry: Mapping[str, Any]) -> Objective:
    """The objective of an entry, without parameters yet. Raises ValueError for an unknown name, key or value."""
    name = entry["name"]
    check_known("objective", name, OBJECTIVES)
    entry_weight(entry)
    options = {k: v for k, v in entry.items() if k not in ENTRY_KEYS}
    valid = [*inspect.signature(OBJECTIVES[name]).parameters, *ENTRY_KEYS]
    for option in options:
        check_known(f"option of objective {name!r}", option, valid)
    objective = OBJECTIVES[name](**options)
    if "role" in entry:
        role = entry["role"]
        check_option(f"objective {name!r}", "role", role, role in ("task", "transfer"), "'task' or 'transfer'")
        objective.role = role
    if "teacher" in entry:
        teacher = entry["teacher"]
        takes = objective.source == "teacher" and objective.needs_teacher
        named = takes and isinstance(teacher, str) and teacher != "start"
        expected = "the name of one of several teachers" if takes else "nothing: it takes no signals of a teacher"
        check_option(f"objective {name!r}", "teacher", teacher, named, expected)
        objective.source = teacher
    return objective
