"""Rows of every layout to conversations: one form, five spellings of a call, a reason otherwise."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_parts import CALL, REPLY, RESULT, SYSTEM, USER, WEATHER, messages, reason

from finetune.data.dialogue.conversation import (
    Conversation,
    Message,
    RowError,
    ShownImage,
    validate,
)
from finetune.data.dialogue.formats import FORMATS, detect, to_conversation

ARGUMENTS = {"city": "北京", "days": 2}
CITY = '{"city": "北京", "days": 2}'
COMPACT = json.dumps(ARGUMENTS, separators=(",", ":"))  # ASCII-escaped, as OpenAI writes it
ASK = {"role": "user", "content": "天气？"}
ANSWER = {"role": "assistant", "content": "20度。"}
SPELLINGS: dict[str, dict[str, Any]] = {
    "messages with metadata": {
        "messages": [
            {"role": "system", "content": "", "tools": [{"type": "function", "function": WEATHER}]},
            ASK,
            {"role": "assistant", "metadata": "get_weather", "content": CITY},
            {"role": "observation", "content": '{"t": 20}'},
            ANSWER,
        ]
    },
    "content with name and arguments": {
        "tools": [WEATHER],
        "messages": [
            ASK,
            {"role": "assistant", "content": {"name": "get_weather", "arguments": ARGUMENTS}},
            {"role": "observation", "content": {"t": 20}},
            ANSWER,
        ],
    },
    "the same as JSON text": {
        "tools": json.dumps([WEATHER]),
        "messages": [
            ASK,
            {"role": "assistant", "content": f'{{"name": "get_weather", "arguments": {COMPACT}}}'},
            {"role": "observation", "content": '{"t": 20}'},
            ANSWER,
        ],
    },
    "OpenAI tool_calls": {
        "tools": [{"type": "function", "function": WEATHER}],
        "messages": [
            ASK,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": COMPACT},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": '{"t": 20}'},
            ANSWER,
        ],
    },
    "ShareGPT function_call": {
        "tools": json.dumps([WEATHER]),
        "conversations": [
            {"from": "human", "value": "天气？"},
            {"from": "function_call", "value": f'{{"name": "get_weather", "arguments": {COMPACT}}}'},
            {"from": "observation", "value": '{"t": 20}'},
            {"from": "gpt", "value": "20度。"},
        ],
    },
    "ChatGLM3 tool role": {
        "tools": [WEATHER],
        "conversations": [
            ASK,
            {"role": "tool", "name": "get_weather", "parameters": ARGUMENTS, "observation": {"t": 20}},
            ANSWER,
        ],
    },
    "OpenAI's older function_call": {
        "functions": [WEATHER],
        "messages": [
            ASK,
            {"role": "assistant", "content": None, "function_call": {"name": "get_weather", "arguments": COMPACT}},
            {"role": "function", "name": "get_weather", "content": '{"t": 20}'},
            ANSWER,
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_spellings_of_a_tool_call_are_one_conversation(spelling: str) -> None:
    assert to_conversation(SPELLINGS[spelling], location="x:1") == Conversation(
        (
            Message("user", "天气？"),
            Message("assistant", CITY, metadata="get_weather"),
            Message("observation", '{"t": 20}'),
            Message("assistant", "20度。"),
        ),
        ({"type": "function", "function": WEATHER},),
        "x:1",
    )


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"messages": [USER, REPLY]}, "messages"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "openai"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}]}, "openai"),
        ({"conversations": [{"from": "human", "value": "Q"}]}, "sharegpt"),
        ({"conversations": [USER]}, "chatglm3"),
        ({"instruction": "Q", "input": "", "output": "A"}, "alpaca"),
        ({"content": "Q", "summary": "A"}, "pairs"),
        ({"prompt": "Q", "response": "A"}, "pairs"),
        ({"question": "Q", "answer": "A", "id": 1}, "pairs"),
        ({"input": "Q", "output": "A"}, "pairs"),
    ],
)
def test_the_layout_is_told_from_the_columns(row: dict[str, Any], layout: str) -> None:
    assert detect([{"id": 3}, row]) == layout


def test_columns_that_are_named_decide_the_layout() -> None:
    row = {"a": "Q", "b": "A", "messages": []}
    assert detect([row], ("a", "b")) == "pairs"
    conversation = to_conversation(row, "pairs", columns=("a", "b"))
    assert conversation.messages == (Message("user", "Q"), Message("assistant", "A"))


def test_a_later_row_with_tool_calls_makes_a_file_openai() -> None:
    rows = [{"messages": [USER, REPLY]}, SPELLINGS["OpenAI tool_calls"]]
    assert detect(rows) == "openai"


# One reader for lists of messages


def test_an_empty_system_message_is_absent_and_its_tools_stay() -> None:
    plain = messages({"role": "system", "content": ""}, USER, REPLY)
    assert plain == messages(USER, REPLY)
    tooled = messages({"role": "system", "content": "", "tools": [{"type": "python"}]}, USER, REPLY)
    assert (len(tooled.messages), tooled.tools) == (2, ({"type": "python"},))


def test_tools_may_stand_in_both_places_when_they_agree() -> None:
    both = {"role": "system", "content": "S", "tools": [WEATHER]}
    assert messages(both, USER, REPLY, tools=[WEATHER]).tools[0]["function"] == WEATHER
    assert "the row has others" in reason(both, USER, REPLY, tools=[{"type": "python"}])


@pytest.mark.parametrize(
    "spelling",
    [
        WEATHER,
        {"type": "function", "function": WEATHER},
        {"function": WEATHER},
        {"type": "function", **WEATHER},
        json.dumps(WEATHER),
    ],
)
def test_all_spellings_of_a_tool_definition_are_one(spelling: Any) -> None:
    expected = ({"type": "function", "function": WEATHER},)
    assert messages(USER, REPLY, tools=[spelling]).tools == expected
    assert messages(USER, REPLY, tools=json.dumps([spelling])).tools == expected


@pytest.mark.parametrize("nothing", [None, "", [], "[]", "  "])
def test_no_tools_may_be_said_in_any_way(nothing: Any) -> None:
    assert messages(USER, REPLY, tools=nothing).tools == ()


def test_a_call_in_messages_is_taken_verbatim() -> None:
    spaced = messages(USER, {**CALL, "content": '{ "a":1 }'}, RESULT, REPLY)
    assert spaced.messages[1].content == '{ "a":1 }'
    as_object = messages(USER, {**CALL, "content": {"a": "é"}}, RESULT, REPLY)
    assert as_object.messages[1].content == '{"a": "é"}'
    picture = messages(USER, {"role": "assistant", "metadata": "cogview", "content": "a cat"})
    assert picture.messages[1] == Message("assistant", "a cat", "cogview")


def test_text_beside_tool_calls_is_a_reply_before_the_calls() -> None:
    calls = [{"id": i, "function": {"name": f"f{i}", "arguments": "{}"}} for i in "ab"]
    assistant = {"role": "assistant", "content": "Let me see.", "tool_calls": calls}
    results = [{"role": "tool", "tool_call_id": i, "content": f"result {i}"} for i in "ba"]
    conversation = messages(USER, assistant, *results, REPLY)
    assert conversation.messages == (
        Message("user", "Q"),
        Message("assistant", "Let me see."),
        Message("assistant", "{}", "fa"),
        Message("assistant", "{}", "fb"),
        Message("observation", "result a"),  # in the order of the calls
        Message("observation", "result b"),
        Message("assistant", "A"),
    )


def test_a_result_must_answer_a_call_that_was_made() -> None:
    assistant = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": {}}}]}  # fmt: skip
    wrong = {"role": "tool", "tool_call_id": "z", "content": "x"}
    assert reason(USER, assistant, wrong, REPLY) == (
        "message 3 answers call 'z', but the calls before it are 'a'"
    )


def test_several_calls_in_one_sharegpt_value_are_several_messages() -> None:
    value = json.dumps([{"name": n, "arguments": {"x": n}} for n in "fg"])
    turns = [("human", "Q"), ("function_call", value), ("observation", "R"), ("gpt", "A")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    assert [m.metadata for m in to_conversation(row).messages] == ["", "f", "g", "", ""]


def test_a_reply_that_only_looks_like_a_call_stays_text() -> None:
    text = '{"name": "Ann", "arguments": {"for": 1}}'
    assert messages(USER, {"role": "assistant", "content": text}).messages[1] == Message(
        "assistant", text
    )
    other = '{"name": "get_weather", "arguments": {}, "more": 1}'
    kept = messages(USER, {"role": "assistant", "content": other}, tools=[WEATHER])
    assert kept.messages[1].metadata == ""


def test_arguments_of_built_in_tools_are_plain_text() -> None:
    call = {"tool_calls": [{"function": {"name": "python", "arguments": "print(1)"}}]}
    conversation = messages(USER, {"role": "assistant", **call}, RESULT, REPLY)
    assert conversation.messages[1] == Message("assistant", "print(1)", "python")


@pytest.mark.parametrize(
    "shown",
    [
        {"type": "image_url", "image_url": {"url": "x.png"}},
        {"type": "image_url", "image_url": "x.png"},
        {"type": "image", "image": "x.png"},
    ],
)
def test_content_parts_are_joined_and_an_image_is_kept(shown: dict[str, Any]) -> None:
    parts = [{"type": "text", "text": "a"}, shown, {"type": "text", "text": "b"}]
    conversation = messages({"role": "user", "content": parts}, REPLY)
    assert conversation.messages[0] == Message("user", "ab", images=(ShownImage("x.png", 1),))
    flat = messages({"role": "user", "content": "ab", "image": "x.png"}, REPLY)
    assert flat.messages[0] == Message("user", "ab", images=(ShownImage("x.png"),))


def test_train_and_weight_go_with_the_message() -> None:
    conversation = messages(
        {**USER, "train": False}, {**REPLY, "train": False}, USER, {**REPLY, "weight": 0.5}
    )
    assert [(m.train, m.weight) for m in conversation.messages] == [
        (False, 1.0),
        (False, 1.0),
        (None, 1.0),
        (None, 0.5),
    ]


def test_null_fields_count_as_absent() -> None:
    nulls = {"metadata": None, "tool_calls": None, "train": None, "weight": None, "tools": None, "image": None}  # fmt: skip
    assert messages({**USER, **nulls}, {**REPLY, **nulls}, tools=None) == messages(USER, REPLY)


def test_a_system_column_is_a_system_message() -> None:
    expected = messages(SYSTEM, USER, REPLY)
    assert messages(USER, REPLY, system="S") == expected
    row = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    assert to_conversation({**row, "system": "S"}) == expected
    assert to_conversation({"system": "S", "prompt": "Q", "response": "A"}) == expected


# Columns


def test_alpaca_puts_the_input_under_the_instruction() -> None:
    row = {"instruction": "I", "input": "N", "output": "O", "history": [["q", "a"]], "system": "S"}
    assert to_conversation(row).messages == (
        Message("system", "S"),
        Message("user", "q"),
        Message("assistant", "a"),
        Message("user", "I\nN"),
        Message("assistant", "O"),
    )
    assert to_conversation({**row, "input": ""}).messages[3].content == "I"


def test_a_csv_row_is_read_like_any_other() -> None:
    cells = {"prompt": "Q", "response": "A", "history": '[["q", "a"]]', "system": ""}
    assert [m.content for m in to_conversation(cells).messages] == ["q", "a", "Q", "A"]
    listed = {"messages": json.dumps([USER, REPLY]), "tools": ""}
    assert to_conversation(listed) == messages(USER, REPLY)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "<image>Q"}, REPLY], "images": ["a/x.png"]},
        {"conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}],
         "image": "a/x.png"},
        {"instruction": "<image>Q", "output": "A", "images": ["a/x.png"]},
        {"messages": [{**USER, "image": "a/x.png"}, REPLY]},
    ],
)  # fmt: skip
def test_an_image_column_with_a_placeholder_in_front_is_an_image_of_the_first_message(
    row: dict[str, Any],
) -> None:
    question, reply = to_conversation(row).messages
    assert question.content.lstrip() == "Q"
    assert [image._replace(marked=False) for image in question.images] == [ShownImage("a/x.png")]
    assert not reply.images


def test_a_placeholder_without_an_image_is_text() -> None:
    said = to_conversation({"prompt": "What does <image> do in SVG?", "response": "A"}).messages[0]
    assert (said.content, said.images) == ("What does <image> do in SVG?", ())


# Whatever a row holds

MIXED = [
    *SPELLINGS.values(),
    {"messages": [SYSTEM, USER, {**REPLY, "train": True, "weight": 2}, {**USER, "image": "x.png"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, REPLY], "system": "S"},
    {"instruction": "I", "input": "N", "output": "O", "history": [["q", "a"]]},
    {"prompt": "Q", "response": "A", "tools": "[]", "images": None},
    {"messages": [{"role": "user", "content": "<image>Q"}, REPLY], "images": ["x.png"]},
]  # fmt: skip
scalars = st.sampled_from(
    [None, True, 0, -1, 1.5, "", " ", "x", "[", "{}", "[]", '["x"]', '{"name": "f", "arguments": {}}', "user", "tool", "function_call", "\ud800"]
)  # fmt: skip
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["role", "content", "name", "type", "function", "from", "arguments", "text", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every node below a value."""
    if not isinstance(value, dict | list):
        return []
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    return [(value, key) for key, _ in items] + [p for _, inner in items for p in places(inner)]


