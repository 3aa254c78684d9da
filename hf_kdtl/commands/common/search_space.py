"""What `tune` tries: a term on class outputs, perhaps one inside the model, their weights, temperature and rate."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.objectives.derivatives import DerivativeObjective
from hf_kdtl.utils.options import check_known

NONE = "none"
OUTPUT_RATIO, SECOND_RATIO, TEMPERATURE, RATE = (0.3, 30.0), (0.03, 3.0), (1.0, 8.0), 5.0


@dataclass(frozen=True)
class SearchSpace:
    """Choices that a trial of optuna makes.

    Args:
        outputs: objectives on class outputs, of which each trial has one.
        seconds: objectives of which a trial has one or none.
        rate: the learning rate in the middle; from a fifth to five times of it are tried.
    """

    outputs: tuple[str, ...]
    seconds: tuple[str, ...]
    rate: float

    @classmethod
    def of(cls, names: list[str], rate: float) -> SearchSpace:
        """Of the names of objectives.

        Raises:
            ValueError: for an unknown name, or none on class outputs.
        """
        for name in names:
            check_known("objective in candidates", name, [n for n in OBJECTIVES if n != "task"])
        outputs = tuple(name for name in names if OBJECTIVES[name].compares_classes and not _inside(name))
        if not outputs:
            raise ValueError(f"candidates: {names or 'none fits'}; expected one on class outputs, such as logit_kd.")
        return cls(outputs, tuple(name for name in names if name not in outputs), rate)

    def suggest(self, trial: Any) -> tuple[list[dict[str, Any]], float]:
        """(entries of `objectives`, learning rate) of a trial. Weights are relative: {"auto": r}, the second term's to
        the stronger of the other two."""
        output, ratio = trial.suggest_categorical("output", self.outputs), _log(trial, "output_ratio", *OUTPUT_RATIO)
        entry = {"name": output, "weight": {"auto": ratio}}
        if "temperature" in inspect.signature(OBJECTIVES[output]).parameters:
            entry["temperature"] = _log(trial, "temperature", *TEMPERATURE)
        entries = [{"name": "task", "weight": 1.0}, entry]
        second = trial.suggest_categorical("second", [NONE, *self.seconds])
        if second != NONE:
            ratio = _three_digits(max(1.0, ratio) * _log(trial, "second_ratio", *SECOND_RATIO))
            entries.append({"name": second, "weight": {"auto": ratio}})
        return entries, _log(trial, "learning_rate", self.rate / RATE, self.rate * RATE)


def _inside(name: str) -> bool:
    """Whether an objective compares derivatives, in addition to class outputs."""
    return issubclass(OBJECTIVES[name], DerivativeObjective)


def _log(trial: Any, name: str, low: float, high: float) -> float:
    """A number that is drawn on a logarithmic scale."""
    return _three_digits(trial.suggest_float(name, low, high, log=True))


def _three_digits(number: float) -> float:
    """It goes into a file that is read."""
    return float(f"{number:.3g}")


def words(entries: list[dict[str, Any]]) -> str:
    """Objectives for a line of a table.

    >>> words([{"name": "task"}, {"name": "logit_kd", "weight": {"auto": 2.0}, "temperature": 3.0}])
    'task 1 + logit_kd auto x 2 (temperature 3)'
    """
    return " + ".join(_entry(entry) for entry in entries)


def _entry(entry: dict[str, Any]) -> str:
    weight = entry.get("weight", 1.0)
    shown = f"auto x {weight['auto']:g}" if isinstance(weight, dict) else f"{weight:g}" if weight != "auto" else weight
    options = ", ".join(f"{key} {value}" for key, value in entry.items() if key not in ("name", "weight"))
    options = options.replace(".0,", ",").removesuffix(".0")
    return f"{entry['name']} {shown}" + (f" ({options})" if options else "")
