"""JSON parsed into dataclasses; what does not fit is reported by its place in the file."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

FILE = "results.json"


class Record:
    """A dataclass that is parsed from JSON. null counts as missing where a field has a default, and in dicts.

    What the class does not know is ignored, or kept in its field `extra` where it has one.
    """

    @classmethod
    def of(cls, value: Any, where: str = "") -> Self:
        """Parse JSON; `where` is the section, for the error.

        Raises:
            ValueError: naming the file, the place in it, what was found and what was expected.
        """
        return parse(cls, value, where)


@cache
def _fields(kind: type) -> list[tuple[str, str, Any, bool]]:
    """(attribute, key in JSON, type, whether it may be missing) of a dataclass."""
    hints = get_type_hints(kind)
    return [
        (f.name, f.metadata.get("key", f.name), hints[f.name], (f.default, f.default_factory) != (MISSING, MISSING))
        for f in fields(kind)
    ]


def parse(kind: Any, value: Any, where: str) -> Any:
    """JSON as a dataclass, or as dict, list, tuple, union or plain type. Raises ValueError as `Record.of`."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _parse_union(inner, value, where)
    if is_dataclass(kind):
        return _parse_record(kind, _expect(dict, value, where), where)  # type: ignore[arg-type]
    if origin is dict:
        optional = inner[1] is Any or type(None) in get_args(inner[1])
        items = {key: item for key, item in _expect(dict, value, where).items() if item is not None or optional}
        return {key: parse(inner[1], item, _inside(where, key)) for key, item in items.items()}
    if origin is list:
        return [parse(inner[0], item, _inside(where, i)) for i, item in enumerate(_expect(list, value, where))]
    if origin is tuple:
        if len(_expect(list, value, where)) != len(inner):
            raise malformed(where, f"{len(value)} values", f"{len(inner)}")
        return tuple(
            parse(one, item, _inside(where, i)) for i, (one, item) in enumerate(zip(inner, value, strict=True))
        )
    return _expect(kind, value, where)


def _parse_record(kind: type, value: Mapping[str, Any], where: str) -> Any:
    found = {}
    for name, key, its, optional in _fields(kind):
        if value.get(key) is not None:
            found[name] = parse(its, value[key], _inside(where, key))
        elif not optional:
            raise malformed(
                where, f"no {key!r}" if key not in value else f"null as {key!r}", _WORDS[get_origin(its) or its]
            )
    if "extra" in (names := {key for _, key, _, _ in _fields(kind)}):
        found["extra"] = {key: item for key, item in value.items() if key not in names}
    return kind(**found)


def _parse_union(kinds: Iterable[Any], value: Any, where: str) -> Any:
    kinds = [kind for kind in kinds if kind is not type(None)]
    if value is None:
        return None
    fitting = [kind for kind in kinds if isinstance(value, list) == (get_origin(kind) in (list, tuple))]
    return parse((fitting or kinds)[0], value, where)


_WORDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def _expect(kind: Any, value: Any, where: str) -> Any:
    accepted = {float: (int, float)}.get(kind, kind)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        shown = _WORDS.get(type(value)) or repr(value)
        raise malformed(where, f"{shown} ({value!r})"[:80] if shown in _WORDS.values() else shown, _WORDS[kind])
    return value


def _inside(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def malformed(where: str, found: str, expected: str) -> ValueError:
    """The error for what does not fit at a place of the file, such as "evaluation.models"."""
    section = where.split(".")[0]
    place = f" ({where})" if where != section else ""
    return ValueError(
        f"{FILE}, section {section or 'none'}{place}: found {found}, expected {expected}. Restore the file, or run "
        "the command again."
    )
