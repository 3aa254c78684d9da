"""Publish the student of a finished run on the Hub, with a card made from its results; or stored teacher outputs.

  hf auth login
  hf-kdtl push --run runs/student --hub_model_id me/my-student
  hf-kdtl push --run runs/student --evaluation runs/evaluation --hub_model_id me/my-student \\
      --private true --license apache-2.0
  hf-kdtl push --cache cache/ --repo_id me/outputs-of-my-teacher

The run is one of hf-kdtl distill, the evaluation one of hf-kdtl evaluate of the same student. The
weights, their settings, the card and results.json go up, in one commit, and nothing else. A store of hf-kdtl cache
becomes a dataset repository, which hf-kdtl distill --teacher me/outputs-of-my-teacher trains from.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from tqdm.auto import tqdm

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import stored
from hf_kdtl.commands.common.store_text import next_steps
from hf_kdtl.evaluation.model_records import Models
from hf_kdtl.evaluation.records import Results
from hf_kdtl.evaluation.results import FILE, load_results, read_results
from hf_kdtl.hub import license as licenses
from hf_kdtl.hub.card_results import hash_of
from hf_kdtl.hub.card_results import published as published_results
from hf_kdtl.hub.card_tables import models_of
from hf_kdtl.hub.model_card import pipeline_task, student_card, with_evaluation
from hf_kdtl.hub.provenance import saved_hash
from hf_kdtl.hub.staging import is_adapter
from hf_kdtl.hub.stored_teacher import publish_store
from hf_kdtl.hub.upload import HubError, check_access, publish, retry_command, student_of
from hf_kdtl.models.teachers.store.manifest import read_manifest


@dataclass
class PushOptions:
    """What to publish, and where."""

    run: str | None = field(default=None, metadata={"help": "The output_dir of hf-kdtl distill."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Where to: owner/name, or a name of your own."})
    cache: str | None = field(default=None, metadata={"help": "In place of a run: a store of hf-kdtl cache."})
    repo_id: str | None = field(default=None, metadata={"help": "Of a store, where to: a dataset repository."})
    evaluation: str | None = field(
        default=None, metadata={"help": "The output_dir of hf-kdtl evaluate, for the card."}
    )
    private: bool | None = field(
        default=None, metadata={"help": "Who may see a new repository; else what you have set."}
    )
    license: str | None = field(default=None, metadata={"help": "By default the teacher's, where it is known."})
    revision: str | None = field(default=None, metadata={"help": "A branch; it is made where there is none."})
    create_pr: bool = field(default=False, metadata={"help": "Propose it as a pull request."})


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, check, publish, say where it is."""
    cli.quiet()
    (options,) = cli.parse(PushOptions, argv=argv, doc=__doc__)
    check(options)
    tqdm.write(published(push(options), options) if options.cache is None else push_store(options))


def check(options: PushOptions) -> None:
    """Raises ValueError where it is not a run with its place, or a store with its."""
    run, store = (options.run, options.hub_model_id), (options.cache, options.repo_id)
    if (None in run or store != (None, None)) and (None in store or run != (None, None) or options.evaluation):
        names = ("run", "hub_model_id", "cache", "repo_id", "evaluation")
        given = [f"--{name}" for name in names if getattr(options, name) is not None]
        raise ValueError(
            f"found {' and '.join(given) or 'nothing'}; expected --run <output_dir of hf-kdtl distill> --hub_model_id "
            "<owner/name>, or of stored teacher outputs --cache <folder of hf-kdtl cache> --repo_id <owner/name>."
        )


def push_store(options: PushOptions, token: str | None = None) -> str:
    """Publish a store; where it is, and how it is used.

    Raises:
        ValueError, HubError: as `hf_kdtl.hub.stored_teacher.publish_store`; what could not be sent is kept.
    """
    folder, repo_id = str(options.cache), str(options.repo_id)
    commit = publish_store(
        folder, repo_id, license=options.license, token=token, private=options.private, revision=options.revision,
        create_pr=options.create_pr,
    )  # fmt: skip
    name = commit.repo_url.repo_id
    if options.create_pr:
        return f"Proposed: {commit.pr_url}" if commit.pr_url else f"Nothing to propose: {name} is this store."
    manifest = read_manifest(Path(folder).expanduser())
    return f"Published: {commit.commit_url}\n\n  {next_steps(name, manifest.settings)}"


