"""What the loopback Hub is made of: users, repositories and their commits, requests, replies, faults."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

TOKEN = "hf_markedSecretOfTheTests"  # the default user's


@dataclass
class User:
    """Who a token belongs to. `role` is write or read; `orgs` {organization: role in it}."""

    name: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)

    def owns(self, namespace: str) -> bool:
        return self.role == "write" and (self.name == namespace or self.orgs.get(namespace) in ("write", "admin"))


@dataclass
class Fault:
    """What goes wrong at the next `times` requests that fit: an answer with `status`, or a connection that is cut,
    "request" (half of the request is read) or "response" (half of the answer is sent)."""

    method: str
    path: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: str = ""
    times: int = 1
    message: str = "a fault of the tests"


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    id: str
    private: bool = False
    readers: list[str] | None = None  # of a gated one: users who may read the files
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})

    def commit(self, revision: str, message: str, files: dict[str, bytes]) -> Commit:
        branch = self.branches.setdefault(revision, [])
        oid = hashlib.sha1(f"{self.id} {revision} {len(branch)} {message}".encode()).hexdigest()
        branch.append(Commit(oid, message, dict(files)))
        return branch[-1]

    def at(self, revision: str) -> Commit:
        found = self.branches.get(revision) or [c for b in self.branches.values() for c in b if c.oid == revision]
        if not found:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found[-1]


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    body: bytes
    user: User | None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Reply:
    status: int = 200
    value: Any = None  # JSON, or bytes
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    def __init__(self, status: int, code: str, message: str):
        self.reply = Reply(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})


def known(user: User | None) -> User:
    if user is None:
        raise Refusal(401, "", "Invalid username or password.")
    return user
