"""A Hugging Face Hub on this machine, as far as memtune's calls go: real HTTP, commits like git's, faults on demand.

It answers what huggingface_hub 2.4 asks for: repositories, revisions, trees, uploads by LFS, commits with a parent,
pull requests, downloads with ranges and redirects to another host, and lists with filters.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_store import Answer, Fault, Repository, git_id, is_large, pointer, refuse, sha256, tags

TOKENS = {"writer": ("user", True), "reader": ("user", False), "stranger": ("stranger", True)}
"""Tokens: whose they are, and whether they may write."""


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}"  # another origin, as the real one's
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self.stop = threading.Event()

    def fail(self, match: str = "", **fault: Any) -> None:
        self.faults.append(Fault(match, **fault))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.refs[revision]].files

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are part of the tests."""


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stop.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def handle_any(self) -> None:
        request = f"{self.command} {self.path}"
        with self.server.lock:
            self.server.requests.append(request)
            fault = next((fault for fault in self.server.faults if fault.take(request)), Fault())
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length if fault.cut_request is None else min(length, fault.cut_request))
        self.server.stop.wait(fault.slow)
        if fault.do is not None:
            fault.do()
        if fault.cut_request is not None:
            self.hang_up(fault.reset)
            return
        try:
            if fault.status is not None:
                raise Answer(fault.status, {"error": "a fault on demand"}, **fault.headers)
            with self.server.lock:
                self.route(body)
            raise refuse(404, None, f"no such address: {request}")
        except Answer as answer:
            self.send(answer, fault)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def send(self, answer: Answer, fault: Fault) -> None:
        headers = {"Content-Length": str(len(answer.body))} | answer.headers
        lines = [f"HTTP/1.1 {answer.status} -", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        data = "\r\n".join(lines).encode() + (b"" if self.command == "HEAD" else answer.body)
        self.wfile.write(data if fault.cut_answer is None else data[: fault.cut_answer])
        if fault.cut_answer is not None:
            self.hang_up(fault.reset)

    def hang_up(self, reset: bool) -> None:
        self.close_connection = True
        self.wfile.flush()
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def route(self, body: bytes) -> None:
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        for method, pattern, action in ROUTES:
            found = re.fullmatch(pattern, address.path)
            if found and self.command in method:
                action(self, body, query, *(unquote(part) for part in found.groups()))

    # who asks, and what they may do

    def user(self) -> tuple[str | None, bool]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise refuse(401, None, "Invalid credentials in Authorization header")
        return TOKENS.get(token, (None, False))

    def repository(self, repo_id: str, *, write: bool = False) -> Repository:
        user, may_write = self.user()
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and user != repo_id.split("/")[0]):
            raise refuse(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not (may_write and user == repo_id.split("/")[0]):
            raise refuse(403, None, "you may not write to this repository")
        return repository

    def revision(self, repository: Repository, revision: str) -> str:
        commit = repository.resolve(revision)
        if commit is None:
            raise refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # repositories

    def whoami(self, body: bytes, query: dict[str, list[str]]) -> None:
        user, _ = self.user()
        raise (
            Answer(200, {"name": user, "type": "user"}) if user else refuse(401, None, "Invalid username or password.")
        )

    def create(self, body: bytes, query: dict[str, list[str]]) -> None:
        wanted = json.loads(body)
        user, may_write = self.user()
        if user is None:
            raise refuse(401, None, "Invalid username or password.")
        owner = wanted["organization"] or user
        repo_id = f"{owner}/{wanted['name']}"
        if not may_write or owner != user:
            raise refuse(403, None, f"you may not make a repository for {owner}")
        url = {"url": f"{self.server.endpoint}/{repo_id}"}
        if repo_id in self.server.repositories:
            raise Answer(409, {"error": "You already created this model repo"} | url)
        repository = Repository(wanted.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, None, "initial commit")
        self.server.repositories[repo_id] = repository
        raise Answer(200, url)

    def info(self, body: bytes, query: dict[str, list[str]], repo_id: str, revision: str = "main") -> None:
        repository = self.repository(repo_id)
        raise Answer(200, self.describe(repo_id, self.revision(repository, revision)))

    def describe(self, repo_id: str, commit: str) -> dict[str, Any]:
        repository = self.server.repositories[repo_id]
        files = repository.commits[commit].files
        return {
            "id": repo_id,
            "sha": commit,
            "private": repository.private,
            "tags": tags(files),
            "siblings": [{"rfilename": name} for name in files],
        }

    def list(self, body: bytes, query: dict[str, list[str]]) -> None:
        user, _ = self.user()
        found = []
        for repo_id, repository in sorted(self.server.repositories.items()):
            described = self.describe(repo_id, repository.refs["main"])
            owner = repo_id.split("/")[0]
            seen = (not repository.private or user == owner) and query.get("author", [owner]) == [owner]
            if seen and set(query.get("filter", [])) <= set(described["tags"]):
                found.append(described)
        start, size = int(query.get("cursor", ["0"])[0]), min(2, int(query.get("limit", ["2"])[0]))
        more = self.path.split("&cursor=")[0] + f"&cursor={start + size}"
        link = {"Link": f'<{self.server.endpoint}{more}>; rel="next"'} if start + size < len(found) else {}
        raise Answer(200, found[start : start + size], **link)

    def tree(self, body: bytes, query: dict[str, list[str]], repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id)
        files = repository.commits[self.revision(repository, revision)].files
        entries = []
        for name, content in files.items():
            lfs = {"oid": sha256(content), "size": len(content), "pointerSize": len(pointer(content))}
            stored = pointer(content) if is_large(name) else content
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_id(stored)}
            entries.append(entry | ({"lfs": lfs} if is_large(name) else {}))
        raise Answer(200, entries)

    def branch(self, body: bytes, query: dict[str, list[str]], repo_id: str, name: str) -> None:
        repository = self.repository(repo_id, write=True)
        if name in repository.refs:
            raise refuse(409, None, "Reference already exists")
        repository.refs[name] = self.revision(repository, json.loads(body).get("startingPoint", "main"))
        raise Answer(200)

    # uploads

    def validate(self, body: bytes, query: dict[str, list[str]]) -> None:
        front = json.loads(body)["content"].split("---\n")[1]
        try:
            metadata = yaml.safe_load(front)
        except yaml.YAMLError as error:
            raise Answer(400, {"errors": [{"message": str(error)}]}) from error
        missing = [name for name in ("library_name", "tags") if name not in metadata]
        raise Answer(200, {"errors": [], "warnings": [{"message": f"no {name}"} for name in missing]})

    def preupload(self, body: bytes, query: dict[str, list[str]], repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id, write="create_pr" not in query)
        files = repository.commits[self.revision(repository, revision)].files
        answers = []
        for wanted in json.loads(body)["files"]:
            name = wanted["path"]
            answer = {"path": name, "uploadMode": "lfs" if is_large(name) else "regular", "shouldIgnore": False}
            if name in files:
                answer["oid"] = sha256(files[name]) if is_large(name) else git_id(files[name])
            answers.append(answer)
        raise Answer(200, {"files": answers})

    def batch(self, body: bytes, query: dict[str, list[str]], repo_id: str) -> None:
        self.repository(repo_id)
        objects = []
        for wanted in json.loads(body)["objects"]:
            actions = {
                name: {"href": f"{self.server.storage}/storage/{name}/{wanted['oid']}"} for name in ("upload", "verify")
            }
            known = wanted["oid"] in self.server.objects
            objects.append(wanted | ({} if known else {"actions": actions}))
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, query: dict[str, list[str]], oid: str) -> None:
        if self.headers.get("Authorization"):
            raise refuse(400, None, "a token was sent to the storage")
        if sha256(body) != oid:
            raise refuse(400, None, "the content has another hash")
        self.server.objects[oid] = body
        raise Answer(200, ETag=f'"{oid}"')

    def verify(self, body: bytes, query: dict[str, list[str]], oid: str) -> None:
        wanted = json.loads(body)
        stored = self.server.objects.get(oid)
        good = stored is not None and wanted == {"oid": oid, "size": len(stored)}
        raise Answer(200) if good else refuse(422, None, "the object is not there")

    def commit(self, body: bytes, query: dict[str, list[str]], repo_id: str, revision: str) -> None:
        proposed = "create_pr" in query
        repository = self.repository(repo_id, write=not proposed)
        if self.user()[0] is None:
            raise refuse(401, None, "Invalid username or password.")
        head = self.revision(repository, revision)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit", head) != head:
            raise refuse(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[head].files)
        for operation in operations:
            self.apply(operation["key"], operation["value"], files)
        number = sum(name.startswith("refs/pr/") for name in repository.refs) + 1
        ref = f"refs/pr/{number}" if proposed else revision
        commit = repository.commit(ref, files, head, header["value"]["summary"])
        url = f"{self.server.endpoint}/{repo_id}/discussions/{number}"
        answer = {"commitOid": commit, "commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{commit}"}
        raise Answer(200, answer | ({"pullRequestUrl": url} if proposed else {}))

    def apply(self, kind: str, value: dict[str, Any], files: dict[str, bytes]) -> None:
        name = value["path"]
        if kind == "file":
            files[name] = base64.b64decode(value["content"], validate=True)
        elif kind == "lfsFile" and value["oid"] in self.server.objects:
            files[name] = self.server.objects[value["oid"]]
        elif kind == "deletedFile" and name in files:
            del files[name]
        else:
            raise refuse(400, None, f"cannot do {kind} of {name}")

    # downloads

    def resolve(self, body: bytes, query: dict[str, list[str]], repo_id: str, revision: str, name: str) -> None:
        repository = self.repository(repo_id)
        commit = self.revision(repository, revision)
        files = repository.commits[commit].files
        if name not in files:
            answer = refuse(404, "EntryNotFound", "Entry not found")
            answer.headers["X-Repo-Commit"] = commit
            raise answer
        content = files[name]
        if not is_large(name):
            self.content(content, git_id(content), commit)
        oid = sha256(content)
        self.server.objects.setdefault(oid, content)
        raise Answer(
            302,
            X_Repo_Commit=commit,
            X_Linked_Etag=f'"{oid}"',
            X_Linked_Size=str(len(content)),
            Location=f"{self.server.storage}/storage/download/{oid}",
        )

    def download(self, body: bytes, query: dict[str, list[str]], oid: str) -> None:
        if self.headers.get("Authorization"):
            raise refuse(400, None, "a token was sent to the storage")
        self.content(self.server.objects[oid], oid, None)

    def content(self, content: bytes, etag: str, commit: str | None) -> None:
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"} | ({"X-Repo-Commit": commit} if commit else {})
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            raise Answer(200, content, **headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(content) - 1) + 1, len(content))
        if start >= len(content):
            raise Answer(416, b"", Content_Range=f"bytes */{len(content)}", **headers)
        raise Answer(206, content[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(content)}", **headers)


ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate),
    (("GET",), "/api/models", Handler.list),
    (("GET",), "/api/models/([^/]+/[^/]+)", Handler.info),
    (("GET",), "/api/models/([^/]+/[^/]+)/revision/([^/]+)", Handler.info),
    (("GET",), "/api/models/([^/]+/[^/]+)/tree/([^/]+)", Handler.tree),
    (("POST",), "/api/models/([^/]+/[^/]+)/branch/([^/]+)", Handler.branch),
    (("POST",), "/api/models/([^/]+/[^/]+)/preupload/([^/]+)", Handler.preupload),
    (("POST",), "/api/models/([^/]+/[^/]+)/commit/([^/]+)", Handler.commit),
    (("POST",), r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), "/storage/upload/([^/]+)", Handler.upload),
    (("POST",), "/storage/verify/([^/]+)", Handler.verify),
    (("GET", "HEAD"), "/storage/download/([^/]+)", Handler.download),
    (("GET", "HEAD"), "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
]
