"""How a suite is run: every case in a fork of its own, in a folder of its own, with a time limit.

A suite is a module of this folder with

    def cases(folder: Path, subset: bool, stock: bool, groups: tuple[str, ...]) -> list[Case]

which imports and prepares what its cases share (`folder` outlives them), so that a case costs about
half a CPU second. `subset` asks for the cases that the continuous integration runs, `stock` for
those that plain transformers.Trainer can run, run with it; cases of other groups than `groups` may be left
out, if there are any.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUITES = ("saves", "signals", "resume", "inputs", "artifacts", "security", "strangers")


@dataclass(frozen=True)
class Case:
    """One thing that goes wrong."""

    name: str
    """`group: what happens`; promises count by group."""
    run: Callable[[Path], str | None]
    """Gets an empty folder and says why the case did not survive; raising says so too."""
    seconds: float = 60.0
    """It did not survive when it takes longer. Time in which this process is stopped does not count."""

    @property
    def group(self) -> str:
        """What a promise counts it under."""
        return self.name.partition(":")[0]


Results = dict[str, str]
"""Case name -> why it did not survive; an empty text when it did."""


def run_suite(
    suite: str, *, groups: tuple[str, ...], subset: bool, stock: bool, until_one_fails: bool = False
) -> Results:
    """Run a suite in a fork, so that what it imports and breaks is its own.

    `until_one_fails`: that is expected; nothing is said of it, and no later case is run.
    """

    def work(folder: Path) -> str:
        module = importlib.import_module(f"tests.reliability.{suite}")
        found = module.cases(folder, subset, stock, groups)
        found = [case for case in found if not groups or case.group in groups]
        if len({case.name for case in found}) != len(found):
            raise AssertionError("two cases have one name")
        gc.collect()
        gc.freeze()  # a collection in a fork would look at all of this, and copy it
        results: Results = {}
        # What a missing safeguard breaks shows in the later cases sooner.
        for case in reversed(found) if until_one_fails else found:
            begun = time.monotonic()
            results[case.name] = in_fork(case.run, seconds=case.seconds)
            if until_one_fails and results[case.name]:
                break
            report(case.name, results[case.name], time.monotonic() - begun)
        return json.dumps(results)

    answer = in_fork(work, seconds=3600.0)
    try:
        return dict(json.loads(answer))
    except ValueError:
        raise SystemExit(f"the suite {suite} itself failed: {answer}") from None


def report(name: str, problem: str, seconds: float) -> None:
    """A line for every failure, and for every case when RELIABILITY_VERBOSE is set."""
    if problem or os.environ.get("RELIABILITY_VERBOSE"):
        line = f"  {'FAILED ' if problem else ''}{name} ({seconds:.1f} s) {problem}"
        os.write(REPORT, (line.rstrip() + "\n").encode("utf-8", "backslashreplace"))


PR_SET_PDEATHSIG = 1
"""Linux: the signal that a process gets when its parent is gone."""
REPORT = os.dup(2)
"""Standard error of the program; that of a fork goes to its log."""


def in_fork(work: Callable[[Path], str | None], *, seconds: float) -> str:
    """What `work` answers in a process group and a folder of its own; both are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="reliability-"))
    log, answer = folder.with_suffix(".log"), folder.with_suffix(".answer")
    sys.stdout.flush()
    sys.stderr.flush()
    if (child := os.fork()) == 0:
        _work(work, folder, log, answer)
    try:
        problem = _wait(child, seconds)
        if answer.exists():
            return answer.read_text(encoding="utf-8")
        last = log.read_text("utf-8", "replace").strip().splitlines()[-1:]
        return f"{problem}: {last[0][:300] if last else 'nothing was said'}"
    finally:
        for path in (log, answer):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _work(work: Callable[[Path], str | None], folder: Path, log: Path, answer: Path) -> None:
    """The life of a fork; it never returns."""
    try:
        os.setpgid(0, 0)
        # A shell that starts this in the background has it ignored, and forks would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(AttributeError):  # only Linux has it
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        try:
            said = work(folder) or ""
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        part = answer.with_suffix(".part")
        part.write_text(said, encoding="utf-8", errors="backslashreplace")
        part.rename(answer)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _wait(child: int, seconds: float) -> str:
    """How the child ended; nothing of its process group is left."""
    left, last = seconds, time.monotonic()
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and left > 0:
        time.sleep(0.01)
        now = time.monotonic()
        left, last = left - min(now - last, 1.0), now
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if ended[0]:
        return f"ended with {os.waitstatus_to_exitcode(ended[1])}"
    os.waitpid(child, 0)
    return f"not done after {seconds:.0f} s"
