"""Tools, calls and what is doubtful in rows, rule by rule."""

from __future__ import annotations

from typing import Any

import pytest
from hints import said
from row_parts import (
    CALL,
    REPLY,
    RESULT,
    SYSTEM,
    THOUGHT,
    TOOL_CALL,
    USER,
    WEATHER,
    dialogue,
    reply,
    user,
)

from finetune.data.dialogue import doubts, strict_json
from finetune.data.dialogue.calls_in_text import CALL_IN_TEXT, with_calls_read, written_calls
from finetune.data.dialogue.conversation import (
    Message,
    RowError,
)
from finetune.data.dialogue.formats import detect, to_conversation
from finetune.data.dialogue.tool_calls import order_results, read_call, read_tools

CALLING = Message("assistant", "{}", metadata="f")
KINDS = {
    "u": Message("user", "Q"),
    "r": Message("assistant", "A"),
    "c": CALLING,
    "o": Message("observation", "o"),
}


# --- tools and calls -----------------------------------------------------------------------------


def test_results_stand_in_the_order_of_their_calls() -> None:
    def run(calls: list[Any], answers: list[Any]) -> list[str]:
        messages = [user(), *[CALLING] * len(calls)]
        messages += [Message("observation", str(one)) for one in answers]
        ids = dict(enumerate([None, *calls, *answers]))
        known = {place: one for place, one in ids.items() if one is not None}
        found = order_results(messages, known, range(1, len(messages) + 1))
        return [m.content for m in found[1 + len(calls) :]]

    assert run(["a", "b", "c"], ["c", "a", "b"]) == ["a", "b", "c"]
    assert run(["a", "a"], ["a", "a"]) == ["a", "a"]
    assert run(["a", None], ["a", "b"]) == ["a", "b"]
    with pytest.raises(RowError, match="answers call 'x', but the calls before it are 'a', 'b'"):
        run(["a", "b"], ["a", "x"])
    with pytest.raises(RowError, match="the call 'b' before message 4 has no result"):
        run(["a", "b"], ["a"])


def test_nulls_of_a_table_are_no_part_of_tools_and_calls_but_for_what_they_say() -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"default": None, "const": None, "type": None}},
    }
    (tool,) = read_tools([{"name": "f", "parameters": schema, "strict": None}])
    kept = tool["function"]
    assert kept["parameters"]["properties"]["city"] == {"default": None, "const": None}
    assert "strict" not in kept
    call = {"name": "f", "arguments": {"city": None, "other": None, "x": 1}}
    assert read_call(call, 1, (tool,)).arguments == '{"city": null, "x": 1}'
    assert read_call(call, 1).arguments == '{"city": null, "other": null, "x": 1}'
    assert read_call({"name": "python", "arguments": "print(1)"}, 1).arguments == "print(1)"
    with pytest.raises(RowError, match="'f' is defined twice"):
        read_tools([{"name": "f"}, {"name": "f"}])


WRITTEN = [
    ('<tool_call>{"name": "f", "arguments": {}}</tool_call>', (), ("", ["f"])),
    ('Hm. <tool_call>{"name": "f", "arguments": {}}</tool_call>', (), ("Hm.", ["f"])),
    ('<tool_call>{"name": "f", "arguments": {}}</tool_call> and more', (), None),
    ('<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>no call</tool_call>', (), None),
    ("f(a=1)", ("f",), ("", ["f"])), ("f(1)", ("f",), None), ("f(a=1)", ("g",), None), ("f(a=1)", (), None),
    ('f(a="x\\")")', ("f",), ("", ["f"])), ('f(a=true, b="(")', ("f",), ("", ["f"])),
    ('[f(a=1), g()]', ("f", "g"), ("", ["f", "g"])), ('f\n{"a": 1}', ("f",), ("", ["f"])),
    ('f\n{"a": 1}', ("g",), None), ('Action: f\nAction Input: {"a": 1}', (), ("", ["f"])),
]  # fmt: skip


@pytest.mark.parametrize(("text", "tools", "expected"), WRITTEN)
def test_a_call_that_is_written_into_a_text_is_found(text: str, tools: Any, expected: Any) -> None:
    found = written_calls(text, tools)
    assert (None if found is None else (found.text, [c.name for c in found.calls])) == expected


def test_a_users_text_is_a_result_only_behind_a_call() -> None:
    result, call = user("<tool_response>20</tool_response>"), reply("{}", metadata="f")
    assert with_calls_read([user(), call, result], ())[2] == Message("observation", "20")
    assert with_calls_read([user(), reply(), result], ())[2] == result
    thought = reply('<think>a</think>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>')
    stays = with_calls_read([user(), thought], (), thinks=True)
    assert [(m.metadata, m.content) for m in stays[1:]] == [("f", "<think>a</think>\n\n{}")]
    apart = with_calls_read([user(), thought], ())
    assert [m.metadata for m in apart[1:]] == ["", "f"]


