"""Nothing that is opened is run, nothing that is secret is written, and the endpoint lets nobody in."""

from __future__ import annotations

from pathlib import Path

from tests.reliability import security_files
from tests.reliability.frame import Case
from tests.reliability.places import prepare

PARTS = (security_files,)


def cases(folder: Path, subset: bool, stock: bool) -> list[Case]:
    """All of them; the subset has every fourth."""
    if stock:
        return []
    prepare(folder)
    found = [case for part in PARTS for case in part.cases()]
    return found[::4] if subset else found
