"""The C heap of a server: few pools, and what is free goes back to the system.

glibc gives every thread a pool of its own, up to eight a core, and keeps in each what was freed there.
Requests are read in many threads, now and then one of many megabytes, so a busy server would hold more
and more memory that nobody uses. Other C libraries have neither function and are left alone.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

POOLS = 2
TRIM_SECONDS = 20.0
"""A trim takes a millisecond or two, after much was freed a tenth of a second; it holds no Python lock."""
_M_ARENA_MAX = -8


def bound_pools() -> None:
    """Lets threads share `POOLS` pools; called before there are many threads."""
    if mallopt := _function("mallopt"):
        mallopt(_M_ARENA_MAX, POOLS)


@asynccontextmanager
async def trimmed() -> AsyncIterator[None]:
    """In here free memory goes back to the system every `TRIM_SECONDS`."""
    task = asyncio.create_task(_trim_again_and_again())
    try:
        yield
    finally:
        task.cancel()


async def _trim_again_and_again() -> None:
    while trim := _function("malloc_trim"):
        await asyncio.sleep(TRIM_SECONDS)
        await asyncio.to_thread(trim, 0)


def _function(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where it has none of that name."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # a system whose C library has no such handle
        return None
