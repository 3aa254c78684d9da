"""Where the CPU time of a training step goes, function by function: by hand, in Trainer, in DistillationTrainer.

`python benchmarks/step_cost.py --tables profile` prints it. A function's time is its own: what other functions of the
list use inside it counts as theirs. So the rows add up to the step, and two loops can be compared row by row.
"""

from __future__ import annotations

import functools
import re
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from interleave import Loop, interleave
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.profiler import ProfilerActivity, profile
from torch.utils.data.dataloader import _BaseDataLoaderIter
from transformers import Trainer, ViTForImageClassification
from transformers.trainer_callback import CallbackHandler

from hf_kdtl.models import Teacher
from hf_kdtl.models.teachers.chance import ChanceChecks
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.trainer import loss
from hf_kdtl.trainer.distiller import Distiller
from hf_kdtl.trainer.labels import LabelCheck
from hf_kdtl.trainer.loss import LossTrainer
from hf_kdtl.trainer.loss_meter import TermMeter
from hf_kdtl.trainer.trainer import DistillationTrainer

HEAVY = "mm$|attention_for_cpu|gelu|layer_norm|convolution|adamw"
Places = dict[str, list[tuple[Any, str]]]
WORK: Places = {  # what the loop by hand does too; "forward" is told apart by `who`
    "forward": [(ViTForImageClassification, "forward")],
    "backward": [(torch.Tensor, "backward")],
    "clipping": [(torch.nn.utils, "clip_grad_norm_")],
    "AdamW": [(Adam, "step")],
    "schedule": [(LRScheduler, "step")],
    "zero_grad": [(Optimizer, "zero_grad"), (torch.nn.Module, "zero_grad")],
    "the next batch": [(_BaseDataLoaderIter, "__next__")],
}
TRAINERS: Places = {
    "Trainer: floating_point_ops": [(Trainer, "floating_point_ops")],
    "Trainer: model.train() every step": [(torch.nn.Module, "train")],
    "Trainer: get_batch_samples": [
        (Trainer, "get_batch_samples"),
        (Trainer, "_get_num_items_in_batch"),
    ],
    "Trainer: callbacks": [(CallbackHandler, "call_event")],
    "Trainer: training_step, compute_loss": [(Trainer, "training_step"), (Trainer, "compute_loss")],
    "accelerate: clip_grad_norm_, backward": [(Accelerator, "clip_grad_norm_"), (Accelerator, "backward")],
    "accelerate: unwrap_model": [(Accelerator, "unwrap_model")],
}
OURS: Places = {
    "LossTrainer._get_num_items_in_batch": [(LossTrainer, "_get_num_items_in_batch")],
    "LossTrainer.get_batch_samples": [(LossTrainer, "get_batch_samples")],
    "LossTrainer.training_step": [(LossTrainer, "training_step")],
    "LossTrainer.compute_loss": [(LossTrainer, "compute_loss"), (LossTrainer, "_counts"), (LossTrainer, "_draws")],
    "LossTrainer._get_grad_norm": [(LossTrainer, "_get_grad_norm")],
    "check_finite": [(loss, "check_finite")],
    "TermMeter.add": [(TermMeter, "add")],
    "DistillationTrainer.log": [(DistillationTrainer, "log")],
    "Distiller.forward": [(Distiller, "forward")],
    "Distiller._values, _batch": [(Distiller, "_values"), (Distiller, "_batch")],
    "Distiller._value, _total": [(Distiller, "_value"), (Distiller, "_total")],
    "capture of the student": [(Distiller, "_capture_student")],
    "capture of the teacher": [(Distiller, "_capture_sources"), (Teacher, "capture")],
    "Teacher.pixels": [(Teacher, "pixels")],
    "LabelCheck": [(LabelCheck, "__call__"), (LabelCheck, "present")],
    "ChanceChecks.add": [(ChanceChecks, "add")],
    "task, logit_kd": [(OBJECTIVES[name], "forward") for name in ("task", "logit_kd")],
}
REST = "the rest of the loop"


