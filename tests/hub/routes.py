"""What the loopback Hub answers to which request: one small function each, in ROUTES."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from tests.hub.parts import Refusal, Reply, Request, known

if TYPE_CHECKING:
    from tests.hub.server import Hub

Route = Callable[..., Reply]
ROUTES: list[tuple[str, str, Route]] = []
NAME = r"((?:datasets/)?[^/]+/[^/]+)"


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    def register(function: Route) -> Route:
        ROUTES.append((method, pattern, function))
        return function

    return register


@route("GET", "/api/whoami-v2")
def whoami(hub: Hub, request: Request) -> Reply:
    user = known(request.user)
    orgs = [{"name": name, "roleInOrg": role} for name, role in user.orgs.items()]
    token = {"accessToken": {"displayName": "test", "role": user.role}}
    return Reply(value={"type": "user", "name": user.name, "orgs": orgs, "auth": token})


@route("POST", "/api/repos/create")
def create(hub: Hub, request: Request) -> Reply:
    asked, user = request.json, known(request.user)
    namespace = asked.get("organization") or user.name
    name = f"{'datasets/' if asked.get('type') == 'dataset' else ''}{namespace}/{asked['name']}"
    if not user.owns(namespace):
        raise Refusal(403, "Forbidden", f"You don't have the rights to create a model under the namespace {namespace}")
    found = {"url": f"{hub.url}/{name}", "id": name}
    if name in hub.repositories:
        return Reply(409, found | {"error": "You already created this model repo"})
    hub.add(name, private=asked.get("visibility") == "private")
    return Reply(value=found)


@route("GET", f"/api/models/{NAME}/auth-check(/write)?")
def auth_check(hub: Hub, request: Request, name: str, write: str | None) -> Reply:
    hub.writable(name, request.user) if write else hub.readable(name, request.user)
    return Reply(value={})


@route("GET", f"/api/models/{NAME}(?:/revision/(.+))?")
def info(hub: Hub, request: Request, name: str, revision: str | None) -> Reply:
    repository = hub.readable(name, request.user)
    commit = repository.at(revision or "main")
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    gated = "manual" if repository.readers is not None else False
    about = {"id": name, "modelId": name, "sha": commit.oid, "private": repository.private, "gated": gated}
    return Reply(value=about | {"tags": [], "siblings": siblings, "disabled": False, "downloads": 0, "likes": 0})


@route("GET", f"/api/models/{NAME}/refs")
def refs(hub: Hub, request: Request, name: str) -> Reply:
    branches = hub.readable(name, request.user).branches
    found = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": commits[-1].oid} for b, commits in branches.items()]
    return Reply(value={"branches": found, "converts": [], "tags": []})


@route("POST", f"/api/models/{NAME}/branch/(.+)")
def branch(hub: Hub, request: Request, name: str, revision: str) -> Reply:
    repository = hub.writable(name, request.user)
    if revision in repository.branches:
        return Reply(409, {"error": f"Reference already exists: {revision}"})
    repository.branches[revision] = [repository.at(request.json.get("startingPoint") or "main")]
    return Reply(value={})


@route("GET", f"/api/models/{NAME}/tree/([^/]+)(?:/.*)?")
def tree(hub: Hub, request: Request, name: str, revision: str) -> Reply:
    files = hub.readable(name, request.user).at(revision).files
    return Reply(value=[_entry(hub, path, content) for path, content in sorted(files.items())])


@route("POST", f"/api/models/{NAME}/paths-info/(.+)")
def paths_info(hub: Hub, request: Request, name: str, revision: str) -> Reply:
    files = hub.readable(name, request.user).at(revision).files
    try:
        paths = request.json["paths"]
    except ValueError:
        paths = parse_qs(request.body.decode())["paths"]
    return Reply(value=[_entry(hub, path, files[path]) for path in paths if path in files])


def _entry(hub: Hub, path: str, content: bytes) -> dict[str, Any]:
    found = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
    sha = _sha(content)
    return found | ({"lfs": {"oid": sha, "size": len(content), "pointerSize": 134}} if sha in hub.objects else {})


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@route("POST", f"/api/models/{NAME}/preupload/(.+)")
def preupload(hub: Hub, request: Request, name: str, revision: str) -> Reply:
    files = hub.writable(name, request.user, "create_pr" in request.query).at(revision).files

    def mode(path: str) -> dict[str, Any]:
        kind = "lfs" if path.endswith((".safetensors", ".png", ".npy")) else "regular"
        hashed = _git_oid if kind == "regular" else _sha
        oid = hashed(files[path]) if path in files else None
        return {"path": path, "uploadMode": kind, "shouldIgnore": False, "oid": oid}

    return Reply(value={"files": [mode(file["path"]) for file in request.json["files"]]})


@route("POST", rf"/{NAME}\.git/info/lfs/objects/batch")
def batch(hub: Hub, request: Request, name: str) -> Reply:
    hub.readable(name, known(request.user))

    def actions(wanted: dict[str, Any]) -> dict[str, Any]:
        known = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in hub.objects:  # there already: nothing to send
            return known
        upload = {"href": f"{hub.url}/objects/{wanted['oid']}"}
        verify = {"href": f"{hub.url}/{name}.git/info/lfs/objects/verify"}
        return known | {"actions": {"upload": upload, "verify": verify}}

    return Reply(value={"transfer": "basic", "objects": [actions(one) for one in request.json["objects"]]})


@route("PUT", "/objects/([0-9a-f]{64})")
def upload(hub: Hub, request: Request, oid: str) -> Reply:
    if _sha(request.body) != oid:
        raise Refusal(400, "BadRequest", "the content has another SHA-256")
    hub.objects[oid] = request.body
    return Reply(value={})


@route("POST", rf"/{NAME}\.git/info/lfs/objects/verify")
def verify(hub: Hub, request: Request, name: str) -> Reply:
    found = hub.objects.get(request.json["oid"])
    return Reply(200 if found is not None and len(found) == request.json["size"] else 404, {})


@route("POST", f"/api/models/{NAME}/commit/(.+)")
def commit(hub: Hub, request: Request, name: str, revision: str) -> Reply:
    pull_request = "create_pr" in request.query
    repository = hub.writable(name, request.user, pull_request)
    before = repository.at(revision)
    operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    files = dict(before.files)
    header = next(one["value"] for one in operations if one["key"] == "header")
    if header.get("parentCommit") not in (None, before.oid):
        raise Refusal(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
    for operation in operations:
        _apply(hub, files, operation["key"], operation["value"])
    number = sum(name.startswith("refs/pr/") for name in repository.branches) + 1
    target = f"refs/pr/{number}" if pull_request else revision
    made = repository.commit(target, header["summary"] + header.get("description", ""), files)
    links = {"pullRequestUrl": f"{hub.url}/{name}/discussions/{number}"} if pull_request else {}
    return Reply(value={"commitOid": made.oid, "commitUrl": f"{hub.url}/{name}/commit/{made.oid}"} | links)


def _apply(hub: Hub, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
    if key == "file":
        files[value["path"]] = base64.b64decode(value["content"])
    elif key == "lfsFile":
        if value["oid"] not in hub.objects:
            raise Refusal(400, "BadRequest", f"the object of {value['path']} was not uploaded")
        files[value["path"]] = hub.objects[value["oid"]]
    elif key == "deletedFile":
        del files[value["path"]]


@route("GET", f"/{NAME}/resolve/([^/]+)/(.+)")
@route("HEAD", f"/{NAME}/resolve/([^/]+)/(.+)")
def resolve(hub: Hub, request: Request, name: str, revision: str, path: str) -> Reply:
    repository = hub.readable(name, request.user)
    if repository.readers is not None and getattr(request.user, "name", None) not in repository.readers:
        raise Refusal(401 if request.user is None else 403, "GatedRepo", f"Access to model {name} is restricted")
    found = repository.at(revision)
    if path not in found.files:
        raise Refusal(404, "EntryNotFound", "Entry not found")
    content = found.files[path]
    return Reply(value=content, headers={"X-Repo-Commit": found.oid, "ETag": f'"{_git_oid(content)}"'})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: Hub, request: Request) -> Reply:
    closed = re.match(r"---\r?\n.*?\n---\r?\n", request.json["content"], re.DOTALL)
    errors = [] if closed else [{"message": "the card does not begin with metadata between two lines of ---"}]
    return Reply(400 if errors else 200, {"errors": errors, "warnings": []})
