"""Every command that a page shows can be typed as it stands: it is run here, or parsed and marked with what it needs."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from finetune.cli import main
from finetune.cli.commands import app
from finetune.config.load import load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(page for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if not page.stem.endswith("_zh"))  # fmt: skip
GROUP: Any = typer.main.get_command(app)
MARK = "# needs: "
RUN_BY = {
    "README.md": "scripts/evidence/readme_commands.py",
    "docs/tutorials/first_model.md": "tests/test_docs_commands.py",
    "docs/tutorials/from_demo.md": "tests/test_migrate.py",
    "docs/tutorials/tools.md": "tests/test_docs_commands.py",
    "docs/tutorials/images.md": "tests/test_docs_commands.py",
    "docs/tutorials/long_text.md": "tests/test_docs_commands.py",
    "docs/tutorials/eight_gpus.md": "tests/test_docs_commands.py",
    "docs/evaluation.md": "tests/test_requirements.py",
    "docs/export.md": "tests/test_push.py",
    "docs/multi_node.md": "tests/test_multi_node.py",
    "docs/python.md": "tests/test_api.py",
    "docs/front_ends.md": "tests/test_page.py",
    "docs/page.md": "tests/test_page.py",
    "docs/report.md": "tests/test_report_runs.py",
    "docs/serving.md": "tests/test_serving.py",
}
"""Page -> what runs its unmarked commands, with other models and files where its own are large."""


WHOLE = ("tests/test_docs_commands.py", "scripts/evidence/readme_commands.py")
"""These read the pages and run what they find."""


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)  # fmt: skip


def commands(block: str) -> list[list[str]]:
    """The words of each command, lines that go on as one, without remarks."""
    lines = block.replace("\\\n", " ").splitlines()
    bare = [re.sub(r"(?:^|\s)#(?=\s|$|[a-z]).*", "", line).strip() for line in lines]
    return [shlex.split(line) for line in bare if line and not line.startswith(("#", "export "))]


def ours(words: list[str]) -> list[str] | None:
    """The words behind `finetune`, as its parser gets them; None for other programs."""
    for at, word in enumerate(words):
        if word == "finetune" or word.endswith("/finetune"):
            return words[at + 1 :]
        if word == "finetune.py":
            rest = words[at + 1 :]
            return rest if rest and rest[0] in GROUP.commands else ["train", *rest]
    return None


def of_pages() -> list[tuple[str, list[str]]]:
    found = [
        (page.relative_to(ROOT).as_posix(), words)
        for page in PAGES
        for block in blocks(page)
        for words in map(ours, commands(block))
        if words and "…" not in words and "$@" not in words
    ]
    assert len(found) > 40
    return found


@pytest.mark.parametrize(("page", "words"), of_pages(), ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60])  # fmt: skip
def test_every_command_of_a_page_is_one_that_the_program_takes(page: str, words: list[str]) -> None:
    command, rest = GROUP, list(words)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    command.make_context(words[0], rest, resilient_parsing=False)
    config = next((word for word in rest if word.startswith("configs/")), None)
    if config and words[0] != "migrate":
        load_config(ROOT / config, [w for w in rest if re.match(r"[a-z]+\.[a-z_]+=", w)])


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)  # fmt: skip
def test_what_is_not_run_by_a_test_is_marked_with_what_it_needs(page: Path) -> None:
    name = page.relative_to(ROOT).as_posix()
    unmarked = [block for block in blocks(page) if not block.startswith(MARK)]
    if unmarked:
        assert name in RUN_BY, f"{name}: run these in a test, or begin the block with `{MARK}…`"
        runs = (ROOT / RUN_BY[name]).read_text(encoding="utf-8")
        for words in [words for block in unmarked for words in map(ours, commands(block)) if words]:
            named = words[1] if words[0] == "data" else words[0]
            assert named in runs or RUN_BY[name] in WHOLE, (name, words)


def test_pages_with_code_to_type_are_all_there() -> None:
    assert {name for name in RUN_BY if not (ROOT / name).exists()} == set()


def test_the_first_tutorial_ends_with_a_model_that_replies(
    tmp_path: Path, tiny_chatglm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Typed line by line in an empty folder; the model's script is stood in for by what it writes."""
    for name in ("data", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    first, *rest = [words for block in blocks(ROOT / "docs/tutorials/first_model.md") for words in commands(block)]  # fmt: skip
    assert first == ["python", "scripts/fixtures/quickstart_model.py", "runs/first-model", "--tiny"]
    shutil.copytree(tiny_chatglm, "runs/first-model")
    others = [
        words
        for name in ("tools", "images", "long_text", "eight_gpus")
        for block in blocks(ROOT / f"docs/tutorials/{name}.md")
        for words in commands(block)
        if not block.startswith(MARK) and words[1:] != ["board", "runs"]  # it never ends
    ]
    for words in map(ours, [*rest, *others]):
        assert words is not None
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0, (words, capsys.readouterr().err[-2000:])
    assert Path("runs/first-evaluation/report.html").exists()
    held_out = Path("data/support_desk/heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(Path("runs/replies.jsonl").read_text(encoding="utf-8").splitlines()) == len(held_out)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_of_commands_is_made_of_the_commands(
    language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path.insert(0, str(ROOT / "scripts/docs"))
    import cli_page

    monkeypatch.setenv("FINETUNE_LANG", language)
    name = "cli_zh.md" if language == "zh" else "cli.md"
    assert (ROOT / "docs/reference" / name).read_text(encoding="utf-8") == cli_page.page(), (
        f"run: FINETUNE_LANG={language} python scripts/docs/cli_page.py > docs/reference/{name}"
    )


def test_every_page_stands_in_the_list_of_the_site() -> None:
    listed = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), flags=re.MULTILINE))  # fmt: skip
    elsewhere = {"index.md", "changelog.md", "security.md", "contributing.md", "data.md"}
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.parent != ROOT}
    assert listed == pages | elsewhere