class Stopwatch:
    """CPU seconds of this process by function, each without those inside it; one list a thread and step."""

    def __init__(self) -> None:
        self.steps: dict[int, list[dict[str, float]]] = defaultdict(list)
        self._open: dict[int, list[str]] = {}
        self._since: dict[int, float] = {}

    def begin(self) -> None:
        """A step of this thread begins."""
        me = threading.get_ident()
        self.steps[me].append(defaultdict(float))
        self._open[me], self._since[me] = [REST], time.process_time()

    def end(self) -> None:
        """The step ends: what comes until the next `begin` belongs to other threads."""
        if self._open.get(threading.get_ident()):
            self._switch()
            self._open.pop(threading.get_ident())

    def _switch(self) -> None:
        me, now = threading.get_ident(), time.process_time()
        self.steps[me][-1][self._open[me][-1]] += now - self._since[me]
        self._since[me] = now

    def timed(self, name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            opened = self._open.get(threading.get_ident())
            if not opened:
                return function(*args, **kwargs)
            self._switch()
            opened.append(name if name != "forward" else f"forward of the {who()}")
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                opened.pop()

        return call


def who() -> str:
    return "student" if torch.is_grad_enabled() else "teacher"


@contextmanager
def watching(watch: Stopwatch) -> Iterator[None]:
    """The functions of the list report to the stopwatch within this context."""
    before = []
    for name, places in (WORK | TRAINERS | OURS).items():
        for owner, attribute in places:
            function = vars(owner)[attribute]
            before.append((owner, attribute, function))
            setattr(owner, attribute, watch.timed(name, function))
    try:
        yield
    finally:
        for owner, attribute, function in before:
            setattr(owner, attribute, function)


def profiled(loops: dict[str, Callable[[], Loop]], warm_up: int = 5) -> dict[str, dict[str, float]]:
    """{loop: {function: median CPU microseconds a step}}; the loops take turns, and are made inside."""
    watch, threads = Stopwatch(), dict[str, int]()

    def watched(name: str, loop: Loop) -> Loop:
        def run(done: Callable[[], None]) -> None:
            threads[name] = threading.get_ident()

            def step() -> None:
                watch.end()
                done()
                watch.begin()

            loop(step)

        return run

    with watching(watch):
        interleave({name: watched(name, make()) for name, make in loops.items()}, warm_up, time.process_time)
    found = {}
    for name, thread in threads.items():
        steps = watch.steps[thread][warm_up:-1]  # the last one has the end of training
        rows = {row for step in steps for row in step}
        found[name] = {row: 1e6 * statistics.median(step.get(row, 0.0) for step in steps) for row in rows}
        found[name]["sum"] = sum(found[name].values())
    return found


def show_profile(loops: dict[str, Callable[[], Loop]], of: str, to: str) -> None:
    """A table: each function's microseconds in every loop, and the difference between two as a share of a step."""
    found = profiled(loops)
    order = [
        "forward of the student",
        "forward of the teacher",
        *[n for n in WORK if n != "forward"],
        *TRAINERS,
        *OURS,
    ]
    print(f"| CPU us a step | {' | '.join(found)} | {of} - {to} | share |\n| --- |{' ---: |' * (len(found) + 2)}")
    for row in [*order, REST, "sum"]:
        values = [times.get(row, 0.0) for times in found.values()]
        extra = found[of].get(row, 0.0) - found[to].get(row, 0.0)
        if any(values):
            shown = " | ".join(f"{value:,.0f}" for value in values)
            print(f"| {row} | {shown} | {extra:+,.0f} | {100 * extra / found[to]['sum']:+.2f} % |", flush=True)


def operations(loop, steps: int, warm_up: int) -> dict[str, int]:
    """{operation of torch: how often it runs in one of these steps, the first ones left out}."""
    seen, counter = 0, profile(activities=[ProfilerActivity.CPU])

    def done():
        nonlocal seen
        seen += 1
        if seen == warm_up:
            counter.start()
        if seen == steps:
            counter.stop()

    loop(done)
    found = {event.key: event.count for event in counter.key_averages() if event.key.startswith("aten::")}
    return {name: round(count / (steps - warm_up)) for name, count in found.items()}


def show_operations(loops: dict, steps: int, warm_up: int) -> None:
    """Those that take the time must be as many in every loop; the others are small."""
    found = {name: operations(loop, steps, warm_up) for name, loop in loops.items()}
    rows = {name for counts in found.values() for name in counts if re.search(HEAVY, name)}
    print(f"| operations a step | {' | '.join(found)} |\n| --- |{' ---: |' * len(found)}")
    for row in sorted(rows):
        print(f"| {row} | {' | '.join(str(counts.get(row, 0)) for counts in found.values())} |")
    rest = (sum(n for name, n in counts.items() if name not in rows) for counts in found.values())
    print(f"| all others | {' | '.join(map(str, rest))} |", flush=True)
