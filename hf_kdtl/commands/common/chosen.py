"""The defaults of a run: found by looking at model and data, put into its settings, kept for when it is continued."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from enum import Enum
from typing import Any

import numpy as np
from datasets import Dataset

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import builders
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.defaults import Case, Default, choose, total_steps
from hf_kdtl.commands.common.folders import folder_of, resumes
from hf_kdtl.data import ImageDataset
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.data.decoding import decode_row
from hf_kdtl.data.several import SEVERAL
from hf_kdtl.evaluation.cost import parameters
from hf_kdtl.evaluation.results import FILE, read_results
from hf_kdtl.trainer.checks import best_is_highest

LOOKED_AT = 32  # images, for color
GREY = 4.0  # mean spread of red, green and blue, of 255, that a compressed grey image may have


class Chosen:
    """The defaults of a run, and what they were chosen by.

    Args:
        model: that is trained.
        kind: where its weights come from, as in `Case`.
        train: the images it is trained on.
        images: how many of an epoch.
        typed: the names that the user gave.
        budgeted: whether the steps are still to be measured.
    """

    def __init__(
        self,
        model: Any,
        kind: str,
        train: Dataset,
        images: int,
        processor: Any,
        typed: Iterable[str],
        config: DistillationConfig,
        data_options: DataOptions,
        budgeted: bool = False,
    ):
        side = int(builders.pixels(train.select([0]), processor)[0]["pixel_values"].shape[-1])
        metric = "map" if SEVERAL in train.features else "accuracy"
        seen = images, side, has_color(train), config.world_size, metric
        self.case = Case(kind, has_attention(model), parameters(model), *seen)
        self.config, self.data_options = config, data_options
        values = vars(data_options) | vars(config)
        self.initial = values
        self.typed = {name: values[name] for name in typed if name in values}
        if not can_augment(train, processor):
            self.typed["augmentation"] = None
        before = restored(config, self.typed)
        self.continued = before is not None
        self.defaults: list[Default] = before or []
        if self.continued:
            put_in(self.defaults, config, data_options, self.typed)
        else:
            self.set(1 if budgeted else None)

    def set(self, steps: int | None = None) -> None:
        """Choose them (again, for a number of steps) and put them into the settings."""
        before, self.defaults = self.defaults, choose(self.case, self.typed, steps)
        # What holds no longer (num_train_epochs, where steps are given) is as if it had never been chosen.
        back = [replace(default, value=self.initial[default.name]) for default in before]
        put_in([*back, *self.defaults], self.config, self.data_options, self.typed)

    @property
    def known(self) -> dict[str, Any]:
        """What was typed, and the defaults."""
        return self.typed | {default.name: default.value for default in self.defaults}

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return total_steps(self.case, self.known)

    @property
    def full_steps(self) -> int:
        """Optimizer steps of a run whose length no budget shortened."""
        chosen = {default.name: default.value for default in choose(self.case, self.typed)}
        return total_steps(self.case, self.typed | chosen)

    def record(self) -> list[dict[str, Any]]:
        """The section `defaults` of results.json."""
        return [asdict(default) for default in self.defaults]


def has_attention(model: Any) -> bool:
    """Whether a model is a transformer, by the names of its modules' classes."""
    return any("attention" in type(module).__name__.lower() for module in model.modules())


def has_color(train: Dataset) -> bool:
    """Whether any of some images, spread over the split, is more than grey."""
    rows = np.linspace(0, len(train) - 1, min(LOOKED_AT, len(train))).astype(int)
    cells = train.select(rows)["image"]
    pictures = (np.asarray(decode_row(cell, i, len(train))).astype(int) for i, cell in zip(rows, cells, strict=True))
    return any((pixels.max(-1) - pixels.min(-1)).mean() > GREY for pixels in pictures)


def can_augment(train: Dataset, processor: Any) -> bool:
    """Whether images can be augmented before this image processor normalizes them."""
    try:
        ImageDataset(train, processor, augmentation=Augmentation({"flip": True}))
    except ValueError:
        return False
    return True


def put_in(
    defaults: Iterable[Default], config: DistillationConfig, data_options: DataOptions, typed: Iterable[str]
) -> None:
    """Put the defaults into the settings.

    Not by a new config: making a second one resets accelerate's state, and on several processes every one of them is
    then alone. So what TrainingArguments derives from these settings is set here too.
    """
    for default in defaults:
        target: Any = config if hasattr(config, default.name) else data_options
        before = getattr(target, default.name)
        setattr(target, default.name, type(before)(default.value) if isinstance(before, Enum) else default.value)
    config.do_eval = config.do_eval or config.eval_strategy != "no"
    if config.metric_for_best_model is not None and "greater_is_better" not in {*typed}:
        known = best_is_highest(config)
        config.greater_is_better = not config.metric_for_best_model.endswith("loss") if known is None else known


def restored(config: DistillationConfig, typed: Iterable[str]) -> list[Default] | None:
    """The defaults that the run to be continued was begun with, less what is typed now; None where none is continued.

    They are not chosen again: a time budget would leave other steps, and the rules of a later version other values.
    """
    if not resumes(config) or not (folder_of(config) / FILE).is_file():
        return None
    kept = [Default(**entry) for entry in read_results(folder_of(config)).get("defaults", [])]
    return [default for default in kept if default.name not in {*typed}]
