"""Tests that stand ready: collected once, and run in a forked process for each mistake.

A mistake inside of functions is put into the functions that are there already, so nothing is imported
again and the first test begins after some hundredths of a second. What runs when a module is imported
(constants, defaults, classes) needs a process of its own that imports the project with the mistake.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NoReturn

import called

PR_SET_PDEATHSIG = 1
"""Linux: the signal that a process gets when its parent is gone."""
OPTIONS = [
    "-q",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
]
"""The warning: pytest would have liked to see its plugins before they were imported."""
HANGS = (20.0, 10.0)
"""A test is given so many seconds, and so many times what it takes without a mistake."""

HANGING = "no end: "
WATCHED = 180.0
"""Seconds in which a test file is watched; what it had not come to then is not known to call anything."""


def forked(work: Callable[[], int], log: Path) -> int:
    """The id of a process that ends with what `work` returns; all that it prints goes to `log`."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:  # whatever happens, this process never goes on with what its parent was doing
        os.setsid()
        with suppress(AttributeError):  # only Linux lets a child end with its parent
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with log.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = work()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def codes(source: str, path: str) -> tuple[list[CodeType], list[tuple[Any, ...]]]:
    """The code of a module's functions, and what it does when it is imported, to be compared."""
    functions: list[CodeType] = []
    imported: list[tuple[Any, ...]] = []
    waiting = [compile(source, path, "exec")]
    while waiting:
        code = waiting.pop(0)
        inner = [const for const in code.co_consts if isinstance(const, CodeType)]
        waiting += inner
        if code.co_flags & 1:  # CO_OPTIMIZED: a function, not a module or the body of a class
            functions.append(code)
        else:
            values = [repr(const) for const in code.co_consts if not isinstance(const, CodeType)]
            imported.append((code.co_qualname, code.co_code, values, code.co_names))
    return functions, imported


def exchanged(old: str, new: str, path: Path) -> bool:
    """Puts the new code into the functions of an imported module; False when that does not say it all, or nothing of it is imported."""
    if "@triton.jit" in old:  # compiled from the source that was there at the import
        return False
    (before, once), (after, then) = codes(old, str(path)), codes(new, str(path))
    if once != then or [c.co_qualname for c in before] != [c.co_qualname for c in after]:
        return False
    by_place = {
        (b.co_qualname, b.co_firstlineno): a
        for b, a in zip(before, after, strict=True)
        if b.co_freevars == a.co_freevars
    }
    count = 0
    for function in [one for one in gc.get_objects() if type(one) is FunctionType]:
        code = function.__code__
        if code.co_filename == str(path):
            found = by_place.get((code.co_qualname, code.co_firstlineno))
            if found is None:
                return False  # a closure that looks at other names by now: it is to be made anew
            function.__code__ = found
            count += 1
    return count > 0


