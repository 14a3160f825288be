"""Keys and columns of other frameworks: read as meant, refused by name, or counted; never silent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_parts import REPLY, USER, WEATHER, reason

from finetune.data.chat.image import ImageSpec
from finetune.data.dialogue import keys
from finetune.data.dialogue.calls_in_text import CALL_IN_TEXT
from finetune.data.dialogue.conversation import Message, RowError, ShownImage
from finetune.data.dialogue.doubts import FEWER_RESULTS, IMAGE_IN_TEXT
from finetune.data.dialogue.formats import RowRules, to_conversation
from finetune.data.preview.report import check
from scripts.evidence import data_keys

CITY = '{"city": "Oslo"}'
READ, MERGE = RowRules(calls_in_text="read"), RowRules(turns="merge")
PAIR = {"prompt": "Q", "response": "A"}


def two_replies(**marks: Any) -> list[dict[str, Any]]:
    return [USER, {**REPLY, **marks}, USER, REPLY]


@pytest.mark.parametrize("key", [*keys.TRAINED, *keys.UNTRAINED, "train_detail"])
@pytest.mark.parametrize("value", [True, False, 1, 0])
def test_every_key_that_masks_decides_what_is_trained(key: str, value: Any) -> None:
    said: Any = (
        [{"begin_offset": 0, "end_offset": 1, "train": bool(value)}]
        if key == "train_detail"
        else value
    )
    row = {"messages": two_replies(**{key: said})}
    expected = bool(value) != (key in keys.UNTRAINED)
    assert to_conversation(row).messages[1].train is expected


@settings(max_examples=60, deadline=None)
@given(
    marks=st.dictionaries(
        st.sampled_from([*keys.TRAINED, *keys.UNTRAINED]), st.booleans(), min_size=1
    )
)
def test_no_reply_is_trained_that_any_key_masks(marks: dict[str, bool]) -> None:
    masked = any(value == (key in keys.UNTRAINED) for key, value in marks.items())
    try:
        message = to_conversation({"messages": two_replies(**marks)}).messages[1]
    except RowError as error:
        said = str(error)
    else:
        said = "contradict each other" if message.train is not masked else "trained although masked"
    assert "contradict each other" in said


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({"mask": True}, "key 'mask' is not supported; some frameworks mean 'trained'"),
        ({"loss": False, "train": True}, "'train' and 'loss' contradict each other; keep one"),
        ({"loss": "no"}, "loss is text, not true or false"),
        (
            {"train_detail": [{"train": True}, {"train": False}]},
            "train_detail trains parts of a reply",
        ),
        ({"weight": 1, "loss_scale": 2}, "'weight' and 'loss_scale' contradict each other"),
        ({"loss_weight": "2"}, "loss_weight is text, not a number"),
        ({"thinking": "a", "thought": "b"}, "'thinking' and 'thought' hold different texts"),
        ({"cot": ["a"]}, "cot is a list, not text"),
        ({"trian": False}, "key 'trian' is not known; did you mean 'train'?"),
    ],
)
def test_a_key_that_cannot_be_read_has_its_reason(marks: dict[str, Any], expected: str) -> None:
    assert reason(*two_replies(**marks)).startswith(f"message 2: {expected}")


def test_other_names_of_a_weight_weigh() -> None:
    for key in keys.WEIGHTS:
        assert to_conversation({"messages": two_replies(**{key: 0.5})}).messages[1].weight == 0.5


@pytest.mark.parametrize("key", keys.REASONING)
def test_reasoning_under_every_name_is_kept_left_out_or_refused(key: str) -> None:
    row = {"messages": [USER, {**REPLY, key: "Because."}]}
    thought = to_conversation(row, rules=RowRules(thinks=True)).messages[1].content
    assert thought == f"<think>\nBecause.\n</think>\n\n{REPLY['content']}"
    assert (
        to_conversation(row, rules=RowRules(reasoning="drop")).messages[1].content
        == REPLY["content"]
    )
    with pytest.raises(
        RowError, match=r"message 2: has reasoning in a key of its own.*data.reasoning: drop"
    ):
        to_conversation(row, rules=RowRules(thinks=False))
    with pytest.raises(RowError, match="the reply has no reasoning"):
        to_conversation({"messages": [USER, REPLY]}, rules=RowRules(reasoning="require"))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *((name, "x") for name in keys._REFUSED_COLUMNS),
        ("label", False),
        ("kto_tag", False),
        ("tool", [WEATHER]),
        ("massages", "x"),
    ],
)
def test_a_column_that_would_be_trained_wrongly_is_refused(column: str, value: Any) -> None:
    with pytest.raises(RowError, match=column):
        to_conversation(PAIR | {column: value})
    ignored = to_conversation(PAIR | {column: value}, rules=RowRules(ignore_columns=(column,)))
    assert ignored.messages == (Message("user", "Q"), Message("assistant", "A"))


def test_unread_text_is_counted_and_ids_and_numbers_are_not(tmp_path: Path) -> None:
    rows = [
        PAIR | {"id": "7", "notes": "read me", "score": 0.5, "empty": ""},
        PAIR | {"notes": "me too"},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (source,) = check(str(file)).sources
    assert source.unread == {"notes": 2}
    assert check(str(file)).notes()[0] == (
        f"{file}: notes: what 2 rows hold there is not read; data.ignore_columns says that it is meant"
    )


def test_a_context_stands_under_its_question() -> None:
    dolly = {
        "instruction": "Where?",
        "context": "It moved.",
        "response": "There.",
        "category": "closed_qa",
    }
    qa = {"question": "Where?", "context": "It moved.", "answer": "There."}
    for row in (dolly, qa):
        conversation = to_conversation(row)
        assert [m.content for m in conversation.messages] == ["Where?\nIt moved.", "There."]
        assert conversation.unread == ()


WRITTEN = {
    "GLM-4's spelling": f"get_weather\n{CITY}",
    "tags": f'<tool_call>\n{{"name": "get_weather", "arguments": {CITY}}}\n</tool_call>',
    "glaive": f'<functioncall> {{"name": "get_weather", "arguments": \'{CITY}\'}} <|endoftext|>',
    "ReAct": f"Action: get_weather\nAction Input: {CITY}",
    "Python": '[get_weather(city="Oslo")]',
}


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_a_call_written_as_text_is_counted_read_or_refused(written: str) -> None:
    row = {
        "tools": [WEATHER],
        "messages": [
            USER,
            {"role": "assistant", "content": written},
            {"role": "tool", "content": "{}"},
            REPLY,
        ],
    }
    kept = to_conversation(row | {"messages": row["messages"][:2]})
    assert kept.doubts == (CALL_IN_TEXT,)
    assert kept.messages[1].content == written
    read = to_conversation(row, rules=READ)
    assert (read.messages[1].metadata, read.messages[1].content) == ("get_weather", CITY)
    assert read.doubts == ()
    with pytest.raises(RowError, match="a call written as text"):
        to_conversation(
            row | {"messages": row["messages"][:2]}, rules=RowRules(calls_in_text="error")
        )


def test_text_before_a_call_stays_a_reply() -> None:
    written = f'Let me see. <tool_call>{{"name": "get_weather", "arguments": {CITY}}}</tool_call>'
    row = {"tools": [WEATHER], "messages": [USER, {"role": "assistant", "content": written}]}
    read = to_conversation(row, rules=READ).messages
    assert [(m.metadata, m.content) for m in read[1:]] == [
        ("", "Let me see."),
        ("get_weather", CITY),
    ]


@pytest.mark.parametrize(
    "text", ["[1, 2]", "f(x)", "get_weather: sunny", "[see (a)]", "list:\n{1, 2}"]
)
def test_plain_replies_are_not_taken_for_calls(text: str) -> None:
    row = {"tools": [WEATHER], "messages": [USER, {"role": "assistant", "content": text}]}
    assert to_conversation(row, rules=READ).messages[1].content == text


def test_sides_that_do_not_take_turns_are_merged_when_asked() -> None:
    hello = {"role": "assistant", "content": "Hello."}
    row = {
        "messages": [
            hello,
            USER,
            {"role": "user", "content": "?"},
            REPLY,
            REPLY,
            {"role": "system", "content": "S"},
            USER,
            REPLY,
        ]
    }
    with pytest.raises(RowError, match=r"data\.turns: merge"):
        to_conversation(row)
    merged = to_conversation(row, rules=MERGE).messages
    assert [m.role for m in merged] == [
        "assistant",
        "user",
        "assistant",
        "system",
        "user",
        "assistant",
    ]
    assert merged[1].content == f"{USER['content']}\n?"
    assert merged[2].content == f"{REPLY['content']}\n{REPLY['content']}"
    assert merged[0].train is False  # nothing asks for it


def test_prompt_and_completion_may_be_lists_of_messages() -> None:
    row = {"prompt": [USER, REPLY, USER], "completion": [REPLY]}
    assert [m.train for m in to_conversation(row).messages] == [None, False, None, None]


FOREIGN: dict[str, dict[str, Any]] = {
    "Firefly": {"kind": "QA", "input": "Q", "target": "A"},
    "xtuner": {"conversation": [{"system": "S", "input": "Q", "output": "A"}]},
    "ms-swift": {"system": "S", "query": "Q", "response": "A", "history": []},
    "human and assistant": {"system": "S", "conversation": [{"human": "Q", "assistant": "A"}]},
    "MOSS": {
        "meta_instruction": "S", "num_turns": 1, "conversation_id": "1",
        "chat": {"turn_1": {"Human": "<|Human|>: Q<eoh>\n", "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n", "Commands": "<|Commands|>: None<eoc>\n", "MOSS": "<|MOSS|>: A<eom>\n"}},
    },
    "ChatML": {"text": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"},
    "history of objects": {"system": "S", "history": [], "query": "Q", "response": "A"},
    "WizardLM": {"instruction": "Q", "output": "A"},
    "Dolly without a context": {"instruction": "Q", "context": "", "response": "A", "category": "open_qa"},
    "ShareGPT": {"id": "x", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "OpenAI with weights": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 1}]},
}  # fmt: skip


@pytest.mark.parametrize("row", FOREIGN.values(), ids=FOREIGN)
def test_layouts_of_published_sets_are_one_dialogue(row: dict[str, Any]) -> None:
    conversation = to_conversation(row)
    system = [] if conversation.messages[0].role == "user" else [Message("system", "S")]
    assert list(conversation.messages) == [*system, Message("user", "Q"), Message("assistant", "A")]
    assert conversation.unread == ()


def test_calls_of_published_sets_are_calls() -> None:
    xlam = {
        "id": 1, "query": "Q", "tools": json.dumps([{"name": "f", "description": "d", "parameters": {"x": {"type": "int"}}}]),
        "answers": json.dumps([{"name": "f", "arguments": {"x": 1}}, {"name": "f", "arguments": {"x": 2}}]),
    }  # fmt: skip
    dialogue = to_conversation(xlam)
    assert [(m.metadata, m.content) for m in dialogue.messages[1:]] == [
        ("f", '{"x": 1}'),
        ("f", '{"x": 2}'),
    ]
    assert dialogue.tools[0]["function"]["parameters"]["properties"] == {"x": {"type": "int"}}
    glaive = {
        "system": 'SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n{"name": "f", "description": "d", "parameters": {}}\n',
        "chat": "USER: Q\n\n\nASSISTANT: <functioncall> {\"name\": \"f\", \"arguments\": '{\"x\": 1}'} <|endoftext|>\n\n\nFUNCTION RESPONSE: {\"y\": 2}\n\n\nASSISTANT: A <|endoftext|>\n",
    }  # fmt: skip
    dialogue = to_conversation(glaive, rules=READ)
    assert [(m.role, m.metadata, m.content) for m in dialogue.messages] == [
        ("user", "", "Q"), ("assistant", "f", '{"x": 1}'), ("observation", "", '{"y": 2}'), ("assistant", "", "A"),
    ]  # fmt: skip
    hermes = {
        "conversations": [
            {"from": "system", "value": f"You are a function calling AI model. <tools> {json.dumps([WEATHER])} </tools> Use them."},
            {"from": "human", "value": "Q"},
            {"from": "gpt", "value": WRITTEN["tags"]},
            {"from": "tool", "value": "<tool_response>\n{}\n</tool_response>"},
            {"from": "gpt", "value": "A"},
        ]
    }  # fmt: skip
    dialogue = to_conversation(hermes, rules=READ)
    assert [m.metadata for m in dialogue.messages] == ["", "get_weather", "", ""]
    assert dialogue.messages[2].content == "{}"
    assert len(dialogue.tools) == 1


@pytest.mark.parametrize("result", [[{"a": 1}], 3, True, None, {"a": 1}])
@pytest.mark.parametrize(
    "role", ["tool", "observation", "tool_response", "function_response", "function"]
)
def test_a_tool_result_may_be_any_value(role: str, result: Any) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": ""}}]}
    row = {"messages": [USER, call, {"role": role, "content": result}, REPLY]}
    messages = to_conversation(row).messages
    assert (messages[1].metadata, messages[1].content) == ("now", "{}")
    assert messages[2].content == json.dumps(result)


def test_a_call_without_its_result_is_named() -> None:
    def row(**ids: Any) -> dict[str, Any]:
        calls = [
            {"id": name, "function": {"name": "now"}} if ids else {"function": {"name": "now"}}
            for name in "ab"
        ]
        result = {"role": "tool", "content": "1"} | ({"tool_call_id": "a"} if ids else {})
        return {"messages": [USER, {"role": "assistant", "tool_calls": calls}, result, REPLY]}

    with pytest.raises(RowError, match="the call 'b' before message 3 has no result"):
        to_conversation(row(ids=True))
    assert to_conversation(row()).doubts == (FEWER_RESULTS,)


def test_nulls_of_a_table_are_not_in_the_definition_of_a_tool() -> None:
    with_null = json.loads(json.dumps(WEATHER))
    with_null["parameters"]["properties"]["day"] = None
    rows = [{"messages": [USER, REPLY], "tools": [tool]} for tool in (WEATHER, with_null)]
    assert to_conversation(rows[0]).tools == to_conversation(rows[1]).tools


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("Which colour?\n<image>", "Which colour?\n"),
        ("<image>\nWhich colour?", ""),
        ("<image>Which colour?", ""),
        ("Which colour?<image>", "Which colour?"),
    ],
)
def test_the_placeholder_of_an_image_may_stand_anywhere_in_the_first_question(
    text: str, before: str
) -> None:
    row = {"messages": [{"role": "user", "content": text}, REPLY], "images": ["a.png"]}
    message = to_conversation(row).messages[0]
    assert message.images == (ShownImage("a.png", len(before), marked=True),)
    assert message.content == text.replace("<image>", "")
    assert ImageSpec(56, 4, 0).laid(message, message.content) == ["", "Which colour?"]


def test_a_placeholder_without_an_image_is_counted() -> None:
    row = {"messages": [{"role": "user", "content": "<image>Which colour?"}, REPLY], "images": []}
    assert to_conversation(row).doubts == (IMAGE_IN_TEXT,)


def test_the_table_of_keys_is_in_the_reference() -> None:
    text = (Path(__file__).parent.parent / "data" / "README.md").read_text(encoding="utf-8")
    for names, answer in keys.table():
        assert f"| {names} | {answer} |" in text


@pytest.mark.parametrize("page", data_keys.PAGES)
def test_the_table_of_keys_is_what_the_code_says(page: str) -> None:
    text = (data_keys.ROOT / page).read_text(encoding="utf-8")
    assert data_keys.BEGIN in text
    assert data_keys.with_table(page) == text


@pytest.mark.parametrize(
    ("part", "unread"),
    [
        ({"type": "text", "value": "a"}, set()),
        ({"type": "text", "text": "a"}, set()),
        ({"type": "image", "value": "a"}, {"value of a content part"}),
        ({"type": "text", "width": 3}, {"width of a content part"}),
        ({"type": "text", "text": "a", "width": None}, set()),
    ],
)
def test_keys_of_a_content_part_that_nothing_reads_are_named(
    part: dict[str, Any], unread: set[str]
) -> None:
    assert keys.unread_of_part(part) == unread
