"""Every page says the same in both languages: headings, code, commands, figures and links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GENERATED_IN_ONE_LANGUAGE: set[str] = set()
ENGLISH = sorted(  # the changelog is kept in one language
    page
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*.md")]
    if not page.stem.endswith("_zh")
    and page.name != "CHANGELOG.md"
    and page.relative_to(ROOT).as_posix() not in GENERATED_IN_ONE_LANGUAGE
)
FENCE = re.compile(r"^```(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
UNITS = {"million": 1e6, "billion": 1e9, "万": 1e4, "亿": 1e8}
NUMBER = re.compile(rf"(\d+(?:[.,]\d+)*)(?: ?({'|'.join(UNITS)}))?")
MADE = re.compile(r"^<!-- (?!/|end)(?!reliability).*?^<!-- (?:/|end).*?-->$", flags=re.DOTALL | re.MULTILINE)  # fmt: skip
EACH_PAGE = pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.relative_to(ROOT).as_posix())  # fmt: skip


def both(page: Path) -> tuple[str, str]:
    return page.read_text("utf-8"), chinese(page).read_text("utf-8")


def chinese(page: Path) -> Path:
    return page.with_name(f"{page.stem}_zh.md")


def prose(text: str) -> str:
    return FENCE.sub("", text)


def headings(text: str) -> list[int]:
    return [len(marks) for marks in re.findall(r"^(#+) ", prose(text), flags=re.MULTILINE)]


def code(text: str) -> list[list[str]]:
    return [block.splitlines() for block in FENCE.findall(text)]


def the_same(english: str, other: str) -> bool:
    """Are two lines of code equal, but for a Chinese remark in the columns behind the first?"""
    first, *remarks = re.split(r"(?<=\S) {2,}", other)
    translated = any(re.search(r"[\u4e00-\u9fff]", remark) for remark in remarks)
    return english == other or (translated and re.split(r"(?<=\S) {2,}", english)[0] == first)


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", prose(text)))


def rows(text: str) -> list[list[str]]:
    """The numbers of every row of a table, sorted: another language has another order."""
    lines = [line for line in prose(text).splitlines() if line.startswith("|")]
    return [sorted(number(*found) for found in NUMBER.findall(line)) for line in lines]


def number(digits: str, unit: str) -> str:
    """A number as it stands, or with its unit worked in: 25 million is 2500 万."""
    return f"{float(digits) * UNITS[unit]:g}" if unit else digits


def targets(text: str) -> list[str]:
    """Where the links go, without the anchors and the mark of a Chinese page."""
    links = re.findall(r"\]\(([^)\s#]+)", prose(text))
    return sorted(re.sub(r"_zh\.md$", ".md", link) for link in links)


@EACH_PAGE
def test_both_languages_have_the_same_headings(page: Path) -> None:
    english, other = both(page)
    assert headings(other) == headings(english)


@EACH_PAGE
def test_both_languages_show_the_same_code(page: Path) -> None:
    english, other = (code(text) for text in both(page))
    assert [len(block) for block in other] == [len(block) for block in english]
    for block, translated in zip(english, other, strict=True):
        pairs = zip(block, translated, strict=True)
        assert [pair for pair in pairs if not the_same(*pair)] == []


@EACH_PAGE
def test_both_languages_quote_the_same_commands_and_names(page: Path) -> None:
    english, other = both(page)
    assert quoted(other) ^ quoted(english) == set()


@EACH_PAGE
def test_both_languages_have_the_same_numbers_in_their_tables(page: Path) -> None:
    english, other = both(page)
    assert rows(other) == rows(english)


@EACH_PAGE
def test_both_languages_hold_the_same_tables_made_by_scripts(page: Path) -> None:
    english, other = both(page)
    assert MADE.findall(other) == MADE.findall(english)


@EACH_PAGE
def test_both_languages_link_to_the_same_places(page: Path) -> None:
    english, other = both(page)
    assert targets(other) == targets(english)
    assert f"({chinese(page).name})" in english
    assert f"({page.name})" in other


@EACH_PAGE
def test_a_chinese_page_links_to_chinese_pages(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s#:]+\.md)", prose(chinese(page).read_text("utf-8"))):
        there = (page.parent / link).resolve()
        assert there == page or not chinese(there).exists(), f"there is a Chinese {link}"