class Collected:
    """A pytest plugin: what pytest has collected, and tests run one by one in forked processes."""

    def __init__(self, root: Path, serve: Callable[[Collected], None]) -> None:
        self.root = root
        self._serve = serve
        self.items: dict[str, Any] = {}
        self._session: Any = None
        self._count = 0

    def pytest_runtestloop(self, session: Any) -> bool:
        """Serves instead of running all that was collected."""
        self._session = session
        self.items = {item.nodeid: item for item in session.items}
        session.config._tmp_path_factory.getbasetemp()
        self._serve(self)
        return True

    def files(self) -> set[str]:
        """The test files that could be collected."""
        return {name.partition("::")[0] for name in self.items}

    def watched(self, file: str, log: Path) -> called.Calls:
        """What the tests of a file call, seen in a process of its own."""

        def work() -> int:
            watch = called.Watch(self.root)

            def kept(*_: object) -> NoReturn:
                called.keep(self.root / file, watch.calls)
                os._exit(0)

            signal.signal(signal.SIGTERM, kept)
            self._session.config.pluginmanager.register(watch)
            for _ in self._run([n for n in self.items if n.partition("::")[0] == file]):
                pass
            kept()

        child = forked(work, log)
        limit = threading.Timer(WATCHED, os.kill, [child, signal.SIGTERM])
        worst = threading.Timer(WATCHED + 10, os.killpg, [child, signal.SIGKILL])
        limit.start()
        worst.start()
        os.waitpid(child, 0)
        limit.cancel()
        worst.cancel()
        return called.kept(self.root / file) or {}

    def first_failure(
        self, tests: Sequence[str], log: Path, change: Callable[[], bool], seconds: dict[str, float]
    ) -> str | None:
        """The first test that fails after a change; "" when all pass, None when the change cannot be made here."""
        said = self.root / "said"

        def work() -> int:
            if not change():
                return 3
            with said.open("w", encoding="utf-8", buffering=1) as file:
                for name in self._run(tests, begun=lambda name: file.write(f"{name}\n")):
                    file.write(f"FAILED {name}\n")
                    return 1
            return 0

        said.write_text("", encoding="utf-8")
        child = forked(work, log)
        running, since = "", time.monotonic()
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            lines = said.read_text(encoding="utf-8").splitlines() or [""]
            if done:
                break
            if lines[-1] != running:
                running, since = lines[-1], time.monotonic()
            if time.monotonic() - since > HANGS[0] + HANGS[1] * seconds.get(running, 0.0):
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return f"{HANGING}{running or 'pytest'}"
            time.sleep(0.02)
        code = os.waitstatus_to_exitcode(status)
        if code == 3:
            return None
        if code == 0:
            return ""
        return lines[-1].removeprefix("FAILED ") or f"ended with {code}"

    def _run(self, tests: Sequence[str], begun: Callable[[str], Any] = str) -> Iterator[str]:
        """Runs tests; the names of those that fail."""
        failed: list[str] = []

        class Reports:
            def pytest_runtest_logreport(self, report: Any) -> None:
                if report.failed:
                    failed.append(report.nodeid)

        config = self._session.config
        self._count += 1
        temporary = config._tmp_path_factory.getbasetemp() / f"fork{os.getpid()}"
        temporary.mkdir()
        config._tmp_path_factory._basetemp = temporary
        config.pluginmanager.register(Reports())
        items = [self.items[name] for name in tests if name in self.items]
        try:
            for item, following in zip(items, [*items[1:], None], strict=False):
                begun(item.nodeid)
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if failed:
                    yield failed.pop()
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class WarmTests:
    """The process that has everything collected, from outside: one question a line."""

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self._root = root
        down, self._ask = os.pipe()
        self._hear, up = os.pipe()

        def serve() -> int:
            os.close(self._ask)  # else the process would wait for a question of its own
            os.close(self._hear)
            return _serve(root, files, down, up)

        self.process = forked(serve, root / "log-warm")
        os.close(down)
        os.close(up)
        self._answers = os.fdopen(self._hear, encoding="utf-8")
        self.files = set(self._answered())

    def watched(self, file: str) -> called.Calls:
        """What the tests of a file call."""
        self._say({"watch": file})
        return {name: called.Test(**test) for name, test in self._answered().items()}

    def first_failure(
        self, tests: Sequence[str], file: str, new: str, seconds: dict[str, float]
    ) -> str | None:
        """The first test that fails with another text of a file; None when it needs a fresh import."""
        self._say({"tests": list(tests), "file": file, "new": new, "seconds": seconds})
        return self._answered()  # type: ignore[no-any-return]

    def close(self) -> None:
        """Ends the process."""
        os.close(self._ask)
        os.waitpid(self.process, 0)
        self._answers.close()

    def _say(self, question: dict[str, Any]) -> None:
        data = (json.dumps(question) + "\n").encode()
        while data:
            data = data[os.write(self._ask, data) :]

    def _answered(self) -> Any:
        line = self._answers.readline()
        if not line:
            text = (self._root / "log-warm").read_text(encoding="utf-8", errors="replace")
            raise SystemExit(f"the tests cannot be collected: {text[-2000:]}")
        return json.loads(line)


def _serve(root: Path, files: Sequence[str], questions: int, answers: int) -> int:
    import pytest

    sys.dont_write_bytecode = True
    log = root / "log"
    asked, told = os.fdopen(questions, encoding="utf-8"), os.fdopen(answers, "w", encoding="utf-8")

    def answer(what: Any) -> None:
        told.write(json.dumps(what) + "\n")
        told.flush()

    def serve(collected: Collected) -> None:
        answer(sorted(collected.files()))
        for line in asked:
            question = json.loads(line)
            if "watch" in question:
                found = collected.watched(question["watch"], log)
                answer({name: vars(test) for name, test in found.items()})
                continue
            answer(_put(collected, root / question["file"], question, log))

    return int(
        pytest.main(
            [*OPTIONS, "--continue-on-collection-errors", *files], plugins=[Collected(root, serve)]
        )
    )


def _put(collected: Collected, path: Path, question: dict[str, Any], log: Path) -> str | None:
    """The first test that fails with another text of a file."""
    old, new = path.read_text(encoding="utf-8"), question["new"]

    def change() -> bool:
        return new == old or exchanged(old, new, path)

    path.write_text(new, encoding="utf-8")  # for processes that a test starts
    try:
        return collected.first_failure(question["tests"], log, change, question["seconds"])
    finally:
        path.write_text(old, encoding="utf-8")
