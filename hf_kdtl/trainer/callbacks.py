"""Callbacks: give the data the epoch, stop with a complete checkpoint on a signal, measure the optimizer's step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_kdtl.utils.wrapped import holders


class SetDatasetEpoch(TrainerCallback):
    """Call `set_epoch` of the training data at the start of each epoch, on every process, also inside a Subset.

    Accelerate does so only in the simplest case: with several processes, or in the epoch in which a run is resumed,
    it reaches the sampler only, and the augmented images of epoch 0 would be repeated.
    `DistillationTrainer` has this callback; a plain Trainer needs it for a `hf_kdtl.data.loading.ImageDataset`.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        for dataset in holders(getattr(train_dataloader, "dataset", None), "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))


class StopOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM finish the optimizer step, save a checkpoint, report how to continue, and then stop.

    An exception in the middle of a step would leave weights and optimizer state of different steps. A second SIGINT
    stops at once. A second SIGTERM does not: a cluster's scheduler signals every process, and the launcher forwards
    its own.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._interrupted = False
        self._owner = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over SIGINT and SIGTERM. Outside the main thread signals cannot be taken, and nothing changes."""
        self.received, self._interrupted, self._owner = None, False, os.getpid()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # a data-loading worker: it inherits the handler, and ends with its parent
        if self._interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt(
                "stopped at once, at the second Ctrl-C. trainer.train(resume_from_checkpoint=True) resumes from "
                "the latest complete checkpoint; one whose save was interrupted is not used."
            )
        if self.received is None:
            how = "Ctrl-C once more" if number == signal.SIGINT else "Ctrl-C twice"
            print(f"\nStopping after this step, with a checkpoint. {how} to stop at once.", flush=True)
        self._interrupted |= number == signal.SIGINT
        self.received = number

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        if self._agreed(args):
            control.should_save = True
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        return self.on_step_end(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._agreed(args):
            lost = " (save_only_model: without the optimizer's state, so not identical to an uninterrupted run)"
            raise KeyboardInterrupt(
                f"stopped after step {state.global_step}, saved in {args.output_dir}/checkpoint-{state.global_step}. "
                "Continue with trainer.train(resume_from_checkpoint=True), or the same command with "
                f"--resume_from_checkpoint true{lost if args.save_only_model else ''}."
            )

    def raise_if_late(self, args: TrainingArguments) -> None:
        """Raises KeyboardInterrupt when the signal came after the last step, where no checkpoint follows."""
        if self._agreed(args):
            raise KeyboardInterrupt("the signal came after the last step: training is complete, and nothing is lost.")

    def _agreed(self, args: TrainingArguments) -> bool:
        """Whether any rank received a signal: all ranks save together, so they must stop at the same step."""
        if args.world_size == 1 or not dist.is_initialized():
            return self.received is not None
        received = torch.tensor(float(self.received is not None), device=args.device)
        dist.all_reduce(received, op=dist.ReduceOp.MAX)
        return bool(received.item())


class MeasureTaskStep(TrainerCallback):
    """Check that the step did what is set; under a gradient rule, measure it along the task's gradient."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._trainer.check_step()
        if (gradients := self._trainer.gradient_rule) is not None:
            gradients.before_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if (gradients := self._trainer.gradient_rule) is not None:
            gradients.after_step()
