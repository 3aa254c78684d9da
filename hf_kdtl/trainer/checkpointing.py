"""A Trainer whose checkpoints are whole or are not used."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from transformers import Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME
from transformers.utils import logging

from hf_kdtl.checkpoints.manifest import UNLISTED, changed_since, fsync_tree, read_manifest, verify, write_manifest
from hf_kdtl.checkpoints.rotation import (
    back_up,
    checkpoints,
    latest_complete,
    resolve_checkpoint,
    restore_backup,
    to_prune,
)

logger = logging.get_logger(__name__)

CONTINUE = "trainer.train(resume_from_checkpoint=True), or the same command with --resume_from_checkpoint true"
_CANNOT_WRITE = (OSError, SafetensorError, RuntimeError)  # the last is torch.save's, and names its C++ writer


class SaveAborted(Exception):
    """Leave a save on every process, because one could not write."""


class CheckpointingTrainer(Trainer):
    """A Trainer whose checkpoints are whole or are not used.

    - `train(resume_from_checkpoint=True)` continues from the last whole checkpoint and says which it skips and why;
      the path of a damaged one is refused. Process 0 decides.
    - A run that is finished makes no further step when it is resumed (Trainer's makes one where the last step is not
      the last of its epoch).
    - A save that fails (no space left) ends on every process, with the last whole checkpoint untouched.
    - `save_total_limit` removes nothing before the new checkpoint is whole, and never that one.
    """

    _folder: Path | None = None  # of the save under way
    _error: Exception | None = None  # of this process, in that save
    _damaged: frozenset[Path] = frozenset()
    _run = ""  # its name, kept when it is resumed

    def __init__(self, model=None, args=None, *positional, **keywords):
        folder = Path("." if args is None else str(args.output_dir)).absolute()
        if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
            raise ValueError(f"output_dir is {args.output_dir} and {file} is a file; name a folder, new or not.")
        super().__init__(model, args, *positional, **keywords)

    def _save_beside(self, folder: Path) -> None:
        """Write what else belongs to a checkpoint, on the process that writes the model."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As Trainer's.

        Raises:
            ValueError: when there is no whole checkpoint to continue from, or it is of another optimizer.
            OSError: when a checkpoint could not be written.
        """
        # Every process comes here, whatever it was asked: one that did not would leave the others waiting.
        asked = gather_object([str(resume_from_checkpoint or None)])
        if differs := [rank for rank, other in enumerate(asked) if other != asked[0]]:
            raise ValueError(
                f"resume_from_checkpoint is {asked[0]!r} on process 0 and {asked[differs[0]]!r} on {differs[0]}. The "
                "processes train one model: give all of them the same."
            )
        self._run, path, self._damaged = self._on_rank_zero(lambda: self._resolve_resume(resume_from_checkpoint))
        return super().train(path, *args, **kwargs)

    def _resolve_resume(self, asked: Any) -> tuple[str, str | None, frozenset[Path]]:
        """On process 0: the run's name, the checkpoint it continues from, and those that are skipped for it."""
        folder = str(self.args.output_dir)
        if isinstance(asked, str) and asked.lower() in ("true", "false"):  # from a command line or an environment
            asked = asked.lower() == "true"
        if asked is None or asked is False:
            if others := checkpoints(folder):
                logger.warning(
                    f"{folder} holds checkpoints of another run, up to {others[-1].name}. This run replaces those of "
                    "its own steps, and is continued from its own. Name another output_dir to keep the two apart."
                )
            return uuid.uuid4().hex, None, frozenset()
        if asked is not True and (asked == "" or not isinstance(asked, str | Path)):
            raise ValueError(f"resume_from_checkpoint is {asked!r}; expected True, or the path of a checkpoint.")
        path, damaged = resolve_checkpoint(asked, folder)
        for skipped, wrong in damaged.items():
            logger.warning(f"{skipped} is skipped, because {'; '.join(wrong)}. {path} is used.")
        if changed := changed_since(path, processes=self.args.world_size, seed=self.args.seed):
            logger.warning(f"{path} was written with {changed}: it goes on, and not bitwise as if never stopped.")
        return read_manifest(path)["run"], str(path), frozenset(damaged)

    def _on_rank_zero(self, decide: Any) -> Any:
        """What process 0 decides, or raises, on every process."""
        decided, error = None, None
        if self.args.process_index == 0:
            try:
                decided = decide()
            except Exception as met:
                known = isinstance(met, OSError | ValueError)  # others may not go through a pickle
                error = met if known else RuntimeError(f"{type(met).__name__}: {met}")
                error.__cause__ = None if known else met
        decided, error = broadcast_object_list([decided, error])
        if error is not None:
            raise error
        return decided

    # ---- Resuming ----

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        begun = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None or self.state.global_step < max_steps:
            return begun
        if self.is_world_process_zero():
            logger.warning(
                f"{resume_from_checkpoint} is of step {self.state.global_step} and the run has {max_steps}: it is "
                "finished, and is loaded as it is."
            )
        return num_train_epochs, 0  # no epoch is left: else the rest of its last one would begin

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        before = read_manifest(checkpoint)["written_with"].get("optimizer") if checkpoint is not None else None
        if before not in (None, self._optimizer_name()):
            raise ValueError(
                f"{checkpoint} was trained with the optimizer {before} and this run has {self._optimizer_name()}: set "
                "optim back, or start a new run from the checkpoint's weights."
            )
        super()._load_optimizer_and_scheduler(checkpoint)

    def _optimizer_name(self) -> str:
        return type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__

    # ---- Saving ----

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        limit, doomed = self.args.save_total_limit, []
        self._folder, self._error = folder, None
        try:
            with self._collect_errors():
                if self.args.should_save:
                    back_up(folder)
            with self._collect_errors():
                if not self._rank_errors():
                    vars(self.state)["save_to_json"] = self._write_state
                    super()._save_checkpoint(model, trial)
                if self.args.should_save and self._error is None:
                    doomed = self._finalize(folder, limit)
        finally:
            vars(self.state).pop("save_to_json", None)
            self._folder, self.args.save_total_limit = None, limit
        if reasons := self._rank_errors():
            self._abort_save(folder, reasons)
        for path in doomed:
            shutil.rmtree(path, ignore_errors=True)

    def _finalize(self, folder: Path, limit: int | None) -> list[Path]:
        """What can be removed now that this checkpoint is whole."""
        if wrong := verify(folder, contents=False):
            raise OSError("; ".join(wrong))
        if doomed := to_prune(folder, limit, self.state.best_model_checkpoint, self._damaged):
            fsync_tree(folder)
        return doomed

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self._collect_errors():
            if _internal_call and output_dir is not None and self.args.should_save:
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                self._save_beside(Path(output_dir))
            super().save_model(output_dir, _internal_call)
        if self._folder is not None and self.args.save_only_model:
            self._sync_before_state()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._collect_errors():
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_scaler(self, output_dir: str) -> None:
        with self._collect_errors():
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with self._collect_errors():
            super()._save_rng_state(output_dir)
        if self._folder is not None:
            self._sync_before_state()

    def _needed(self) -> list[str]:
        """Trainer's own files beside the model."""
        if self.args.save_only_model:
            return []
        world = range(self.args.world_size) if not self.args.save_on_each_node else [self.args.process_index]
        random = [f"rng_state_{i}.pth" for i in world] if self.args.world_size > 1 else ["rng_state.pth"]
        scaler = [SCALER_NAME] if self.accelerator.scaler is not None else []
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # those have folders
        return random + scaler + ([] if sharded else [OPTIMIZER_NAME, SCHEDULER_NAME])

    def _sync_before_state(self) -> None:
        """What every process has written is there, and trainer_state.json is next."""
        if self._rank_errors():
            raise SaveAborted
        self.args.save_total_limit = None  # Trainer's own rotation does not know what is whole

    def _write_state(self, path: str) -> None:
        """In the place of `TrainerState.save_to_json`: the file is listed before it has its name."""
        folder = Path(path).parent
        TrainerState.save_to_json(self.state, str(folder / UNLISTED))
        optimizer = None if self.args.save_only_model else self._optimizer_name()
        facts = {"seed": self.args.seed, "optimizer": optimizer}
        write_manifest(folder, self.args.world_size, self._needed(), self._run, **facts)

    @contextmanager
    def _collect_errors(self) -> Iterator[None]:
        """Keep an error until the processes compare: one that leaves a save alone leaves the others waiting for it."""
        try:
            yield
        except SaveAborted:
            pass
        except Exception as error:
            if self._folder is None:
                raise
            self._error = self._error or error

    def _rank_errors(self) -> list[str]:
        """Why processes could not write; the same on all of them."""
        mine = None if self._error is None else str(self._error) or type(self._error).__name__
        return [reason for reason in gather_object([mine]) if reason is not None]

    def _abort_save(self, folder: Path, reasons: list[str]) -> None:
        error, kept = self._error, self._on_rank_zero(lambda: not verify(folder))
        if self.args.should_save and not kept:
            shutil.rmtree(folder, ignore_errors=True)
            restore_backup(folder.parent)
        self.accelerator.wait_for_everyone()
        if error is not None and (kept or not isinstance(error, _CANNOT_WRITE)):
            raise error
        if kept:  # a push failed, say
            raise RuntimeError(f"another process stopped after it had written {folder}: {'; '.join(reasons)}.")
        last, _ = latest_complete(folder.parent)
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
        if not (wrong := self._on_rank_zero(lambda: verify(best))):
            return best
        last = Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
        if self._on_rank_zero(lambda: verify(last)):
            self._save_checkpoint(self.model, None)
        raise ValueError(
            f"training is finished, and the best checkpoint {best} cannot be loaded: {'; '.join(wrong)}. The model as "
            f"it was at the last step is in {last}; load_best_model_at_end=False ends with that one."
        )
