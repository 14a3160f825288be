"""Equal lists of tools are read and laid out once, long ones are not kept, and none is taken for another."""

from __future__ import annotations

import datetime
import decimal
import re
from typing import Any

import pytest
import tiny
from dialogues import dialogue

from finetune.data.chat.layouts import glm4
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import ChatTokenizer, load_chat_tokenizer
from finetune.data.dialogue import tool_calls
from finetune.data.dialogue.conversation import RowError
from finetune.data.dialogue.formats import to_conversation
from finetune.data.dialogue.tool_calls import read_tools, tool_name


def described(name: str, **more: Any) -> dict[str, Any]:
    """A tool that only its name and what its schema says tell from others."""
    function = {"name": name, "description": "d", "parameters": {"type": "object", **more}}
    return {"type": "function", "function": function}


@pytest.mark.parametrize("as_text", [False, True])
def test_equal_lists_give_one_result_and_long_ones_are_not_kept(as_text: bool) -> None:
    def given(*tools: dict[str, Any]) -> Any:
        return tool_calls.strict_json.dump(list(tools)) if as_text else list(tools)

    assert read_tools(given(described("f"))) is read_tools(given(described("f")))
    long = described("f", note="x" * tool_calls._LONG)
    before = tool_calls._remembered.cache_info().currsize
    first, second = read_tools(given(long)), read_tools(given(long))
    assert first == second == (long,)
    assert tool_calls._remembered.cache_info().currsize == before


def test_lists_that_python_calls_equal_are_kept_apart() -> None:
    told = [read_tools([described("f", const=value)]) for value in (1, True, 1.0, "1")]
    constants = [one[0]["function"]["parameters"]["const"] for one in told]
    assert [type(value) for value in constants] == [int, bool, float, str]


def test_a_list_that_is_kept_is_not_the_rows_own() -> None:
    given = [described("own")]
    kept = read_tools(given)
    given[0]["function"]["name"] = "changed"
    assert tool_name(kept[0]) == tool_name(read_tools([described("own")])[0]) == "own"


@pytest.mark.parametrize(
    "value",
    [
        datetime.date(2026, 1, 1), datetime.datetime(2026, 1, 1), datetime.time(1),
        datetime.timedelta(1), decimal.Decimal("1.5"), b"bytes",
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_only_a_table_can_hold_is_refused_by_its_kind(value: object) -> None:
    kind = re.escape(repr(type(value).__name__))
    with pytest.raises(
        RowError, match=f"^tools: a value of type {kind} cannot be .* JSON; make it"
    ):
        read_tools([described("f", since=value)])
    call = {"name": "f", "arguments": {"when": [value]}}
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]}  # fmt: skip
    with pytest.raises(
        RowError, match=f"^message 2: the arguments of 'f': a value of type {kind} "
    ):
        to_conversation(row, purpose="predict")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return load_chat_tokenizer(folder)


def test_each_list_is_laid_out_as_its_own_however_many_there_were(
    tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(glm4, "_KEPT", 3)
    template = ChatTemplate(tokenizer)
    layout: Any = template.layout
    long = "x" * glm4._LONG
    for turn in range(2):
        for number in range(8):
            more = {"note": long} if number % 2 else {}
            asked = dialogue(("user", "q"), ("reply", "a"), tools=[described(f"tool_{number}", **more)])  # fmt: skip
            for _ in range(2):
                text = template.decode(template.render([asked])[0].input_ids)
                assert [f"tool_{n}" in text for n in range(8)] == [n == number for n in range(8)], turn  # fmt: skip
            assert len(layout._same_tools) <= 3
    assert layout._kept_text.cache_info().currsize == 3
    assert all(len(str(tools)) < glm4._LONG for tools, _ in layout._same_tools.values())
