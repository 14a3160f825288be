"""Every row that cannot be a dialogue has its reason, and prediction asks for less."""

from __future__ import annotations

from typing import Any

import pytest
from row_parts import CALL, REASONS, REPLY, RESULT, SYSTEM, USER, WEATHER, reason

from finetune.data.dialogue.conversation import Conversation, Message, RowError, validate
from finetune.data.dialogue.formats import to_conversation

# Reasons


@pytest.mark.parametrize(
    ("items", "expected"), REASONS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_invalid_dialogue_has_its_reason(items: list[Any], expected: str) -> None:
    assert reason(*items) == expected


def test_an_unknown_role_is_told_the_known_ones() -> None:
    assert reason({"role": "robot", "content": "Q"}, REPLY).startswith(
        "message 1: role 'robot' is not one of system, developer, user, human, prompter, assistant"
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
        *(([{"name": name}], "tools: definition 1 has no usable name") for name in ("", " f", "f ", "f\t", "f\n", 3, None)),
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
        ({"prompt": "Q", "response": "A", "images": ["x.png", 3]}, "pairs", "images is neither a path nor"),
        ({"prompt": "Q", "response": "A", "images": ["https://x/y.png"]}, "pairs", "images 'https://x/y.png' is a URL"),
        ({"prompt": "<image><image>Q", "response": "A", "image": "x.png"}, "pairs", "image: brings 1, and there are 2 places"),
        ({"messages": [{**USER, "image": "a.png"}, REPLY], "images": ["x.png"]}, "messages", "images: the first user message names"),
        ({"prompt": "Q", "response": "A", "videos": ["x.mp4"]}, "pairs", "videos: GLM-4 takes text"),
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


@pytest.mark.parametrize("asked", ["why", [{"role": "user", "content": "why"}]])
@pytest.mark.parametrize("said", ["so", [{"role": "assistant", "content": "so"}]])
def test_each_column_of_a_pair_may_be_a_text_or_messages(asked: Any, said: Any) -> None:
    read = to_conversation({"prompt": asked, "response": said}).messages
    assert [(one.role, one.content) for one in read] == [("user", "why"), ("assistant", "so")]
