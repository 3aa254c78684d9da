"""To the Hub: who may write there, and one commit of a clean folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

from hf_kdtl.evaluation.results import FILE, SCHEMA, read_results
from hf_kdtl.hub.staging import is_students, refuse_secrets, stage_student
from hf_kdtl.models.teachers.store.manifest import FILE as STORE
from hf_kdtl.models.teachers.store.manifest import read_manifest
from hf_kdtl.models.teachers.store.named import is_stores

# What a repository may hold that was made on the web site and not used yet.
BLANK = (".gitattributes", ".gitignore", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")


class HubError(OSError):
    """The Hub refused, or could not be reached; the message says why and what to type."""


def check_access(
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    kind: str = "model",
) -> str:
    """Make sure, before any work, that a student may be published there; the repository is made where there is none.

    Args:
        repo_id: `owner/name`, or a name alone for the token's owner.
        token: with the right to write; by default the one that is logged in.
        private: who may see a new repository; by default what its owner has set.
        revision: a branch, made where there is none.
        create_pr: it will be proposed as a pull request: the repository exists, and may be somebody else's.
        kind: model; dataset for a store of teacher outputs.

    Returns: the repository's full name.

    Raises:
        ValueError: no token, or one that may only read; a repository that holds something else, or is public where
            a private one is requested.
        HubError: the Hub refuses the token or the repository, or cannot be reached.
    """
    if (token := token or get_token()) is None:
        raise ValueError(
            "there is no token for the Hub, and publishing needs one. Make one with the role write "
            "(https://huggingface.co/settings/tokens) and type `hf auth login`, or set HF_TOKEN."
        )
    api = HfApi(token=token)
    with hub_errors(repo_id):
        user = api.whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ValueError(
                f"the token of {user['name']} may only read. Make one with the role write, for {repo_id}."
            )
        name = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
        if not create_pr:
            api.create_repo(name, private=private, exist_ok=True, repo_type=kind)
            api.auth_check(
                name, write=True, repo_type=kind
            )  # create_repo is content with a repository that one may only read
        found = api.repo_info(name, repo_type=kind)
        if private and not found.private:
            raise ValueError(f"{name} exists and is public, and a private one is requested. Name another, or hide it.")
        if not create_pr:
            _check_ours(api, name, revision, kind)
            if revision is not None:
                api.create_branch(name, branch=revision, exist_ok=True, repo_type=kind)
    return name


def publish(
    folder: str | Path,
    repo_id: str,
    card: ModelCard,
    *,
    results: dict[str, Any] | None = None,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Publish the student",
) -> CommitInfo:
    """Publish the student of a finished run folder, in one commit: all of it appears, or nothing. The folder stays as
    it is, whatever happens.

    Args:
        folder: of a recipe, with results.json and student/.
        repo_id, token, private, revision, create_pr: as `check_access`.
        card: as `hf_kdtl.hub.model_card.student_card` makes it.
        results: goes up as results.json; by default the folder's.

    Raises:
        ValueError, FileNotFoundError: as `check_access` and `hf_kdtl.hub.staging.stage_student`.
        HubError: the Hub refused, or could not be reached; calling it again sends only what is not there yet.
    """
    folder = Path(folder)
    results = read_results(folder) if results is None else results
    with TemporaryDirectory(prefix="student-") as staged:
        stage_student(student_of(folder), staged, card, results, folder, token)
        name = check_access(repo_id, token, private, revision=revision, create_pr=create_pr)
        return create_commit(staged, name, token, revision, commit_message, create_pr)


def retry_command(student: str | Path, run: str | Path, repo_id: str, **flags: Any) -> str:
    """Where a student is that could not be sent, and the command that sends it."""
    settings = {"run": run, "hub_model_id": repo_id} | {name: value for name, value in flags.items() if value}
    words = [f"--{name} {'true' if value is True else shlex.quote(str(value))}" for name, value in settings.items()]
    return f"The student is complete in {student}. Push it later: hf-kdtl push {' '.join(words)}"


def student_of(folder: Path) -> Path:
    """Where a run folder holds its student."""
    return folder / "student" if (folder / "student").is_dir() else folder


def _check_ours(api: HfApi, name: str, revision: str | None, kind: str) -> None:
    """Whether what would be overwritten is a student (a store) of ours; a branch that does not exist yet starts from
    main."""
    branches = api.list_repo_refs(name, repo_type=kind).branches if revision else []
    revision = revision if revision in {branch.name for branch in branches} else None
    files = api.list_repo_files(name, revision=revision, repo_type=kind)
    foreign = sorted(set(files) - {*BLANK})
    what, file, is_ours = OURS[kind]
    if foreign and not (
        file in files and is_ours(Path(api.hf_hub_download(name, file, revision=revision, repo_type=kind)))
    ):
        where = f"{name} (branch {revision})" if revision else name
        flag = "--hub_model_id" if kind == "model" else "--repo_id"
        raise ValueError(
            f"{where} exists and holds {', '.join(foreign[:5])}, and no {file} of {what}: it would be overwritten. "
            f"Name another repository ({flag}), or empty this one first."
        )


def _is_a_students(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return 1 <= found["schema"] <= SCHEMA and found["run"]["recipe"] in (None, "distill")
    except (ValueError, TypeError, KeyError):  # a file of somebody else's, by the same name
        return False


def _is_a_stores(path: Path) -> bool:
    try:
        return bool(read_manifest(path.parent))
    except ValueError:
        return False


OURS = {"model": ("a student", FILE, _is_a_students), "dataset": ("a store", STORE, _is_a_stores)}


def create_commit(
    staged: str | Path,
    name: str,
    token: str | None,
    revision: str | None,
    message: str,
    create_pr: bool = False,
    *,
    kind: str = "model",
    more: Mapping[str, Path] = MappingProxyType({}),
) -> CommitInfo:
    """One commit of a staged folder, and of `more` files {path in the repository: file}. What it held of a student (a
    store) and is not among them goes: it would be loaded."""
    refuse_secrets("the commit message", message.encode(), token)
    api = HfApi(token=token, library_name="hf_kdtl")
    with hub_errors(name):
        found = sorted(path for path in Path(staged).rglob("*") if path.is_file())
        files = {path.relative_to(staged).as_posix(): path for path in found} | dict(more)
        there = api.list_repo_files(name, revision=None if create_pr else revision, repo_type=kind)
        its = is_students if kind == "model" else is_stores
        stale = [CommitOperationDelete(path) for path in there if its(path) and path not in files]
        added = [CommitOperationAdd(path_in_repo, path) for path_in_repo, path in files.items()]
        return api.create_commit(
            name, [*stale, *added], commit_message=message, revision=revision, create_pr=create_pr, repo_type=kind
        )


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Errors of the Hub and of the way there as a HubError."""
    try:
        yield
    except (HTTPError, ConnectionError, LocalEntryNotFoundError) as error:
        raise HubError(_explain(error, repo_id)) from error
    except RuntimeError as error:  # how the client reports a failed upload
        if not isinstance(error.__cause__, HTTPError | ConnectionError):
            raise
        raise HubError(_explain(error.__cause__, repo_id)) from error


def _explain(error: Exception, repo_id: str) -> str:
    """What went wrong, and what to type."""
    if not isinstance(error, HfHubHTTPError):
        reason = " ".join(str(error).split()) or "the connection was cut"
        return f"the Hub could not be reached ({type(error).__name__}: {reason})."
    status = error.response.status_code
    wait = error.response.headers.get("Retry-After")
    meaning = {
        401: "the token is wrong or has expired. Log in again with `hf auth login`, or set HF_TOKEN.",
        403: f"this token may not write to {repo_id}. Take one with the role write of somebody who may, name a "
        "repository of your own, or propose it there: --create_pr true.",
        404: f"{repo_id} was not found, or is private and not yours. Check the name, and the revision.",
        409: "something else was going on in the repository. Do it again.",
        412: "somebody else has committed since. Do it again.",
        429: f"too many requests. Wait {wait + ' seconds' if wait else 'a few minutes'}, and do it again.",
    }
    own = "the trouble is the Hub's. Do it again later." if status >= 500 else " ".join(str(error).split())
    return f"the Hub refused {repo_id} ({status}): {meaning.get(status, own)}"
