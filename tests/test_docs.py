"""What the pages name is there: commands, their options, files, headings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer
from typer.core import TyperGroup, TyperOption

from finetune.cli.commands import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*.md")])
GROUP: Any = typer.main.get_command(app)
OF_OTHERS = {"--nnodes", "--rdzv-endpoint", "--ipc", "--shm-size",  # options of torchrun, SLURM, vLLM and llama.cpp that stand alone in a sentence
    "--shutdown_timeout", "--signal", "--generation-config", "--trust-remote-code", "--jinja", "--no-repack", "--reasoning-parser",
}  # fmt: skip


def names(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_of(page: Path) -> list[str]:
    """Inline code and the lines of code blocks, those that go on in the next line as one."""
    text = text_of(page)
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [line.split("  #")[0] for line in lines] + re.findall(r"`([^`\n]+)`", prose)


def commands() -> dict[str, Any]:
    """`data check` -> the command."""
    found: dict[str, Any] = {}
    for name, command in GROUP.commands.items():
        inner = command.commands if isinstance(command, TyperGroup) else {}
        found |= {name: command} | {f"{name} {part}": each for part, each in inner.items()}
    return found


def options(command: Any) -> set[str]:
    shown = [p for p in command.params if isinstance(p, TyperOption) and not p.hidden]
    return {"--help", *(word for p in shown for word in (*p.opts, *p.secondary_opts))}


COMMANDS = commands()
ANY_COMMAND = options(GROUP)


def calls(page: Path) -> list[tuple[str, set[str]]]:
    """(`data check`, its options) of each call of finetune that a page shows."""
    found = []
    for code in code_of(page):
        for part in re.split(r"\s(?:&&|\|)\s", code):
            match = re.search(
                r"(?:^|(?<!from)[\s/])finetune(?:\.py)? ((?:data )?[a-z]+)(?= |$)(.*)", part
            )
            if match:
                words = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", match[2]))
                found.append((match[1], words))
    return found


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_command_and_option_that_a_page_names_exists(page: Path) -> None:
    for command, words in calls(page):
        assert command in COMMANDS, f"finetune {command}"
        unknown = words - options(COMMANDS[command]) - ANY_COMMAND
        assert not unknown, f"finetune {command} has no {', '.join(sorted(unknown))}"


def test_enough_calls_are_found_to_mean_something() -> None:
    found = [call for page in PAGES for call in calls(page)]
    assert len(found) > 80
    assert len({command for command, _ in found}) > 15


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=names)
def test_every_option_named_alone_is_one_of_a_command_or_a_script(page: Path) -> None:
    scripts = [*(ROOT / "scripts").rglob("*.*"), *(ROOT / "tests/reliability").glob("*.py")]
    known = OF_OTHERS | ANY_COMMAND.union(*map(options, COMMANDS.values()))
    sources = " ".join(p.read_text("utf-8") for p in scripts if p.suffix in (".py", ".sh"))
    known |= set(re.findall(r"(?<=[\"'\s])--[a-z][\w-]*", sources))
    named = {code.split("=")[0].split()[0] for code in code_of(page) if code.startswith("--")}
    assert sorted(named - known) == []


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        number = sum(each == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", each) is not None for each in found)  # fmt: skip
        found.add(f"{slug}-{number}" if number else slug)
    return found


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    prose = re.sub(r"^```.*?^```|`[^`\n]+`", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = unquote(target).partition("#")
        there = page.parent / file if file else page
        assert there.exists(), f"{target}: no such file"
        assert ROOT in there.resolve().parents, f"{target}: outside the repository"
        if anchor:
            assert anchor in anchors(there), f"{target}: no such heading"
