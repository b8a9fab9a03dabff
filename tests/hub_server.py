"""A small Hub on the loopback, for tests with huggingface_hub's real client.

It serves the part of the Hub's protocol that loading and uploading use: files with commit, ETag and range headers, the
repository, tree and paths-info requests, and repository creation, preupload, LFS upload and commit. It keeps a log.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Folders by commit, commits by name of a branch, and the token that reading needs."""

    commits: dict[str, Path] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None

    def add(self, branch: str, folder: Path) -> str:
        """Make a folder the newest commit of a branch."""
        commit = hashlib.sha1(f"{branch}{folder}".encode()).hexdigest()
        self.commits[commit], self.branches[branch] = Path(folder), commit
        return commit


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    status: int
    sent: int


class HubServer(ThreadingHTTPServer):
    """`repositories` by id; `requests` so far; uploads go to folders in `uploads`."""

    daemon_threads = True

    def __init__(self, uploads: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.uploads = uploads
        self.objects: dict[str, bytes] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def section(self, name: str) -> list[Request]:
        """The requests after `GET /_mark/<name>`, up to the next mark."""
        marks = [index for index, request in enumerate(self.requests) if request.path.startswith("/_mark/")]
        start = next(index for index in marks if self.requests[index].path == f"/_mark/{name}")
        return self.requests[start + 1 : next((index for index in marks if index > start), None)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def do_POST(self) -> None:
        self.respond()

    def do_PUT(self) -> None:
        self.respond()

    def respond(self) -> None:
        self.recursive = "recursive=true" in urlsplit(self.path).query.lower()
        self.path = unquote(urlsplit(self.path).path)
        self.body = self.read_body()
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, self.path):
                return method(self, *match.groups())
        return self.fail(404, "EntryNotFound")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, content: bytes, status: int = 200, headers: dict[str, Any] | None = None) -> None:
        sent = 0 if self.command == "HEAD" else len(content)
        self.server.requests.append(Request(self.command, self.path, status, sent))
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, content: Any) -> None:
        self.send(json.dumps(content).encode(), headers={"Content-Type": "application/json"})

    def fail(self, status: int, code: str) -> None:
        self.send(json.dumps({"error": code}).encode(), status, {"X-Error-Code": code})

    def commit_of(self, name: str, revision: str) -> tuple[str, Path] | None:
        """The commit and its folder; without the repository, the token or the revision a refusal is sent."""
        repository = self.server.repositories.get(name)
        if repository is None or repository.token not in (None, self.headers.get("Authorization", "")[7:]):
            return self.fail(401, "RepoNotFound")
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return self.fail(404, "RevisionNotFound")
        return commit, repository.commits[commit]

    def mark(self, name: str) -> None:
        self.send(b"")

    def file(self, name: str, revision: str, path: str) -> None:
        if (found := self.commit_of(name, revision)) is None:
            return None
        commit, folder = found
        headers: dict[str, Any] = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not (folder / path).is_file():
            return self.send(b"", 404, {**headers, "X-Error-Code": "EntryNotFound"})
        content = (folder / path).read_bytes()
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{stop}/{len(content)}"
            return self.send(content[start : stop + 1], 206, headers)
        return self.send(content, 200, headers)

    def repository(self, name: str, revision: str | None = None) -> None:
        if (found := self.commit_of(name, revision or "main")) is not None:
            commit, folder = found
            siblings = [{"rfilename": str(path.relative_to(folder))} for path in folder.rglob("*") if path.is_file()]
            self.send_json({"id": name, "sha": commit, "siblings": siblings})

    def tree(self, name: str, revision: str, under: str = "") -> None:
        if (found := self.commit_of(name, revision)) is not None:
            folder = found[1]
            if not (folder / under).is_dir():
                return self.fail(404, "EntryNotFound")
            paths = (folder / under).rglob("*") if self.recursive else (folder / under).iterdir()
            self.send_json([entry(path, folder) for path in sorted(paths)])
        return None

    def paths_info(self, name: str, revision: str) -> None:
        if (found := self.commit_of(name, revision)) is not None:
            folder = found[1]
            try:
                paths = json.loads(self.body)["paths"]
            except ValueError:
                paths = [unquote(pair.partition("=")[2]) for pair in self.body.decode().split("&") if "paths=" in pair]
            self.send_json([entry(folder / path, folder) for path in paths if (folder / path).exists()])

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
        name = name if "/" in name else f"someone/{name}"
        self.server.repositories.setdefault(name, Repository())
        self.send_json({"url": f"{self.server.url}/{name}", "id": name, "name": name})

    def preupload(self, name: str, revision: str) -> None:
        files = [
            {
                "path": wanted["path"],
                "uploadMode": "lfs" if wanted["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for wanted in json.loads(self.body)["files"]
        ]
        self.send_json({"files": files})

    def lfs_batch(self, name: str) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.server.url}/_lfs/{wanted['oid']}"}}}
            for wanted in json.loads(self.body)["objects"]
        ]
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        self.send(b"")

    def commit(self, name: str, revision: str) -> None:
        folder = self.server.uploads / name.replace("/", "--")
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] in ("file", "lfsFile"):
                (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
                lfs = operation["key"] == "lfsFile"
                content = self.server.objects[value["oid"]] if lfs else base64.b64decode(value["content"])
                (folder / value["path"]).write_bytes(content)
        commit = self.server.repositories[name].add(revision, folder)
        self.send_json({"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})

    def valid(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def who(self) -> None:
        self.send_json({"name": "someone", "type": "user", "auth": {}, "orgs": []})


def entry(path: Path, folder: Path) -> dict[str, Any]:
    kind = "directory" if path.is_dir() else "file"
    return {"type": kind, "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": "0" * 40}


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    (r"/_mark/(.+)", _Handler.mark),
    (r"/_lfs/(.+)", _Handler.lfs_upload),
    (rf"(?:/datasets)?/{NAME}/resolve/([^/]+)/(.+)", _Handler.file),
    (rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.valid),
    (r"/api/whoami-v2", _Handler.who),
    (rf"/api/(?:models|datasets)/{NAME}", _Handler.repository),
    (rf"/api/(?:models|datasets)/{NAME}/revision/([^/]+)", _Handler.repository),
    (rf"/api/(?:models|datasets)/{NAME}/tree/([^/]+)/?(.*)", _Handler.tree),
    (rf"/api/(?:models|datasets)/{NAME}/paths-info/([^/]+)", _Handler.paths_info),
    (rf"/api/(?:models|datasets)/{NAME}/preupload/([^/]+)", _Handler.preupload),
    (rf"/api/(?:models|datasets)/{NAME}/commit/([^/]+)", _Handler.commit),
]
