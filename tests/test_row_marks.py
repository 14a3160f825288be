"""Marks of other frameworks that nobody listed: keys that seem to mask, calls, images and control tokens in text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from row_parts import REPLY, USER, WEATHER, reason
from test_row_keys import CITY, READ, two_replies

from finetune.data.dialogue.formats import (
    CALL_IN_TEXT,
    IMAGE_IN_TEXT,
    MARKER_IN_TEXT,
    RowRules,
    to_conversation,
)

MASKS = [
    ("compute_loss", False), ("supervise", False), ("train_on_turn", False), ("learnable", 0), ("ignore", True),
    ("no_loss", True), ("loss_masks", [0, 1]), ("mask_out", True), ("is_trained", False),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), MASKS)
def test_an_unknown_key_that_seems_to_mask_is_refused(key: str, value: Any) -> None:
    said = reason(*two_replies(**{key: value}))
    assert "seems to say what is learned" in said or "did you mean" in said
    said = reason(*two_replies(), **{key: value})
    assert f"data.ignore_columns: [{key}]" in said
    rules = RowRules(ignore_columns=(key,))
    assert to_conversation({"messages": two_replies(), key: value}, rules=rules).messages


@pytest.mark.parametrize("column", ["loss", "train", "weight", "loss_mask"])
def test_a_column_that_is_a_key_of_messages_is_no_silent_one(column: str) -> None:
    assert "write it into the messages" in reason(*two_replies(), **{column: 0})
    assert to_conversation({"messages": two_replies(), column: 1}).messages


@pytest.mark.parametrize("value", [False, True, 0, -1.5])
def test_flags_and_numbers_in_unread_columns_are_named(value: Any) -> None:
    assert to_conversation({"messages": two_replies(), "accepted": value}).unread == ("accepted",)
    row = {"messages": two_replies(agreed=value)}
    assert to_conversation(row).unread == ("agreed of messages",)


@pytest.mark.parametrize(
    "text",
    [
        '```json\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n```',
        '<function=get_weather>{"city": "Oslo"}</function>',
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo"}}]',
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Oslo"}}',
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>",
        'get_weather(city="Oslo")',
        '```tool_code\nget_weather(city="Oslo")\n```',
    ],
)
def test_a_call_of_another_model_is_counted_and_can_be_read(text: str) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": text}], "tools": [WEATHER]}
    assert to_conversation(row).doubts == (CALL_IN_TEXT,)
    reply = to_conversation(row, rules=READ).messages[-1]
    assert (reply.metadata, json.loads(reply.content)) == ("get_weather", json.loads(CITY))


@pytest.mark.parametrize(
    "mark", ["<image_0>", "<|image|>", "<|image_pad|>", "[IMG]", "<ImageHere>"]
)
def test_every_mark_of_an_image_that_is_not_there_is_counted(mark: str) -> None:
    row = {"messages": [{"role": "user", "content": f"{mark} what?"}, REPLY]}
    assert IMAGE_IN_TEXT in to_conversation(row).doubts


@pytest.mark.parametrize("text", ["A<|user|>", "<|im_start|>user", "A</s>", "[INST] Q [/INST]"])
def test_control_tokens_of_any_layout_in_a_text_are_counted(text: str) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": text}]}
    assert to_conversation(row).doubts == (MARKER_IN_TEXT,)
    assert to_conversation({"messages": [USER, REPLY]}).doubts == ()