@settings(max_examples=150, deadline=None)
@given(
    row=st.sampled_from(MIXED).map(copy.deepcopy), data=st.data(), fmt=st.sampled_from(["auto", *FORMATS])
)  # fmt: skip
def test_a_row_is_a_conversation_or_has_a_reason(row: Any, data: st.DataObject, fmt: str) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(row)))
        container[key] = data.draw(anything)
        if not places(row):
            return
    try:
        conversation = to_conversation(row, fmt)
    except RowError:
        return
    assert validate(conversation) is conversation


def test_replies_of_a_list_of_prompts_are_not_trained() -> None:
    row = {"prompt": [USER, REPLY, USER], "completion": [REPLY]}
    read = to_conversation(row, detect([row]), location="f:1").messages
    assert [message.train for message in read if message.role == "assistant"] == [False, None]


def test_a_null_argument_stays_where_the_function_takes_it() -> None:
    taken = {"city": {"type": "string"}, "zone": {"type": ["string", "null"]}}
    tool = {"name": "f", "parameters": {"type": "object", "properties": taken}}
    given = {"city": "x", "zone": None, "of another tool": None, "odd": 1}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": given}}]}
    [_, read] = to_conversation(
        {"messages": [USER, call], "tools": [tool]}, "openai", location="f:1"
    ).messages
    assert json.loads(read.content) == {"city": "x", "zone": None, "odd": 1}
