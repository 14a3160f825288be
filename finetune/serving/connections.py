"""Connections that cost nothing: a header must come in time, and whoever is slowest gives way to others.

What a client may do before its key is looked at is to open connections and to send a header slowly.
uvicorn waits for a first header for ever; here it has `HEADER_SECONDS`, and of more connections than
the process has room for the one that has waited longest for its header is closed.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
"""A header must have come whole by then, counted from the connection or the first byte after a reply."""
MAX_CONNECTIONS = 1024
_SPARE_FILES = 64
"""Files that the process needs for itself: libraries, images of requests, its log."""


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
        """Takes the connection; when there are too many, the slowest that sent no header goes."""
        super().connection_made(transport)
        self._expect_header()
        if len(self.connections) <= max_connections():
            return
        idle = [one for one in self.connections if isinstance(one, TimedProtocol) and one._deadline]
        slowest = min(idle, key=lambda one: one._deadline.when() if one._deadline else 0.0)
        slowest.transport.abort()

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
