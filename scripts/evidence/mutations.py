"""Mistakes that are tried one at a time: drawn from modules or from the lines of a change, or a person's own."""

from __future__ import annotations

import json
import random
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mistakes import mistakes

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutation:
    """One mistake: a text of a file and what stands there instead."""

    file: str
    old: str
    new: str
    line: int = 0
    """Where the text begins; 0: it stands in the file once."""
    column: int = 0
    tests: tuple[str, ...] = ()
    """The tests that are run; none: those of the module and its room."""

    def applied(self, source: str) -> str:
        """The file with the mistake in it."""
        if not self.line:
            if source.count(self.old) != 1:
                raise SystemExit(f"{self.file}: {source.count(self.old)} × {self.old!r}, not 1")
            return source.replace(self.old, self.new)
        lines = source.encode().splitlines(keepends=True)
        start = sum(map(len, lines[: self.line - 1])) + self.column
        data = source.encode()
        assert data[start:].startswith(self.old.encode()), (self.file, self.line, self.old)
        return (data[:start] + self.new.encode() + data[start + len(self.old.encode()) :]).decode()

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {' '.join(self.old.split())[:60]} -> {' '.join(self.new.split())[:60]}"


def changed_lines(commit: str) -> dict[str, set[int]]:
    """Lines of the package that differ from a commit, by file."""
    command = ["git", "diff", "-U0", commit, "--", "finetune"]
    diff = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found: dict[str, set[int]] = {}
    file = ""
    for line in diff.splitlines():
        if line.startswith("+++ "):
            file = line.removeprefix("+++ b/")
        elif match := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            start, count = int(match[1]), int(match[2] or 1)
            found.setdefault(file, set()).update(range(start, start + count))
    return {file: lines for file, lines in found.items() if file.endswith(".py")}


def modules(names: Sequence[str]) -> list[str]:
    """The modules that are named, and all of the folders that are."""
    paths = [
        found
        for name in names
        for found in (
            [ROOT / name] if name.endswith(".py") else sorted((ROOT / name).rglob("*.py"))
        )
    ]
    return [path.relative_to(ROOT).as_posix() for path in paths]


def made(files: dict[str, set[int] | None], most: int, seed: int) -> list[Mutation]:
    """At most so many of the mistakes that the files' lines (None: all) allow, drawn by a seed."""
    all_of_them = [
        Mutation(file, one.old, one.new, one.line, one.column)
        for file, lines in files.items()
        for one in mistakes((ROOT / file).read_text(encoding="utf-8"))
        if lines is None or one.line in lines
    ]
    drawn = random.Random(seed).sample(all_of_them, min(most, len(all_of_them)))
    return sorted(drawn, key=lambda one: (one.file, one.line, one.column))


def listed(path: Path) -> list[Mutation]:
    """The mistakes of a file, one a line."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [
        Mutation(
            row["file"],
            row["old"],
            row["new"],
            row.get("line", 0),
            row.get("column", 0),
            tuple(row.get("tests", ())),
        )
        for row in rows
    ]