# --- layouts and doubts --------------------------------------------------------------------------


def test_a_file_is_openai_when_one_of_its_first_rows_shows_it() -> None:
    plain = {"messages": [USER, REPLY]}
    assert detect([plain, plain]) == "messages"
    assert detect([plain, {"messages": [USER, TOOL_CALL]}]) == "openai"
    assert detect([{"instruction": "Q"}, {"messages": [TOOL_CALL]}]) == "alpaca"


def test_glaives_tools_are_those_of_its_system_text_else_of_the_row() -> None:
    chat = "USER: Q ASSISTANT: A <|endoftext|>"
    tool = '{"name": "f", "parameters": {}}'
    listed = to_conversation({"chat": chat, "system": f"SYSTEM: Use functions. {tool}"})
    assert [t["function"]["name"] for t in listed.tools] == ["f"]
    beside = to_conversation({"chat": chat, "system": "Use functions.", "tools": [WEATHER]})
    assert [t["function"]["name"] for t in beside.tools] == ["get_weather"]
    assert beside.messages[0] == Message("system", "Use functions.")


def test_reasoning_is_kept_left_out_or_required() -> None:
    kept = dialogue(USER, THOUGHT).messages[1].content
    assert kept == f"<think>\nwhy\n</think>\n\n{REPLY['content']}"
    assert dialogue(USER, THOUGHT, reasoning="drop").messages[1].content == REPLY["content"]
    assert "message 2: has reasoning" in said(dialogue, USER, THOUGHT, thinks=False)
    untrained = {**REPLY, "train": False}
    assert dialogue(USER, untrained, USER, THOUGHT, reasoning="require")
    assert "message 2: the reply has no" in said(dialogue, USER, REPLY, USER, THOUGHT, reasoning="require")  # fmt: skip
    called = {**CALL, "reasoning_content": "why"}
    assert dialogue(USER, called, RESULT, REPLY).doubts == (doubts.CALL_THOUGHT,)
    assert dialogue(USER, called, RESULT, REPLY, thinks=True).doubts == ()
    quoted = {"role": "assistant", "content": '{"x": "<think>a</think>b"}', "metadata": "f"}
    assert dialogue(USER, quoted, RESULT, REPLY, reasoning="drop").messages[1].content == quoted["content"]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "thinks", "expected"),
    [("<think>a</think>b", None, ""), ("<think>a</think>b", True, ""), ("b", False, ""),
     ("<think>a</think>b", False, doubts.THOUGHT_IN_TEXT),
     ("<thinking>a</thinking>b", None, doubts.OTHER_THOUGHT)],
)  # fmt: skip
def test_a_thought_in_a_text_is_doubtful_where_it_is_none(
    text: str, thinks: Any, expected: str
) -> None:
    assert doubts.thought_in_text(text, thinks=thinks) == expected


@pytest.mark.parametrize(("kinds", "count"), [("uccor", 1), ("uccoor", 0), ("ucoor", 0), ("uccr", 0), ("ucorucco", 1)])  # fmt: skip
def test_calls_with_fewer_results_are_counted(kinds: str, count: int) -> None:
    messages = [KINDS[kind] for kind in kinds]
    assert len(list(doubts.fewer_results(messages))) == count


def test_a_written_call_is_counted_or_refused_in_any_message() -> None:
    written = {
        "role": "assistant",
        "content": '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
    }
    assert dialogue(USER, REPLY, USER, written).doubts == (CALL_IN_TEXT,)
    assert "message 4: a call" in said(dialogue, USER, REPLY, USER, written, calls_in_text="error")
    assert "message 2: a call" in said(dialogue, USER, written, calls_in_text="error")


def test_the_number_of_a_message_is_that_of_the_row_until_others_stand_between() -> None:
    empty = {"role": "system", "content": ""}
    assert "message 3 is 'user'" in said(dialogue, empty, USER, USER, REPLY)
    written = {
        "role": "assistant",
        "content": 'Hm. <tool_call>{"name": "f", "arguments": {}}</tool_call>',
    }
    assert "message 4 is 'user'" in said(dialogue, USER, written, USER, REPLY, calls_in_text="read")


def test_columns_that_are_meant_to_stay_unread_leave_tools_alone() -> None:
    tool = {**WEATHER, "note": "x"}
    found = dialogue(USER, {**REPLY, "note": "x"}, columns={"tools": [tool], "note": "x"}, ignore_columns=("note",))  # fmt: skip
    assert found.unread == ()
    assert found.tools[0]["function"]["note"] == "x"


