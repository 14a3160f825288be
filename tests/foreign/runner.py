"""Runs a suite of others in a process of its own; returns what became of each test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Outcome:
    """What became of a test."""

    outcome: str
    """passed, skipped or failed."""
    reason: str
    seconds: float


def run(suite: str, tests: list[str], *, timeout: int, show: bool = False) -> dict[str, Outcome]:
    """The outcomes by `Class::test` of a suite's classes or tests; RuntimeError when it broke off."""
    with tempfile.TemporaryDirectory() as place:
        results = Path(place) / "results.json"
        file = HERE / f"suite_{suite}.py"
        command = [
            sys.executable, "-m", "pytest", "-c", str(HERE / "foreign.ini"), "--rootdir", str(HERE),
            "-p", "tests.foreign.recording", "-p", "no:cacheprovider", "--tb=short",
            *[f"{file}::{test}" for test in tests],
        ]  # fmt: skip
        set_here = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "FOREIGN_RESULTS": str(results)}
        done = subprocess.run(
            command, cwd=place, env=os.environ | set_here, timeout=timeout, check=False, text=True,
            stdout=None if show else subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode > 1 or not results.is_file():
            raise RuntimeError(f"{suite} broke off (exit {done.returncode}):\n{done.stdout}")
        found = json.loads(results.read_text())
    return {name: Outcome(**values) for name, values in found.items()}
