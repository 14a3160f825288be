"""Small mistakes put into the code, one at a time: do the tests of its room notice?

    python scripts/evidence/mutate.py --change main            # lines that differ from main
    python scripts/evidence/mutate.py finetune/data/chat/spans.py --most 40
    python scripts/evidence/mutate.py finetune --most 100 --seed 3   # drawn over all rooms alike
    python scripts/evidence/mutate.py --list mistakes.jsonl    # {"file", "old", "new"[, "tests"]} a line

Works in a copy of the tree. The tests are imported once; each mistake gets a forked process that runs the
tests that call the function with the mistake (`called.py` has seen them do it once): those that name its module,
its room, then all others, quick ones first, up to the first failure. So most mistakes take a second. Tests that start processes
come last and only with `--processes`. Prints a line for each and ends with 1 when one survived. A survivor
is a missing test, or a change that changes nothing: which of both, somebody has to look at.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))

import called  # noqa: E402
from mutations import Mutation, changed_lines, listed, made, modules  # noqa: E402
from warm_tests import HANGING, OPTIONS, WarmTests, forked  # noqa: E402

COPIED = [
    "finetune",
    "tests",
    "scripts",
    "configs",
    "data",
    "docs",
    "deploy",
    ".ci",
    "pyproject.toml",
    "finetune.py",
]
COPIED += [
    "README.md",
    "README_zh.md",
    "SECURITY.md",
    "SECURITY_zh.md",
    "CHANGELOG.md",
    "constraints.txt",
]
COPIED += ["CONTRIBUTING.md", "CONTRIBUTING_zh.md", "LICENSE"]
PROCESS_SECONDS = 8.0
"""What a test takes that starts a process, about."""


def test_files() -> list[Path]:
    """The files of the tests, but for the whole suites of others."""
    folders = (ROOT / "tests", ROOT / "tests/foreign")
    found = [path for folder in folders for path in sorted(folder.glob("test_*.py"))]
    return [path for path in found if path.name != "test_foreign.py"]


def groups_of(file: str, *, near_only: bool = False) -> list[list[str]]:
    """Test files that name a module, those that name its room, and all others."""
    module = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    room = ".".join(module.split(".")[:2])
    package, _, name = module.rpartition(".")
    near = rf"{re.escape(module)}\b|from {re.escape(package)} import [^\n]*\b{name}\b"
    groups: list[list[str]] = [[], [], []]
    for path in test_files():
        text = path.read_text(encoding="utf-8")
        place = 0 if re.search(near, text) else 1 if re.search(rf"{re.escape(room)}\b", text) else 2
        groups[place].append(path.relative_to(ROOT).as_posix())
    return groups[:1] if near_only else groups


def copied() -> Path:
    """A copy of the tree; the caller removes it."""
    folder = Path(tempfile.mkdtemp(prefix="mutate-"))
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".mypy_cache", ".ruff_cache")
            shutil.copytree(source, folder / name, ignore=ignored, symlinks=True)
        elif source.is_file():
            shutil.copy2(source, folder / name)
    return folder


def warm_up(tests: Sequence[str], folder: Path) -> None:
    """Imports here what the tests import, but for the project and the tests themselves."""
    libraries = called.STORE / "libraries"

    def scout() -> int:
        import pytest

        pytest.main(["--collect-only", *OPTIONS, *tests])
        ours = {path.stem for path in Path("tests").glob("*.py")} | {"finetune", "tests"}
        ours |= {"__main__", "mistakes", "mutate", "mutations", "warm_tests", "called", "xdist"}
        names = [n for n in sys.modules if n.partition(".")[0] not in ours and "pytest" not in n]
        called.STORE.mkdir(parents=True, exist_ok=True)
        libraries.write_text("\n".join(names), encoding="utf-8")
        return 0

    if not libraries.is_file():
        os.waitpid(forked(scout, folder / "log"), 0)
    for name in libraries.read_text(encoding="utf-8").splitlines():
        try:
            __import__(name)
        except Exception:  # only to save time: the tests import it again, and fail if they need it
            continue


def fresh_failure(tests: Sequence[str], log: Path, seconds: float) -> str:
    """The first of the tests that fails where all is imported anew; "" when all pass."""

    def run() -> int:
        import pytest

        sys.dont_write_bytecode = True
        return int(pytest.main([*OPTIONS, "--tb=line", "-x", *tests]))

    child = forked(run, log)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            time.sleep(0.02)
            continue
        code = os.waitstatus_to_exitcode(status)
        text = log.read_text(encoding="utf-8", errors="replace")
        named = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.M)
        if code and not named:
            raise SystemExit(f"the tests cannot be run ({code}): {text[-1000:]}")
        return str(named[0]) if code else ""
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"no end within {seconds:.0f} s"


class Laboratory:
    """A copy of the tree in which mistakes are made, and what its tests call."""

    def __init__(self, folder: Path, warm: WarmTests, seconds: float, *, processes: bool) -> None:
        self._folder = folder
        self._warm = warm
        self._seconds = seconds
        self._processes = processes
        self._calls: dict[str, called.Calls] = {}
        self._sound: dict[str, bool] = {}
        """Tests by whether they pass in the copy as it is."""
        self.unsound: set[str] = set()
        """Those that did not: what they would have noticed counts as unnoticed."""

    def noticed_by(self, mutation: Mutation, groups: Sequence[Sequence[str]]) -> str:
        """The test that fails because of the mistake, of the first group of files that has one; "" for none."""
        source = (self._folder / mutation.file).read_text(encoding="utf-8")
        wanted, constant = self._functions(mutation, source)
        if mutation.tests:
            files = {test.partition("::")[0] for test in mutation.tests}
            calls = {name: test for file in files for name, test in self._of(file).items()}
            named = {n: test for n, test in calls.items() if n.startswith(mutation.tests)}
            anew = not any(wanted & set(test.calls) for test in named.values())
            seconds = {name: test.seconds for name, test in named.items()}
            return self._first(mutation, source, seconds, anew=anew)
        left = self._seconds
        for files in groups:
            chosen, left = self._chosen(files, wanted, constant, left)
            if found := self._first(mutation, source, chosen):
                return found
        # Nobody was seen to call it: it runs at an import, or in a process.
        if left == self._seconds:
            every = {n: t.seconds for file in groups[0] for n, t in self._of(file).items()}
            return self._first(mutation, source, every, anew=True)
        return self._first(mutation, source, self._process_tests(groups[0]))

    def _first(
        self, mutation: Mutation, source: str, seconds: dict[str, float], *, anew: bool = False
    ) -> str:
        """The first of the tests that fails because of the mistake; `anew`, where all is imported with it."""
        new = mutation.applied(source)
        while tests := [test for test in seconds if self._sound.get(test, True)]:
            found = None if anew else self._warm.first_failure(tests, mutation.file, new, seconds)
            if found is None:
                found = self._fresh(tests, mutation.file, source, new)
            test = found.removeprefix(HANGING)
            if test not in seconds:
                return found
            if test not in self._sound:
                self._sound[test] = self._passes(test, mutation.file, source, seconds)
            if self._sound[test]:
                return found
            self.unsound.add(test)
        return ""

    def _passes(self, test: str, file: str, source: str, seconds: dict[str, float]) -> bool:
        """Whether a test passes without a mistake; a machine that is short of something gets a second chance."""
        for pause in (0, 5):
            time.sleep(pause)
            if not self._warm.first_failure([test], file, source, seconds):
                return True
        return False

    def _fresh(self, tests: Sequence[str], file: str, old: str, new: str) -> str:
        path = self._folder / file
        path.write_text(new, encoding="utf-8")
        try:
            return fresh_failure(tests, self._folder / "log", 20 + 5 * self._seconds)
        finally:
            path.write_text(old, encoding="utf-8")

    def _chosen(
        self, files: Sequence[str], wanted: set[str], constant: str, seconds: float
    ) -> tuple[dict[str, float], float]:
        """Tests that call one of the functions or name the constant, quick ones first, with what they take, and the time left."""
        calls = {n: t for file in files for n, t in self._of(file).items()}
        naming = {
            f"{file}::{test}"
            for file in files
            for test in (called.tests_that_name(constant, self._folder / file) if constant else ())
        }
        hit = {
            n: t.seconds
            for n, t in calls.items()
            if wanted & set(t.calls) or n.partition("[")[0] in naming
        }
        chosen: dict[str, float] = {}
        for name in sorted(hit, key=lambda one: hit[one]):
            if seconds > hit[name]:
                seconds -= hit[name]
                chosen[name] = hit[name]
        return chosen, seconds

    def _process_tests(self, near: Sequence[str]) -> dict[str, float]:
        """Tests of a module's own files that cannot be watched, if these are run at all."""
        if not self._processes:
            return {}
        calls = {n: t for file in near for n, t in self._of(file).items()}
        return {n: PROCESS_SECONDS for n, t in calls.items() if t.starts_process}

    def _functions(self, mutation: Mutation, source: str) -> tuple[set[str], str]:
        """The functions that a test must call to notice, and the constant or class of a mistake outside of all."""
        line = mutation.line or source[: source.index(mutation.old)].count("\n") + 1
        if around := called.functions_at(source, line):
            asked = {f"{mutation.file}:{around[0]}"}
            if "@triton.jit" in source:  # what Triton compiles is seen where it is started
                asked |= called.that_mention(around[0], self._folder)
            return asked, ""
        name = called.name_at(source, line)
        found = called.that_mention(name, self._folder) if name else set()
        every = {f"{mutation.file}:{function}" for function in called.functions_of(source)}
        return found | every, name

    def _of(self, file: str) -> called.Calls:
        if file not in self._calls:
            seen = called.kept(self._folder / file)
            if seen is None and file in self._warm.files:
                seen = self._warm.watched(file)
            self._calls[file] = seen or {}
        return self._calls[file]


