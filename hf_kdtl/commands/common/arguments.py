"""The command line: settings from a YAML file and flags, errors as sentences, little noise."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from hf_kdtl.commands.common.help import HELP, help_text
from hf_kdtl.commands.common.settings_file import SettingsFile, unknown
from hf_kdtl.commands.common.shipped import find_config
from hf_kdtl.utils.options import read_json

# Errors that a user can act on. Anything else is a bug and keeps its traceback.
EXPECTED_ERRORS = (ValueError, OSError, FloatingPointError)
TRACEBACK = "HF_KDTL_TRACEBACK"


class _Parser(HfArgumentParser):
    def error(self, message: str):
        # argparse would print the usage of all of TrainingArguments, several screens of it.
        raise ValueError(f"{message}. Give it in the file of --config or as a flag; --help lists the settings.")


def parse(*types: Any, argv: Sequence[str] | None = None, doc: str | None = "") -> tuple[Any, ...]:
    """Instances of the dataclasses `types`, from `--config file.yaml` and flags; flags override the file.

    The file is one mapping of the same names as the flags. Lists and mappings in it reach their field as they are
    (`objectives`); numbers that YAML takes for text (`1e-3`) become numbers. A setting without a default may come
    from either.

    Args:
        doc: what `--help` begins with: what the command does, and examples.

    Raises:
        ValueError: for an unknown setting (the closest one is named), or a value of another type.
        FileNotFoundError: when the file is missing.
        SystemExit: after `--help` and `--help-all`.
    """
    parser = _parser(types)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if asked := set(HELP) & set(arguments):
        print(help_text(parser, types, doc or "", everything="--help-all" in asked))
        raise SystemExit(0)
    file = _config_file(arguments)
    if file is not None:
        file.set_defaults(parser)
    try:
        *parsed, _namespace, rest = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        raise ValueError(file.locate(str(error)) if file is not None else str(error)) from error
    if rest:
        names = [option for action in parser._actions for option in action.option_strings]
        if rest[0].startswith("-"):
            raise ValueError(unknown(rest[0].split("=")[0], "flag", names))
        raise ValueError(f"found {rest[0]!r} where a flag was expected; settings are given as --name value.")
    for one in parsed:
        one.__dict__.update({name: _at_home(value) for name, value in vars(one).items()})
    return tuple(parsed)


def _at_home(value: Any) -> Any:
    """A path with its `~` expanded, which shells leave in --name=~/path and YAML holds as it is."""
    if isinstance(value, list):
        return [_at_home(one) for one in value]
    return os.path.expanduser(value) if type(value) is str and value.startswith("~") else value


def typed_names(*types: Any, argv: Sequence[str] | None = None) -> set[str]:
    """The settings that the user gave, as flags or in the file of `--config`, whatever their values.

    Call it after `parse` with the same arguments, which raises what there is to raise.
    """
    return set(typed_values(*types, argv=argv))


def typed_values(*types: Any, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """{setting: value} of what the user gave, flags before the file of `--config`."""
    parser = _parser(types)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    arguments = list(sys.argv[1:] if argv is None else argv)
    file = _config_file(arguments)
    flags = vars(parser.parse_known_args(arguments)[0])
    given = (file.values if file is not None else {}) | flags
    return {name: value for name, value in given.items() if name != "config"}


def _parser(types: Sequence[Any]) -> _Parser:
    parser = _Parser(types, allow_abbrev=False, add_help=False)
    parser.add_argument(
        "--config", metavar="NAME", help="Settings: a name that hf-kdtl configs lists, or a YAML file."
    )
    for action in parser._actions:
        if action.dest == "objectives":
            action.nargs = "+"  # names, or one JSON text
    return parser


def _config_file(arguments: list[str]) -> SettingsFile | None:
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    path = first.parse_known_args(arguments)[0].config
    return None if path is None else SettingsFile(find_config(path), path)


def mapping(name: str, value: Any) -> dict[str, Any]:
    """A setting that is a mapping, which comes as JSON text from a flag and as it is from YAML; None gives {}.

    Raises:
        ValueError: when it is anything else.
    """
    found = read_json(name, value, '{"key": 1}') if isinstance(value, str) else value
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{name} is {value!r}, expected a mapping, such as --{name} '{{\"key\": 1}}'.")
    return found


def run(program: Callable[[], int | None]) -> int:
    """Run a command and return its exit code: 0, 2 after an error that is reported in a sentence, 130 after Ctrl-C,
    141 where the output is no longer read; of evaluate --max_drop, 1 where a student fails.

    Set HF_KDTL_TRACEBACK=1 to see where such an error was raised.
    """
    try:
        return program() or 0
    except KeyboardInterrupt as stop:
        return _report(str(stop) or "stopped; the same command with --resume_from_checkpoint true continues.", 130)
    except BrokenPipeError:  # `| head` has read enough: end as other programs do, without a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except EXPECTED_ERRORS as error:
        if os.environ.get(TRACEBACK):
            raise
        table = str(error).count("\n  ") > 2  # keeps its lines
        message = str(error) if table else " ".join(str(error).split())
        return _report(f"error: {message} ({TRACEBACK}=1 shows where.)", 2)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # else its threads may abort the process at its exit


def _report(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    text = printable(message)
    print(text if rank == "0" else f"[process {rank}] {text}", file=sys.stderr, flush=True)
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
    # Commands print the teacher's notes themselves, once, before training.
    logging.getLogger("hf_kdtl.trainer.trainer").addFilter(lambda record: record.levelno > logging.WARNING)
    # Which implementation of an image processor is used depends on torchvision, and makes no difference here.
    imports = logging.getLogger("transformers.utils.import_utils")
    imports.addFilter(lambda record: "torchvision" not in record.getMessage())
    # Exporting to ONNX: operators of a torchvision that is not installed, and torch's own use of its pytree.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec.*")
    # Pinned memory is asked for by default, whether or not there is a GPU.
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
