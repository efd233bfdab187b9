"""A hub on this machine: as much of Hugging Face's protocol as an upload needs, and what it has received.

Nothing in it comes from the client library that the product uses; a commit is a plain dictionary of bytes.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

Answer = tuple[int, Any]
NOT_FOUND: Answer = (404, {"error": "Repository not found"})


@dataclass
class Repository:
    """A repository's commits, the newest last, each with its message and all files."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=lambda: [("initial commit", {})])
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    @property
    def head(self) -> str:
        return self.name_commit(len(self.commits) - 1)

    def name_commit(self, index: int) -> str:
        return hashlib.sha1(f"{index} {self.commits[index][0]}".encode()).hexdigest()

    @property
    def card_tags(self) -> list[str]:
        card = self.files.get("README.md", b"").decode()
        return (
            list(yaml.safe_load(card.split("---\n")[1]).get("tags", [])) if card.startswith("---\n") else []
        )


class FakeHub:
    """The state of the hub: who may write where, repositories, large files, and the requests it got.

    `lose_upload` closes the connection in the middle of the n-th large file; `refuse` answers a request,
    chosen by its method and path, with a status; `ignored` are paths that the repository's .gitignore names.
    """

    def __init__(self) -> None:
        self.owners = {"hf_tokenofsomeone0000": ("someone", "their-lab")}
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploads = 0
        self.lose_upload: int | None = None
        self.refuse: Callable[[str, str], int | None] = lambda method, path: None
        self.ignored: tuple[str, ...] = ()
        self.url = ""

    def answer(self, method: str, path: str, owners: tuple[str, ...], body: bytes) -> Answer:
        """Return the status and the JSON of an answer; `owners` are those whom the token may write for."""
        for verb, pattern, act in self._routes():
            match = re.fullmatch(pattern, path)
            if verb == method and match:
                found = match.groupdict()
                repo = found.pop("repo", None)
                if repo is None:
                    return act(owners, body, **found)
                known = self.repositories.get(repo)
                is_own = repo.split("/")[0] in owners
                if known is None or (known.private and not is_own):
                    return NOT_FOUND
                if method != "GET" and not is_own:
                    return 403, {"error": "Forbidden: pass a token of the owner"}
                return act(repo, known, body, **found)
        return 404, {"error": f"the fake hub has no {method} {path}"}

    def _routes(self) -> list[tuple[str, str, Callable[..., Answer]]]:
        repo = r"(?P<repo>[^/]+/[^/]+)"
        return [
            ("POST", "/api/repos/create", self._create),
            ("POST", "/api/validate-yaml", self._validate),
            ("GET", f"/api/models/{repo}", self._show),
            ("GET", f"/api/models/{repo}/revision/(?P<revision>[^/]+)", self._show),
            ("GET", f"/api/models/{repo}/tree/(?P<revision>[^/]+)", self._list),
            ("GET", f"/api/models/{repo}/refs", self._list_refs),
            ("POST", f"/api/models/{repo}/preupload/main", self._preupload),
            ("POST", f"/api/models/{repo}/commit/main", self._commit),
            ("POST", f"/api/models/{repo}/tag/(?P<revision>[^/]+)", self._tag),
            ("POST", f"/{repo}.git/info/lfs/objects/batch", self._batch),
            ("PUT", "/large/(?P<oid>[0-9a-f]{64})", self._store),
        ]

    def _create(self, owners: tuple[str, ...], body: bytes) -> Answer:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in owners:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        if repo in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{repo}"}
        self.repositories[repo] = Repository(private=asked.get("visibility") == "private")
        return 200, {"url": f"{self.url}/{repo}"}

    def _validate(self, owners: tuple[str, ...], body: bytes) -> Answer:
        front = json.loads(body)["content"].split("---\n")[1]
        is_mapping = isinstance(yaml.safe_load(front), dict)
        return (200, {"warnings": []}) if is_mapping else (400, {"errors": [{"message": "no metadata"}]})

    def _show(self, repo: str, known: Repository, body: bytes, revision: str = "main") -> Answer:
        siblings = [{"rfilename": name} for name in known.files]
        shown = {"id": repo, "sha": known.head, "private": known.private, "siblings": siblings}
        return 200, shown | {"tags": known.card_tags}

    def _list(self, repo: str, known: Repository, body: bytes, revision: str) -> Answer:
        return 200, [
            {"type": "file", "path": name, "size": len(content), "oid": hash_blob(content)}
            for name, content in known.files.items()
        ]

    def _list_refs(self, repo: str, known: Repository, body: bytes) -> Answer:
        tags = [
            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid}
            for name, oid in known.tags.items()
        ]
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": known.head}
        return 200, {"branches": [branch], "tags": tags, "converts": []}

    def _preupload(self, repo: str, known: Repository, body: bytes) -> Answer:
        return 200, {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": file["path"] in self.ignored,
                    "oid": self._identify(file["path"], known.files.get(file["path"])),
                }
                for file in json.loads(body)["files"]
            ]
        }

    def _identify(self, path: str, content: bytes | None) -> str | None:
        if content is None:
            return None
        return hashlib.sha256(content).hexdigest() if is_large(path) else hash_blob(content)

    def _batch(self, repo: str, known: Repository, body: bytes) -> Answer:
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.url}/large/{asked['oid']}"}}
            objects.append(asked if asked["oid"] in self.large_files else asked | {"actions": upload})
        return 200, {"transfer": "basic", "objects": objects}

    def _store(self, owners: tuple[str, ...], body: bytes, oid: str) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "these are other bytes"}
        self.large_files[oid] = body
        return 200, {}

    def _commit(self, repo: str, known: Repository, body: bytes) -> Answer:
        message, files = "", dict(known.files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.large_files:
                    return 400, {"error": f"{value['path']} was not uploaded"}
                files[value["path"]] = self.large_files[value["oid"]]
            else:
                assert line["key"] == "deletedFile", line
                del files[value["path"]]
        known.commits.append((message, files))
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{known.head}", "commitOid": known.head}

    def _tag(self, repo: str, known: Repository, body: bytes, revision: str) -> Answer:
        known.tags[json.loads(body)["tag"]] = revision
        return 200, {}


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def hash_blob(content: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A hub that listens on this machine until the block ends."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            path = self.path.partition("?")[0]
            if hub.lose_upload is not None and self.command == "PUT":
                hub.uploads += 1
                if hub.uploads == hub.lose_upload:
                    self.rfile.read(100)
                    self.connection.close()
                    self.close_connection = True
                    return
            body = self._read_body()
            hub.requests.append((self.command, path))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            refusal = hub.refuse(self.command, path)
            if refusal is not None:
                self._reply(refusal, {"error": "as the test wants it"})
            elif token not in hub.owners and self.command != "PUT":  # large files go to signed addresses
                self._reply(401, {}, {"X-Error-Message": "Invalid credentials in Authorization header"})
            else:
                status, answer = hub.answer(self.command, path, hub.owners.get(token, ()), body)
                self._reply(
                    status, answer, {"X-Error-Code": "RepoNotFound"} if answer is NOT_FOUND[1] else {}
                )

        def _read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _reply(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        do_GET = do_POST = do_PUT = _handle  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
