"""A server on this machine that speaks those endpoints of the Hugging Face hub that a pull uses."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any


@dataclass
class HubRepository:
    """`files`: name → content. `digests`: SHA-256 that the hub claims, where it is not the content's own. `breaks`: name →
    how many bytes are sent before the connection ends, once for each. `denied`: a status and an error code of the hub."""

    files: dict[str, bytes]
    revision: str = "a" * 40
    digests: dict[str, str] = field(default_factory=dict)
    breaks: dict[str, list[int]] = field(default_factory=dict)
    denied: tuple[int, str] | None = None
    hidden: bool = False
    ranges: bool = True

    @classmethod
    def of(cls, directory: Path, **options: Any) -> HubRepository:
        files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        return cls(files, **options)


class HubServer:
    """`with HubServer(repositories) as hub`: serves at `hub.url`; `hub.sent` lists (file, first byte, bytes sent)."""

    def __init__(self, repositories: dict[str, HubRepository]) -> None:
        self.repositories = repositories
        self.sent: list[tuple[str, int, int]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        for source, repository in self.hub.repositories.items():
            if path == f"/api/models/{source}":
                return self._refuse(404, "RepoNotFound") if repository.hidden else self._info(source, repository)
            if path.startswith(f"/{source}/resolve/{repository.revision}/"):
                return self._file(repository, path.rpartition("/")[2])
        return self._refuse(404, "RepoNotFound")

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _info(self, source: str, repository: HubRepository) -> None:
        siblings = []
        for name, content in repository.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            found: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
            if name.endswith((".safetensors", ".bin")):
                digest = repository.digests.get(name, hashlib.sha256(content).hexdigest())
                found["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 134}
            siblings.append(found)
        values = {"id": source, "modelId": source, "sha": repository.revision, "siblings": siblings}
        self._answer(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _file(self, repository: HubRepository, name: str) -> None:
        if repository.denied:
            return self._refuse(*repository.denied)
        content = repository.files[name]
        wanted = self.headers.get("Range", "bytes=0-") if repository.ranges else "bytes=0-"
        start = int(wanted.removeprefix("bytes=").partition("-")[0])
        piece = content[start:]
        breaks = repository.breaks.get(name, [])
        sent = piece[: breaks.pop(0)] if breaks else piece
        self.hub.sent.append((name, start, len(sent)))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(piece)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(sent)
        if len(sent) < len(piece):
            self.wfile.flush()
            self.close_connection = True
        return None
