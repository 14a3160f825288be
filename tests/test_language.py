"""The command line speaks Chinese where it is asked to: every message, help text and option has its words."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from finetune import console
from finetune.cli import main
from finetune.config.load import reference_page
from finetune.language import _catalogue, language, sentence, width
from finetune.language.help_pages import wrapped

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts" / "docs"))
import messages as catalogue_script  # noqa: E402

PLACE = re.compile(r"\{(\d*)\}")
KEPT = re.compile(r"(?<![\w-])--[a-z][\w-]*|`[^`{}]+`|\b(?:data|training|model|method|evaluation|deepspeed)\.[a-z_]+")  # fmt: skip


def translations() -> dict[str, str]:
    from babel.messages import pofile

    with catalogue_script.CATALOGUE.open("rb") as file:
        return {str(m.id): str(m.string) for m in pofile.read_po(file, locale="zh") if m.id}


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    return catalogue_script.texts()


@pytest.fixture
def in_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_LANG", "zh")


def said(*words: str) -> None:
    with pytest.raises(SystemExit):
        main(words)


def test_every_text_has_its_chinese_words(texts: dict[str, list[str]]) -> None:
    found = translations()
    missing = {text: places for text, places in texts.items() if not found.get(text)}
    assert missing == {}, "run: python scripts/docs/messages.py, and translate what it names"
    assert sorted(found.keys() - texts.keys()) == [], "run: python scripts/docs/messages.py"
    assert len(texts) > 1000


def test_every_value_of_a_message_has_one_place_in_the_translation() -> None:
    for text, other in translations().items():
        places = [int(n) if n else i for i, n in enumerate(PLACE.findall(other))]
        assert sorted(places) == list(range(len(PLACE.findall(text)))), (text, other)


def test_names_of_options_and_commands_stay_in_the_translation() -> None:
    for text, other in translations().items():
        if not text.startswith("# "):
            kept = set(KEPT.findall(" ".join(text.split())))
            assert kept <= set(KEPT.findall(other)), (text, other)


def test_the_program_reads_the_catalogue_as_babel_does() -> None:
    assert _catalogue() == translations()


def test_the_chinese_page_of_options_is_current(in_chinese: None) -> None:
    page = (ROOT / "docs/config_zh.md").read_text(encoding="utf-8")
    assert page.rstrip() == reference_page().rstrip()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "FINETUNE_LANG": "en"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "C", "FINETUNE_LANG": "zh"}, "zh"),
        ({"LANG": "en_US", "LC_MESSAGES": "zh_TW"}, "zh"),
        ({"LC_MESSAGES": "C", "LC_ALL": "zh_CN"}, "zh"),
        ({"LANG": "ZH", "LC_ALL": ""}, "zh"),
        ({"LANG": "zh"}, "zh"),
    ],
)
def test_the_language_is_that_of_the_variable_else_of_the_locale(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FINETUNE_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert language() == expected


def test_all_problems_of_a_configuration_are_said_in_chinese(
    in_chinese: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    said("train", "configs/lora.yaml", "trainin.x=1", "training.max_steps=a", "training.learning_rate=-1")  # fmt: skip
    err = capsys.readouterr().err
    assert "错误：配置中有 4 个问题" in err
    assert "trainin: 最外层 中没有这个键；是否想写 training？" in err
    assert "training.max_steps: 应为 整数，得到 'a'" in err
    assert "training.learning_rate: 应为 大于 0，得到 -1" in err
    assert "configs/lora.yaml:20: training.num_epochs: 与 training.max_steps 矛盾" in err


def test_a_wrong_option_is_said_in_chinese(
    in_chinese: None, capsys: pytest.CaptureFixture[str]
) -> None:
    said("merge", "--outpt", "x")
    err = capsys.readouterr().err
    assert "没有这个选项：--outpt（可用的选项：--output）" in err
    assert "用 'finetune merge --help' 查看帮助。" in err


def test_help_pages_are_chinese(in_chinese: None, capsys: pytest.CaptureFixture[str]) -> None:
    said("data", "check", "--help")
    page = capsys.readouterr().out
    assert "用法：" in page
    assert "检查每一行，并统计文件内容。" in page
    assert "选项:" in page
    assert "行的布局：auto, messages, openai" in page
    assert "--help                  显示本说明并退出。" in page
    assert max(map(width, page.splitlines())) <= 100


def test_bad_rows_are_said_in_chinese_and_values_stay_as_they_are(in_chinese: None) -> None:
    text = "2 bad rows:\n  a.jsonl:1: the row is number, not an object\n  is b.jsonl:2: the dialogue has no messages"
    assert sentence(text).splitlines()[1:] == [
        "  a.jsonl:1: 该行是 数字，不是对象",
        "  is b.jsonl:2: 对话没有消息",
    ]
    assert sentence("你好 {} 42") == "你好 {} 42"


def test_warnings_and_errors_say_so_in_chinese(
    in_chinese: None, capsys: pytest.CaptureFixture[str]
) -> None:
    console.warn("--base is now --include-base")
    console.error("x is damaged; delete it")
    assert (
        capsys.readouterr().err == "警告：--base 现在叫 --include-base\n错误：x 已损坏；请删除它\n"
    )


def test_chinese_lines_are_cut_by_the_columns_they_take() -> None:
    assert wrapped("查看帮助，然后 `finetune` 继续", 12) == [
        "查看帮助，然",
        "后",
        "`finetune`",
        "继续",
    ]
    assert wrapped("", 10) == []
