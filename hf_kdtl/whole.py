"""A Trainer whose checkpoints are whole or are not used."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME
from transformers.utils import logging

from hf_kdtl.checkpoint_folder import (
    changed_since,
    choose,
    last_whole,
    problems,
    put_back,
    seal,
    set_aside,
    superfluous,
    to_disk,
)

logger = logging.get_logger(__name__)

CONTINUE = "trainer.train(resume_from_checkpoint=True), or the same command with --resume_from_checkpoint true"
_CANNOT_WRITE = (OSError, SafetensorError, RuntimeError)  # the last is torch.save's, and names its C++ writer


class _BrokenOff(Exception):
    """Leave a save on every process, because one could not write."""


class CheckpointingTrainer(Trainer):
    """A Trainer whose checkpoints are whole or are not used.

    - `train(resume_from_checkpoint=True)` continues from the last whole checkpoint and says which it skips and why;
      the path of a damaged one is refused. Process 0 decides.
    - A save that fails (no space left) ends on every process, with the last whole checkpoint untouched.
    - `save_total_limit` removes nothing before the new checkpoint is whole, and never that one.
    """

    _folder: Path | None = None  # of the save under way
    _error: Exception | None = None  # of this process, in that save
    _damaged: frozenset[Path] = frozenset()

    def _save_beside(self, folder: Path) -> None:
        """Write what else belongs to a checkpoint, on the process that writes the model."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As Trainer's.

        Raises:
            ValueError: when there is no whole checkpoint to continue from.
            OSError: when a checkpoint could not be written.
        """
        if resume_from_checkpoint not in (None, False):
            resume_from_checkpoint = str(self._chosen(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _chosen(self, asked: Any) -> Path:
        def decide() -> Any:
            try:
                return choose(asked, str(self.args.output_dir))
            except ValueError as error:
                return error

        decided = self._by_first(decide)
        if isinstance(decided, ValueError):
            raise decided
        path, damaged = decided
        self._damaged = frozenset(damaged)
        if self.is_world_process_zero():
            for skipped, wrong in damaged.items():
                logger.warning(f"{skipped} is skipped, because {'; '.join(wrong)}. {path} is used.")
            if changed := changed_since(path, self.args.world_size):
                logger.warning(f"{path} was written with {changed}: it goes on, and not bitwise as if never stopped.")
        return path

    def _by_first(self, decide: Any) -> Any:
        """What process 0 decides, on every process."""
        decided = [decide() if self.args.process_index == 0 else None]
        return broadcast_object_list(decided)[0]

    # ---- Saving ----

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        limit, doomed = self.args.save_total_limit, []
        self._folder, self._error = folder, None
        try:
            with self._noting():
                if self.args.should_save:
                    set_aside(folder)
            with self._noting():
                if not self._reasons():
                    super()._save_checkpoint(model, trial)
                if self.args.should_save and self._error is None:
                    doomed = self._settled(folder, limit)
        finally:
            self._folder, self.args.save_total_limit = None, limit
        if reasons := self._reasons():
            self._give_up(folder, reasons)
        for path in doomed:
            shutil.rmtree(path, ignore_errors=True)

    def _settled(self, folder: Path, limit: int | None) -> list[Path]:
        """What can be removed now that this checkpoint is whole."""
        if wrong := problems(folder, contents=False):
            raise OSError("; ".join(wrong))
        if doomed := superfluous(folder, limit, self.state.best_model_checkpoint, self._damaged):
            to_disk(folder)
        return doomed

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self._noting():
            if _internal_call and output_dir is not None and self.args.should_save:
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                self._save_beside(Path(output_dir))
            super().save_model(output_dir, _internal_call)
        if self._folder is not None and self.args.save_only_model:
            self._seal(self._folder, [])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._noting():
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_scaler(self, output_dir: str) -> None:
        with self._noting():
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with self._noting():
            super()._save_rng_state(output_dir)
        if self._folder is not None:
            self._seal(self._folder, self._needed())

    def _needed(self) -> list[str]:
        """Trainer's own files beside the model."""
        world = range(self.args.world_size) if not self.args.save_on_each_node else [self.args.process_index]
        random = [f"rng_state_{i}.pth" for i in world] if self.args.world_size > 1 else ["rng_state.pth"]
        scaler = [SCALER_NAME] if self.accelerator.scaler is not None else []
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # those have folders
        return random + scaler + ([] if sharded else [OPTIMIZER_NAME, SCHEDULER_NAME])

    def _seal(self, folder: Path, needed: list[str]) -> None:
        """What every process has written is there, and trainer_state.json is next."""
        if self._reasons():
            raise _BrokenOff
        self.args.save_total_limit = None  # Trainer's own rotation does not know what is whole
        if self.args.should_save:
            seal(folder, self.args.world_size, needed)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Keep an error until the processes compare: one that leaves a save alone leaves the others waiting for it."""
        try:
            yield
        except _BrokenOff:
            pass
        except Exception as error:
            if self._folder is None:
                raise
            self._error = self._error or error

    def _reasons(self) -> list[str]:
        """Why processes could not write; the same on all of them."""
        mine = None if self._error is None else str(self._error) or type(self._error).__name__
        return [reason for reason in gather_object([mine]) if reason is not None]

    def _give_up(self, folder: Path, reasons: list[str]) -> None:
        error, kept = self._error, self._by_first(lambda: not problems(folder))
        if self.args.should_save and not kept:
            shutil.rmtree(folder, ignore_errors=True)
            put_back(folder.parent)
        self.accelerator.wait_for_everyone()
        if error is not None and (kept or not isinstance(error, _CANNOT_WRITE)):
            raise error
        if kept:  # a push failed, say
            raise RuntimeError(f"another process stopped after it had written {folder}: {'; '.join(reasons)}.")
        last, _ = last_whole(folder.parent)
        how = f"The last whole one is {last}: make room and continue with {CONTINUE}" if last else "There is no other"
        free = shutil.disk_usage(folder.parent).free
        raise OSError(
            f"{folder} could not be written and was removed: {'; '.join(reasons)} ({free:,} bytes are free). {how}."
        ) from error

    # ---- The best one ----

    def _load_best_model(self) -> None:
        self._best()
        super()._load_best_model()

    def _best(self) -> str:
        """The best checkpoint.

        Raises:
            ValueError: when it is not whole; the last state is then in a checkpoint.
        """
        best = self.state.best_model_checkpoint
        assert best is not None
        if not (wrong := self._by_first(lambda: problems(best))):
            return best
        last = Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
        if self._by_first(lambda: problems(last)):
            self._save_checkpoint(self.model, None)
        raise ValueError(
            f"training is finished, and the best checkpoint {best} cannot be loaded: {'; '.join(wrong)}. The model as "
            f"it was at the last step is in {last}; load_best_model_at_end=False ends with that one."
        )
