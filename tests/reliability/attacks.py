"""What strangers tried, 527 inputs and faults by kind and 28 faults that they found, and our cases of each.

attacks.json: every kind with its members, how often each was tried, and patterns of our cases,
`suite / group: what happens` with `*` for anything. There are at least as many cases as tries.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from tests.reliability.frame import ROOT

FILE = ROOT / "tests/reliability/attacks.json"


@dataclass(frozen=True)
class Attack:
    """One member of a kind, or one fault that was found."""

    name: str
    tried: int
    """How many cases there must be."""
    patterns: tuple[str, ...]

    def found(self, names: Collection[str]) -> set[str]:
        """Its cases among `suite / group: what happens`."""
        return {name for name in names for one in self.patterns if fnmatchcase(name, _plain(one))}

    def problem(self, names: Collection[str]) -> str:
        """What is missing, in words."""
        empty = [
            one for one in self.patterns if not any(fnmatchcase(n, _plain(one)) for n in names)
        ]
        if empty:
            return f"{self.name}: there is no case {', '.join(empty)}"
        count = len(self.found(names))
        return f"{self.name}: {count} cases for {self.tried}" if count < self.tried else ""

    @property
    def groups(self) -> set[tuple[str, str]]:
        """Suites and groups of its cases."""
        pairs = (one.partition(" / ") for one in self.patterns)
        return {(suite, rest.partition(":")[0]) for suite, _, rest in pairs}


def _plain(pattern: str) -> str:
    """Only `*` stands for something: names have brackets and question marks of their own."""
    return pattern.replace("[", "[[]").replace("?", "[?]")


def load() -> Mapping[str, Any]:
    """The file."""
    return dict(json.loads(FILE.read_text(encoding="utf-8")))


def attacks() -> Iterator[Attack]:
    """All members of all kinds, and all faults."""
    found = load()
    for kind in found["kinds"]:
        for one in kind["members"]:
            name = f"{kind['kind']}, {one['attack']}"
            yield Attack(name, one["tried"], tuple(one["cases"]))
    for one in found["faults"]:
        yield Attack(f"fault {one['number']}, {one['fault']}", 1, tuple(one["cases"]))


def tried() -> int:
    """How many there were."""
    return sum(one["tried"] for kind in load()["kinds"] for one in kind["members"])


def problems(names: Collection[str], suites: Collection[str]) -> list[str]:
    """Attacks without enough cases; of those only whose cases all lie in `suites`."""
    return [
        said
        for one in attacks()
        if {suite for suite, _ in one.groups} <= set(suites)
        if (said := one.problem(names))
    ]
