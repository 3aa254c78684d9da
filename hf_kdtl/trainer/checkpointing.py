"""A Trainer that resumes only from complete, verified checkpoints."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from hf_kdtl.checkpoints.manifest import UNLISTED, changed_since, fsync_tree, read_manifest, verify, write_manifest
from hf_kdtl.checkpoints.plain import accept_plain, plain_trainer_lacks, verify_loaded
from hf_kdtl.checkpoints.rotation import (
    back_up,
    checkpoints,
    latest_complete,
    resolve_checkpoint,
    restore_backup,
    to_prune,
)
from hf_kdtl.checkpoints.state import CheckpointPart, save_parts
from hf_kdtl.checkpoints.student import note_undescribed
from hf_kdtl.trainer.resume_facts import needed_files, run_facts, settings_that_are_kept
from hf_kdtl.trainer.streaming import StreamingTrainer

logger = logging.get_logger(__name__)

CONTINUE = "trainer.train(resume_from_checkpoint=True), or the same command with --resume_from_checkpoint true"
_CANNOT_WRITE = (OSError, SafetensorError, RuntimeError)  # the last is torch.save's, and names its C++ writer


class CheckpointingTrainer(StreamingTrainer):
    """A Trainer that resumes only from complete, verified checkpoints.

    - `train(resume_from_checkpoint=True)` continues from the latest complete checkpoint and reports which it skips and
      why; the path of a damaged one is refused. Process 0 decides.
    - A run that is complete makes no further step when it is resumed (Trainer's makes one where the last step is not
      the last of its epoch).
    - A save that fails (no space left) ends on every process, and the latest complete checkpoint stays.
    - `save_total_limit` removes nothing before the new checkpoint is complete, and never that one.
    """

    _damaged: frozenset[Path] = frozenset()
    _doomed: list[Path]  # checkpoints that the save in progress replaces
    _saved = False  # whether it has written one
    _run = ""  # its name, kept when it is resumed

    def __init__(
        self, model=None, args=None, data_collator=None, train_dataset=None, eval_dataset=None, processing_class=None,
        model_init=None, compute_loss_func=None, compute_metrics=None, callbacks=None, optimizers=(None, None),
        optimizer_cls_and_kwargs=None, preprocess_logits_for_metrics=None,
    ):  # fmt: skip
        folder = Path("." if args is None else str(args.output_dir)).absolute()
        if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
            raise ValueError(f"output_dir is {args.output_dir} and {file} is a file; name a folder, new or not.")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    def _checkpoint_parts(self, folder: Path) -> dict[str, CheckpointPart]:
        """What the checkpoint in `folder` holds in addition to Trainer's files, by name."""
        return {}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As Trainer's.

        Raises:
            ValueError: when there is no complete checkpoint to continue from, or it is of another optimizer.
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
                limit = self.args.save_total_limit
                too = f", save_total_limit={limit} removes the oldest of both" if limit else ""
                logger.warning(
                    f"{folder} holds checkpoints of another run, up to {others[-1].name}. This run replaces those of "
                    f"its own steps{too}, and is resumed from its own. Use another output_dir to keep the two apart."
                )
            return uuid.uuid4().hex, None, frozenset()
        if asked is not True and (asked == "" or not isinstance(asked, str | Path)):
            raise ValueError(f"resume_from_checkpoint is {asked!r}; expected True, or the path of a checkpoint.")
        if asked is not True and (lost := plain_trainer_lacks(asked)) is not None:
            return uuid.uuid4().hex, accept_plain(str(asked), lost), frozenset()
        path, damaged = resolve_checkpoint(asked, folder)
        for skipped, wrong in damaged.items():
            logger.warning(f"{skipped} is skipped, because {'; '.join(wrong)}. {path} is used.")
        if changed := changed_since(path, processes=self.args.world_size, **run_facts(self)):
            logger.warning(
                f"{path} was written with {changed}: resuming, but not bit-identical to an uninterrupted run."
            )
        return read_manifest(path)["run"], str(path), frozenset(damaged)

    def _on_rank_zero(self, decide: Callable[[], Any]) -> Any:
        """What process 0 decides, or raises, on every process."""
        decided, error = None, None
        if self.args.process_index == 0:
            try:
                decided = decide()
            except Exception as raised:
                known = isinstance(raised, OSError | ValueError)  # others may not go through a pickle
                error = raised if known else RuntimeError(f"{type(raised).__name__}: {raised}")
                error.__cause__ = None if known else raised
        decided, error = broadcast_object_list([decided, error])
        if error is not None:
            raise error
        return decided

    # ---- Resuming ----

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        progress = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None or self.state.global_step < max_steps:
            return progress
        if self.is_world_process_zero():
            logger.warning(
                f"{resume_from_checkpoint} is at step {self.state.global_step} of {max_steps}: training is already "
                "complete, and the model is loaded as it is."
            )
        return num_train_epochs, 0  # no epoch is left: else the rest of its last one would begin

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        before = None
        if checkpoint is not None and plain_trainer_lacks(checkpoint) is None:
            before = read_manifest(checkpoint)["written_with"].get("optimizer")
        if before not in (None, self._optimizer_name()):
            raise ValueError(
                f"{checkpoint} was trained with the optimizer {before} and this run has {self._optimizer_name()}: set "
                "optim back, or start a new run from the checkpoint's weights."
            )
        with settings_that_are_kept(self.optimizer, checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _optimizer_name(self) -> str:
        return type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__

    # ---- Saving ----

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's steps, with these changes: an error in one of them stops all processes after it; the manifest is
        written before trainer_state.json gets its name; and nothing is removed before all that is verified."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        steps: list[Callable[[str], None]] = [self._back_up, self._save_parts]
        steps.append(lambda path: self.save_model(path, _internal_call=True))
        if not self.args.save_only_model:
            steps += [self._save_optimizer_and_scheduler, self._save_scaler, self._save_rng_state]
        steps += [self._write_state, self._finalize]
        if self.args.push_to_hub:
            steps.append(self._push_from_checkpoint)
        self._doomed = []
        for step in steps:
            error = None
            try:
                step(str(folder))
            except Exception as raised:
                error = raised
            if reasons := self._rank_errors(error):
                self._abort_save(folder, error, reasons)
        for superseded in self._doomed:
            shutil.rmtree(superseded, ignore_errors=True)

    def _back_up(self, output_dir: str) -> None:
        if self.args.should_save:
            back_up(Path(output_dir))

    def _save_parts(self, output_dir: str) -> None:
        """A step of its own: a user's `save_model` may write the student alone."""
        if not self.args.should_save:
            return
        folder = Path(output_dir)
        if parts := self._checkpoint_parts(folder):
            folder.mkdir(parents=True, exist_ok=True)
            save_parts(folder, parts)
        if not self._saved:
            note_undescribed(self.model)
        self._saved = True

    def _write_state(self, output_dir: str) -> None:
        """Write trainer_state.json under another name, list all files in the manifest, and give it its name."""
        folder = Path(output_dir)
        if self.state.best_global_step and self.args.save_strategy != SaveStrategy.NO:
            best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(best) if best.exists() else self.state.best_model_checkpoint
        if not self.args.should_save:
            return
        kept: dict[str, Any] = self.state.stateful_callbacks  # type: ignore[assignment]
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                kept[name] = [*kept[name], state] if isinstance(kept[name], list) else state
        self.state.save_to_json(str(folder / UNLISTED))
        optimizer = None if self.args.save_only_model else self._optimizer_name()
        write_manifest(
            folder, self.args.world_size, needed_files(self), self._run, optimizer=optimizer, **run_facts(self)
        )

    def _finalize(self, output_dir: str) -> None:
        """Verify the checkpoint, and find what can be removed now that it is complete."""
        folder = Path(output_dir)
        if not self.args.should_save:
            return
        if wrong := verify(folder, contents=False):
            raise OSError("; ".join(wrong))
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if doomed := to_prune(folder, limit, best, self._damaged):
            fsync_tree(folder)
        self._doomed = doomed

    def _rank_errors(self, error: Exception | None) -> list[str]:
        """Why processes could not write; the same on all of them. One that left alone would leave the others
        waiting."""
        mine = None if error is None else str(error) or type(error).__name__
        return [reason for reason in gather_object([mine]) if reason is not None]

    def _abort_save(self, folder: Path, error: Exception | None, reasons: list[str]) -> None:
        kept = self._on_rank_zero(lambda: not verify(folder))
        if self.args.should_save and not kept:
            shutil.rmtree(folder, ignore_errors=True)
            restore_backup(folder.parent)
        self.accelerator.wait_for_everyone()
        if error is not None and (kept or not isinstance(error, _CANNOT_WRITE)):
            raise error
        if kept:  # a push failed, say
            raise RuntimeError(f"another process stopped after it had written {folder}: {'; '.join(reasons)}.")
        last, _ = latest_complete(folder.parent)
        how = f"The latest complete one is {last}: free some space and continue with {CONTINUE}"
        free = shutil.disk_usage(folder.parent).free
        raise OSError(
            f"{folder} could not be written and was removed: {'; '.join(reasons)} ({free:,} bytes are free). "
            f"{how if last else 'There is no other'}."
        ) from error

    # ---- The best one ----

    def _load_best_model(self) -> None:
        self._best()
        super()._load_best_model()

    def _best(self) -> str:
        """The best checkpoint.

        Raises:
            ValueError: when what is loaded of it is not as it was written; the last state is then in a checkpoint.
        """
        best = self.state.best_model_checkpoint
        assert best is not None
        if not (wrong := self._on_rank_zero(lambda: verify_loaded(best))):
            return best
        last = Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
        if self._on_rank_zero(lambda: verify(last)):
            self._save_checkpoint(self.model, None)
        raise ValueError(
            f"training is complete, and the best checkpoint {best} cannot be loaded: {'; '.join(wrong)}. The model as "
            f"it was at the last step is in {last}; load_best_model_at_end=False ends with that one."
        )
