"""Suite 7: what strangers tried: odd outputs, two writers at once, other people's files and requests.

Every `strangers_*.py` beside this file adds the cases that its `cases()` gives.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.reliability.frame import Case
from tests.reliability.places import prepare


def cases(folder: Path, subset: bool, stock: bool, groups: tuple[str, ...]) -> list[Case]:
    """All of them; the subset has every third, without the signals at the rarer moments."""
    if stock:
        return []
    prepare(folder)
    parts = sorted(Path(__file__).parent.glob("strangers_*.py"))
    modules = [importlib.import_module(f"tests.reliability.{part.stem}") for part in parts]
    found = [case for module in modules for case in module.cases()]
    return [case for case in found if case.group != "phase"][::3] if subset else found
