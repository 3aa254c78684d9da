"""A Trainer that publishes its student alone.

What makes cards and talks to the Hub is imported by the methods that do so: it brings scikit-learn, scipy and
matplotlib, which training does not need.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, ModelCard, run_as_future
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from hf_kdtl.config import DistillationConfig
from hf_kdtl.trainer.sharding import ShardingTrainer

logger = logging.get_logger(__name__)


class PublishingTrainer(ShardingTrainer):
    """Trainer whose Hub methods publish the student and nothing else: weights, settings, card, results.

    `push_to_hub` and `create_model_card` take what Trainer's take. With `args.push_to_hub` token, repository and
    license are checked when the trainer is constructed. A push that fails during training is logged, and training
    continues.
    """

    args: DistillationConfig
    model: Any
    hub_model_id: Any
    push_in_progress: Any = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As Trainer's, and check everything that could make a later push fail: see `check_access`.

        Raises:
            ValueError, HubError: as `check_access`; with `args.push_to_hub` also for the license, for an adapter whose
                base model nobody else can open, and for a results.json in `args.output_dir` that cannot be read.
        """
        if not self.is_world_process_zero():
            return
        from hf_kdtl.hub.card_results import recipes_results
        from hf_kdtl.hub.staging import check_base
        from hf_kdtl.hub.upload import check_access

        private = self.args.hub_private_repo if private is None else private
        token, revision = token or self.args.hub_token, self.args.hub_revision
        if self.args.push_to_hub:
            self._license(None)
            recipes_results(self._run_folder)
            for adapter in (getattr(self.model, "peft_config", None) or {}).values():
                check_base(adapter.base_model_name_or_path)
        self.hub_model_id = check_access(self._repo_name(), token, private, revision=revision)
        self.push_in_progress = None

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the student's card as README.md into `args.output_dir`. The arguments are Trainer's; `license` is by
        default `args.license`, and then the teacher's; where none is known, the card states it.

        Raises:
            ValueError: as `hf_kdtl.hub.model_card.student_card`.
        """
        if not self.is_world_process_zero():
            return
        given = {"language": language, "license": license, "tags": tags, "model_name": model_name, "tasks": tasks,
                 "finetuned_from": finetuned_from, "dataset_tags": dataset_tags, "dataset": dataset,
                 "dataset_args": dataset_args}  # fmt: skip
        (self._run_folder / "README.md").write_text(
            str(self._card(self._results(), self.hub_model_id, **given)), "utf-8"
        )

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        **kwargs,
    ) -> CommitInfo | Future | None:
        """Save the student in `args.output_dir`, and publish it in one commit.

        Args:
            ...: as Trainer's; `kwargs` go to `create_model_card`.
            create_pr: propose it as a pull request.

        Returns: the commit, with `blocking=False` its future; None on other processes than the first.

        Raises:
            ValueError, HubError: as `publish`. The student is saved by then.
        """
        from hf_kdtl.hub.upload import HubError, retry_command

        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder, token, revision = self._run_folder, token or self.args.hub_token, revision or self.args.hub_revision
        results = self._results()
        try:
            self._finish_current_push()
            name = self._writable_repo(token, revision, private, create_pr)
            given = kwargs | {"license": self._license(kwargs.get("license"))}
            job = self._stage(folder, results, self._card(results, name, **given), token)
            card = Path(job.name, "README.md").read_text("utf-8")
            (folder / "README.md").write_text(card, "utf-8")
            how = name, token, revision, commit_message or "End of training", create_pr
            return _send_and_remove(job, *how) if blocking else self._in_background(job, *how)
        except HubError as error:
            if not _keep(folder, results):
                raise HubError(
                    f"{error} The student is saved in {folder}: call trainer.push_to_hub() again."
                ) from error
            asked = {"license": kwargs.get("license") or self.args.license, "private": private, "revision": revision,
                     "create_pr": create_pr}  # fmt: skip
            command = retry_command(folder, folder, self._repo_name(), **asked)
            raise HubError(f"{error} {command}, or trainer.push_to_hub().") from error

    def _writable_repo(self, token: str | None, revision: str | None, private: bool | None, create_pr: bool) -> str:
        """The name of the repository, after checking write access."""
        from hf_kdtl.hub.upload import check_access

        if create_pr:
            return check_access(self._repo_name(), token, create_pr=True)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if revision != self.args.hub_revision:
            check_access(str(self.hub_model_id), token, private, revision=revision)
        return str(self.hub_model_id)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """In the background, from a copy: the checkpoint may be removed before it is sent."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch or 0)}"
        token = self.args.hub_token
        try:
            results = self._results()
            card = self._card(results, str(self.hub_model_id), license=self._license(None))
            job = self._stage(Path(checkpoint_folder), results, card, token)
        except Exception as error:  # no error of a push should end the training
            return _log_failure(when, error)
        future = self._in_background(
            job, str(self.hub_model_id), token, self.args.hub_revision, f"Training in progress, {when}"
        )
        future.add_done_callback(lambda done: _log_failure(when, done.exception()) if done.exception() else None)

    # ---- Parts of these ----

    @property
    def _run_folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _in_background(self, *job: Any) -> Future:
        future = run_as_future(_send_and_remove, *job)  # the client's one queue: pushes arrive in their order
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress([future])  # type: ignore[arg-type]
        else:
            self.push_in_progress.jobs.append(future)
        return future

    def _repo_name(self) -> str:
        return self.args.hub_model_id or self._run_folder.absolute().name

    def _license(self, asked: str | None) -> str:
        """The student's license: what is requested, as far as those of its teacher and its start allow it."""
        from hf_kdtl.hub.license import student_license
        from hf_kdtl.hub.provenance import made_from

        asked = self.args.license if asked is None else asked
        return student_license(made_from(self), asked)

    def _results(self) -> dict[str, Any]:
        """The results of this run, without paths."""
        from hf_kdtl.hub.card_results import published
        from hf_kdtl.hub.trainer_results import results_of

        return published(results_of(self))

    def _card(self, results: dict[str, Any], name: str | None, **given: Any) -> ModelCard:
        from hf_kdtl.hub.model_card import student_card

        given["license"] = given.get("license") or self.args.license
        name = name or self.args.hub_model_id  # the folder's name is none: the card makes a title of the architecture
        given["model_name"] = given.get("model_name") or (name.split("/")[-1] if name else None)
        tags = given.get("tags") or []
        tags = [tags] if isinstance(tags, str) else [*tags]
        given["tags"] = list(dict.fromkeys([*tags, *(getattr(self.model, "model_tags", None) or [])])) or None
        return student_card(results, model_id=name, **given)

    def _stage(
        self, student: Path, results: dict[str, Any], card: ModelCard, token: str | None
    ) -> TemporaryDirectory[str]:
        from hf_kdtl.hub.staging import stage_student

        folder = TemporaryDirectory(prefix="student-")
        stage_student(student, folder.name, card, results, self._run_folder, token)
        return folder


def _send_and_remove(folder: TemporaryDirectory[str], *how: Any) -> CommitInfo:
    from hf_kdtl.hub.upload import create_commit

    with folder as staged:
        return create_commit(staged, *how)


def _log_failure(when: str, error: BaseException | None) -> None:
    logger.warning(f"the push of {when} failed, training continues: {error}")


def _keep(folder: Path, results: dict[str, Any]) -> bool:
    """Write results.json for a later push; False where the folder holds a recipe's results of another student, which
    are not changed."""
    from hf_kdtl.evaluation.results import FILE, read_results, update_results
    from hf_kdtl.hub.card_results import hash_of

    if (folder / FILE).is_file() and read_results(folder).get("run", {}).get("recipe") is not None:
        return hash_of(read_results(folder)) == hash_of(results)
    (folder / FILE).unlink(missing_ok=True)
    for section, value in results.items():
        if section != "schema":
            update_results(folder, section, value)
    return True
