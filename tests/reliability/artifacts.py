"""What is written beside checkpoints: whole or absent, never over anything, only with what belongs together."""

from __future__ import annotations

from pathlib import Path

from tests.reliability import artifact_bases, artifact_names, artifact_outputs
from tests.reliability.frame import Case
from tests.reliability.places import prepare

PARTS = (artifact_bases, artifact_outputs, artifact_names)


def cases(folder: Path, subset: bool, stock: bool, groups: tuple[str, ...]) -> list[Case]:
    """All of them; the subset has every third."""
    prepare(folder)
    if stock:
        return list(artifact_bases.stock_cases())
    found = [case for part in PARTS for case in part.cases()]
    return found[::3] if subset else found
