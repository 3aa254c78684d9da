"""The settings of a run: TrainingArguments, and what distillation adds to them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from hf_kdtl.gradient_rules import GRADIENT_RULES, GradientRule
from hf_kdtl.objectives import Objective
from hf_kdtl.objectives.entries import auto_ratio, build_entry, check_weights, entry_key, entry_weight
from hf_kdtl.objectives.paired import PairedObjective
from hf_kdtl.objectives.task import Task
from hf_kdtl.optim.factory import check_optimizer_name
from hf_kdtl.optim.options import RateOptions
from hf_kdtl.utils.options import check_known, read_json

logger = logging.get_logger(__name__)

DEFAULT_OBJECTIVES: list[dict[str, Any]] = [
    {"name": "task", "weight": 0.1},
    {"name": "logit_kd", "weight": 0.9, "temperature": 4.0},
]


@dataclass
class DistillationConfig(TrainingArguments):
    """TrainingArguments with what to distill, and how.

    The same list works from Python, from YAML and from the command line (`--objectives '[{"name": "task"}]'`), and
    comes back from `to_dict()`. A name alone stands for an entry with defaults and weight 1: `["task", "logit_kd"]`;
    the commands also take `--objectives task logit_kd`, an HfArgumentParser of your own one JSON text. Everything
    that needs no model is checked here, before any work.

    In hyperparameter_search a value inside a setting has a dotted name: `objectives.logit_kd.temperature`,
    `layer_rates.momentum`; `setattr(args, name, value)` takes it too. Settings may be changed between two calls of
    `train`, and the weights that are numbers at any step, such as by a callback: the next step uses them.

    Args:
        objectives: the terms of the loss, each `{"name": ..., "weight": 1.0, "key": <name>, "role": "task" |
            "transfer", ...options}`. `key` names the term in logs (two entries of one name need distinct keys);
            `role` is what a gradient rule takes it for; `teacher` names one of several. Default: task and logit_kd.
            The weight "auto" is measured before training, so that the term's gradient is as large as that of the
            first entry whose weight is a number; {"auto": 0.5}: half as large.
        layer_rates: learning rates per layer, such as `{"mode": "discrepancy", "source": "attention"}`; the keys are
            those of `hf_kdtl.optim.RateOptions`. None: one rate for all.
        gradient_rule: how the gradients of task and transfer objectives are combined, such as
            `{"name": "never_hurt", "form": "one_sided"}`; see `hf_kdtl.gradient_rules`. None: their sum.
        start: the model that `l2_sp`, `delta` and `lwf` (source: start) hold the student to, as a folder or Hub name.
            None: the student as it is when the trainer first uses it, in `train` or `evaluate`; a second `train`
            keeps it. It is saved with the run, for resuming.
        view_seed: of the augmentation, as in `hf_kdtl.data.ImageDataset`; `seed` does not change what images show.
        teacher_pixels: "shared", the student's, resized; or "own": the files at its own size, from `ImageDataset`.
        augment_on_device: colors, erasing and mixing of `ImageDataset` a batch at once, not rounded to 8 bits.
        eval_objectives: report every term as eval_<key> too. `eval_loss` is the task loss either way.
        quantize: "int8": the student's linear and convolution layers round inputs and weights to 8 bits in training;
            what is saved is the plain model, for an int8 export that loses less. In memory it still rounds.
        license: the license under which `push_to_hub` publishes the student, such as "apache-2.0". None: its
            teacher's, which must then be known and allow it.

    Raises:
        ValueError: for an unknown name, key or value, naming the valid ones and the closest match.
    """

    # This order of types matters: HfArgumentParser ends the program on `list[dict] | None`.
    objectives: list[dict] | str | None = field(
        default=None,
        metadata={"help": "Terms of the loss: names, or a JSON list of names and {name, weight, ...options}."},
    )
    layer_rates: dict | str | None = field(default=None, metadata={"help": "Learning rates per layer, as JSON."})
    gradient_rule: dict | str | None = field(
        default=None, metadata={"help": 'How task and transfer gradients are combined: \'{"name": "never_hurt"}\'.'}
    )
    start: str | None = field(
        default=None,
        metadata={"help": "A folder or Hub name: what the student is held to; by default its own first weights."},
    )
    view_seed: int = field(default=0, metadata={"help": "Of the augmentation: runs with other seeds see the same."})
    teacher_pixels: str = field(default="shared", metadata={"help": "shared: the student's; own: at its own size."})
    augment_on_device: bool = field(default=False, metadata={"help": "Colors, erasing and mixing on the GPU."})
    eval_objectives: bool = field(
        default=False, metadata={"help": "Report every objective as eval_<key> when evaluating."}
    )
    quantize: str | None = field(
        default=None, metadata={"help": "int8: train with layers that round as hf-kdtl export --int8 will."}
    )
    license: str | None = field(
        default=None, metadata={"help": "License of the published student; by default its teacher's."}
    )

    def __post_init__(self):
        self.objectives = copy.deepcopy(DEFAULT_OBJECTIVES if self.objectives is None else self.objectives)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if (size := getattr(self, name)) is None or size < 1:
                raise ValueError(f"{name!r} is {size!r}; expected a whole number of at least 1.")
        super().__post_init__()
        self.check()
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"hub_strategy is {str(HubStrategy(self.hub_strategy).value)!r}, which would publish the training "
                "state: optimizer, random states and a pickle of the arguments with paths of this machine. Use "
                "'every_save' or 'end'; to continue on another machine, copy the checkpoint folder."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if "." in name:  # a result of hyperparameter_search, which transformers' users set one by one
            return vars(self).update(self.with_dotted({name: value}))
        if name in ("objectives", "layer_rates", "gradient_rule"):
            value = _entries(value) if name == "objectives" else _from_json(name, value)
        super().__setattr__(name, value)

    def check(self) -> None:
        """Raises ValueError for an unknown name, key or value of objectives, layer_rates and gradient_rule."""
        self.build_objectives()
        if self.quantize is not None:
            check_known("quantize", self.quantize, ["int8"])
        if self.rate_options is not None:
            check_optimizer_name(self)
        self.build_rule()

    @property
    def entries(self) -> list[dict[str, Any]]:
        """`objectives` as the list that it is once parsed."""
        assert isinstance(self.objectives, list)
        return self.objectives

    @property
    def rate_options(self) -> RateOptions | None:
        """`layer_rates`, checked, with its defaults. Raises ValueError for what it cannot be."""
        return None if self.layer_rates is None else RateOptions.of(self.layer_rates)

    def build_objectives(self) -> dict[str, Objective]:
        """New objectives by key, in the order of the list, without parameters yet (those need the models' widths).

        Raises:
            ValueError: as the class does.
        """
        entries = self.objectives
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise ValueError(
                f"objectives is {entries!r}; expected a list of mappings such as "
                '[{"name": "task", "weight": 0.1}, {"name": "logit_kd", "weight": 0.9}].'
            )
        if not entries:
            raise ValueError('objectives is empty; expected at least one, such as [{"name": "task"}].')
        built: dict[str, Objective] = {}
        for entry in entries:
            key = entry_key(entry)
            if key in built:
                raise ValueError(
                    f"objectives: two entries have the key {key!r}; give each one of its own, such as "
                    f'{{"name": {entry["name"]!r}, "key": "{key}_2", ...}}.'
                )
            built[key] = build_entry(entry)
            if isinstance(task := built[key], Task):
                self._share_smoothing(task, key)
        check_weights(entries)
        return built

    def build_rule(self) -> GradientRule | None:
        """A new gradient rule; None where `gradient_rule` is.

        Raises:
            ValueError: for an unknown name, key or value, or where there is nothing to protect it from, or by.
        """
        if self.gradient_rule is None:
            return None
        if not isinstance(self.gradient_rule, dict) or "name" not in self.gradient_rule:
            raise ValueError(
                f'gradient_rule is {self.gradient_rule!r}; expected a mapping such as {{"name": "never_hurt"}}, with '
                f"one of the names {', '.join(GRADIENT_RULES)}."
            )
        options = dict(self.gradient_rule)
        name = options.pop("name")
        check_known("gradient rule", name, GRADIENT_RULES)
        valid = inspect.signature(GRADIENT_RULES[name]).parameters
        for option in options:
            check_known(f"option of gradient rule {name!r}", option, valid)
        rule = GRADIENT_RULES[name](**options)
        weights = self.weights()
        check_roles(name, rule, {key: o for key, o in self.build_objectives().items() if weights[key]})
        return rule

    def _share_smoothing(self, task: Task, key: str) -> None:
        """`label_smoothing_factor` keeps its meaning: it smooths the task's labels."""
        if task.label_smoothing is None:
            task.label_smoothing = self.label_smoothing_factor
        elif self.label_smoothing_factor not in (0.0, task.label_smoothing):
            raise ValueError(
                f"label smoothing is {task.label_smoothing} in objective {key!r} and {self.label_smoothing_factor} "
                "in label_smoothing_factor; set one of them."
            )

    def weights(self) -> dict[str, float]:
        """Weight of each objective, by key; nan where it is "auto", which `train` measures."""
        return {entry_key(entry): entry_weight(entry) for entry in self.entries}

    def auto_ratios(self) -> dict[str, float]:
        """r of each objective whose weight is "auto" (1) or {"auto": r}, by key."""
        ratios = {entry_key(entry): auto_ratio(entry) for entry in self.entries}
        return {key: ratio for key, ratio in ratios.items() if ratio is not None}

    def with_dotted(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a hyperparameter search, with dotted names such as `objectives.logit_kd.temperature` or
        `layer_rates.momentum` replaced by the setting that they are part of.

        Raises:
            ValueError: for a dotted name that is not part of a setting, or a value that it cannot have.
        """
        found = {name: value for name, value in values.items() if "." not in name}
        dotted = {name: value for name, value in values.items() if "." in name}
        for root in dict.fromkeys(name.partition(".")[0] for name in dotted):
            found[root] = copy.deepcopy(getattr(self, root, None))
        for name, value in dotted.items():
            root, *path = name.split(".")
            holder = found[root]
            if root == "objectives" and len(path) == 2:
                holder = {entry_key(entry): entry for entry in holder}.get(path.pop(0))
            if len(path) != 1 or not isinstance(holder, dict):
                raise ValueError(
                    f"{name!r} names no setting; expected objectives.<key>.<option>, such as "
                    "objectives.logit_kd.temperature, layer_rates.<option> or gradient_rule.<option>."
                )
            holder[path[0]] = value
        if dotted:
            checked = copy.copy(self)
            vars(checked).update(found)
            checked.check()
        return found


def check_roles(name: str, rule: GradientRule, objectives: Mapping[str, Objective]) -> None:
    """Refuse a rule that has no task to protect; say where it has nothing to protect it from.

    Raises:
        ValueError: also for a rule by layers and a term that has none.
    """
    transfer = {key: objective for key, objective in objectives.items() if objective.role == "transfer"}
    if len(transfer) == len(objectives):
        raise ValueError(
            f"gradient_rule {name!r} protects the task, and none of the objectives {', '.join(objectives)} has that "
            'role. Add {"name": "task"}, or give one of them "role": "task".'
        )
    if not transfer:
        logger.warning_once(
            f"gradient_rule {name!r} has nothing to protect the task from: every objective has the role task."
        )
    apart = [key for key, objective in transfer.items() if not isinstance(objective, PairedObjective)]
    if rule.local and apart:
        raise ValueError(
            f"gradient_rule {name!r} lets each pair of layers move its own block, and {', '.join(apart)} pairs no "
            'layers. Leave it out, give it "role": "task", or take the rule "never_hurt".'
        )


def _entries(value: Any) -> Any:
    """`objectives` as a list of mappings: from one of names or mappings, a name, or JSON text."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]  # the command line gives a list
    if isinstance(value, str):
        value = _from_json("objectives", value) if value.lstrip().startswith(("[", "{")) else [value]
    if not isinstance(value, list):
        return value
    return [{"name": entry} if isinstance(entry, str) else entry for entry in value]


def _from_json(name: str, value: Any) -> Any:
    """Parse what came as text from the command line."""
    such = {"objectives": '[{"name": "task"}]', "layer_rates": '{"mode": "llrd"}'}.get(name, '{"name": "pcgrad"}')
    return read_json(name, value, such) if isinstance(value, str) else value
