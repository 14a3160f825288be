"""A pytest plugin: writes what became of each test to the file that FOREIGN_RESULTS names."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

_results: dict[str, dict[str, Any]] = {}
_RANK = {"passed": 0, "skipped": 1, "failed": 2}


def pytest_runtest_setup() -> None:
    """The same draws each time: theirs compare within bands that one draw in hundreds leaves."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    for module in list(sys.modules.values()):
        if isinstance(generator := vars(module).get("global_rng"), random.Random):
            generator.seed(0)


def pytest_runtest_logreport(report: Any) -> None:
    """Keep the worst of a test's phases and parts."""
    name = report.nodeid.split("::", 1)[1]
    kept = _results.setdefault(name, {"outcome": "passed", "reason": "", "seconds": 0.0})
    kept["seconds"] = round(kept["seconds"] + report.duration, 2)
    if _RANK[report.outcome] > _RANK[kept["outcome"]]:
        kept["outcome"] = report.outcome
        kept["reason"] = _reason(report)


def pytest_sessionfinish() -> None:
    """Write them."""
    Path(os.environ["FOREIGN_RESULTS"]).write_text(json.dumps(_results, indent=1, sort_keys=True))


def _reason(report: Any) -> str:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash is not None else str(report.longrepr)
