"""What `--help` prints: a command's options by group, the objectives, and the settings of Trainer used most."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import TrainingArguments

from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.objectives.table import first_sentence

HELP = ("-h", "--help", "--help-all")
# Of TrainingArguments, whose own help is a paragraph each.
MOST_USED = {
    "output_dir": "A folder for all that the run leaves.",
    "max_steps": "Steps, instead of epochs.",
    "num_train_epochs": "Passes over the training images.",
    "per_device_train_batch_size": "Images a step on each device.",
    "learning_rate": "Its peak.",
    "warmup_steps": "Steps until the peak.",
    "bf16": "Forward passes in bfloat16.",
    "eval_strategy": "When validation is scored.",
    "save_strategy": "When a checkpoint is written.",
    "seed": "Of weights, order, augmentation.",
    "resume_from_checkpoint": "true: continue from the last complete checkpoint.",
    "use_cpu": "Leave GPUs alone.",
}


# What the commands that train choose by model and images: hf_kdtl/commands/common/defaults.py.
CHOSEN = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "warmup_steps", "eval_strategy",
          "save_strategy", "augmentation")  # fmt: skip
# Rarely needed: only `--help-all` shows them.
RARE = ("student_heads", "student_mlp", "student_importance", "student_width", "student_parameters", "split_seed",
        "teacher_pool", "teacher_batch", "teacher_dtype", "teacher_options", "templates", "view_seed", "license",
        "image_column", "label_column", "validation_fraction", "test_fraction", "on_bad_image", "high_bit_depth",
        "multi_label", "eval_objectives", "max_trials", "start", "streaming", "shuffle_buffer",
        "augment_on_device")  # fmt: skip


# First in their group.
FIRST = ("teacher", "student_layers", "student_flops", "student", "student_config", "baseline", "seeds", "time_budget",
         "unlabelled")  # fmt: skip


class _Formatter(argparse.HelpFormatter):
    """One spelling of each flag, and defaults where there are any."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[0]
        many = " ..." if action.nargs == "+" else ""
        return f"{name} {action.metavar or _kind(action)}{many}"

    def _expand_help(self, action: argparse.Action) -> str:
        default = action.default
        if isinstance(default, list):
            default = " ".join(map(str, default))
        shown = "" if default in (None, "", False, argparse.SUPPRESS) else f" (default: {default})"
        if action.required:
            shown = " (required)"
        return f"{' '.join((action.help or '').split())}{shown}"


def _kind(action: argparse.Action) -> str:
    if action.choices:
        return "|".join(map(str, action.choices))
    name = getattr(action.type, "__name__", "")
    if name in ("dict", "list") or dataclasses.is_dataclass(action.type):
        return "JSON"
    return {"int": "N", "float": "X", "string_to_bool": "true"}.get(name, "TEXT")


def help_text(parser: argparse.ArgumentParser, types: Sequence[Any], doc: str, everything: bool = False) -> str:
    """All of `--help`, or with `everything` also each of TrainingArguments.

    Args:
        types: the dataclasses of the parser; each is a group, with the first line of its docstring as title.
        doc: what the text begins with.
    """
    width = min(shutil.get_terminal_size().columns - 2, 110)
    formatter = _Formatter("", max_help_position=32, width=width)
    actions = {action.dest: action for action in reversed(parser._actions)}  # a --no_x comes after its --x
    for title, names in _groups(types, everything):
        formatter.start_section(title)
        for name in names:
            if names is MOST_USED and not everything:
                actions[name].help = MOST_USED[name]
            if name in CHOSEN and "time_budget" in actions:
                actions[name].help = f"{actions[name].help} (chosen)"
                actions[name].default = None
            formatter.add_argument(actions[name])
        formatter.end_section()
    parts = [doc.strip(), formatter.format_help().strip()]
    if _trains(types):
        if "student_layers" in actions and (everything or "budget" not in actions):  # a search chooses them itself
            parts.append(objective_lines(width))
        if not everything:
            chosen = "(chosen): by model and images, printed with the reason.\n" if "time_budget" in actions else ""
            parts.append(f"{chosen}--help-all adds rare settings, and all of transformers' TrainingArguments.")
    return "\n\n".join(parts)


def _trains(types: Sequence[Any]) -> bool:
    return any(issubclass(kind, TrainingArguments) for kind in types)


def _groups(types: Sequence[Any], everything: bool) -> Iterator[tuple[str, Any]]:
    trainer = {field.name for field in dataclasses.fields(TrainingArguments)}
    yield "Settings from a file", ["config"]
    for kind in types:
        title = (inspect.getdoc(kind) or "").split("\n")[0].rstrip(".")
        names = [field.name for field in dataclasses.fields(kind) if field.init]
        names = [name for name in names if everything or name not in RARE]
        if not issubclass(kind, TrainingArguments):
            yield title, [*(name for name in FIRST if name in names), *(name for name in names if name not in FIRST)]
            continue
        yield "The loss, and how it is optimized", [name for name in names if name not in trainer]
        if everything:
            yield "TrainingArguments", [name for name in names if name in trainer]
        else:
            yield "Training, as transformers' TrainingArguments (the ones used most)", MOST_USED


def objective_lines(width: int) -> str:
    """One line an objective, from the registry."""
    column = max(map(len, OBJECTIVES)) + 4
    what = {name: first_sentence(kind).split(": ")[0] for name, kind in OBJECTIVES.items()}  # before any formula
    lines = [
        f"  {name}".ljust(column)
        + textwrap.shorten(text.removesuffix(", per image"), width - column, placeholder=" ...")
        for name, text in what.items()
    ]
    return "\n".join(["Names for --objectives (what each is for, and its options: docs/methods):", *lines])
