"""A small Hugging Face hub on loopback: repositories in memory, read and written, and what can go wrong with them.

As on the hub, clients ask for a file with HEAD, then with GET, and weights are redirected to a storage server.
Uploads come as from clients without the xet protocol (HF_HUB_DISABLE_XET=1).
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/(?P<repository>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
_COMMIT = re.compile(r"/api/models/(?P<repository>[^/]+/[^/]+)/(?P<what>preupload|commit)/main")
_BATCH = re.compile(r"/(?P<repository>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
_FILE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


class Refusal(NamedTuple):
    """What is answered instead of what is asked for: a status, and what the hub's own headers say."""

    status: int
    code: str = ""
    message: str = ""


class Break(NamedTuple):
    """A connection that ends after some bytes of a file: closed, or reset as by a machine that died."""

    after: int
    reset: bool = False


class Request(NamedTuple):
    """What a client asked for."""

    method: str
    address: str
    path: str
    headers: Message


@dataclass
class Hub:
    """What the hub has, what goes wrong, and what it was asked.

    Attributes:
        commits: commit -> name of a file -> its content.
        heads: repository -> the commit that its main branch is at.
        refs: repository and another branch or tag, "org/name@tag" -> its commit.
        names: former name of a repository -> its name.
        tokens: repository -> the token that opens it.
        refusals: a repository, a file of one ("org/name/config.json"), or a step of an upload to one
            ("org/name:create", "org/name:commit") -> what is answered instead.
        writers: token -> the owners whose repositories it may write; a token that only reads has none.
        private: the repositories that were made as private ones.
        stored: SHA-256 -> content of the large files that were uploaded.
        breaks: a file of a repository -> how the next connections end that ask for its content.
        served: a file of a repository -> what is sent instead of its content.
        rate: bytes a second of each connection to the storage; None for what the machine allows.
        requests: all of them.
        servers: the hub itself, and its storage.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    writers: dict[str, set[str]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    stored: dict[str, bytes] = field(default_factory=dict)
    breaks: dict[str, list[Break]] = field(default_factory=dict)
    served: dict[str, bytes] = field(default_factory=dict)
    rate: float | None = None
    requests: list[Request] = field(default_factory=list)
    servers: list["_Server"] = field(default_factory=list)

    def start(self) -> None:
        """Serve; after `stop`, at the same addresses as before."""
        ports = [server.server_port for server in self.servers] or [0, 0]
        self.servers = [_Server(self, port) for port in ports]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()

    def stop(self) -> None:
        """Refuse connections."""
        for server in self.servers:
            server.shutdown()
            server.server_close()

    @property
    def address(self) -> str:
        """Of the hub itself."""
        return f"http://127.0.0.1:{self.servers[0].server_port}"

    @property
    def storage(self) -> str:
        """The address that large files are redirected to."""
        return f"http://127.0.0.1:{self.servers[1].server_port}"

    def publish(self, repository: str, files: dict[str, bytes]) -> str:
        """Let the main branch of a repository, new or not, hold these files. Returns the commit."""
        content = b"".join(name.encode() + data for name, data in sorted(files.items()))
        commit = hashlib.sha1(repository.encode() + content).hexdigest()
        self.commits[commit] = dict(files)
        self.heads[repository] = commit
        return commit

    def commit(self, repository: str, revision: str) -> str:
        """The commit that a revision of a repository means; the revision itself if it is no branch or tag."""
        named = self.refs | {f"{name}@main": commit for name, commit in self.heads.items()}
        return named.get(f"{repository}@{revision}", revision)

    def asked_for_commits(self, repository: str) -> list[str]:
        """The branches and tags of a repository whose commit was asked for, each as often as it was."""
        found = [_API.fullmatch(request.path) for request in self.requests]
        return [
            one["revision"] or "main"
            for one in found
            if one and one["repository"] == repository and one["what"] != "tree"
        ]

    def fetched(self, repository: str) -> list[str]:
        """The files of a repository whose content was sent, or some of it, each as often as it was."""
        files = [_FILE.fullmatch(request.path) for request in self.requests if request.method == "GET"]
        sent = [request.address for request in self.requests if request.method == "GET"]
        return [
            file["name"]
            for file, address in zip(files, sent, strict=True)
            if file is not None
            and file["repository"] == repository
            and is_large(file["name"]) == (address == self.storage)
        ]


def is_large(name: str) -> bool:
    """Whether the hub keeps a file in its storage."""
    return name.endswith(".safetensors")


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub that runs, empty at first; it ends with the block."""
    hub = Hub()
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub, port: int):
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub = hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # type: ignore[assignment]

    def do_GET(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        address = f"http://{self.headers['Host']}"
        hub.requests.append(Request(self.command, address, path, self.headers))
        if path == "/api/whoami-v2":
            known = (self.headers["Authorization"] or "").removeprefix("Bearer ") in hub.writers
            self.answer_json({"name": "someone"} if known else {}, 200 if known else 401)
            return
        if (found := _API.fullmatch(path) or _FILE.fullmatch(path)) is None:
            self.answer(404, {})
            return
        asked = found.groupdict()
        repository, name, revision = asked["repository"], asked.get("name"), asked["revision"] or "main"
        commit = hub.commit(repository, revision)
        if address == hub.storage and name is not None:
            file = f"{repository}/{name}"
            self.send_content(file, hub.served.get(file, hub.commits[commit][name]))
        elif repository in hub.names:
            self.answer(307, {"Location": self.path.replace(repository, hub.names[repository], 1)})
        elif (refusal := self.refusal(repository, commit, name)) is not None:
            self.answer(refusal.status, {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message})
        elif name is not None:
            self.send_file(repository, commit, name)
        elif asked["what"] == "tree":
            self.answer_json([_entry(name, data) for name, data in hub.commits[commit].items()])
        else:
            siblings = [{"rfilename": name} for name in hub.commits[commit]]
            self.answer_json({"id": repository, "sha": commit, "siblings": siblings})

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        """What an upload asks for: who the user is, a repository, where the files go, and a commit of them."""
        hub, path, data = self.server.hub, unquote(urlsplit(self.path).path), self.body()
        hub.requests.append(Request(self.command, f"http://{self.headers['Host']}", path, self.headers))
        if path == "/api/validate-yaml":
            self.answer_json({"warnings": [], "errors": []})
            return
        found = _COMMIT.fullmatch(path) or _BATCH.fullmatch(path)
        asked = {} if found else json.loads(data)
        repository = found["repository"] if found else f"{asked['organization']}/{asked['name']}"
        may_write = hub.writers.get((self.headers["Authorization"] or "").removeprefix("Bearer "))
        if refusal := hub.refusals.get(f"{repository}:{path.split('/')[5] if found else 'create'}"):
            self.answer(refusal.status, {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message})
        elif may_write is None:
            self.answer(401, {"X-Error-Message": "Invalid username or password."})
        elif repository.split("/")[0] not in may_write:
            self.answer(403, {"X-Error-Message": "You don't have the rights to write there"})
        elif found is None:
            self.create(repository, asked.get("visibility") == "private")
        elif _BATCH.fullmatch(path):
            objects = [self.where_to(one) for one in json.loads(data)["objects"]]
            self.answer_json({"transfer": "basic", "objects": objects})
        elif found["what"] == "preupload":
            self.answer_json({"files": [_upload_mode(file["path"]) for file in json.loads(data)["files"]]})
        else:
            self.commit(repository, [json.loads(line) for line in data.splitlines()])

    def do_PUT(self) -> None:
        """A large file, for the storage."""
        data = self.body(self.server.hub.rate)
        self.server.hub.requests.append(Request(self.command, self.server.hub.storage, self.path, self.headers))
        assert hashlib.sha256(data).hexdigest() == self.path.removeprefix("/")
        self.server.hub.stored[self.path.removeprefix("/")] = data
        self.answer(200, {})

    def body(self, rate: float | None = None) -> bytes:
        if (size := self.headers["Content-Length"]) is not None:
            return b"".join(map(self.rfile.read, _paced(int(size), rate)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def create(self, repository: str, private: bool) -> None:
        hub, exists = self.server.hub, repository in self.server.hub.heads
        if not exists:
            hub.publish(repository, {})
            hub.private |= {repository} if private else set()
        self.answer_json({"url": f"{hub.address}/{repository}"}, 409 if exists else 200)

    def where_to(self, file: dict[str, Any]) -> dict[str, Any]:
        if file["oid"] in self.server.hub.stored:
            return file
        return file | {"actions": {"upload": {"href": f"{self.server.hub.storage}/{file['oid']}"}}}

    def commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        hub = self.server.hub
        files = dict(hub.commits[hub.heads[repository]])
        for line in lines:
            match line:
                case {"key": "file", "value": {"path": path, "content": content}}:
                    files[path] = base64.b64decode(content)
                case {"key": "lfsFile", "value": {"path": path, "oid": oid}}:
                    files[path] = hub.stored[oid]
        commit = hub.publish(repository, files)
        self.answer_json({"commitUrl": f"{hub.address}/{repository}/commit/{commit}", "commitOid": commit})

    def refusal(self, repository: str, commit: str, name: str | None) -> Refusal | None:
        hub = self.server.hub
        if (refusal := hub.refusals.get(f"{repository}/{name}", hub.refusals.get(repository))) is not None:
            return refusal
        if repository not in hub.heads:
            return Refusal(404, "RepoNotFound", "Repository not found")
        if commit not in hub.commits:
            return Refusal(404, "RevisionNotFound", f"Invalid rev id: {commit}")
        if name is None:
            return None
        if name not in hub.commits[commit]:
            return Refusal(404, "EntryNotFound", "Entry not found")
        # What a gated repository holds is listed for all.
        token = hub.tokens.get(repository)
        if token is not None and self.headers["Authorization"] != f"Bearer {token}":
            return Refusal(401, "GatedRepo", f"Access to model {repository} is restricted.")
        return None

    def send_file(self, repository: str, commit: str, name: str) -> None:
        data, headers = self.server.hub.commits[commit][name], {"X-Repo-Commit": commit}
        if not is_large(name):
            self.send_content(f"{repository}/{name}", data, headers | {"ETag": f'"{_git_hash(data)}"'})
            return
        linked = {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        self.answer(302, headers | linked | {"Location": self.server.hub.storage + self.path})

    def send_content(self, file: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        headers, status = {"Content-Length": str(len(data)), **(headers or {})}, 200
        if given := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
            start, end, size = int(given[1]), int(given[2] or len(data) - 1), len(data)
            data, status = data[start : end + 1], 206
            headers |= {"Content-Range": f"bytes {start}-{end}/{size}", "Content-Length": str(len(data))}
        self.answer(status, headers)
        breaks = self.server.hub.breaks.get(file)
        if self.command == "HEAD":
            return
        if not breaks:
            place = 0
            for size in _paced(len(data), self.server.hub.rate):
                self.wfile.write(data[place : place + size])
                place += size
            return
        end = breaks.pop(0)
        self.wfile.write(data[: end.after])
        self.close_connection = True
        if end.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def answer_json(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.answer(status, {"Content-Type": "application/json", "Content-Length": str(len(data))})
        self.wfile.write(data)

    def answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass  # `requests` has them


def _paced(size: int, rate: float | None) -> Iterator[int]:
    """How many bytes to move at a time, so that `size` bytes keep to a rate in bytes a second."""
    step = size if rate is None else max(1, int(rate / 50))
    for start in range(0, size, max(1, step)):
        yield min(step, size - start)
        if rate is not None:
            time.sleep(min(step, size - start) / rate)


def _upload_mode(name: str) -> dict[str, Any]:
    return {"path": name, "uploadMode": "lfs" if is_large(name) else "regular", "shouldIgnore": False}


def _entry(name: str, data: bytes) -> dict[str, Any]:
    """How the hub lists a file."""
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _git_hash(data)}
    if is_large(name):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
