"""Runs a suite of others in a process of its own; returns what became of each test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

LIMIT = 300
"""Seconds a test may take: the longest takes 40 on idle cores."""


@dataclass(frozen=True)
class Outcome:
    """What became of a test."""

    outcome: str
    """passed, skipped or failed."""
    reason: str
    seconds: float


def run(suite: str, tests: list[str], *, timeout: int, show: bool = False) -> dict[str, Outcome]:
    """The outcomes by `Class::test` of the named classes or tests of suite_<suite>.py."""
    file = HERE / f"suite_{suite}.py"
    return run_file(file, [f"{file}::{test}" for test in tests], timeout=timeout, show=show)


def run_file(
    file: Path, chosen: list[str], *, timeout: int, limit: int = LIMIT, show: bool = False
) -> dict[str, Outcome]:
    """The outcomes by test of a file's chosen tests; RuntimeError when nothing could be run.

    A test that takes longer than the limit (seconds), or takes its process along, has failed;
    those behind it are run by another process.
    """
    with tempfile.TemporaryDirectory() as place:
        notes = Path(place) / "notes.jsonl"
        command = [
            sys.executable, "-m", "pytest", "-c", str(HERE / "foreign.ini"), "--rootdir", str(file.parent),
            "-p", "tests.foreign.recording", "-p", "no:cacheprovider", "--tb=short",
            "-o", f"faulthandler_timeout={limit}", *chosen,
        ]  # fmt: skip
        set_here = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "FOREIGN_RESULTS": str(notes)}
        while True:
            done = subprocess.run(
                command, cwd=place, env=os.environ | set_here, timeout=timeout, check=False,
                text=True, stdout=None if show else subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            kept = _read(notes)
            begun = [note["begun"] for note in kept if "begun" in note]
            if begun and any("ended" in note for note in kept) and done.returncode in (0, 1, 5):
                return _outcomes(kept)  # 5: nothing was left to run
            if not begun or begun[-1] in {note.get("finished") for note in kept}:
                raise RuntimeError(
                    f"{file.name} broke off (exit {done.returncode}):\n{done.stdout}"
                )
            reason = f"did not end within {limit} s, or its process ended (exit {done.returncode})"
            broken = {"outcome": "failed", "reason": reason, "seconds": limit}
            with notes.open("a", encoding="utf-8") as file_of_notes:
                for note in ({"test": begun[-1], **broken}, {"finished": begun[-1]}):
                    file_of_notes.write(json.dumps(note) + "\n")


def _read(notes: Path) -> list[dict[str, Any]]:
    if not notes.is_file():
        return []
    return [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]


_RANK = {"passed": 0, "skipped": 1, "failed": 2}


def _outcomes(notes: list[dict[str, Any]]) -> dict[str, Outcome]:
    """The worst of each test's phases and parts, and how long they took together."""
    found: dict[str, Outcome] = {}
    for note in notes:
        if "test" in note:
            before = found.get(note["test"], Outcome("passed", "", 0.0))
            seconds = round(before.seconds + note["seconds"], 2)
            worse = _RANK[note["outcome"]] > _RANK[before.outcome]
            worst = note if worse else {"outcome": before.outcome, "reason": before.reason}
            found[note["test"]] = Outcome(worst["outcome"], worst["reason"], seconds)
    return found
