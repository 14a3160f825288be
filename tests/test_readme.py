"""What the README says is so: its commands run, its map is the house, its keys exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import finetune
from finetune.cli import main
from finetune.config.load import load_config

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", ROOT / "README_zh.md"]


def blocks(readme: Path, language: str) -> list[str]:
    text = readme.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(readme: Path) -> list[str]:
    lines = [line for block in blocks(readme, "bash") for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.name)
def test_every_command_names_what_exists(readme: Path) -> None:
    for command in commands(readme):
        words = shlex.split(command)
        for word in words:
            if word.startswith(("scripts/", "configs/")) or word == "finetune.py":
                assert (ROOT / word).exists(), command
        config = next((word for word in words if word.startswith("configs/")), None)
        if config:
            load_config(ROOT / config, [word for word in words if re.match(r"[a-z_]+\.[a-z_]+=", word)])  # fmt: skip


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.name)
def test_every_subcommand_has_a_help_page(readme: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"`finetune ((?:data )?[a-z]+)", readme.read_text(encoding="utf-8")))
    assert {"train", "evaluate", "predict", "merge", "chat", "data check", "data show", "data tokens", "schema"} <= named  # fmt: skip
    for subcommand in sorted(named):
        with pytest.raises(SystemExit) as end:
            main([*subcommand.split(), "--help"])
        assert end.value.code == 0, subcommand
        assert f"finetune {subcommand}" in capsys.readouterr().out


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.name)
def test_the_map_is_the_house(readme: Path) -> None:
    (drawn,) = [block for block in blocks(readme, "text") if "finetune/" in block]
    named = {word.strip(",") for word in drawn.split() if word.strip(",").endswith((".py", ".sh", ".yaml", "/")) and "<" not in word}  # fmt: skip
    rooms = {f"{p.relative_to(ROOT / 'finetune').parts[0]}/" for p in (ROOT / "finetune").glob("*/*.py")}  # fmt: skip
    modules = {p.name for p in (ROOT / "finetune").glob("*.py") if not p.name.startswith("__")}
    for name in rooms | modules:
        assert name in named, f"{name} is not on the map"
    for name in named:
        assert list(ROOT.rglob(name.rstrip("/"))), f"{name} is on the map but not in the house"


def test_both_languages_show_the_same_commands() -> None:
    english, chinese = (commands(readme) for readme in READMES)
    assert english == chinese


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.name)
def test_the_yaml_shown_is_a_config(readme: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(readme, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        load_config(path, [])


@pytest.mark.slow
def test_the_quickstart_goes_from_nothing_to_a_reopened_model() -> None:
    environment = Path(sys.prefix)
    if not (environment / ".installed-quickstart").exists():
        pytest.skip("this environment was not made by scripts/install.sh")
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh", "--tiny"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "VENV": str(environment)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for sign in ("before", "after", "rouge-l", "tensors updated", "tuned", "Done."):
        assert sign in done.stdout, sign


HELP_OF_ALL = """
import contextlib, io, os, runpy, sys
for script in sys.argv[1:]:
    said, path = io.StringIO(), list(sys.path)
    sys.argv = [script, "--help"]
    sys.path.insert(0, os.path.dirname(script))
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code or "usage: " not in said.getvalue():
            print(script, end.code)
    else:
        print(script, "went on")
    sys.path[:] = path
"""


def test_every_script_prints_its_help_and_does_nothing(tmp_path: Path) -> None:
    """All in one process, in an empty folder: whatever a script would have made is seen there."""
    scripts = [path for path in sorted((ROOT / "scripts").glob("*/*.py")) if '__name__ == "__main__"' in path.read_text("utf-8")]  # fmt: skip
    assert len(scripts) > 40
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL, *map(str, scripts)],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("", 0), done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "script", [*(ROOT / "scripts").glob("*.sh"), *(ROOT / "scripts").glob("*/*.sh")], ids=lambda path: path.name
)  # fmt: skip
def test_every_shell_script_prints_its_help_and_does_nothing(script: Path, tmp_path: Path) -> None:
    if script.name == "install.sh":
        return  # read by the others; it is no command
    done = subprocess.run(
        ["bash", str(script), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "VENV": str(tmp_path / "venv")},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) >= 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("page", ["architecture.md", "architecture_zh.md"])
def test_the_walks_name_files_that_exist(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+/[a-z_/]*(?:\.py)?)`", text))
    assert len(named) > 25
    assert [
        name
        for name in sorted(named)
        if not (ROOT / "finetune" / name).exists() and not (ROOT / name).exists()
    ] == []


def test_both_languages_walk_through_the_same_files() -> None:
    english, chinese = (
        re.findall(
            r"`([a-z_]+/[a-z_/]*(?:\.py)?)`", (ROOT / "docs" / page).read_text(encoding="utf-8")
        )
        for page in ("architecture.md", "architecture_zh.md")
    )
    assert english == chinese


def bars(readme: Path) -> str:
    """What is skimmed: everything above the second half."""
    return re.split(r"^## (?:More|更多)$", readme.read_text(encoding="utf-8"), flags=re.MULTILINE)[
        0
    ]


def test_the_readme_is_skimmed_in_a_minute() -> None:
    assert len(bars(READMES[0]).split()) <= 900
    for readme in READMES:
        shown = [line for line in bars(readme).splitlines() if re.match(r"## |!\[", line)]
        assert len(shown) == 7, "six headings and a picture"
        assert (ROOT / re.findall(r"!\[[^\]]*\]\(([^)]+)\)", bars(readme))[0]).is_file()


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.name)
def test_each_row_of_the_comparison_has_its_command(readme: Path) -> None:
    rows = [line for line in bars(readme).split("LLaMA-Factory 0.9.5")[1].splitlines()[2:] if line.startswith("|")]  # fmt: skip
    assert len(rows) >= 6
    for row in rows:
        last = re.split(r"(?<!\\)\|", row)[-2]
        assert re.search(r"`(?:finetune |python -m |scripts/)", last), row


def test_the_changelog_is_by_release_and_the_newest_is_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(
        r"^## (\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)$", text, flags=re.MULTILINE
    )
    assert len(releases) == len(re.findall(r"^## ", text, flags=re.MULTILINE))
    versions = [tuple(map(int, version.split("."))) for version, _ in releases]
    assert versions == sorted(versions, reverse=True)
    assert releases[0][0] == finetune.__version__
    assert "unreleased" not in {day for _, day in releases[1:]}
