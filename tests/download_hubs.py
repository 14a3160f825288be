"""Hubs on loopback, as far as huggingface_hub and modelscope download from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hub import listening

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A hub, and what was asked of it."""

    files: Mapping[str, bytes]
    """Of `owner/name`, the only repository, model and data set alike."""
    address: str = ""
    requests: list[str] = field(default_factory=list)


@contextmanager
def downloads(files: Mapping[str, bytes], name: str = "owner/name") -> Iterator[Hub]:
    """Both hubs under one address; the repository `name` holds `files`."""
    state = Hub(files)
    with listening(type("Handler", (_Handler,), {"state": state, "name": name})) as state.address:
        yield state


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    name: str

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.state.requests.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        asked = {key: values[0] for key, values in parse_qs(url.query).items()}
        if self.name not in url.path:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif url.path.startswith("/api/v1/"):
            self._modelscope(url.path, asked)
        elif "/resolve/" in url.path:
            self._file(url.path.partition("/resolve/")[2].partition("/")[2])
        else:
            self._huggingface(url.path)

    def _huggingface(self, path: str) -> None:
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": _sha1(data)}
            for name, data in self.state.files.items()
        ]
        if "/tree/" in path:
            self._json(entries)
            return
        siblings = [{"rfilename": name} for name in self.state.files]
        self._json({"id": self.name, "sha": COMMIT, "siblings": siblings})

    def _modelscope(self, path: str, asked: Mapping[str, str]) -> None:
        if "FilePath" in asked:
            self._file(asked["FilePath"])
        elif path.endswith("/revisions"):
            branch = {"Revision": "master", "CreatedAt": 1}
            self._modelscope_data({"RevisionMap": {"Branches": [branch], "Tags": []}})
        elif path.endswith(("/files", "/tree")):
            files = [
                {
                    "Name": name.rpartition("/")[2], "Path": name, "Type": "blob",
                    "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest(),
                    "Revision": COMMIT, "Mode": "100644", "IsLFS": False, "CommittedDate": 1,
                }
                for name, data in self.state.files.items()
            ]  # fmt: skip
            self._modelscope_data({"Files": files, "TotalCount": len(files)})
        else:
            owner, _, name = self.name.partition("/")
            self._modelscope_data({"Id": 1, "Name": name, "Path": owner, "Type": 1})

    def _modelscope_data(self, data: Any) -> None:
        self._json({"Code": 200, "Success": True, "Message": "", "Data": data})

    def _file(self, name: str) -> None:
        data = self.state.files.get(name)
        if data is None:
            self._json({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        begin = 0
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_sha1(data)}"'}
        if found := self.headers.get("Range"):
            first, _, last = found.removeprefix("bytes=").partition("-")
            begin = int(first or 0)
            end = min(int(last) + 1 if last else len(data), len(data))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            self._bytes(data[begin:end], 206, headers)
            return
        self._bytes(data, 200, headers)

    def _json(self, value: Any, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        self._bytes(json.dumps(value).encode(), status, headers)

    def _bytes(self, data: bytes, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
