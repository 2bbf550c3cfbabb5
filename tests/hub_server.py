"""A local server with the endpoints of the Hugging Face hub that huggingface_hub asks for, for tests.

It serves repositories from memory: model info, trees, files with range requests, and the hub's errors. It can refuse access and
break connections, and it remembers what was asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

API = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?/?")
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """Files by commit, branches and tags. `gated`: files are given to no one; `cut_after`: so many bytes of a file are sent
    before the connection breaks, as often as `cuts` says."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False
    cut_after: dict[str, int] = field(default_factory=dict)
    cuts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, **more: Any) -> Repository:
        """The files of `folder` at one commit of the branch main."""
        repository = cls({}, {}, **more)
        repository.commit(
            {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        )
        return repository

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """A commit of these files, which `ref` then names."""
        digest = hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()
        self.commits[digest] = dict(files)
        self.refs[ref] = digest
        return digest

    @property
    def files(self) -> dict[str, bytes]:
        """The files that main names."""
        return self.commits[self.refs["main"]]


@dataclass
class Hub:
    """Repositories by hub id. `asked`: (method, path in the repository or endpoint, bytes that were sent) of each request."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    down: bool = False
    url: str = ""

    def sent(self, ending: str) -> int:
        """Bytes of files whose names end so that were sent."""
        return sum(size for method, path, size in self.asked if method == "GET" and path.endswith(ending))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        api, resolve = API.fullmatch(path), RESOLVE.fullmatch(path)
        if self.hub.down:
            self._error(method, 503, "", "down")
        elif api:
            self._about(method, api[1], api[2], api[3] or "main")
        elif resolve:
            self._file(method, *resolve.groups())
        else:
            self._error(method, 404, "", f"no endpoint {path}")

    def _at(self, method: str, repo: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get(repo)
        if repository is None:
            self._error(method, 401, "RepoNotFound", "Repository not found")
            return None
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self._error(method, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository, commit

    def _about(self, method: str, repo: str, kind: str | None, revision: str) -> None:
        found = self._at(method, repo, revision)
        if found is None:
            return
        repository, commit = found
        files = repository.commits[commit]
        answer: Any = {"id": repo, "modelId": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        if kind == "tree":
            answer = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
        self._send(
            method, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, f"api {kind or 'info'}"
        )

    def _file(self, method: str, repo: str, revision: str, name: str) -> None:
        found = self._at(method, repo, revision)
        if found is None:
            return
        repository, commit = found
        if repository.gated:
            return self._error(method, 403, "GatedRepo", f"Access to model {repo} is restricted")
        data = repository.commits[commit].get(name)
        if data is None:
            return self._error(method, 404, "EntryNotFound", f"{name} does not exist")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        status, start, stop = 200, 0, len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and method == "GET":
            self.hub.ranges.append(f"{name} {self.headers['Range']}")
            status, start = 206, int(asked[1])
            stop = min(len(data), int(asked[2]) + 1) if asked[2] else len(data)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        limit = None
        if method == "GET" and repository.cuts.get(name, 0) > 0 and stop - start > repository.cut_after[name]:
            repository.cuts[name] -= 1
            limit = repository.cut_after[name]
        self._send(method, status, data[start:stop], headers, name, limit)

    def _error(self, method: str, status: int, code: str, message: str) -> None:
        self._send(method, status, b"", {"X-Error-Code": code, "X-Error-Message": message}, f"error {code}")

    def _send(
        self, method: str, status: int, body: bytes, headers: dict[str, str], what: str, limit: int | None = None
    ) -> None:
        sent = b"" if method == "HEAD" else body[:limit]
        self.hub.asked.append((method, what, len(sent)))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(sent)
        if limit is not None:
            self.wfile.flush()
            self.close_connection = True


@contextmanager
def served(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub asks while the body runs, with an empty cache in the folder `cache`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    close_session()
    try:
        yield hub
    finally:
        close_session()
        server.shutdown()
        server.server_close()
        thread.join()
