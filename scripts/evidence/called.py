"""Which tests call which functions of the project: what a pytest plugin has seen, kept by test file."""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

STORE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glm4-finetune/mutate"
"""Where the calls of a test file are kept, under the fingerprint of its text."""

STARTED = re.compile(r"python|torchrun|finetune|bash|chrom")
"""Programs that take seconds; what a library asks, such as `uname`, is let through."""


@dataclass
class Test:
    """What one test does."""

    seconds: float = 0.0
    calls: list[str] = field(default_factory=list)
    """Its functions of the project, as `finetune/x.py:Class.method`."""
    starts_process: bool = False
    """It was stopped where it would have started one, which cannot be watched."""


Calls = dict[str, Test]
"""Tests by their ids."""


def kept(file: Path) -> Calls | None:
    """The calls of a test file as they were seen last; None when its text is another by now."""
    place = _place(file)
    if not place.is_file():
        return None
    return {name: Test(**test) for name, test in json.loads(place.read_text("utf-8")).items()}


def keep(file: Path, calls: Calls) -> None:
    """Keeps what a test file calls."""
    place = _place(file)
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({name: asdict(test) for name, test in calls.items()}), "utf-8")
    part.replace(place)


def _place(file: Path) -> Path:
    return STORE / f"{file.stem}-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}.json"


class Watch:
    """A pytest plugin: writes down the functions that each test calls, in threads too."""

    def __init__(self, root: Path) -> None:
        self._prefix = str(root / "finetune") + os.sep
        self._tests = str(root / "tests") + os.sep
        self._cut = len(str(root)) + 1
        self._seen: set[str] = set()
        self._of_fixtures: dict[int, set[str]] = {}
        """Fixtures of a module or a session are made once; whoever asks for them calls what they called."""
        self.calls: Calls = {}
        self._of_forks = root / ".calls-of-forks"
        self._of_forks.mkdir(exist_ok=True)
        multiprocessing.util.register_after_fork(self, Watch._go_on_in_a_fork)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        """Watches a test; it is skipped where it would start a process that cannot be watched."""
        self._seen = set()
        test = self.calls[item.nodeid] = Test()
        begin = subprocess.Popen.__init__

        def refused(process: Any, command: Any, *args: Any, **options: Any) -> None:
            program = command if isinstance(command, str) else str(command[0])
            if STARTED.search(program) and self._is_a_tests_own(sys._getframe(1)):
                test.starts_process = True
                raise pytest.skip.Exception("starts a process")
            begin(process, command, *args, **options)

        subprocess.Popen.__init__ = refused  # type: ignore[assignment, method-assign]
        threading.settrace(self._called)
        sys.settrace(self._called)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            subprocess.Popen.__init__ = begin  # type: ignore[method-assign]
            for name in item.fixturenames:
                for made in item._fixtureinfo.name2fixturedefs.get(name, ()):
                    self._seen |= self._of_fixtures.get(id(made), set())
            for file in self._of_forks.iterdir():
                self._seen |= set(json.loads(file.read_text("utf-8")))
                file.unlink()
            test.calls = sorted(self._seen)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        """Remembers what is called for a fixture that others use too."""
        if fixturedef.scope == "function":
            return (yield)
        outer, self._seen = self._seen, set()
        try:
            return (yield)
        finally:
            self._of_fixtures[id(fixturedef)] = self._seen
            self._seen = outer | self._seen

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Adds the time of a part of a test."""
        self.calls[report.nodeid].seconds += report.duration

    def _go_on_in_a_fork(self) -> None:
        """What a process calls that a test has forked is written down when that ends."""
        self._seen = set()

        def tell() -> None:
            file = self._of_forks / str(os.getpid())
            file.write_text(json.dumps(sorted(self._seen)), encoding="utf-8")

        multiprocessing.util.Finalize(None, tell, exitpriority=0)

    def _is_a_tests_own(self, frame: FrameType | None) -> bool:
        """Whether a process is started by a test, and not by the project (the template's sandbox, say)."""
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith((self._prefix, self._tests)):
                return file.startswith(self._tests)
            frame = frame.f_back
        return True

    def _called(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if code.co_filename.startswith(self._prefix):
            self._seen.add(f"{code.co_filename[self._cut :]}:{code.co_qualname}")


def functions_at(source: str, line: int) -> list[str]:
    """The qualified names of the functions around a line, the innermost first; [] outside of all."""
    found = [
        name for name, first, last in _functions(ast.parse(source), "") if first <= line <= last
    ]
    return found[::-1]


def functions_of(source: str) -> list[str]:
    """The qualified names of all functions."""
    return [name for name, _, _ in _functions(ast.parse(source), "")]


def name_at(source: str, line: int) -> str:
    """The constant or class of a module that a line belongs to; "" when there is none."""
    for node in ast.parse(source).body:
        if node.lineno <= line <= (node.end_lineno or 0):
            match node:
                case ast.ClassDef(name=name):
                    return name
                case (
                    ast.Assign(targets=[ast.Name(id=name)])
                    | ast.AnnAssign(target=ast.Name(id=name))
                ):
                    return name
    return ""


def tests_that_name(name: str, file: Path) -> set[str]:
    """The functions of a test file in whose own text a name stands: they need not call what reads it."""
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines()
    return {
        function
        for function, first, last in _functions(ast.parse(source), "")
        if re.search(rf"\b{re.escape(name)}\b", "\n".join(lines[first - 1 : last]))
    }


def that_mention(name: str, root: Path) -> set[str]:
    """The functions of the project in whose text a name stands."""
    found = set()
    for path in (root / "finetune").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if not (
            hits := [
                source[: m.start()].count("\n") + 1 for m in re.finditer(rf"\b{name}\b", source)
            ]
        ):
            continue
        spans = list(_functions(ast.parse(source), ""))
        file = path.relative_to(root).as_posix()
        found |= {
            f"{file}:{inside}"
            for inside, first, last in spans
            if any(first <= h <= last for h in hits)
        }
    return found


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, int, int]]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                yield prefix + name, first, child.end_lineno or first
                yield from _functions(child, f"{prefix}{name}.<locals>.")
            case ast.ClassDef(name=name):
                yield from _functions(child, f"{prefix}{name}.")
            case _:
                yield from _functions(child, prefix)
