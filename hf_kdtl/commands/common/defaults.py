"""What `train-teacher` and `distill` set where the user typed nothing: rules, each with its reason.

The rules read a `Case` and what was typed, so that they can be read, and tested, as a table. A setting that was typed,
as a flag or in YAML, is never changed, also when its value is the default of TrainingArguments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SMALL_MODEL = 10_000_000  # parameters: below, a pre-trained model bears three times the learning rate
SMALL_IMAGE = 64  # pixels a side: up to here a shifted crop, above a resized one
LOG_POINTS = EVALUATIONS = 20

# Peak learning rates of AdamW: (transformer, convolutional net).
LEARNING_RATES = {"random": (1e-3, 2e-3), "cut": (5e-4, 1e-3), "pretrained": (1e-4, 1e-4), "adapter": (1e-3, 1e-3)}
# Fewer than this many images: (batch size, {kind: passes over the images}). The last row has no end.
BY_IMAGES: list[tuple[float, int, dict[str, int]]] = [
    (1_000, 32, {"random": 200, "cut": 60, "pretrained": 30, "adapter": 30}),
    (5_000, 32, {"random": 100, "cut": 30, "pretrained": 20, "adapter": 20}),
    (20_000, 64, {"random": 60, "cut": 20, "pretrained": 10, "adapter": 10}),
    (100_000, 128, {"random": 40, "cut": 15, "pretrained": 5, "adapter": 5}),
    (math.inf, 128, {"random": 30, "cut": 10, "pretrained": 3, "adapter": 3}),
]
STARTS = {
    "random": "random weights",
    "cut": "weights cut out of the teacher",
    "pretrained": "pre-trained weights",
    "adapter": "an adapter on trained weights",
}


@dataclass(frozen=True)
class Case:
    """What the rules look at.

    Attributes:
        kind: where the weights come from: random, cut (out of the teacher), pretrained or adapter.
        transformer: whether the model has attention; otherwise it is convolutional.
        images: of train.
        side: pixels a side of what the model is fed.
        color: whether the images have any.
        processes: that train, each with a batch of its own.
        metric: by which the best model is chosen.
    """

    kind: str
    transformer: bool
    parameters: int
    images: int
    side: int
    color: bool = True
    processes: int = 1
    metric: str = "accuracy"


@dataclass(frozen=True)
class Default:
    """A setting that the user did not type."""

    name: str
    value: Any
    reason: str


Rule = Callable[[Case, Mapping[str, Any]], list[Default]]


def choose(case: Case, typed: Mapping[str, Any], steps: int | None = None) -> list[Default]:
    """The defaults of a case, in the order of the rules.

    Args:
        typed: {setting: value} of what the user typed; none of these is among the result.
        steps: what a time budget leaves, instead of passes over the images.
    """
    known, chosen = dict(typed), []
    if steps is not None:
        known["max_steps"] = steps
        chosen.append(Default("max_steps", steps, "what fits into --time_budget"))
    for rule in RULES:
        for default in rule(case, known):
            if default.name not in known:
                known[default.name] = default.value
                chosen.append(default)
    return chosen


def _learning_rate(case: Case, known: Mapping[str, Any]) -> list[Default]:
    rate = LEARNING_RATES[case.kind][not case.transformer]
    why = f"{STARTS[case.kind]}, {'a transformer' if case.transformer else 'a convolutional net'}"
    if case.kind == "pretrained" and case.parameters < SMALL_MODEL:
        rate, why = round(3 * rate, 7), f"{why} of less than {SMALL_MODEL // 10**6} M parameters"
    return [Default("learning_rate", rate, why)]


def _batch(case: Case, known: Mapping[str, Any]) -> list[Default]:
    size = min(_row(case)[1], case.images)
    train = Default("per_device_train_batch_size", size, f"for {case.images:,} images: enough steps a pass")
    return [train, Default("per_device_eval_batch_size", 64, "without gradients there is room for more")]


def _length(case: Case, known: Mapping[str, Any]) -> list[Default]:
    if known.get("max_steps", 0) > 0:
        return []
    passes = _row(case)[2][case.kind]
    reason = f"passes over {case.images:,} images from {STARTS[case.kind]}: the fewer images, the more passes"
    return [Default("num_train_epochs", passes, reason)]


def _schedule(case: Case, known: Mapping[str, Any]) -> list[Default]:
    steps = total_steps(case, known)
    part = 10 if case.kind == "random" and case.transformer else 20
    return [
        Default("lr_scheduler_type", "cosine", "falls to 0, so that the last steps settle"),
        Default("warmup_steps", min(steps // part, 1000), f"1/{part} of {steps:,} steps, at most 1000"),
    ]


def _weight_decay(case: Case, known: Mapping[str, Any]) -> list[Default]:
    if case.kind == "adapter":
        return [Default("weight_decay", 0.0, "adapters are small")]
    return [Default("weight_decay", 0.05, "usual with AdamW for images")]


def _augmentation(case: Case, known: Mapping[str, Any]) -> list[Default]:
    if case.side <= SMALL_IMAGE and not case.color:
        changes: dict[str, Any] = {"crop": max(1, case.side // 16)}
        why = f"{case.side} pixels: shifted"
    else:
        changes = {"resized_crop": [0.6, 1.0]}
        why = "photographs: cut and zoomed" if case.color else "cut and zoomed"
    if case.color:
        changes["flip"] = True
        why += ", mirrored; where left and right matter, leave flip out"
    else:
        why += ", not mirrored: images without color often hold signs"
    return [Default("augmentation", changes, why)]


def _cadence(case: Case, known: Mapping[str, Any]) -> list[Default]:
    """Logging, evaluation and checkpoints. The best model is kept where it is evaluated as often as it is saved."""
    steps = total_steps(case, known)
    log = Default("logging_steps", max(1, steps // LOG_POINTS), f"{LOG_POINTS} points")
    chosen = [log] if known.get("logging_strategy", "steps") == "steps" else []
    evaluations = min(EVALUATIONS, max(1, steps // steps_a_pass(case, known)))
    every = max(1, steps // evaluations)
    why = f"{evaluations} in all: about one a pass, at most {EVALUATIONS}"
    asked = {"eval_strategy", "eval_steps", "save_strategy", "save_steps"} & {*known}
    if "eval_strategy" not in known:
        chosen.append(Default("eval_strategy", "steps", "validation accuracy while it trains"))
    if known.get("eval_strategy", "steps") == "steps":
        chosen.append(Default("eval_steps", every, why))
    if not asked:
        chosen.append(Default("save_strategy", "steps", "where it was evaluated, to go on from and to keep the best"))
        chosen.append(Default("save_steps", every, why))
    if not asked or known.get("eval_strategy") == known.get("save_strategy") == "epoch":
        chosen.append(Default("load_best_model_at_end", True, "the end need not be the best"))
        chosen.append(Default("metric_for_best_model", case.metric, "on validation"))
    chosen.append(Default("save_total_limit", 2, "checkpoints: the best and the last"))
    return chosen


RULES: list[Rule] = [_learning_rate, _batch, _length, _schedule, _weight_decay, _augmentation, _cadence]


def steps_a_pass(case: Case, known: Mapping[str, Any]) -> int:
    """Optimizer steps for one pass over the images."""
    at_once = known.get("per_device_train_batch_size", 8) * case.processes
    batches = max(1, math.ceil(case.images / at_once))
    return max(1, math.ceil(batches / known.get("gradient_accumulation_steps", 1)))


def total_steps(case: Case, known: Mapping[str, Any]) -> int:
    """Optimizer steps of the run."""
    if (steps := known.get("max_steps", 0)) > 0:
        return steps
    return max(1, math.ceil(known.get("num_train_epochs", 3) * steps_a_pass(case, known)))


def _row(case: Case) -> tuple[float, int, dict[str, int]]:
    return next(row for row in BY_IMAGES if case.images < row[0])


def listing(defaults: list[Default]) -> list[str]:
    """The defaults for the terminal, a line each."""
    if not defaults:
        return []
    shown = [f"{default.name}: {yaml_value(default.value)}" for default in defaults]
    width = min(46, max(map(len, shown)))
    lines = [f"  {text:<{width}}  {default.reason}" for text, default in zip(shown, defaults, strict=True)]
    return ["Settings that were not typed, and why (each is a flag, or a line of YAML):", *lines]


def yaml_value(value: Any) -> str:
    """A value as YAML holds it in a line.

    >>> yaml_value({"resized_crop": [0.6, 1.0], "flip": True})
    '{resized_crop: [0.6, 1.0], flip: true}'
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(yaml_value, value))}]"
    return json.dumps(value, ensure_ascii=False)