@contextmanager
def workshop(files: Sequence[str]) -> Iterator[tuple[Path, WarmTests]]:
    """A copy of the tree, and the tests of these files ready to run in it."""
    folder = copied()
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{folder / 'tests'}"
    warm = None
    try:
        warm_up(files, folder)
        warm = WarmTests(folder, files)
        yield folder, warm
    finally:
        if warm is not None:
            warm.close()
        os.chdir(ROOT)
        shutil.rmtree(folder, ignore_errors=True)


def outcomes(
    mutations: Sequence[Mutation], seconds: float, *, room_too: bool, processes: bool
) -> Iterator[tuple[Mutation, str, float]]:
    """Each mutation with what noticed it, "" for none, and the seconds that it took."""
    groups = {one: groups_of(one.file, near_only=not room_too) for one in mutations}
    files = {
        test.partition("::")[0]
        for one, found in groups.items()
        for test in (one.tests or itertools.chain.from_iterable(found))
    }
    with workshop(sorted(files)) as (folder, warm):
        laboratory = Laboratory(folder, warm, seconds, processes=processes)
        for one in mutations:
            begun = time.monotonic()
            yield one, laboratory.noticed_by(one, groups[one]), time.monotonic() - begun
        if laboratory.unsound:
            listed = ", ".join(sorted(laboratory.unsound)[:5])
            print(f"{len(laboratory.unsound)} tests fail without a mistake, too, such as {listed}")


