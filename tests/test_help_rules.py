"""Help pages and usage errors in Chinese, on a command of a test's own, and which template of many wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

import finetune.language as languages
from finetune.language import pages, sentence
from finetune.language.help_pages import translate, usage_error, wrapped

WIDTH = 60


@pytest.fixture
def in_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_LANG", "zh")
    monkeypatch.setattr(Context, "formatter_class", click.HelpFormatter)  # `translate` sets it


class Context(click.Context):
    formatter_class = click.HelpFormatter


def command(**inner: click.Command) -> Any:
    options = [
        click.Option(["--output"], help="Folder for what is placed; a new one in words that go on.", default="x", show_default=True),
        click.Option(["--a-name-that-takes-more-than-its-column"], help="Overwrite", required=True),
        click.Option(["-q"]),
    ]  # fmt: skip
    made = click.Group("f", inner, params=options, help="Merge what there is.")
    made.context_class = Context
    return made


def page(of: Any) -> list[str]:
    context = Context(of, info_name="f", terminal_width=WIDTH, max_content_width=WIDTH)
    return str(of.get_help(context)).splitlines()


def test_a_page_has_its_words_and_two_columns_and_a_long_name_a_line_of_its_own(
    in_chinese: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = command()
    english = made.get_help(Context(made, info_name="f"))
    translate(made)
    assert page(made) == [
        "用法： f [OPTIONS] COMMAND [ARGS]...",
        "",
        "  Merge what there is.",
        "",
        "选项:",
        "  --output TEXT                     Folder for what is",
        "                                    placed; a new one in",
        "                                    words that go on. [默认：",
        "                                    x]",
        "  --a-name-that-takes-more-than-its-column TEXT",
        "                                    Overwrite [必填]",
        "  -q TEXT",
        "  --help                            显示本说明并退出。",
    ]
    translate(made)  # once more changes nothing
    assert Context.formatter_class.english is click.HelpFormatter  # type: ignore[attr-defined]
    monkeypatch.setenv("FINETUNE_LANG", "en")
    translate(made)
    assert made.get_help(Context(made, info_name="f")) == english


def test_the_column_of_names_is_as_wide_as_the_widest_and_two_more(in_chinese: None) -> None:
    names = ["-a", "--twelve"]
    made = click.Command("f", params=[click.Option([name], is_flag=True, help="so") for name in names])  # fmt: skip
    made.context_class = Context
    translate(made)
    assert page(made)[-3:] == [
        "  -a        so",
        "  --twelve  so",
        "  --help    显示本说明并退出。",
    ]


def test_a_name_that_fills_its_column_has_a_line_of_its_own(in_chinese: None) -> None:
    names = ["--" + "n" * length for length in (31, 32, 60)]
    made = click.Command("f", params=[click.Option([name], is_flag=True, help="so") for name in names])  # fmt: skip
    made.context_class = Context
    translate(made)
    indent = " " * 36
    assert page(made)[-6:-1] == [f"  {names[0]} so", f"  {names[1]}", f"{indent}so", f"  {names[2]}", f"{indent}so"]  # fmt: skip


def test_a_usage_error_says_the_usage_where_to_look_and_what_is_wrong(in_chinese: None) -> None:
    made = command()
    translate(made)
    context = Context(made, info_name="finetune")
    with pytest.raises(click.UsageError) as caught:
        made.parse_args(context, ["--outptu", "x"])
    lines = usage_error(caught.value).splitlines()
    assert lines[0] == "用法： finetune [OPTIONS] COMMAND [ARGS]..."
    assert lines[1:3] == ["用 'finetune --help' 查看帮助。", ""]
    assert lines[3].startswith("错误：")
    assert "--outptu" in lines[3]
    assert usage_error(click.UsageError("so")) == "\n错误：so"


@pytest.mark.parametrize(
    ("text", "columns", "lines"),
    [
        ("ab cd", 5, ["ab cd"]), ("ab cd", 4, ["ab", "cd"]), ("abcdef gh", 3, ["abcdef", "gh"]), ("  a\n b  ", 9, ["a b"]),
        ("甲乙丙", 4, ["甲乙", "丙"]), ("甲乙。", 4, ["甲乙。"]), ("甲乙a", 4, ["甲乙", "a"]), ("甲 乙 丙", 5, ["甲 乙", "丙"]),
    ],
)  # fmt: skip
def test_lines_are_as_full_as_they_may_be(text: str, columns: int, lines: list[str]) -> None:
    assert wrapped(text, columns) == lines


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("the q aa bb cc", "best q"),  # the fourth that fits, and the one that says most
        ("one aa", "first one"),
        ("x one: y", "x one: y"),
        ("ab; the q aa bb cc", "ab; best q"),
        ("a is b of c", "c,a,b"),
        ("two\nlines here", "2 of lines"),
    ],
)
def test_of_templates_that_fit_the_one_that_says_most_is_taken(
    text: str, said: str, in_chinese: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {
        "{} aa": "first {}", "{} cc": "second {}", "{} bb cc": "third {}", "{} aa bb cc": "fourth {}", "the {} aa bb cc": "best {}",
        "{} is {} of {}": "{2},{0},{1}", "two{}here": "2 of lines",
    }  # fmt: skip
    monkeypatch.setattr(languages, "_catalogue", lambda: texts)
    monkeypatch.setattr(languages, "_templates", languages._templates.__wrapped__)
    assert sentence(text) == said


def test_pages_of_a_wheel_lie_where_it_packs_them() -> None:
    packed = pages.PLACES[0].relative_to(Path(languages.__file__).parents[2]).as_posix()
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for room in pages.ROOMS[:-1]:
        assert f'"docs/{room}" = "{packed}/{room}"' in project
