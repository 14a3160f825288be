"""Who may come in: the Host header, the key and the kind of body are checked before anything is read."""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune import console
from finetune.serving.errors import ApiError, bad_request

OPEN_PATHS = frozenset({"/health"})
"""What answers without a key."""


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
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
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
