"""A pytest plugin: notes what became of each test, as it ends, in the file of FOREIGN_RESULTS.

A process that begins with notes of another runs what is not finished in them.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

_NOTES = Path(os.environ["FOREIGN_RESULTS"])


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leave out what is finished."""
    if _NOTES.is_file():
        lines = _NOTES.read_text(encoding="utf-8").splitlines()
        finished = {json.loads(line).get("finished") for line in lines}
        items[:] = [item for item in items if _name(item.nodeid) not in finished]


def pytest_runtest_setup() -> None:
    """The same draws each time: theirs compare within bands that one draw in hundreds leaves."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    for module in list(sys.modules.values()):
        if isinstance(generator := vars(module).get("global_rng"), random.Random):
            generator.seed(0)


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins."""
    _note(begun=_name(nodeid))


def pytest_runtest_logreport(report: Any) -> None:
    """A phase or a part of a test ends."""
    reason = "" if report.passed else _reason(report)
    _note(test=_name(report.nodeid), outcome=report.outcome, reason=reason, seconds=report.duration)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """A test ends."""
    _note(finished=_name(nodeid))


def pytest_sessionfinish() -> None:
    """All of them have ended."""
    _note(ended=True)


def _note(**note: Any) -> None:
    with _NOTES.open("a", encoding="utf-8") as file:
        file.write(json.dumps(note) + "\n")


def _name(nodeid: str) -> str:
    return nodeid.split("::", 1)[1]


def _reason(report: Any) -> str:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash is not None else str(report.longrepr)
