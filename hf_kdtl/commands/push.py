"""Publish the student of a finished run on the Hub, with a card made from its results.

  hf auth login
  hf-kdtl push --run runs/student --hub_model_id me/my-student
  hf-kdtl push --run runs/student --evaluation runs/evaluation --hub_model_id me/my-student \\
      --private true --license apache-2.0

The run is one of hf-kdtl distill, the evaluation one of hf-kdtl evaluate of the same student. The
weights, their settings, the card and results.json go up, in one commit, and nothing else.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from tqdm.auto import tqdm

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.evaluation.model_records import Models
from hf_kdtl.evaluation.records import Results
from hf_kdtl.evaluation.results import FILE, read_results
from hf_kdtl.hub import license as licenses
from hf_kdtl.hub.card_results import hash_of
from hf_kdtl.hub.card_results import published as published_results
from hf_kdtl.hub.card_tables import models_of
from hf_kdtl.hub.model_card import student_card, with_evaluation
from hf_kdtl.hub.provenance import saved_hash
from hf_kdtl.hub.staging import is_adapter
from hf_kdtl.hub.upload import HubError, check_access, publish, retry_command, student_of


@dataclass
class PushOptions:
    """What to publish, and where."""

    run: str = field(metadata={"help": "The output_dir of hf-kdtl distill."})
    hub_model_id: str = field(metadata={"help": "Where to: owner/name, or a name of your own."})
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
    tqdm.write(published(push(options), options))


def push(options: PushOptions, token: str | None = None) -> CommitInfo:
    """Publish a run's student.

    Raises:
        ValueError, FileNotFoundError: for a run that is not finished, results of something else, a license that
            is not known or does not allow it, and as `hf_kdtl.hub.upload.publish`.
        HubError: as that too. Both say where the student is, and the command to push it later.
    """
    results = read_results(options.run)
    check_student(Path(options.run), results)
    if options.evaluation is not None:
        results = with_evaluation(results, read_results(options.evaluation))
    results = published_results(results)
    where: dict[str, Any] = {"private": options.private, "revision": options.revision, "create_pr": options.create_pr}
    try:
        settled = licenses.student_license(models_of(Results.of(results)), options.license)
        name = check_access(options.hub_model_id, token, **where)
        card = student_card(results, model_id=name, license=settled)
        return publish(options.run, name, card, results=results, token=token, **where)
    except (HubError, ValueError) as error:  # at the end of a training the student is what one asks after
        flags = dataclasses.asdict(options)
        command = retry_command(student_of(Path(options.run)), flags.pop("run"), flags.pop("hub_model_id"), **flags)
        raise (HubError if isinstance(error, HubError) else ValueError)(f"{error} {command}") from error


def planned(config: DistillationConfig, teachers: Iterable[str], student: str | None) -> PushOptions | None:
    """What hf-kdtl distill will push at its end, after checking everything that could refuse it then; None
    where it will not, and on other processes than the first.

    Args:
        teachers, student: folders or Hub names of what the student is made from, where there are any.

    Raises:
        ValueError, HubError: as `push`.
    """
    if not config.push_to_hub or config.process_index != 0:
        return None
    folder, token = Path(str(config.output_dir)), config.hub_token
    models: dict[str, Any] = {}
    if found := {str(i): {"licence": licenses.license_of(path, token)} for i, path in enumerate(teachers)}:
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
    return (
        f"Published: {commit.commit_url}\n\n"
        f"  python -c \"from transformers import pipeline; print(pipeline('image-classification', '{name}'{branch})"
        "('an_image.png'))\""
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
