"""A small hub on this machine: as much of the Hugging Face hub's HTTP API as `datasets` and huggingface_hub ask for.

Repositories are folders of real files under one root, `root/owner/name/…`; each has one commit and the branch `main`.
It notes what was asked (`asked`) and refuses `private` repositories to whoever comes without the token.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", COMMIT)
TOKEN = "hf_tokenOfATest"


class Hub:
    """Where it is, and what was asked of it."""

    def __init__(self, root: Path, private: tuple[str, ...] = ()):
        self.root, self.private, self.asked = root, private, list[str]()
        self.url = ""


@contextmanager
def serve(root: Path, private: tuple[str, ...] = ()) -> Iterator[Hub]:
    hub = Hub(root, private)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append(f"{self.command} {unquote(self.path)}")
            made = reply(hub, unquote(self.path), self.headers, body)
            self.send_response(made.status)
            for name, value in {**made.headers, "Content-Length": str(len(made.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(made.body)

        do_HEAD = do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class Reply(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]

    @classmethod
    def of(cls, value: Any, status: int = 200, error: str = "") -> Reply:
        headers = {"Content-Type": "application/json"} | ({"X-Error-Code": error} if error else {})
        return cls(status, json.dumps(value).encode(), headers)


def reply(hub: Hub, url: str, headers: Mapping[str, str], body: bytes) -> Reply:
    path, _, query = url.partition("?")
    name = re.match(r"(?:/api)?/datasets/([^/]+/[^/]+)/?(.*)", path)
    repository, rest = name.groups() if name else ("", "")
    token = headers.get("Authorization", "").removeprefix("Bearer ")
    if not (hub.root / repository / ".").is_dir() or not name or (repository in hub.private and token != TOKEN):
        return Reply.of({"error": "not found"}, 404 if token else 401, "RepoNotFound")
    kind, revision, inside = [*rest.split("/", 2), "", "", ""][:3]
    if revision and revision not in REVISIONS:
        return Reply.of({"error": f"Invalid rev id: {revision}"}, 404, "RevisionNotFound")
    folder = hub.root / repository
    if kind == "resolve":
        return part_of_file(folder / inside, headers.get("Range", ""))
    if kind == "tree":
        if not (folder / inside).is_dir():
            return Reply.of({"error": "does not exist"}, 404, "EntryNotFound")
        found = (folder / inside).rglob("*") if "recursive=true" in query.lower() else (folder / inside).iterdir()
        return Reply.of([entry(path, folder) for path in sorted(found)])
    if kind == "paths-info":
        wanted = [folder / path for path in json.loads(body)["paths"]]
        return Reply.of([entry(path, folder) for path in wanted if path.exists()])
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return Reply.of({"id": repository, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})


def entry(path: Path, folder: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "size": 0, "oid": COMMIT}
    content = path.read_bytes()
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def part_of_file(file: Path, wanted: str) -> Reply:
    if not file.is_file():
        return Reply.of({"error": "Entry not found"}, 404, "EntryNotFound")
    content = file.read_bytes()
    headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
    borders = re.match(r"bytes=(\d+)-(\d*)", wanted)
    if not borders:
        return Reply(200, content, headers)
    first, last = int(borders[1]), min(int(borders[2] or len(content)), len(content) - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return Reply(206, content[first : last + 1], headers)
