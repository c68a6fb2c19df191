"""A hub on this machine: the part of the Hugging Face hub's API that downloads, over folders, and that makes repositories."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants


@dataclass
class LocalHub:
    """What the hub has, and what it was asked for.

    Attributes:
        repositories: by id and revision, the folder with the files.
        gated: ids whose files are not given.
        asked: the paths of all requests, in order.
    """

    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def files_asked(self) -> set[str]:
        """Return the names of the files that were downloaded."""
        return {unquote(path.partition("/resolve/")[2].partition("/")[2]) for path in self.asked if "/resolve/" in path}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Answer a GET with status, headers and content."""
        self.asked.append(path)
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if parts == [""]:
            return 200, {}, b""
        is_api = parts[:2] == ["api", "models"]
        owner, name, action, *rest = [*(parts[2:] if is_api else parts), "", "", ""]
        revisions = self.repositories.get(f"{owner}/{name}")
        if revisions is None:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        revision, *inner = rest
        commits = {commit_of(folder): folder for folder in revisions.values()}
        folder = revisions.get(revision) or commits.get(revision)
        if folder is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        commit = commit_of(folder)
        if is_api and action == "revision":
            return 200, {}, json.dumps({"id": f"{owner}/{name}", "sha": commit, "siblings": []}).encode()
        if f"{owner}/{name}" in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if is_api and action == "tree":
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            listed = [{"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": _hash(f)} for f in files]
            return 200, {}, json.dumps(listed).encode()
        file = folder.joinpath(*inner)
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{_hash(file)}"'}, file.read_bytes()


def commit_of(folder: Path) -> str:
    """Return a name for what a folder holds, in the form of a commit's."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


def _hash(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serving(hub: LocalHub) -> Iterator[str]:
    """Serve a hub on a port of its own inside; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, content = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def only_hub(hub: LocalHub, cache: Path) -> Iterator[LocalHub]:
    """Let the hub's client know of no other hub inside, and of an empty cache."""
    with serving(hub) as address, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        yield hub
