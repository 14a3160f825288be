"""How far this process has come, for the thread that watches: points that every process passes alike.

NCCL tells nobody that it waits in vain. Whoever has waited for the accelerator too long compares how many
points each process has passed; one that hangs has passed fewer. No torch here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_passed = 0
_waiting_since: float | None = None
_patient_since: float | None = None


def advance() -> None:
    """One more point; called before processes wait for each other."""
    global _passed
    _passed += 1


def passed() -> int:
    """Points so far."""
    return _passed


def waited() -> float:
    """Seconds that the accelerator has been waited for without a break."""
    since = _waiting_since
    return 0.0 if since is None else time.monotonic() - since


def waited_patiently() -> float:
    """Seconds that others have been waited for while one of them reads or writes a disk."""
    since = _patient_since
    return 0.0 if since is None else time.monotonic() - since


@contextmanager
def waiting_patiently() -> Iterator[None]:
    """In here the process waits for others whose disk may be slow: without a limit while it moves."""
    global _patient_since
    _patient_since = time.monotonic()
    try:
        yield
    finally:
        _patient_since = None


@contextmanager
def waiting_for_device() -> Iterator[None]:
    """In here the process waits for its accelerator, and so for what others are to send it."""
    global _waiting_since
    advance()
    _waiting_since = time.monotonic()
    try:
        yield
    finally:
        _waiting_since = None
