"""A Hugging Face hub on loopback, as far as huggingface_hub uploads to one: git's plain files and LFS."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_pushTestTokenThatMustNeverBeShown01"


@dataclass
class Hub:
    """What arrived."""

    address: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    """Repositories."""
    files: dict[str, bytes] = field(default_factory=dict)
    """By name, committed."""
    large: dict[str, bytes] = field(default_factory=dict)
    """Uploaded by LFS, by SHA-256."""
    commits: int = 0
    requests: list[str] = field(default_factory=list)
    refuse: str = ""
    """Requests whose path holds this get 403."""


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that lives in this block."""
    state = Hub()
    with listening(type("Handler", (_Handler,), {"state": state})) as state.address:
        yield state


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on this machine that answers with `handler`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    def do_PUT(self) -> None:
        self._answer(self._body())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, body: bytes) -> None:
        self.state.requests.append(f"{self.command} {self.path}")
        sent = self.headers.get("Authorization")
        if self.state.refuse and self.state.refuse in self.path:
            self._reply(403, {"error": f"{sent} may not write here"})  # repeats the token
        elif self.path.startswith("/lfs/"):
            oid = self.path.removeprefix("/lfs/")
            good = hashlib.sha256(body).hexdigest() == oid
            if good:
                self.state.large[oid] = body
            self._reply(200 if good else 400, {})
        elif sent != f"Bearer {TOKEN}":
            self._reply(401, {"error": "who are you?"})
        elif self.command == "GET" and not self._repository():
            self._reply(404, {"error": "Repository not found"})
        else:
            self._reply(200, self._known(json.loads(body) if self._is_json(body) else body))

    def _is_json(self, body: bytes) -> bool:
        return bool(body) and "/commit/" not in self.path

    def _known(self, body: Any) -> dict[str, Any]:
        state = self.state
        if self.path == "/api/repos/create":
            repo = f"{body['organization']}/{body['name']}"
            state.private.setdefault(repo, body.get("visibility") == "private")
            return {"url": f"{state.address}/{repo}"}
        if self.path.startswith("/api/validate-yaml"):
            return {"errors": [], "warnings": []}
        if "/preupload/" in self.path:
            modes = {True: "lfs", False: "regular"}
            return {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": modes[file["path"].endswith(".safetensors")],
                        "shouldIgnore": False,
                    }
                    for file in body["files"]
                ]
            }
        if self.path.endswith(".git/info/lfs/objects/batch"):
            return {"transfer": "basic", "objects": [self._place(o) for o in body["objects"]]}
        if "/commit/" in self.path:
            return self._commit(body)
        name = self._repository()
        assert name, self.path
        return {"id": name, "private": state.private[name], "siblings": []}

    def _repository(self) -> str:
        """The repository that the path names, if it is there."""
        found = re.fullmatch(r"/api/models/([^/]+/[^/?]+).*", self.path)
        return found[1] if found and found[1] in self.state.private else ""

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.state.large:
            return wanted
        return wanted | {
            "actions": {"upload": {"href": f"{self.state.address}/lfs/{wanted['oid']}"}}
        }

    def _commit(self, body: bytes) -> dict[str, Any]:
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.state.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                self.state.files[value["path"]] = self.state.large[value["oid"]]
        self.state.commits += 1
        repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
        url = f"{self.state.address}/{repo}/commit/{self.state.commits:040}"
        return {"commitUrl": url, "commitOid": f"{self.state.commits:040}", "success": True}

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""
