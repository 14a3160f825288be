"""A request's body, as far as it may be large and take time."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from finetune.serving.errors import ApiError

BODY_SECONDS = 30.0
"""A body must have come by then."""


async def read_body(request: Request, limit: int) -> bytes:
    """The body; ApiError when it is too large, which its header tells first, or too slow."""
    too_large = ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} s") from None
    return bytes(body)
