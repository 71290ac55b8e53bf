"""A server of this machine that speaks as much of the Hugging Face Hub's HTTP interface as downloading a model takes.

https://huggingface.co/docs/hub/api, and what huggingface_hub sends and expects: a model's commit and files, and the
files themselves, whole or from some byte on.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass
class Repository:
    """files: by path. token: what opens a private model. gated: that its files are not for everyone who sees it."""

    files: dict[str, bytes]
    token: str = ""
    gated: bool = False
    branches: tuple[str, ...] = ("main",)

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for path, content in sorted(self.files.items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass
class Hub:
    """Serves while it is open, as a context manager. requests: method, path and Range of each that is for a model.

    lost: files that are listed and not there. breaks: at which byte of a file the connection ends, in order. sizes: of
    files, bytes, that are listed in place of their own.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    breaks: dict[str, list[int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def downloaded(self) -> list[str]:
        """The paths of all files that were asked for, and were not only looked up."""
        pattern = re.compile(r"/[^/]+/[^/]+/resolve/[^/]+/(.*)")
        found = [pattern.fullmatch(path) for kind, path, _ in self.requests if kind == "GET"]
        return sorted(match[1] for match in found if match)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        if match:  # the library also asks for something that is for all programs
            self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        repository = self.hub.repositories.get(match[1]) if match else None
        allowed = repository and self.headers.get("Authorization", "") == f"Bearer {repository.token}".rstrip()
        if not match or not repository or (repository.token and not allowed):
            self._refuse(401, "RepoNotFound")
        elif match[3 if api else 2] not in (*repository.branches, repository.commit):
            self._refuse(404, "RevisionNotFound")
        elif api and api[2] == "revision":
            self._send({"id": match[1], "sha": repository.commit, "siblings": []})
        elif api:
            entries = [
                {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(content).hexdigest()}
                for name, content in repository.files.items()
                for size in [self.hub.sizes.get(name, len(content))]
            ]
            self._send(entries)
        elif repository.gated:
            self._refuse(403, "GatedRepo")
        elif match[3] not in repository.files or match[3] in self.hub.lost:
            self._refuse(404, "EntryNotFound")
        else:
            self._file(repository, match[3])

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, repository: Repository, name: str) -> None:
        content = repository.files[name]
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(start[1]) if start else 0
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - first))
        if start:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        breaks = self.hub.breaks.get(name, [])
        self.wfile.write(content[first : breaks.pop(0)] if breaks else content[first:])
        self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""
