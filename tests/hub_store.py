"""What a Hub keeps, its faults and its answers (see `hub_server`)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass
class Commit:
    files: dict[str, bytes]
    parent: str | None
    title: str


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes], parent: str | None, title: str) -> str:
        digest = hashlib.sha1(f"{ref} {parent} {title} {len(self.commits)}".encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + content)
        self.commits[digest.hexdigest()] = Commit(files, parent, title)
        self.refs[ref] = digest.hexdigest()
        return digest.hexdigest()

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What goes wrong with requests whose method and path match.

    Attributes:
        match: A regular expression on `METHOD /path`.
        times: How often; -1 for always.
        skip: How many matching requests go well first.
        status: Answer with this status, and do nothing.
        headers: The answer's headers.
        cut_request: Drop the connection after so many bytes of the request's body, and do nothing.
        cut_answer: Do what was asked, and drop the connection after so many bytes of the answer.
        reset: Drop it by a reset.
        slow: Seconds before the answer.
        do: What happens before the request is answered.
    """

    match: str = ""
    times: int = 1
    skip: int = 0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_request: int | None = None
    cut_answer: int | None = None
    reset: bool = False
    slow: float = 0.0
    do: Callable[[], Any] | None = None

    def take(self, request: str) -> bool:
        if self.times == 0 or not re.search(self.match, request):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class Answer(Exception):
    """An answer, raised from wherever it is known."""

    def __init__(self, status: int = 200, body: Any = b"", **headers: str) -> None:
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if not isinstance(body, bytes):
            self.headers["Content-Type"] = "application/json"


def refuse(status: int, code: str | None = None, message: str = "") -> Answer:
    headers = {"X_Error_Message": message or code or "refused"} | ({"X_Error_Code": code} if code else {})
    return Answer(status, {"error": message or code or "refused"}, **headers)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(content: bytes) -> bytes:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\nsize {len(content)}\n"
    return text.encode()


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def tags(files: dict[str, bytes]) -> list[str]:
    """The tags that the Hub takes from a card."""
    parts = files.get("README.md", b"").decode().split("---\n")
    metadata = yaml.safe_load(parts[1]) if len(parts) > 2 else {}
    found = [*metadata.get("tags", []), *[metadata[key] for key in ("library_name", "pipeline_tag") if key in metadata]]
    if "base_model" in metadata:
        found.append(f"base_model:{metadata['base_model']}")
        if "base_model_relation" in metadata:
            found.append(f"base_model:{metadata['base_model_relation']}:{metadata['base_model']}")
    return list(dict.fromkeys(found))
