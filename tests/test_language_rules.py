"""How a message finds its words, rule by rule: with a small catalogue, and pages of a test's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import finetune.language as languages
from finetune.language import pages, sentence, width, word
from finetune.language.help_pages import translate


@pytest.fixture
def in_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_LANG", "zh")


@pytest.fixture
def catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small one, in which every rule can be seen."""
    texts = {
        "{} is {}": "{1}就是{0}", "{} is damaged; {}": "{}已损坏；{}", "copy it again": "请重新复制", "the file": "文件", "yes": "是",
        "the file is damaged": "文件坏了", "{} of {} rows": "{} 行中的 {} 行",
    }  # fmt: skip
    monkeypatch.setattr(languages, "_catalogue", lambda: texts)
    monkeypatch.setattr(languages, "_templates", languages._templates.__wrapped__)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("yes", "是"), ("  yes\n", "  是\n"), ("42", "42"), ("unknown words", "unknown words"), ("yes\nthe file\n42", "是\n文件\n42"),
        ("the file is damaged", "文件坏了"), ("the file is damaged; copy it again", "文件已损坏；请重新复制"), ("a.txt:3: the file", "a.txt:3: 文件"),
        ("x; yes", "x; 是"), ("x. yes", "x. 是"), ("the file is yes", "是就是文件"), ("a: b: yes", "a: b: 是"),
    ],
)  # fmt: skip
def test_a_message_is_read_as_the_catalogue_knows_most_of_it(
    text: str, said: str, catalogue: None, in_chinese: None
) -> None:
    assert sentence(text) == said
    assert word(text) == {"yes": "是", "the file is damaged": "文件坏了"}.get(text, text)


def test_in_english_nothing_is_changed(catalogue: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_LANG", "en")
    assert (sentence("yes"), word("yes"), languages.chinese("yes")) == ("yes", "yes", "是")


@pytest.mark.parametrize(("text", "columns"), [("abc", 3), ("中文", 4), ("！", 2), ("ａ", 2), ("é", 1), ("", 0)])  # fmt: skip
def test_a_wide_character_takes_two_columns(text: str, columns: int) -> None:
    assert width(text) == columns


def test_pages_of_the_reader_s_language_come_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "tutorials/start.md": "# Start\n\n[简体中文](start_zh.md)\n\nGo [there](x.md) ![seen](y.png).\n", "tutorials/start_zh.md": "# 开始\n\n[English](start.md)\n\n去。\n",
        "reference/only.md": "# Only English\n", "start.md": "# Another\n", "zebra.md": "# Zebra\n",
    }.items():  # fmt: skip
        (tmp_path / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "docs" / name).write_text(text, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(pages, "PLACES", (tmp_path / "empty", tmp_path / "docs"))
    monkeypatch.setenv("FINETUNE_LANG", "en")
    assert list(pages.topics().items()) == [("only", "Only English"), ("start", "Start"), ("zebra", "Zebra")]  # fmt: skip
    assert pages.topic("start") == "# Start\n\nGo there seen."
    assert pages.topic("none") is None
    monkeypatch.setenv("FINETUNE_LANG", "zh")
    assert list(pages.topics().items()) == [("only", "Only English"), ("start", "开始"), ("zebra", "Zebra")]  # fmt: skip
    assert pages.topic("start") == "# 开始\n\n去。"


def test_a_command_its_options_and_its_last_words_are_translated(
    catalogue: None, in_chinese: None
) -> None:
    class Formatter:
        pass

    def command(**inner: Any) -> Any:
        option = SimpleNamespace(help="x; yes")
        context = type("Context", (), {"formatter_class": Formatter})
        return SimpleNamespace(help="yes", short_help="yes", epilog="the file is damaged", params=[option, SimpleNamespace()], commands=inner, context_class=context)  # fmt: skip

    outer = command(a=command())
    translate(outer)
    for one in (outer, outer.commands["a"]):
        assert (one.help, one.short_help, one.epilog, one.params[0].help) == ("是", "是", "文件坏了", "x; 是")  # fmt: skip
