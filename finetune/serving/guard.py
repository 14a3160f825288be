"""Who may come in: headers that come in time, with a Host, a key and a kind of body that are taken.

What a client may do before its key is looked at is to open connections and to send a header slowly.
uvicorn waits for a first header for ever; here it has `HEADER_SECONDS`, and of more connections than
the process has room for one that asks nothing is closed, or the one that is slowest with its header.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import resource
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import h11
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from finetune import console
from finetune.serving.errors import ApiError, bad_request

OPEN_PATHS = frozenset({"/health", "/"})
"""What answers without a key: the page, too, in which a key is typed."""


HEADER_SECONDS = 10.0
"""A header must have come whole by then, counted from the connection or the first byte after a reply."""
KEEP_ALIVE_SECONDS = 75
"""An answered connection stays open so long: longer than clients keep theirs (httpx and openai: 5).

The other way round a request now and then meets a connection that is just being closed, and fails.
"""
MAX_CONNECTIONS = 1024
_SPARE_FILES = 64
"""Files that the process needs for itself: libraries, images of requests, its log."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a request must bring."""

    names: Collection[str]
    """Names under which the server may be called; addresses in numbers always may be used."""
    key: bytes | None
    """What stands behind `Authorization: Bearer`; None on a server of this machine alone."""

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raises ApiError unless the request may come in."""
        if not _is_called(headers.get("host", ""), self.names):
            # A web page whose name was made to point at this machine (DNS rebinding) ends here.
            raise bad_request("this Host is not served here; --allow-host NAME admits it")
        if path in OPEN_PATHS:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        # A header arrives as bytes, which Starlette shows as latin-1.
        if self.key is not None and not hmac.compare_digest(given.encode("latin-1"), self.key):
            # litellm tells it from other errors by OpenAI's first words.
            message = "Incorrect API key provided: it is missing or wrong"
            raise ApiError(401, message, code="invalid_api_key")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            # A web page can send other kinds from anywhere without asking; this one not.
            raise ApiError(415, "Content-Type must be application/json")


class Guard:
    """The outermost layer: turns requests away, and says one line about each."""

    def __init__(self, app: ASGIApp, access: Access, count: Callable[[str], None]) -> None:
        self._app = app
        self._access = access
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets the request in, or answers why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), "gone"

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            self._access.check(scope["method"], scope["path"], Headers(scope=scope))
            await self._app(scope, receive, noting)
        except ApiError as error:
            await JSONResponse(error.body, error.status)(scope, receive, noting)
        except Exception:
            status = "500" if status == "gone" else status  # as it is answered further out
            raise
        finally:
            if scope["path"] not in OPEN_PATHS:
                self._count(status)
                what = f"{scope['method']} {scope['raw_path'][:80].decode('ascii', 'replace')}"
                console.say(f"{what}: {status}, {time.monotonic() - began:.1f} s")


def _is_called(host: str, names: Collection[str]) -> bool:
    """Whether a Host header names this server: by a number, or by one of its names."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return name.lower().removesuffix(".") in names
    return True


def max_connections() -> int:
    """Connections at once that leave the process files to work with."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(8, min(MAX_CONNECTIONS, files - _SPARE_FILES))


class TimedProtocol(H11Protocol):
    """uvicorn's, with a time for headers and a bound on connections."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes the connection; when there are too many, an answered one goes, or the slowest to ask."""
        super().connection_made(transport)
        self._expect_header()
        if len(self.connections) <= max_connections():
            return
        ours = [one for one in self.connections if isinstance(one, TimedProtocol)]
        ends = {one: end for one in ours if (end := one.timeout_keep_alive_task or one._deadline)}
        answered = {one: end for one, end in ends.items() if one.timeout_keep_alive_task}
        min(answered or ends, key=lambda one: ends[one].when()).transport.abort()

    def data_received(self, data: bytes) -> None:
        """Reads on; a header that has begun has its time, one that is whole needs none."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._expect_nothing()
        elif self._deadline is None and self.conn.trailing_data[0]:
            self._expect_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._expect_nothing()
        super().connection_lost(exc)

    def _expect_header(self) -> None:
        self._deadline = self.loop.call_later(HEADER_SECONDS, self._too_slow)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        self.transport.abort()
