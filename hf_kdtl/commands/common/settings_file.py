"""A YAML file of settings, read so that an error can name its line."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hf_kdtl.utils.options import suggestion


class _Loader(yaml.SafeLoader):
    """Which also takes 1e-6 for a number, as JSON does, and not for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class SettingsFile:
    """One mapping of the same names as the flags.

    Args:
        path: the file.
        shown: how the user named it, for errors.

    Raises:
        ValueError: for text that is no YAML, or no mapping, or that has a name twice, at any depth.
    """

    def __init__(self, path: Path, shown: str):
        self.shown = shown
        try:
            loader = _Loader(path.read_text(encoding="utf-8"))
            self._root = loader.get_single_node()
            self._check_names()
            self.values: dict[str, Any] = loader.construct_document(self._root) if self._root else {}
        except yaml.MarkedYAMLError as error:
            line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
            raise ValueError(f"{shown} is not valid YAML{line}: {error.problem or error.context}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{shown} is not valid YAML: {error}.") from error
        if not isinstance(self.values, dict):
            raise ValueError(f"{shown} holds {type(self.values).__name__}, expected lines of the form `name: value`.")
        pairs = self._root.value if self._root else ()
        self._lines = {key.value: key.start_mark.line + 1 for key, _ in pairs}
        self._nodes: dict[str, yaml.Node] = {key.value: node for key, node in pairs}

    def _check_names(self) -> None:
        for node in _nodes(self._root):
            lines: dict[str, int] = {}
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key.value, str) and key.value in lines:  # YAML would take the last one
                    raise ValueError(f"{self._at(key)}: {key.value} stands in line {lines[key.value]} too; keep one.")
                if isinstance(key.value, str):
                    lines[key.value] = key.start_mark.line + 1

    def where(self, name: str) -> str:
        """ "x.yaml, line 3" for a setting."""
        return f"{self.shown}, line {self._lines[name]}" if name in self._lines else self.shown

    def locate(self, message: str) -> str:
        """The message, preceded by where the file holds the last name that its first part quotes, if it does."""
        quoted = re.findall(r"'([^']+)'", re.split(r"[.;] ", message)[0])
        nodes = {node.value: node for node in _nodes(self._root) if isinstance(node, yaml.ScalarNode)}
        found = next((nodes[name] for name in reversed(quoted) if name in nodes), None)
        return message if found is None else f"{self._at(found)}: {message}"

    def _at(self, node: yaml.Node) -> str:
        return f"{self.shown}, line {node.start_mark.line + 1}"

    def set_defaults(self, parser: argparse.ArgumentParser) -> None:
        """Make these settings the parser's defaults, each as the type of its flag.

        Raises:
            ValueError: for an unknown setting (the closest one is named), a value of another type, or none.
        """
        actions: dict[str, argparse.Action] = {}
        for action in parser._actions:
            if action.dest != "config":
                actions.setdefault(action.dest, action)  # a --no_x of the same dest comes after its --x
        for name, value in self.values.items():
            if name not in actions:
                raise ValueError(f"{self.where(name)}: {unknown(str(name), 'setting', list(actions))}")
            if value is None and actions[name].default is not None and not actions[name].required:
                raise ValueError(f"{self.where(name)}: {name} has no value; give it one, or leave the line out.")
            if value is not None:
                try:
                    value = _converted(actions[name], value, self._nodes[name], name)
                except ValueError as error:
                    raise ValueError(f"{self.where(name)}: {error}") from None
                actions[name].required = False
            parser.set_defaults(**{name: value})


def _nodes(root: Any) -> Iterator[yaml.Node]:
    """In the file's order. Each node once: aliases may repeat it, or make it hold itself."""
    seen, waiting = set(), [root] if root is not None else []
    while waiting:
        node = waiting.pop(0)
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting[:0] = [one for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting[:0] = node.value


def unknown(name: str, what: str, valid: list[str], listed: str = "") -> str:
    """The sentence for a name that is not valid, with the closest one."""
    rest = f" Expected {listed} {', '.join(valid)}." if listed else " --help-all lists all of them."
    return f"unknown {what}: {name!r}.{suggestion(name, valid)}{rest}"


def _converted(action: argparse.Action, value: Any, node: yaml.Node, name: str) -> Any:
    """A YAML value as the type of its flag."""
    if action.nargs == "+":
        items = zip(value, node.value, strict=True) if isinstance(value, list) else [(value, node)]
        return [_scalar(action.type, item, one, name) for item, one in items]
    value = _scalar(action.type, value, node, name)
    choices = list(action.choices or [])
    if value is False and "no" in choices:
        return "no"  # `save_strategy: no` is false to YAML
    if choices and value not in choices:
        raise ValueError(unknown(str(value), f"value of {name}", list(map(str, choices)), "one of"))
    return value


def _scalar(kind: Any, value: Any, node: yaml.Node, name: str) -> Any:
    # What stands there, as after a flag: to YAML, 010 is 8, 1:30 is 90, and a class called yes is true.
    text = node.value if isinstance(node, yaml.ScalarNode) else None
    if kind is str and text is not None:
        return text
    if kind in (int, float):
        text = "inf" if value == math.inf else str(text)  # max_grad_norm: .inf
        try:
            number = int(text) if text.isdecimal() else float(text)
        except ValueError:
            number = None
        if number is None or (kind is int and number != number // 1):
            raise ValueError(f"{name} is {value!r}; expected {'a whole number' if kind is int else 'a number'}.")
        return kind(number)
    if getattr(kind, "__name__", "") == "string_to_bool" and not isinstance(value, bool | str):
        raise ValueError(f"{name} is {value!r}; expected true or false.")
    return value
