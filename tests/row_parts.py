"""The parts of rows, and what becomes of them, for the tests of the layouts."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.data.dialogue.conversation import Conversation, Message, RowError
from finetune.data.dialogue.formats import RowRules, to_conversation

USER = {"role": "user", "content": "Q"}
REPLY = {"role": "assistant", "content": "A"}
CALL = {"role": "assistant", "metadata": "f", "content": "{}"}
RESULT = {"role": "observation", "content": "R"}
SYSTEM = {"role": "system", "content": "S"}
THOUGHT = {**REPLY, "reasoning_content": "why"}
TOOL_CALL = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}  # fmt: skip

WEATHER = {
    "name": "get_weather",
    "description": "天气",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}

# A list of messages that is no dialogue, and why.
REASONS: list[tuple[list[Any], str]] = [
    ([USER], "the dialogue ends with message 1, 'user'; for training the last message must be a reply"),
    ([USER, CALL, RESULT], "the dialogue ends with message 3, 'observation'; for training the last message must be a reply"),
    ([], "the dialogue has no messages"),
    ([SYSTEM], "the dialogue has only system messages"),
    ([REPLY], "message 1 is 'assistant', but a dialogue begins with 'user' (after 'system' messages, if any); data.turns: merge takes a reply that opens it"),
    ([SYSTEM, REPLY], "message 2 is 'assistant', but message 1 is 'system'; add the user turn before it"),
    ([USER, REPLY, REPLY], "message 3 is 'assistant' but message 2 is too; merge them (data.turns: merge does) or add the user turn"),
    ([USER, USER, REPLY], "message 2 is 'user' but message 1 is too; merge them (data.turns: merge does) or add the reply"),
    ([USER, SYSTEM, REPLY], "message 2 is 'system', but GLM-4 allows system messages only at the start; move it, or set data.turns: merge"),
    ([USER, RESULT, REPLY], "message 2 is 'observation' (a tool result), but message 1 is not a tool call"),
    ([USER, REPLY, RESULT, REPLY], "message 3 is 'observation' (a tool result), but message 2 is not a tool call"),
    ([USER, CALL, REPLY], "message 3 is 'assistant', but the tool call in message 2 has no result"),
    ([USER, CALL, USER, REPLY], "message 3 is 'user', but the tool call in message 2 has no result"),
    ([USER, CALL, RESULT, USER, REPLY], "message 4 is 'user', but the tool result in message 3 has no reply yet"),
    ([{"role": "system", "content": ""}, USER, REPLY, REPLY], "message 4 is 'assistant' but message 3 is too; merge them (data.turns: merge does) or add the user turn"),
    ([USER, {"role": "assistant", "content": ""}], "message 2: content is empty; GLM-4's template drops such a message"),
    ([{"role": "user", "content": " \n"}, REPLY], "message 1: content is empty; GLM-4's template drops such a message"),
    ([USER, {**CALL, "content": ""}], "message 2: the arguments are empty; write {} for a call without any"),
    ([USER, {"role": "assistant", "content": None}], "message 2: content is null, not text"),
    ([USER, {"role": "assistant"}], "message 2: content is null, not text"),
    ([USER, {"role": "assistant", "content": 7}], "message 2: content is a number, not text"),
    ([USER, {"role": "assistant", "content": True}], "message 2: content is true or false, not text"),
    ([USER, {"role": "assistant", "content": []}], "message 2: content is a list, not text"),
    ([USER, {"role": "assistant", "content": ["A"]}], "message 2: content is a list of other things than parts with a type, such as text"),
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
    ([USER, {"role": "assistant", "content": "a\ud800"}], "message 2: the text contains half a surrogate pair, \\ud800"),
    ([{"role": "user", "content": "\0"}, REPLY], "message 1: the text contains a NUL character"),
    ([USER, {**REPLY, "image": "x.png"}, USER, REPLY], "message 2: an image on 'assistant'; only users and tools show one"),
    ([USER, REPLY, {**USER, "content": "<image>", "images": ["x.png", "y.png"]}, REPLY], "message 3: brings 2, and there are 1 places for images (<image> in the text, or parts of type 'image'); write one <image> for each image, or none, which shows all before the first question"),
    ([{**USER, "image": "http://x/y.png"}, REPLY], "message 1: image 'http://x/y.png' is a URL; only files and data URLs are opened"),
    ([{**USER, "image": 3}, REPLY], "message 1: image is neither a path nor the bytes of an image"),
    ([USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}], "message 2: the call has no function name"),
    ([USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{'a': 1}"}}]}], "message 2: the arguments of 'f': not JSON at column 2: text stands in double quotes in JSON, here are single ones"),
    ([USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}], "message 2: the arguments of 'f': are a list, not a JSON object"),
    ([USER, {"role": "assistant", "tool_calls": ["f"]}], "message 2: the call is text"),
    ([USER, {**CALL, "tool_calls": [{"name": "f", "arguments": {}}]}], "message 2: has metadata beside a call that names its function itself"),
    ([USER, {"role": "function_call", "content": "f(1)"}], "message 2: the call is not JSON: not JSON at column 1: Expecting value"),
    ([USER, {"role": "tool", "parameters": {}, "content": "x"}], "message 2: has parameters but no name of a tool"),
]  # fmt: skip


def messages(*items: dict[str, Any], **row: Any) -> Conversation:
    return to_conversation({"messages": list(items), **row}, "messages")


def reason(*items: Any, **row: Any) -> str:
    with pytest.raises(RowError) as error:
        messages(*items, **row)
    return str(error.value)


def user(text: str = "Q", **more: Any) -> Message:
    return Message("user", text, **more)


def reply(text: str = "A", **more: Any) -> Message:
    return Message("assistant", text, **more)


def dialogue(
    *messages: Any, purpose: Any = "train", columns: Any = None, **rules: Any
) -> Conversation:
    row = {"messages": list(messages)} | (columns or {})
    return to_conversation(row, purpose=purpose, rules=RowRules(**rules))
