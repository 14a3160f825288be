"""Nothing that is opened is run, nothing that is secret is written, and the endpoint lets nobody in."""

from __future__ import annotations

from pathlib import Path

from tests.reliability import (
    security_code,
    security_endpoint,
    security_files,
    security_secrets,
    security_templates,
)
from tests.reliability.frame import Case
from tests.reliability.places import prepare

PARTS = (security_files, security_templates, security_code, security_secrets, security_endpoint)


def cases(folder: Path, subset: bool, stock: bool, groups: tuple[str, ...]) -> list[Case]:
    """All of them; the subset has every third."""
    if stock:
        return []
    prepare(folder)
    found = [case for part in PARTS for case in part.cases()]
    return found[::3] if subset else found
