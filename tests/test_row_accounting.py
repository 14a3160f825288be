"""All that a row of any layout holds is in the dialogue, or named, or refused; and no mask is overlooked."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from row_parts import CALL, REPLY, RESULT, USER, WEATHER

from finetune.data.dialogue import keys
from finetune.data.dialogue.columns import ALPACA_REPLIES, PAIRS
from finetune.data.dialogue.conversation import RowError
from finetune.data.dialogue.doubts import CALL_THOUGHT
from finetune.data.dialogue.formats import to_conversation

PAIR = {"prompt": "Q", "response": "A"}
NEEDLE = "needle-7f3a"
ROWS: list[dict[str, Any]] = [
    PAIR, {"messages": [USER, REPLY]}, {"instruction": "Q", "output": "A"}, {"question": "Q", "answer": "A"},
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    {"conversation": [{"human": "Q", "assistant": "A"}]}, {"input": "Q", "target": "A"},
    {"conversation": [{"input": "Q", "output": "A"}]}, {"query": "Q", "response": "A", "history": [["a", "b"]]},
    {"prompt": [USER], "completion": [REPLY]}, {"messages": [USER, CALL, RESULT, REPLY], "tools": [WEATHER]},
    {"chat": {"turn_1": {"Human": "Q", "MOSS": "A"}}}, {"chat": "USER: Q ASSISTANT: A"},
    {"text": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>"}, {"text": "a document"},
    {"query": "Q", "tools": [WEATHER], "answers": [{"name": "get_weather", "arguments": {}}]},
]  # fmt: skip
"""One row of every layout."""
KNOWN_COLUMNS = sorted(
    {name for pair in PAIRS for name in pair} | set(ALPACA_REPLIES) | keys._HARMLESS_COLUMNS | keys._MESSAGE_KEYS
    | {"history", "context", "system", "functions", "messages", "conversations", "chat", "text", "answers"}
)  # fmt: skip
NAMES = st.one_of(
    st.sampled_from(KNOWN_COLUMNS), st.text("abcdefghij_", min_size=1, max_size=12), st.text(min_size=1)
)  # fmt: skip


def is_accounted_for(row: dict[str, Any], name: str) -> bool:
    """Whether what a row holds is refused, named, or in the dialogue that is trained."""
    try:
        dialogue = to_conversation(row)
    except RowError:
        return True
    said = [dialogue.text, *(f"{m.content}{m.metadata}{m.images}" for m in dialogue.messages)]
    if CALL_THOUGHT in dialogue.doubts:
        return True
    named = any(name == noted.removesuffix(" of messages") for noted in dialogue.unread)
    return named or any(NEEDLE in text for text in said) or NEEDLE in json.dumps(dialogue.tools)


@settings(max_examples=400, deadline=None)
@given(row=st.sampled_from(ROWS), name=NAMES)
def test_text_in_any_column_of_any_layout_is_read_or_named(row: dict[str, Any], name: str) -> None:
    if name not in row and name not in keys._HARMLESS_COLUMNS:
        assert is_accounted_for({**row, name: NEEDLE}, name)
    long = f"{NEEDLE} " * 20
    assert is_accounted_for({**row, name: long}, name)


LISTS = [row for row in ROWS if {"messages", "conversations", "conversation"} & row.keys()]


@settings(max_examples=400, deadline=None)
@given(row=st.sampled_from(LISTS), name=NAMES, place=st.integers(0, 3))
def test_text_in_any_key_of_any_message_is_read_or_named(
    row: dict[str, Any], name: str, place: int
) -> None:
    (column,) = {"messages", "conversations", "conversation"} & row.keys()
    items = list(row[column])
    place %= len(items)
    # "name" says which tool gave a result, which stands behind its call anyway.
    if name not in items[place] and name not in {*keys._HARMLESS_IN_MESSAGES, "name"}:
        items[place] = {**items[place], name: NEEDLE}
        assert is_accounted_for({**row, column: items}, name)


@settings(max_examples=300, deadline=None)
@given(
    row=st.sampled_from(LISTS),
    stem=st.sampled_from(["loss", "train", "mask", "learn", "supervise", "backprop"]),
    before=st.sampled_from(["", "no_", "is_", "compute_", "X", "use_", "my_"]),
    behind=st.sampled_from(["", "_on", "able", "_this", "s", "ed", "_turn"]),
    value=st.sampled_from([False, 0, 0.0, "false", "no", "False", 0.25]),
    in_row=st.booleans(),
)
def test_no_reply_is_trained_that_a_key_of_any_name_masks(
    row: dict[str, Any], stem: str, before: str, behind: str, value: Any, in_row: bool
) -> None:
    (column,) = {"messages", "conversations", "conversation"} & row.keys()
    mark = {f"{before}{stem}{behind}": value}
    items = [*row[column][:-1], {**row[column][-1], **mark}]
    given_row = {**row, **mark} if in_row else {**row, column: items}
    try:
        reply = to_conversation(given_row).messages[-1]
    except RowError:
        return
    # "masked": false says that a reply is trained.
    assert reply.train is False or reply.weight == value or list(mark) == ["masked"]
