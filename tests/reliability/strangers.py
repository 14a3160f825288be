"""Suite 7: what strangers tried: odd outputs, two writers at once, other people's files and requests.

Every `strangers_*.py` beside this file adds the cases that its `cases()` gives.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.reliability.frame import Case
from tests.reliability.places import prepare


def cases(folder: Path, subset: bool, stock: bool, groups: tuple[str, ...]) -> list[Case]:
    """All of them; the subset has one of every group."""
    if stock:
        return []
    prepare(folder)
    parts = sorted(Path(__file__).parent.glob("strangers_*.py"))
    modules = [importlib.import_module(f"tests.reliability.{part.stem}") for part in parts]
    found = [case for module in modules for case in module.cases()]
    return list({case.group: case for case in reversed(found)}.values()) if subset else found
