"""Marks of other frameworks that nobody listed: keys that seem to mask, calls, images and control tokens in text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from row_parts import REPLY, USER, WEATHER, reason
from test_row_keys import CITY, READ, two_replies

from finetune.data.dialogue.calls_in_text import (
    CALL_IN_TEXT,
    RESULT_IN_TEXT,
    TOOLS_IN_TEXT,
    UNREADABLE_CALL,
)
from finetune.data.dialogue.conversation import Message, RowError
from finetune.data.dialogue.doubts import (
    DIALOGUE_IN_MESSAGE,
    IMAGE_IN_TEXT,
    MARKER_IN_TEXT,
    OTHER_THOUGHT,
    PARTS_IN_TEXT,
)
from finetune.data.dialogue.formats import RowRules, to_conversation

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


@pytest.mark.parametrize(
    "text",
    [
        'get_weather\n```python\ntool_call(city="Oslo")\n```',
        '✿FUNCTION✿: get_weather\n✿ARGS✿: {"city": "Oslo"}\n✿RESULT✿',
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
        '<function_calls><invoke name="get_weather"><parameter name="city">Oslo</parameter></invoke></function_calls>',
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Oslo"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Oslo"}<｜tool▁call▁end｜>',
        '<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Oslo"}<|tool_call_end|><|tool_calls_section_end|>',
        '[TOOL_CALLS]get_weather{"city": "Oslo"}',
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}</s>',
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]<|/tool_call|>',
        '<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": {"city": "Oslo"}}<|action_end|>',
        '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>',
    ],
)  # fmt: skip
def test_a_call_with_marks_of_its_own_is_counted_and_can_be_read(text: str) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": text}], "tools": [WEATHER]}
    assert to_conversation(row).doubts == (CALL_IN_TEXT,)
    (reply,) = to_conversation(row, rules=READ).messages[1:]
    assert (reply.metadata, json.loads(reply.content)) == ("get_weather", json.loads(CITY))


def test_only_what_an_assistant_writes_as_text_is_read_as_a_call() -> None:
    written = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
    call = {"function": {"name": "get_weather", "arguments": {"city": written}}}
    messages = [
        {"role": "user", "content": written},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": written},
        {"role": "assistant", "content": "fine"},
    ]
    row = {"messages": messages, "tools": [WEATHER]}
    plain, read = (to_conversation(row, rules=rules).messages for rules in (RowRules(), READ))
    assert list(read) == list(plain)


UNREADABLE = [
    "<tool_call>get_weather(Oslo)</tool_call>", "✿FUNCTION✿: get_weather\n✿ARGS✿: Oslo",
    "Action: get_weather\nAction Input: Oslo", "<function_calls>\n</function_calls>",
    'A <tool_call>{"name": "f", "arguments": {}}</tool_call> and what is said behind it', "[TOOL_CALLS] f",
    '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "g", </tool_call>',
    'Thought: a\nAction: f\nAction Input: {"x": 1}\nObservation: 3\nThought: b\nFinal Answer: 3',
]  # fmt: skip


@pytest.mark.parametrize("text", UNREADABLE)
def test_the_mark_of_a_call_that_cannot_be_read_is_counted_whatever_the_switch_says(
    text: str,
) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": text}], "tools": [WEATHER]}
    for rules in (RowRules(), READ):
        conversation = to_conversation(row, rules=rules)
        assert conversation.doubts == (UNREADABLE_CALL,)
        assert conversation.messages[1].content == text
    with pytest.raises(RowError, match="message 2: the mark of a call"):
        to_conversation(row, rules=RowRules(calls_in_text="error"))


@pytest.mark.parametrize(
    "result", ["<tool_response>\n3\n</tool_response>", "Observation: 3", "✿RESULT✿: 3"]
)
def test_a_result_in_a_users_text_is_counted_and_read_behind_its_call(result: str) -> None:
    call = {"role": "assistant", "content": '<tool_call>{"name": "f", "arguments": {}}</tool_call>'}
    row = {"messages": [USER, call, {"role": "user", "content": result}, REPLY]}
    assert to_conversation(row).doubts == (CALL_IN_TEXT, RESULT_IN_TEXT)
    read = to_conversation(row, rules=READ)
    assert [(m.role, m.content) for m in read.messages[1:3]] == [("assistant", "{}"), ("observation", "3")]  # fmt: skip
    assert read.doubts == ()


def test_tools_in_a_system_text_are_counted_and_what_else_it_says_stays() -> None:
    told = f"You are a pirate. You may call functions.\n<tools>{json.dumps(WEATHER)}</tools>\nReturn JSON.\n请用中文回答。"
    row = {"messages": [{"role": "system", "content": told}, USER, REPLY]}
    assert TOOLS_IN_TEXT in to_conversation(row).doubts
    read = to_conversation(row, rules=READ)
    assert read.messages[0] == Message("system", "You are a pirate. 请用中文回答。")
    assert len(read.tools) == 1
    assert read.doubts == ()


THOUGHTS = [
    "<thinking>hm</thinking>A", "<Thought>\nhm\n</Thought>\n\nA", "◁think▷hm◁/think▷A", "[THINK]hm[/THINK]A",
    "<|begin_of_thought|>hm<|end_of_thought|>A", "<reasoning>hm</reasoning>\nA",
]  # fmt: skip


@pytest.mark.parametrize("text", THOUGHTS)
@pytest.mark.parametrize("thinks", [True, False, None])
def test_a_thought_in_other_tags_is_counted_and_can_be_dropped(
    text: str, thinks: bool | None
) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": text}]}
    assert to_conversation(row, rules=RowRules(thinks=thinks)).doubts == (OTHER_THOUGHT,)
    dropped = to_conversation(row, rules=RowRules(thinks=thinks, reasoning="drop"))
    assert dropped.messages[1].content == "A"
    assert dropped.doubts == ()


@pytest.mark.parametrize(
    "text",
    [
        "![](images/a.png)\nWhat?", "![a cat](a.jpg) What?", '<img src="a.png"> What?', "<|vision_start|> What?",
        "<video> What?", "<audio>", "<start_of_image>", "<image_soft_token>", "data:image/png;base64,AAAA",
        "<IMAGE> What?", "Picture 1: <img>a.png</img>", "<|image_1|>",
    ],
)  # fmt: skip
def test_an_image_in_a_users_text_is_counted(text: str) -> None:
    assert to_conversation({"prompt": text, "response": "A"}).doubts == (IMAGE_IN_TEXT,)
    assert to_conversation({"prompt": "Q", "response": "![](a.png)"}).doubts == ()


@pytest.mark.parametrize(
    "text",
    [
        "<|eot_id|>", "<｜User｜>", "<start_of_turn>user", "[gMASK]<sop>Q", "<s>Q", "<<SYS>>", "<|endoftext|>Q",
        "<|start|>Q",
    ],
)  # fmt: skip
def test_control_tokens_of_other_models_are_counted(text: str) -> None:
    assert to_conversation({"prompt": text, "response": "A"}).doubts == (MARKER_IN_TEXT,)


@pytest.mark.parametrize(
    "text",
    [
        "Human: hi\nAssistant: hello\nHuman: more\nAssistant:", "[Round 1]\n\n问：你好\n\n答：",
        "### Instruction:\nQ\n\n### Response:\n", "USER: a ASSISTANT: b\nASSISTANT: c", "用户：你好\n助手：你好",
    ],
)  # fmt: skip
def test_a_dialogue_in_one_message_is_counted(text: str) -> None:
    assert to_conversation({"prompt": text, "response": "A"}).doubts == (DIALOGUE_IN_MESSAGE,)


def test_content_parts_written_as_text_are_counted() -> None:
    text = json.dumps([{"type": "text", "text": "Q"}])
    assert to_conversation({"prompt": text, "response": "A"}).doubts == (PARTS_IN_TEXT,)


PLAIN_TEXTS = [
    "x < y and a[0] > 3", "a <b>bold</b> word", "if a < b: c", "f(x) -> y | z", "问：什么是答案？", "Human rights: yes",
    "std::vector<int> v; v[1] <= 2;", "see [1] and [image-based] methods", "The assistant: helps", "std::cout << x;",
    "<html><body>hi</body></html>", "Array<string>", "She said: [INSTRUCTION] go",
]  # fmt: skip


@pytest.mark.parametrize("text", PLAIN_TEXTS)
def test_plain_texts_raise_no_doubt(text: str) -> None:
    assert to_conversation({"prompt": text, "response": text}).doubts == ()
