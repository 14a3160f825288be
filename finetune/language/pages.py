"""The pages of the documentation in the terminal, in the user's language."""

from __future__ import annotations

import re
from pathlib import Path

from finetune.language import language

ROOMS = ("tutorials", "explanation", "reference", "")
_PACKAGE = Path(__file__).resolve().parent.parent
PLACES = (_PACKAGE / "pages", _PACKAGE.parent / "docs")
"""Of a wheel, and of a clone."""


def topics() -> dict[str, str]:
    """Name of each page -> its title."""
    return {path.stem.removesuffix("_zh"): _title(path) for path in _files()}


def topic(name: str) -> str | None:
    """The text of a page; None when there is no such page."""
    path = next((path for path in _files() if path.stem.removesuffix("_zh") == name), None)
    return None if path is None else _plain(path.read_text(encoding="utf-8"))


def _files() -> list[Path]:
    ending = "_zh" if language() == "zh" else ""
    folder = next((place for place in PLACES if (place / "tutorials").is_dir()), None)
    found = [path for room in ROOMS if folder for path in sorted((folder / room).glob("*.md"))]
    by_name = {
        path.stem: path for path in reversed(found)
    }  # a name twice: the tutorial's page wins
    chosen = [by_name.get(name + ending, path) for name, path in by_name.items() if not name.endswith("_zh")]  # fmt: skip
    return chosen[::-1]


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def _plain(text: str) -> str:
    """Without the link to the other language; a link stands as its words."""
    text = re.sub(r"^\[(?:简体中文|English)\]\([^)]*\)\n\n?", "", text, count=1, flags=re.MULTILINE)
    return re.sub(r"!?\[([^\]]+)\]\([^)\s]+\)", r"\1", text).rstrip()
