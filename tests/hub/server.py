"""A Hub on this machine's loopback: as much of the HTTP API as the real huggingface_hub client needs for models and
data sets (`hub.files("datasets/tester/outputs")`).

    with Hub() as hub:
        hub.fail(Fault("POST", "/commit/", status=503))
        ...  # a client with HF_ENDPOINT=hub.url and HF_HUB_DISABLE_XET=1
        assert hub.files("tester/student")["README.md"].startswith(b"---")

Every request is kept in `hub.log`, every commit with its message in its repository, every uploaded object in
`hub.objects`. Standard library only.
"""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.parts import TOKEN, Fault, Refusal, Reply, Repository, Request, User, known
from tests.hub.routes import ROUTES

__all__ = ["TOKEN", "Fault", "Hub", "User"]


class Hub:
    """The server. `users` are by token; a request without a token is anonymous."""

    def __init__(self, users: dict[str, User] | None = None):
        self.users = {TOKEN: User("tester")} if users is None else users
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files by their SHA-256
        self.log: list[str] = []  # "POST /api/repos/create"
        self.faults: list[Fault] = []
        self.gone = False
        self._lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Be gone: connections are refused from now on, and open ones closed."""
        self.gone = True
        self._server.shutdown()
        self._server.server_close()

    def fail(self, *faults: Fault) -> None:
        """Let these happen, each at the next requests that fit it."""
        self.faults += faults

    def add(self, name: str, files: dict[str, bytes] | None = None, **settings: Any) -> Repository:
        """A repository as the Hub makes it, and then a commit of `files`."""
        repository = self.repositories[name] = Repository(name, **settings)
        first = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        repository.commit("main", "initial commit", first)
        if files:
            repository.commit("main", "files", first | files)
        return repository

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds, by path."""
        return self.repositories[name].at(revision).files

    def messages(self, name: str) -> list[str]:
        """The messages of all commits on all branches."""
        return [commit.message for branch in self.repositories[name].branches.values() for commit in branch]

    def uploaded(self) -> dict[str, bytes]:
        """Everything that ever went up, whether or not it was committed."""
        committed = {
            f"{repository.id}/{path}@{commit.oid[:7]}": content
            for repository in self.repositories.values()
            for branch in repository.branches.values()
            for commit in branch
            for path, content in commit.files.items()
        }
        return committed | self.objects

    def fault(self, method: str, path: str) -> Fault | None:
        """The first fault that fits, used up by one."""
        with self._lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def answer(self, request: Request) -> Reply:
        """The reply to a request, by ROUTES: a data set is a repository whose name begins with datasets/."""
        request.path = request.path.replace("/api/datasets/", "/api/models/datasets/", 1)
        with self._lock:
            for method, pattern, function in ROUTES:
                if method == request.method and (match := re.fullmatch(pattern, request.path)):
                    try:
                        return function(self, request, *match.groups())
                    except Refusal as refusal:
                        return refusal.reply
        return Refusal(404, "NotFound", f"no route for {request.method} {request.path}").reply

    # ---- Who may do what ----

    def readable(self, name: str, user: User | None) -> Repository:
        """A repository whose existence the user may know. Raises Refusal."""
        found = self.repositories.get(name)
        if found is None or (found.private and (user is None or not user.owns(namespace(name)))):
            raise Refusal(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return found

    def writable(self, name: str, user: User | None, pull_request: bool = False) -> Repository:
        """A repository that the user may commit to, or propose to. Raises Refusal."""
        found = self.readable(name, known(user))
        if not pull_request and not known(user).owns(namespace(name)):
            raise Refusal(403, "Forbidden", "You don't have the rights to write to this repository")
        return found


def namespace(name: str) -> str:
    """Of a repository, who it belongs to."""
    return name.removeprefix("datasets/").split("/")[0]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # else each answer waits 40 ms for an acknowledgement

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        if self.hub.gone:
            return self._cut()
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.hub.log.append(f"{self.command} {path}")
        fault = self.hub.fault(self.command, path)
        if fault is not None and fault.cut == "request":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self._cut()
        body = self._body()
        if fault is not None and fault.status:
            return self._send(Reply(fault.status, {"error": fault.message}, fault.headers))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            return self._send(Refusal(401, "", "Invalid credentials in Authorization header").reply)
        request = Request(self.command, path, parse_qs(address.query), body, self.hub.users.get(token))
        self._send(self.hub.answer(request), cut=fault is not None)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, reply: Reply, cut: bool = False) -> None:
        content = reply.value if isinstance(reply.value, bytes) else json.dumps(reply.value).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