def watched() -> int:
    """Sees what every test calls that was not seen yet; 0."""
    unseen = [p.relative_to(ROOT).as_posix() for p in test_files() if called.kept(p) is None]
    for start in range(0, len(unseen), 40):
        with workshop(unseen[start : start + 40]) as (_, warm):
            for file in sorted(warm.files):
                tests = warm.watched(file).values()
                started = sum(test.starts_process for test in tests)
                seconds = sum(test.seconds for test in tests)
                print(
                    f"{file}: {len(tests)} tests, {started} start processes, {seconds:.0f} s",
                    flush=True,
                )
    return 0


def main() -> int:
    """Makes the mistakes; 1 when one survives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="modules of the package")
    parser.add_argument("--change", metavar="COMMIT", help="only lines that differ from it")
    parser.add_argument("--list", type=Path, metavar="FILE", help="mistakes of a person's own")
    parser.add_argument("--most", type=int, default=60, help="mistakes that are made (60)")
    parser.add_argument("--seed", type=int, default=0, help="draws them (0)")
    parser.add_argument("--seconds", type=float, default=60, help="of tests for one mistake (60)")
    parser.add_argument("--near", action="store_true", help="only tests that name the module")
    parser.add_argument("--processes", action="store_true", help="tests that start processes too")
    parser.add_argument("--tests", nargs="*", default=(), help="instead of the room's")
    parser.add_argument(
        "--watch", action="store_true", help="only see what all tests call: later runs are quicker"
    )
    asked = parser.parse_args()
    if asked.watch:
        return watched()
    if asked.list:
        mutations = listed(asked.list)
    else:
        lines: dict[str, set[int] | None] = dict.fromkeys(modules(asked.files))
        lines |= changed_lines(asked.change) if asked.change else {}
        mutations = made(lines, asked.most, asked.seed)
    if asked.tests:
        mutations = [
            Mutation(m.file, m.old, m.new, m.line, m.column, tuple(asked.tests)) for m in mutations
        ]
    counts = Counter[bool]()
    for one, found, seconds in outcomes(
        mutations, asked.seconds, room_too=not asked.near, processes=asked.processes
    ):
        counts[bool(found)] += 1
        print(f"{'caught  ' if found else 'SURVIVED'} {seconds:5.1f} s  {one}  {found}", flush=True)
    print(f"{counts[True]} of {counts.total()} mistakes were noticed")
    return int(counts[False] > 0)


if __name__ == "__main__":
    sys.exit(main())
