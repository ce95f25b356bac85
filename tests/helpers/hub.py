"""A small Hugging Face hub on 127.0.0.1, which can be told to fail. A helper for tests.

It speaks what a download needs: `/api/models/<name>?blobs=true`, and
`/<name>/resolve/<commit>/<file>` with ETag, X-Repo-Commit and Range. Weights are given as the real
hub gives them: by a redirect to another host, where the token must not follow. Every request is
noted in `requests`.
"""

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

LARGE = (".safetensors", ".bin", ".model")  # stored by their sha256; all others are in git


@dataclass(frozen=True)
class Request:
    """A request that the hub has received."""

    path: str
    file: str | None  # the name of the file, if it was one
    range: str | None
    authorization: str | None


@dataclass
class Repo:
    """One commit of a repository."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    token: str | None = None  # private: served only with this token
    gated: bool = False  # its list is public, its files are for `token` only

    @property
    def commit(self) -> str:
        """As in git, another for other files."""
        listed = json.dumps({n: sha256(content) for n, content in sorted(self.files.items())})
        return hashlib.sha1(listed.encode()).hexdigest()


@dataclass
class Hub:
    """Its repositories, the faults that it must show, and the requests that it has received."""

    repos: dict[str, Repo] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    # Faults, by the name of a file or "api".
    statuses: dict[str, int] = field(default_factory=dict)  # answer with this one instead
    hiccups: dict[str, list[int]] = field(default_factory=dict)  # or with these, one after another
    retry_after: int | None = None  # the text for one of these statuses
    corrupt: set[str] = field(default_factory=set)  # one byte differs
    cuts: dict[str, list[int]] = field(default_factory=dict)  # hang up after so many bytes
    resets: bool = False  # and leave the connection open instead of hanging up
    ignores_ranges: bool = False
    forgets_queries: bool = False  # when it redirects
    tells_checksums: bool = True
    silent: bool = False  # never answer
    nonsense: bool = False  # answer with bytes that no hub sends
    stopping: threading.Event = field(default_factory=threading.Event)
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def add(self, name: str, folder: Path, **options: Any) -> Repo:
        """Publish the files of a folder."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.repos[name] = Repo(files, **options)
        return self.repos[name]

    def asked_for(self, file: str) -> list[Request]:
        """The requests for a file's bytes."""
        return [request for request in self.requests if request.file == file]


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serve it on a free port of this machine until the block ends."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = _QuietServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    """As `git hash-object` computes it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        """The client has hung up, which many tests do on purpose."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    timeout = 20

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.hub.silent:
            self.hub.stopping.wait(self.timeout)
            return
        path, _, query = self.path.partition("?")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.note(None)
            revision = unquote(parts[5]) if len(parts) > 5 else "main"
            self.describe("/".join(parts[2:4]), revision, query)
        elif parts[0] == "storage":
            self.give_stored(*parts[1:])
        elif len(parts) == 5 and parts[2] == "resolve":
            self.give("/".join(parts[:2]), *parts[3:])
        else:
            self.refuse(404, None)

    def note(self, file: str | None) -> None:
        asked, token = self.headers.get("Range"), self.headers.get("Authorization")
        self.hub.requests.append(Request(self.path, file, asked, token))

    def describe(self, name: str, revision: str, query: str) -> None:
        if self.hub.nonsense:
            self.answer(200, b"<html>welcome</html>", {})
            return
        if name in self.hub.renamed:
            where = self.path.replace(name, self.hub.renamed[name])
            self.redirect(where.partition("?")[0] if self.hub.forgets_queries else where)
            return
        repo = self.find(name, revision, "api")
        if repo is None:
            return
        siblings: list[dict[str, Any]] = [{"rfilename": file} for file in repo.files]
        if "blobs=" in query and self.hub.tells_checksums:
            for sibling in siblings:
                content = repo.files[sibling["rfilename"]]
                sibling |= {"size": len(content), "blobId": git_id(content)}
                if sibling["rfilename"].endswith(LARGE):
                    lfs = {"sha256": sha256(content), "size": len(content), "pointerSize": 130}
                    sibling |= {"blobId": git_id(b"a pointer"), "lfs": lfs}
        answer = {"id": name, "sha": repo.commit, "siblings": siblings, "gated": repo.gated}
        answer |= {"private": False, "tags": ["transformers", "license:mit"]}
        self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def find(self, name: str, revision: str, fault: str) -> Repo | None:
        """The repository, if it is there and may be seen; else say why not."""
        repo, token = self.hub.repos.get(name), self.headers.get("Authorization")
        hiccups = self.hub.hiccups.get(fault)
        status = hiccups.pop(0) if hiccups else self.hub.statuses.get(fault, 200)
        if status != 200:
            self.refuse(status, "EntryNotFound" if status == 404 else None)
        elif token == "Bearer wrong":
            self.refuse(401, None, "Invalid credentials in Authorization header")
        elif token == "Bearer expired":  # as if there were no such model
            self.refuse(401, "RepoNotFound", "User Access Token is expired.")
        elif repo is None or (repo.token and not repo.gated and token != f"Bearer {repo.token}"):
            self.refuse(404 if token else 401, "RepoNotFound")
        elif repo.gated and fault != "api" and token != f"Bearer {repo.token}":
            self.refuse(403 if token else 401, "GatedRepo")
        elif revision not in (*repo.revisions, repo.commit):
            self.refuse(404, "RevisionNotFound")
        else:
            return repo
        return None

    def give(self, name: str, revision: str, file: str) -> None:
        repo = self.find(name, revision, file)
        if repo is not None and file not in repo.files:
            self.refuse(404, "EntryNotFound")
        elif repo is not None and file.endswith(LARGE):
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
            linked = {"X-Linked-Etag": f'"{sha256(repo.files[file])}"'}
            linked["X-Linked-Size"] = str(len(repo.files[file]))
            self.redirect(f"{elsewhere}/storage/{name}/{file}", linked)
        elif repo is not None:
            self.note(file)
            self.send_content(file, repo.files[file], repo.commit)

    def give_stored(self, owner: str, name: str, file: str) -> None:
        self.note(file)
        repo = self.hub.repos[f"{owner}/{name}"]
        self.send_content(file, repo.files[file], repo.commit)

    def send_content(self, file: str, content: bytes, commit: str) -> None:
        if file in self.hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = None if self.hub.ignores_ranges else self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        headers = {"ETag": f'"{git_id(content)}"', "X-Repo-Commit": commit}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cuts = self.hub.cuts.get(file)
        self.answer(206 if asked else 200, content[start:], headers, cuts.pop(0) if cuts else None)

    def redirect(self, where: str, headers: dict[str, str] | None = None) -> None:
        self.answer(307, b"", {"Location": where} | (headers or {}))

    def refuse(self, status: int, code: str | None, message: str = "no") -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        if self.hub.retry_after is not None:
            headers["Retry-After"] = str(self.hub.retry_after)
        self.answer(status, b"", headers)

    def answer(
        self, status: int, content: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True  # in the middle of what was announced
        if cut is not None and self.hub.resets:
            self.wfile.flush()
            self.hub.stopping.wait(0.2)  # else the client would not see what has arrived
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
