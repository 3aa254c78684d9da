"""The command line of the recipes: settings from a YAML file and flags, errors as sentences, little noise."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from hf_kdtl.utils.options import closest, suggestion

# What a user can put right. Anything else is a bug and keeps its traceback.
EXPECTED_ERRORS = (ValueError, OSError, FloatingPointError)
TRACEBACK = "HF_KDTL_TRACEBACK"


class _Parser(HfArgumentParser):
    def error(self, message: str):
        # argparse would print the usage of all of TrainingArguments, several screens of it.
        raise ValueError(f"{message}. Give it in the file of --config or as a flag; --help lists all settings.")


def parse(*types: Any, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Instances of the dataclasses `types`, from `--config file.yaml` and flags; flags override the file.

    The file is one mapping of the same names as the flags. Lists and mappings in it reach their field as they are
    (`objectives`); numbers that YAML takes for text (`1e-3`) become numbers. A setting without a default may come
    from either.

    Raises:
        ValueError: for an unknown setting (the closest one is named), or a value of another type.
        FileNotFoundError: when the file is missing.
    """
    parser = _Parser(types, allow_abbrev=False)
    parser.add_argument("--config", help="a YAML file of these settings; flags override it")
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    if path := first.parse_known_args(arguments)[0].config:
        _set_defaults(parser, _read(path), path)
    *parsed, _namespace, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        names = [option for action in parser._actions for option in action.option_strings]
        if unknown[0].startswith("-"):
            raise ValueError(_unknown(unknown[0].split("=")[0], "flag", names))
        raise ValueError(f"found {unknown[0]!r} where a flag was expected; settings are given as --name value.")
    return tuple(parsed)


def mapping(name: str, value: Any) -> dict[str, Any]:
    """A setting that is a mapping, which comes as JSON text from a flag and as it is from YAML; None gives {}.

    Raises:
        ValueError: when it is anything else.
    """
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name} is not valid JSON ({error}): {value!r}. Type --{name} '{{\"key\": 1}}'."
            ) from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{name} is {value!r}, expected a mapping, such as --{name} '{{\"key\": 1}}'.")
    return found


def run(program: Callable[[], None]) -> int:
    """Run a recipe and return its exit code: 0, 2 after an error that is told in a sentence, 130 after Ctrl-C.

    Set HF_KDTL_TRACEBACK=1 to see where such an error was raised.
    """
    try:
        program()
        return 0
    except KeyboardInterrupt as stop:
        return _told(str(stop) or "stopped; the same command with --resume_from_checkpoint true continues.", 130)
    except EXPECTED_ERRORS as error:
        if os.environ.get(TRACEBACK):
            raise
        table = str(error).count("\n  ") > 2  # keeps its lines
        said = str(error) if table else " ".join(str(error).split())
        return _told(f"error: {said} ({TRACEBACK}=1 shows where.)", 2)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # else its threads may abort the process at its exit


def _told(sentence: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    told = printable(sentence)
    print(told if rank == "0" else f"[process {rank}] {told}", file=sys.stderr, flush=True)
    return code


def printable(text: str) -> str:
    """A text for the terminal without control characters, which names of files and classes may hold; lines stay.

    >>> printable("a\\x1b[2Jb\\n| c |")
    'a[2Jb\\n| c |'
    """
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def quiet() -> None:
    """Turn off what libraries print that no user can act on. The one place where anything is silenced."""
    # The bars of reading and writing weights last milliseconds; Trainer's own bars stay.
    transformers_logging.disable_progress_bar()
    # Recipes print the teacher's notes themselves, once, before training.
    logging.getLogger("hf_kdtl.trainer.trainer").addFilter(lambda record: record.levelno > logging.WARNING)
    # Which implementation of an image processor is used depends on torchvision, and makes no difference here.
    imports = logging.getLogger("transformers.utils.import_utils")
    imports.addFilter(lambda record: "torchvision" not in record.getMessage())
    # Pinned memory is asked for by default, whether or not there is a GPU.
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def _read(path: str) -> dict[str, Any]:
    file = Path(path).expanduser()
    if not file.is_file():
        near = sorted(file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        close = closest(file.name, [other.name for other in near])
        hint = f" Did you mean {file.parent / close[0]}?" if close else ""
        raise FileNotFoundError(f"the file of --config, {path!r}, does not exist.{hint}")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds {type(settings).__name__}, expected lines of the form `name: value`.")
    return settings


def _set_defaults(parser: _Parser, settings: dict[str, Any], path: str) -> None:
    actions: dict[str, Any] = {}
    for action in parser._actions:
        if action.dest not in ("help", "config"):
            actions.setdefault(action.dest, action)  # a --no_x of the same dest comes after its --x
    for name, value in settings.items():
        if name not in actions:
            raise ValueError(_unknown(str(name), f"setting in {path}", list(actions)))
        if value is not None:
            value = _converted(actions[name], value, f"{name} in {path}")
            actions[name].required = False
        parser.set_defaults(**{name: value})


def _converted(action: argparse.Action, value: Any, where: str) -> Any:
    """A YAML value as the type of its flag."""
    if action.nargs == "+":
        items = value if isinstance(value, list) else [value]
        return [_scalar(action.type, item, where) for item in items]
    value = _scalar(action.type, value, where)
    choices = list(action.choices or [])
    if value is False and "no" in choices:
        return "no"  # `save_strategy: no` is false to YAML
    if choices and value not in choices:
        raise ValueError(_unknown(str(value), f"value of {where}", list(map(str, choices)), "one of"))
    return value


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is str and isinstance(value, bool):
        return "true" if value else "no"  # `resume_from_checkpoint: true`
    if kind is str and isinstance(value, int | float):
        return str(value)
    if kind in (int, float):
        try:
            number = float(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError):
            number = None
        if number is None or (kind is int and number != int(number)):
            raise ValueError(f"{where} is {value!r}, expected {'a whole number' if kind is int else 'a number'}.")
        return kind(number) if kind is float or not isinstance(value, int) else value
    if getattr(kind, "__name__", "") == "string_to_bool" and not isinstance(value, bool | str):
        raise ValueError(f"{where} is {value!r}, expected true or false.")
    return value


def _unknown(name: str, what: str, valid: list[str], listed: str = "") -> str:
    rest = f" Expected {listed} {', '.join(valid)}." if listed else " --help lists all of them."
    return f"unknown {what}: {name!r}.{suggestion(name, valid)}{rest}"