def test_pairs_and_histories_are_read_by_column() -> None:
    found = to_conversation({"instruction": "Q", "input": "I", "output": "A", "context": "C"})
    assert found.messages[0].content == "Q\nI\nC"
    lists = {"prompt": [SYSTEM, USER, REPLY, USER], "completion": [REPLY]}
    talk = to_conversation(lists)
    assert [m.train for m in talk.messages] == [None, None, False, None, None]
    pairs = to_conversation({"instruction": "Q", "output": "A", "history": [["a", "b"], ["c", "d"]]})  # fmt: skip
    assert [message.content for message in pairs.messages] == ["a", "b", "c", "d", "Q", "A"]
    for history in ([["a", ""]], [["", "b"]]):
        with pytest.raises(RowError, match="turn 1 has an empty text"):
            to_conversation({"instruction": "Q", "output": "A", "history": history})
    asked = to_conversation({"instruction": "Q", "output": ""}, purpose="predict")
    assert len(asked.messages) == 1
    both = {"prompt": "Q", "response": "A", "tools": [WEATHER], "functions": [WEATHER]}
    assert len(to_conversation(both).tools) == 1
    with pytest.raises(RowError, match="both define tools"):
        to_conversation(both | {"functions": [{**WEATHER, "name": "g"}]})


# --- strict JSON ---------------------------------------------------------------------------------


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "taken"),
    [(nested(100), True), (nested(101), False), ("[" + ",".join(["[]"] * 200) + "]", True),
     ('{"a": "\\ud83d\\ude00"}', True), ('{"a": "\\uD83D"}', False), ('{"a": "\\ude00"}', False),
     ('{"\\uD83D": 1}', False), ('{"a": ["\\u0000"]}', False), ('{"a": NaN}', False), ("[1] x", False)],
)  # fmt: skip
def test_only_clean_json_is_json(text: str, taken: bool) -> None:
    if taken:
        strict_json.parse(text)
    else:
        with pytest.raises(RowError):
            strict_json.parse(text)
    with pytest.raises(RowError, match="not finite"):
        strict_json.dump(float("nan"))


def test_tools_that_a_system_text_lists_are_read_where_the_row_has_none() -> None:
    listed = {
        "role": "system",
        "content": 'Tools: [{"name": "listed", "parameters": {}}]\nBe kind.',
    }
    alone = dialogue(listed, USER, REPLY, calls_in_text="read")
    assert [tool["function"]["name"] for tool in alone.tools] == ["listed"]
    beside = dialogue(listed, USER, REPLY, columns={"tools": [WEATHER]}, calls_in_text="read")
    assert [tool["function"]["name"] for tool in beside.tools] == ["get_weather"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1} x', "more text after the end of the JSON value, at column 9"),
        ('{"a": "x', "the JSON is cut off at column 7: Unterminated string starting"),
        ('{"a": 1', "the JSON is cut off at column 8: Expecting ',' delimiter"),
        ('{"a": "b\n', "the JSON is cut off at column 9: Invalid control character"),
        ('\n{"a": x}', "not JSON at column 7: Expecting value"),
        ("{'a': 1}", "not JSON at column 2: text stands in double quotes in JSON, here are single ones"),
        ('{"a": 1, "a": 2}', "duplicate key 'a' in one object"), ("[Infinity]", "Infinity is not JSON; write a number or null"),
        ('{"b": 1, "a": 1, "c": 2, "a": 2, "b": 3}', "duplicate key 'a' in one object"),
        ('["a", ' * 101 + "1" + "]" * 101, "nested more than 100 deep"),
        ("[" * 101 + "]" * 101, "nested more than 100 deep"), ("[" * 100_000, "nested more than 100 deep"),
        ('["\\u0000"]', "the text contains a NUL character"), ("[" + "1" * 5000 + "]", "not JSON that can be read: Exceeds"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_json_is_said_in_words(text: str, reason: str) -> None:
    assert said(strict_json.parse, text).startswith(reason)


@pytest.mark.parametrize("value", [0, False, [], {}])
def test_a_column_of_another_kind_is_no_empty_text(value: object) -> None:
    row = {"instruction": "Q", "input": value, "output": "A"}
    assert said(to_conversation, row).startswith("input: is ")


def test_kinds_of_values_have_names() -> None:
    kinds = {"true or false": True, "a number": 3, "text": "x", "a list": [], "an object": {}, "null": None}  # fmt: skip
    assert {strict_json.describe(value) for value in kinds.values()} == set(kinds)
    for name, value in kinds.items():
        assert strict_json.describe(value) == name
    assert (strict_json.describe(1.5), strict_json.describe(b"")) == ("a number", "bytes")
    assert strict_json.dump({"é": [1, None, 1.5]}) == '{"é": [1, null, 1.5]}'