def push(options: PushOptions, token: str | None = None) -> CommitInfo:
    """Publish a run's student.

    Raises:
        ValueError, FileNotFoundError: for a run that is not finished, results of something else, a license that
            is not known or does not allow it, and as `hf_kdtl.hub.upload.publish`.
        HubError: as that too. Both say where the student is, and the command to push it later.
    """
    run, repo_id = str(options.run), str(options.hub_model_id)
    results = read_results(run)
    check_student(Path(run), results)
    if options.evaluation is not None:
        results = with_evaluation(results, read_results(options.evaluation))
    results = published_results(results)
    where: dict[str, Any] = {"private": options.private, "revision": options.revision, "create_pr": options.create_pr}
    try:
        settled = licenses.student_license(models_of(Results.of(results)), options.license)
        name = check_access(repo_id, token, **where)
        card = student_card(results, model_id=name, license=settled)
        return publish(run, name, card, results=results, token=token, **where)
    except (HubError, ValueError) as error:  # at the end of a training the student is what one asks after
        names = ("evaluation", "private", "license", "revision", "create_pr")
        flags = {flag: getattr(options, flag) for flag in names}
        command = retry_command(student_of(Path(run)), run, repo_id, **flags)
        raise (HubError if isinstance(error, HubError) else ValueError)(f"{error} {command}") from error


def planned(config: DistillationConfig, teachers: Iterable[str], student: str | None) -> PushOptions | None:
    """What hf-kdtl distill will push at its end, after checking everything that could refuse it then; None
    where it will not, and on other processes than the first.

    Args:
        teachers, student: folders, stores or Hub names of what the student is made from, where there are any.

    Raises:
        ValueError, HubError: as `push`.
    """
    if not config.push_to_hub or config.process_index != 0:
        return None
    folder, token = Path(str(config.output_dir)), config.hub_token
    models: dict[str, Any] = {}
    if found := {str(i): {"licence": stored.license_of(path, token)} for i, path in enumerate(teachers)}:
        models["teachers"] = found
    if student is not None:
        models["student"] = {"start": {"how": "pretrained", "licence": licenses.license_of(student, token)}}
    licenses.student_license(Models.of(models, "models"), config.license)
    where: dict[str, Any] = {"private": config.hub_private_repo, "revision": config.hub_revision}
    name = check_access(config.hub_model_id or folder.resolve().name, token, **where)
    return PushOptions(str(folder), name, license=config.license, **where)


def check_student(run: Path, results: dict[str, Any]) -> None:
    """Raises ValueError where a run is not finished, or its results are not of the student in it."""
    student = student_of(run)
    if not (student / "config.json").is_file() and not (student / "adapter_config.json").is_file():
        raise ValueError(f"{run} holds no student; let the run finish: --resume_from_checkpoint true continues it.")
    stated, found = hash_of(results), saved_hash(student, is_adapter(student, results))
    if stated != found:
        raise ValueError(
            f"{run / FILE} is of a student with the weights {stated}, and {student} has {found}: its figures "
            "would be of another model. Put the two of one run together, or run hf-kdtl distill again."
        )


def published(commit: CommitInfo, options: PushOptions) -> str:
    """Where it is, and how it is used."""
    name = commit.repo_url.repo_id
    if options.create_pr:
        return f"Proposed: {commit.pr_url}" if commit.pr_url else f"Nothing to propose: {name} is this student."
    branch = f", revision='{options.revision}'" if options.revision else ""
    task = pipeline_task(load_results(str(options.run)))
    return (
        f"Published: {commit.commit_url}\n\n"
        f"  python -c \"from transformers import pipeline; print(pipeline('{task}', '{name}'{branch})"
        "('an_image.png'))\""
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
