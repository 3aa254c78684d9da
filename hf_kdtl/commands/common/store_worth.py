"""Whether a store of the teacher's outputs would pay: what the teacher costs in a step, measured, and what to type."""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_kdtl.commands.common.experiment import Experiment
from hf_kdtl.commands.common.next_command import program
from hf_kdtl.commands.common.storing import MAX_GB, VIEWS, needs_of, passes_of
from hf_kdtl.models import Teacher
from hf_kdtl.models.teachers.store import signals
from hf_kdtl.models.teachers.store.manifest import GB
from hf_kdtl.preflight import timed
from hf_kdtl.trainer.batch import by_view
from hf_kdtl.trainer.sample import training_sample

ROUNDS = 3  # the first of which is left out
WORTH_SAYING = 0.1  # of the time of a step


@dataclass(frozen=True)
class Worth:
    """What a store costs and saves.

    Args:
        share: of a step that is the teacher's forward, with the data loaded in the same process.
        views: V, of each image.
        gb: of V views of all images.
        passes: over the images, of all runs that have a teacher.
        back: passes after which a store that was written beforehand has paid: V times what rendering and the teacher
            take, over what the teacher takes.
    """

    share: float
    views: int
    gb: float
    passes: float
    back: float

    @property
    def saved(self) -> float:
        """The part of the time of all passes that is saved where the store is written in the first V of them."""
        return self.share * max(0.0, 1 - self.views / self.passes)

    @property
    def worth_saying(self) -> bool:
        """Not for a run that ends within a pass, nor where `cache` would refuse the size."""
        return self.share >= WORTH_SAYING and self.gb <= MAX_GB and self.passes >= 1

    def sentence(self, argv: Sequence[str]) -> str:
        """With the commands to type, complete.

        Args:
            argv: what was typed after the command's name.
        """
        typed, views = shlex.join(argv), "" if "--views" in argv else f" --views {self.views}"
        text = f"The teacher's forward is {self.share:.0%} of the step; {self.views} views cost {self.gb:.3g} GB"
        if self.saved >= 0.01:
            text += (
                f" and, stored in the first {self.views} of {self.passes:.0f} passes, save {self.saved:.0%} of the "
                f"time: type\n  {program()} distill {typed}{views} --cache auto\n"
            )
        else:
            text += f"; in {self.passes:.0f} passes no view recurs, so a store pays with further runs alone. "
        return (
            f"{text}Written beforehand, for several commands, they pay back after {self.back:.0f} passes: type\n"
            f"  {program()} cache {typed}{views} --output cache/"
        )


def store_worth(experiment: Experiment, trainer: Any, argv: Sequence[str] | None) -> str:
    """The sentence, where a store can be written and the teacher costs enough; else nothing."""
    teacher, options = experiment.teacher, experiment.options
    if not isinstance(teacher, Teacher) or experiment.stores or options.cache is not None or options.stages > 1:
        return ""
    found = measured(experiment, trainer)
    typed = sys.argv[1:] if argv is None else argv
    return found.sentence(typed) if found is not None and found.worth_saying else ""


def measured(experiment: Experiment, trainer: Any) -> Worth | None:
    """By a few steps of one batch. None where an objective needs what cannot be stored."""
    try:
        needs = needs_of(trainer)
    except ValueError:
        return None
    batch = training_sample(trainer, trainer.args.per_device_train_batch_size)
    assert batch is not None  # the commands' data has an index
    inputs, teacher = next(iter(batch)), trainer.teacher
    trainer.distiller.to(trainer.args.device).train()  # as in training: LeViT keeps what it computes in eval mode
    pixels, steps, forwards = inputs["pixel_values"], [], []
    data, count = trainer.train_dataset, len(inputs["pixel_values"])
    began = time.perf_counter()
    data.__getitems__(list(range(min(count, len(data)))))
    rendering = (time.perf_counter() - began) / min(count, len(data))
    known: Any = by_view(inputs, trainer.distiller.view_seed, [needs])
    with torch.no_grad():
        arrays = signals.pack(teacher.capture(pixels, needs, known), needs, "float32", None)
    for _ in range(ROUNDS):
        steps.append(timed(trainer.distiller, inputs))
        began = time.perf_counter()
        with torch.no_grad():
            teacher.capture(pixels, needs, known)
        forwards.append(time.perf_counter() - began)
    step, forward = (statistics.median(times[1:]) for times in (steps, forwards))
    views = experiment.data_options.views or (VIEWS if data.augmentation is not None else 1)
    size = sum(kind.bytes for kind in signals.kinds_of(arrays).values()) * len(data) * views / GB
    share = min(1.0, forward / (step + rendering * count))
    back = views * (forward + rendering * count) / forward
    return Worth(share, views, size, passes_of(experiment)[1], back)
