"""Rows of every layout to conversations: one form, five spellings of a call, a reason otherwise."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.conversation import Conversation, Message, RowError, calls_in_words, validate
from finetune.data.formats import FORMATS, detect, to_conversation
from finetune.data.sources import SourceSpec, read_conversations

USER = {"role": "user", "content": "Q"}
REPLY = {"role": "assistant", "content": "A"}
CALL = {"role": "assistant", "metadata": "f", "content": "{}"}
RESULT = {"role": "observation", "content": "R"}
SYSTEM = {"role": "system", "content": "S"}

WEATHER = {
    "name": "get_weather",
    "description": "天气",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
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


def messages(*items: dict[str, Any], **row: Any) -> Conversation:
    return to_conversation({"messages": list(items), **row}, "messages")


def reason(*items: Any, **row: Any) -> str:
    with pytest.raises(RowError) as error:
        messages(*items, **row)
    return str(error.value)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_spellings_of_a_tool_call_are_one_conversation(spelling: str) -> None:
    assert to_conversation(SPELLINGS[spelling], where="x:1") == Conversation(
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


def test_content_parts_are_joined_and_an_image_is_kept() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x.png"}}, {"type": "text", "text": "b"}]  # fmt: skip
    conversation = messages({"role": "user", "content": parts}, REPLY)
    assert conversation.messages[0] == Message("user", "ab", image="x.png")
    flat = messages({"role": "user", "content": "ab", "image": "x.png"}, REPLY)
    assert flat == conversation


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


# Reasons


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([USER], "the dialogue ends with message 1, 'user'; for training the last message must be a reply"),
        ([USER, CALL, RESULT], "the dialogue ends with message 3, 'observation'; for training the last message must be a reply"),
        ([], "the dialogue has no messages"),
        ([SYSTEM], "the dialogue has only system messages"),
        ([REPLY], "message 1 is 'assistant', but a dialogue begins with 'user' (after 'system' messages, if any)"),
        ([SYSTEM, REPLY], "message 2 is 'assistant', but message 1 is 'system'; add the user turn before it"),
        ([USER, REPLY, REPLY], "message 3 is 'assistant' but message 2 is too; merge them or add the user turn"),
        ([USER, USER, REPLY], "message 2 is 'user' but message 1 is too; merge them or add the reply"),
        ([USER, SYSTEM, REPLY], "message 2 is 'system', but GLM-4 allows system messages only at the start; move or merge it"),
        ([USER, RESULT, REPLY], "message 2 is 'observation' (a tool result), but message 1 is not a tool call"),
        ([USER, REPLY, RESULT, REPLY], "message 3 is 'observation' (a tool result), but message 2 is not a tool call"),
        ([USER, CALL, REPLY], "message 3 is 'assistant', but the tool call in message 2 has no result"),
        ([USER, CALL, USER, REPLY], "message 3 is 'user', but the tool call in message 2 has no result"),
        ([USER, CALL, RESULT, USER, REPLY], "message 4 is 'user', but the tool result in message 3 has no reply yet"),
        ([{"role": "system", "content": ""}, USER, REPLY, REPLY], "message 4 is 'assistant' but message 3 is too; merge them or add the user turn"),
        ([USER, {"role": "assistant", "content": ""}], "message 2: content is empty; GLM-4's template drops such a message"),
        ([{"role": "user", "content": " \n"}, REPLY], "message 1: content is empty; GLM-4's template drops such a message"),
        ([USER, {**CALL, "content": ""}], "message 2: the arguments are empty; write {} for a call without any"),
        ([USER, {"role": "assistant", "content": None}], "message 2: content is null, not text"),
        ([USER, {"role": "assistant"}], "message 2: content is null, not text"),
        ([USER, {"role": "assistant", "content": 7}], "message 2: content is a number, not text"),
        ([USER, {"role": "assistant", "content": True}], "message 2: content is true or false, not text"),
        ([USER, {"role": "assistant", "content": []}], "message 2: content is a list, not text"),
        ([USER, {"role": "assistant", "content": ["A"]}], "message 2: content is a list with more than text parts and one image part"),
        ([USER, {"role": "assistant", "content": {"a": 1}}], 'message 2: content is an object but not {"name": …, "arguments": …}'),
        ([{"role": "user", "content": {"a": 1}}, REPLY], "message 1: content is an object, not text"),
        ([USER, 3], "message 2: is a number, not an object"),
        ([{"content": "Q"}, REPLY], "message 1: has no role"),
        ([{"role": 1, "content": "Q"}, REPLY], "message 1: role is a number, not text"),
        ([{"role": ["user"], "content": "Q"}, REPLY], "message 1: role is a list, not text"),
        ([USER, {**REPLY, "train": "no"}], "message 2: train is text, not true or false"),
        ([USER, {**REPLY, "weight": "2"}], "message 2: weight is text, not a number"),
        ([USER, {**REPLY, "weight": True}], "message 2: weight is true or false, not a number"),
        ([USER, {**REPLY, "weight": -1}], "message 2: weight is -1.0; it must be 0 or more"),
        ([USER, {**REPLY, "weight": 1e999}], "message 2: weight is inf; it must be 0 or more"),
        ([{**USER, "train": True}, REPLY], "message 1: train is true on 'user'; only replies train"),
        ([USER, {**REPLY, "train": False}], "nothing to learn: every reply has train: false or weight 0"),
        ([USER, {**REPLY, "weight": 0}], "nothing to learn: every reply has train: false or weight 0"),
        ([{**USER, "metadata": "f"}, REPLY], "message 1: metadata (a tool's name) on 'user'"),
        ([USER, {**CALL, "metadata": "f\ng"}], "message 2: metadata 'f\\ng' is not a tool's name"),
        ([USER, {**CALL, "metadata": 5}], "message 2: metadata is a number, not a tool's name"),
        ([USER, {**REPLY, "trian": False}], "message 2: key 'trian' is not known; did you mean 'train'?"),
        ([USER, {**REPLY, "reasoning_content": "…"}], "message 2: key 'reasoning_content' is not supported; put the reasoning into content as the model shall write it"),
        ([USER, {"role": "assistant", "content": "a\ud800"}], "message 2: the text contains half a surrogate pair, \\ud800"),
        ([{"role": "user", "content": "\0"}, REPLY], "message 1: the text contains a NUL character"),
        ([USER, {**REPLY, "image": "x.png"}, USER, REPLY], "message 2: an image on 'assistant'; only users show one"),
        ([USER, REPLY, {**USER, "image": "x.png"}, REPLY], "message 3: GLM-4V takes one image, in the first user message"),
        ([{**USER, "image": "http://x/y.png"}, REPLY], "message 1: image 'http://x/y.png' is a URL; only paths of files are opened"),
        ([{**USER, "image": 3}, REPLY], "message 1: image is not a path"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}], "message 2: the call has no function name"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{'a': 1}"}}]}], "message 2: the arguments of 'f': not JSON at column 2: text stands in double quotes in JSON, here are single ones"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}], "message 2: the arguments of 'f': are a list, not a JSON object"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], "message 2: the arguments of 'f': are null, not a JSON object"),
        ([USER, {"role": "assistant", "tool_calls": ["f"]}], "message 2: the call is text"),
        ([USER, {**CALL, "tool_calls": [{"name": "f", "arguments": {}}]}], "message 2: has metadata beside a call that names its function itself"),
        ([USER, {"role": "function_call", "content": "f(1)"}], "message 2: the call is not JSON: not JSON at column 1: Expecting value"),
        ([USER, {"role": "tool", "parameters": {}, "content": "x"}], "message 2: has parameters but no name of a tool"),
    ],
)  # fmt: skip
def test_an_invalid_dialogue_has_its_reason(items: list[Any], expected: str) -> None:
    assert reason(*items) == expected


def test_an_unknown_role_is_told_the_known_ones() -> None:
    assert reason({"role": "robot", "content": "Q"}, REPLY).startswith(
        "message 1: role 'robot' is not one of system, developer, user, human, assistant"
    )


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        (3, "tools: is a number, not a list of definitions"),
        ("{bad", "tools: not JSON at column 2"),
        ('"x"', "tools: is text, not a list of definitions"),
        ([3], "tools: definition 1 is a number, not an object"),
        ([{"type": "web", "name": "f"}], "tools: definition 1 has type 'web', not 'function'"),
        ([{"name": "f", "description": "\ud800"}], "tools: the text contains half a surrogate pair"),
        ([{"description": "x"}], "tools: definition 1 has no usable name"),
        ([{"type": "function", "function": {"name": "a\nb"}}], "tools: definition 1 has no usable name"),
        ([{"type": "function", "function": "f"}], "tools: definition 1 has no usable name"),
        ([WEATHER, WEATHER], "tools: 'get_weather' is defined twice"),
        ([{"name": "f", "parameters": "none"}], "tools: parameters of 'f' are not an object"),
    ],
)  # fmt: skip
def test_an_unusable_tool_definition_has_its_reason(tools: Any, expected: str) -> None:
    assert reason(USER, REPLY, tools=tools).startswith(expected)


@pytest.mark.parametrize(
    ("row", "fmt", "expected"),
    [
        ({"text": "x"}, "messages", "the row has no 'messages'; its columns are 'text'"),
        ({"messages": None}, "messages", "messages: is null, not a list of messages"),
        ({"messages": {"a": 1}}, "messages", "messages: is an object, not a list of messages"),
        ({"messages": "hello"}, "messages", "not JSON at column 1"),
        ({"messages": [USER, REPLY]}, "sharegpt", "the row has no 'conversations'"),
        ({"content": "Q", "summary": ""}, "pairs", "summary: is empty; no reply to train"),
        ({"content": "Q", "summary": None}, "pairs", "summary: is empty; no reply to train"),
        ({"content": " ", "summary": "A"}, "pairs", "content: is empty"),
        ({"content": "Q", "summary": 3}, "pairs", "summary: is a number, not text"),
        ({"content": "Q"}, "pairs", "the row has no pair of columns prompt/response"),
        ({"instruction": "", "output": "A"}, "alpaca", "instruction: is empty"),
        ({"instruction": "Q"}, "alpaca", "output: is missing; no reply to train"),
        ({"instruction": "Q", "output": ["A"]}, "alpaca", "output: is a list, not text"),
        ({"prompt": "Q", "response": "A", "history": [["a"]]}, "pairs", "history: turn 1 is not a pair"),
        ({"prompt": "Q", "response": "A", "history": [["a", ""]]}, "pairs", "history: turn 1 has an empty"),
        ({"prompt": "Q", "response": "A", "history": 3}, "pairs", "history: is a number"),
        ({"prompt": "Q", "response": "A", "images": ["x.png"]}, "pairs", "images: write the path as"),
    ],
)  # fmt: skip
def test_an_unusable_column_has_its_reason(row: dict[str, Any], fmt: str, expected: str) -> None:
    with pytest.raises(RowError) as error:
        to_conversation(row, fmt)
    assert str(error.value).startswith(expected)


# For prediction


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER]},
        {"messages": [SYSTEM, USER, CALL, RESULT]},
        {"messages": [USER, REPLY]},
        {"prompt": "Q"},
        {"content": "Q", "summary": None},
        {"instruction": "Q", "input": "x"},
        {"conversations": [{"from": "human", "value": "Q"}]},
    ],
)
def test_for_prediction_the_reply_may_be_missing(row: dict[str, Any]) -> None:
    conversation = to_conversation(row, purpose="predict")
    assert conversation.messages[-1].role in ("user", "observation", "assistant")


def test_a_conversation_made_by_hand_is_checked_alike() -> None:
    good = Conversation((Message("user", "Q"), Message("assistant", "A")))
    assert validate(good) is good
    with pytest.raises(RowError, match="message 2 is 'user' but message 1 is too"):
        validate(Conversation((Message("user", "Q"), Message("user", "Q"))), "predict")


# Whatever a row holds

MIXED = [
    *SPELLINGS.values(),
    {"messages": [SYSTEM, USER, {**REPLY, "train": True, "weight": 2}, {**USER, "image": "x.png"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, REPLY], "system": "S"},
    {"instruction": "I", "input": "N", "output": "O", "history": [["q", "a"]]},
    {"prompt": "Q", "response": "A", "tools": "[]", "images": None},
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


# Published data


def read(path: Path) -> list[Conversation]:
    return list(read_conversations([SourceSpec(str(path))]))


def test_every_published_row_is_accepted(glm4_assets: Path) -> None:
    data = glm4_assets / "data"
    counts = {
        "advertisegen/train.jsonl": 3000,
        "advertisegen/dev.jsonl": 1070,
        "advertisegen/dev_raw.json": 1070,
        "alpaca/alpaca_zh.json": 1000,
        "toolcall/glaive_zh_sharegpt.json": 300,
        "vision/eye_chart/train.jsonl": 200,
        "vision/eye_chart/dev.jsonl": 50,
    }
    assert {name: len(read(data / name)) for name in counts} == counts


def test_both_forms_of_advertisegen_are_the_same_dialogues(glm4_assets: Path) -> None:
    folder = glm4_assets / "data" / "advertisegen"
    listed, raw = read(folder / "dev.jsonl"), read(folder / "dev_raw.json")
    assert [c.messages for c in listed] == [c.messages for c in raw]


def test_two_published_tool_dialogues_write_a_call_into_a_reply(glm4_assets: Path) -> None:
    found = read(glm4_assets / "data" / "toolcall" / "glaive_zh_sharegpt.json")
    odd = [c for c in found if calls_in_words(c)]
    assert len(odd) == 2
    assert all("AI" in c.messages[calls_in_words(c)[0]].content for c in odd)


def test_published_rows_become_what_the_golden_dialogues_show(glm4_assets: Path) -> None:
    golden: dict[str, list[Conversation]] = {}
    with (glm4_assets / "golden" / "chat_template.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            dialogue = to_conversation({"messages": row["messages"]})
            golden.setdefault(row["source"], []).append(dialogue)
    data = glm4_assets / "data"
    for source, file, expected in (
        ("glaive_zh", "toolcall/glaive_zh_sharegpt.json", 60),
        ("alpaca_zh", "alpaca/alpaca_zh.json", 30),
        ("advertisegen", "advertisegen/dev_raw.json", 40),
    ):
        ours = {(c.messages, json.dumps(c.tools)) for c in read(data / file)}
        if source == "advertisegen":
            ours |= {(c.messages, "[]") for c in read(data / "advertisegen/train.jsonl")}
        found = [(c.messages, json.dumps(c.tools)) in ours for c in golden[source]]
        assert (source, sum(found)) == (source, expected)


def test_the_record_in_the_readme_is_what_it_says() -> None:
    text = (Path(__file__).parent.parent / "data" / "README.md").read_text(encoding="utf-8")
    record = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert record is not None
    conversation = to_conversation(json.loads(record[1]))
    assert [m.role for m in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "observation",
        "assistant",
    ]
    assert all(f"`{layout}`" in text for layout in FORMATS)
