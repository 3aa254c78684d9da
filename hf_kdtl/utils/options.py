"""Checks of settings, and the wording of their refusals: what was found, the closest match, what is expected."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

# The largest float32: a finite Python number above it is infinite in a tensor.
_LARGEST = 3.4028234663852886e38


def check_known(what: str, name: Any, valid: Iterable[str]) -> None:
    """Refuse a name that is not valid.

    Args:
        what: is named, such as "objective" or "option of objective 'logit_kd'".

    Raises:
        ValueError: with the closest match and all valid names.

    >>> check_known("mode", "discrepency", ("discrepancy", "uniform"))
    Traceback (most recent call last):
    ValueError: unknown mode: 'discrepency'. Did you mean 'discrepancy'? Valid: discrepancy, uniform.
    """
    names = list(valid)
    if name not in names:
        known = ", ".join(names) or "none in this version"
        raise ValueError(f"unknown {what}: {name!r}.{suggestion(name, names)} Valid: {known}.")


def check_option(owner: str, option: str, value: Any, valid: bool, expected: str) -> None:
    """Refuse an option's value.

    Raises:
        ValueError: when not `valid`, naming the value and what is expected.
    """
    if not valid:
        raise ValueError(f"{owner}: {option} is {value!r}; expected {expected}.")


def read_json(name: str, text: str, such: str) -> Any:
    """A setting that came as JSON text.

    Args:
        such: an example of it, for the error.

    Raises:
        ValueError: for text that is no JSON, or that has a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{name} has the key {twice[0]!r} twice in {text!r}; keep one.")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name} is not valid JSON ({error}): {text!r}. Quote it for the shell, such as --{name} '{such}'."
        ) from error


def suggestion(name: Any, valid: Iterable[str]) -> str:
    """The closest valid name, as a question to put after an error; "" when none is close.

    >>> suggestion("temprature", ["temperature", "beta"])
    " Did you mean 'temperature'?"
    """
    close = closest(name, valid)
    return f" Did you mean {close[0]!r}?" if close else ""


def closest(name: Any, valid: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Up to `most` of the valid names, by likeness to `name` (a ratio from 0 to 1, of at least `cutoff`)."""
    return difflib.get_close_matches(str(name), list(valid), n=most, cutoff=cutoff)


def is_number(value: Any) -> bool:
    """An int or float that float32 can hold, and not a bool (YAML's `yes` is one)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def is_integer(value: Any, least: int = 1) -> bool:
    """An int of at least `least`, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
