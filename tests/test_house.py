"""The house is in order: style, types, import arrows, sizes, and what is never called."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.reliability.security_code import RULES, SOURCES, broken

ROOT = Path(__file__).resolve().parent.parent
ALL_PYTHON = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "scripts").rglob("*.py"))]  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["lint-imports"],
        ["codespell", "finetune", "tests", "scripts", "configs", "README.md", "docs"],
    ],
    ids=lambda command: " ".join(command),
)
def test_the_tools_find_nothing(command: list[str]) -> None:
    beside_python = Path(sys.executable).parent / command[0]
    program = str(beside_python) if beside_python.exists() else shutil.which(command[0])
    if program is None:
        pytest.skip(f"{command[0]} is not installed: pip install -e '.[dev]'")
    done = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_room_is_over_400_lines() -> None:
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in ALL_PYTHON}
    assert {str(p): n for p, n in lengths.items() if n > 400} == {}


@pytest.mark.parametrize("rule", RULES)
def test_nothing_opens_pickles_runs_shells_or_evaluates_text(rule: str) -> None:
    assert broken(rule) == []


def imported(path: Path) -> set[str]:
    """Modules of ours that a module imports, inside functions too."""
    modules = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in SOURCES
    }
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "finetune":
            names = {f"{node.module}.{name.name}" for name in node.names}
            found |= names & modules
            found |= {str(node.module)} if names - modules else set()
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names} & modules
    return found


def test_no_module_imports_more_than_15_of_ours() -> None:
    fan_out = {p.relative_to(ROOT).as_posix(): len(imported(p)) for p in SOURCES}
    assert fan_out["finetune/training/run.py"] > 10
    assert {path: number for path, number in fan_out.items() if number > 15} == {}


def test_no_room_has_more_than_14_modules() -> None:
    rooms = Counter(
        p.parent.relative_to(ROOT).as_posix() for p in SOURCES if p.name != "__init__.py"
    )
    assert rooms["finetune/training"] > 10
    assert {room: number for room, number in rooms.items() if number > 14} == {}


def test_the_whole_config_is_named_by_the_command_line_and_the_program_only() -> None:
    allowed = ("finetune/cli/", "finetune/config/", "finetune/training/run.py")
    named = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == "RunConfig"
    }
    assert "finetune/training/run.py" in named
    assert [path for path in named if not path.startswith(allowed)] == []


def test_no_exception_is_swallowed() -> None:
    silent = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.ExceptHandler)
                and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
                and all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)
            ):
                silent.append(f"{path.name}:{node.lineno}")
    assert silent == []


@pytest.mark.parametrize(
    "module",
    ["finetune.cli", "finetune.config.schema", "finetune.config.load", "finetune.console", "finetune.data.preview.report",
     "finetune.data.examples.dataset", "finetune.data.chat.template", "finetune.evaluation.scores.metrics", "finetune.report.compare",
     "finetune.report.plots", "finetune.report.terminal", "finetune.report.page"],
)  # fmt: skip
def test_light_rooms_import_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {module}; heavy = {{'torch', 'transformers', 'datasets', 'peft', 'deepspeed', 'resvg_py'}}; "
        "found = heavy & set(sys.modules); sys.exit(', '.join(sorted(found)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


_WAITS = {"settimeout", "communicate", "wait", "acquire"}
_REQUESTS = {"get", "post", "head", "options", "request", "stream", "Client", "AsyncClient"}


def _impatient(path: Path) -> list[int]:
    """Lines of calls that give up within a minute, or by httpx's own rule after five seconds."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        of, _, name = ast.unparse(node.func).rpartition(".")
        limits = [k.value for k in node.keywords if k.arg == "timeout"]
        limits += node.args[:1] if name in _WAITS else []
        numbers = [limit.value for limit in limits if isinstance(limit, ast.Constant)]
        numbers = [number for number in numbers if isinstance(number, int | float)]
        asks = of == "httpx" and name in _REQUESTS
        if any(number < 60 for number in numbers) or (asks and not limits):
            found.append(node.lineno)
    return found


def _answered_by_its_name(path: Path) -> list[str]:
    """Tests with a folder of their own, whose name begins like theirs, that wait for a word of their name."""
    found = []
    for test in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(test, ast.FunctionDef) or not test.name.startswith("test_"):
            continue
        if not {"tmp_path", "folder"} & {argument.arg for argument in test.args.args}:
            continue
        words = [k.value for k in ast.walk(test) if isinstance(k, ast.keyword) and k.arg == "match"]
        texts = [word.value for word in words if isinstance(word, ast.Constant)]
        if any(re.search(str(text), test.name[:30]) for text in texts):  # as pytest shortens it
            found.append(test.name)
    return found


def test_no_message_is_told_by_the_folder_that_is_named_like_its_test(tmp_path: Path) -> None:
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    assert {str(path): names for path in tests if (names := _answered_by_its_name(path))} == {}
    (tmp_path / "a.py").write_text(
        "def test_pickles_are_refused(tmp_path):\n    raises(E, match='pickle')\n"
    )
    assert _answered_by_its_name(tmp_path / "a.py") == ["test_pickles_are_refused"]


def test_what_must_come_is_waited_for_for_a_minute_on_a_busy_machine(tmp_path: Path) -> None:
    tests = sorted((ROOT / "tests").rglob("*.py"))
    assert {str(path): lines for path in tests if (lines := _impatient(path))} == {}
    (tmp_path / "a.py").write_text("x.wait(5)\nhttpx.get(u)\nf(timeout=1)\nx.wait(60)\n','.join(x)")
    assert _impatient(tmp_path / "a.py") == [1, 2, 3]
