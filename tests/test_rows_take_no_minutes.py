"""Rows of strangers in which a pattern could walk back and forth: read in time that grows as they do."""

from __future__ import annotations

import time
from typing import Any

import pytest

from finetune.data.dialogue.calls_in_text import structure_in_text
from finetune.data.dialogue.conversation import Message
from finetune.data.dialogue.foreign import tools_of_system

MANY = 100_000
BLANKS = " " * MANY
SYSTEMS = {
    "a tag and blanks": f"<tools>{BLANKS}",
    "blanks in a tag": f"<tools>{BLANKS}{{{BLANKS}</tools>",
    "tags that are opened": "<tools>" * MANY,
    "words for lists": "tools: " * MANY,
    "lists that are opened": "tools: [{" * MANY,
    "lists that are closed": "tools: [{" + "]" * MANY,
    "ends without a beginning": "}]" * MANY + "tools: [{",
    "blanks before an end": "tools: [{" + f"{BLANKS}]" * 3,
}
REPLIES = {
    "blanks in a call": f"<tool_call>a{BLANKS}b",
    "calls that are opened": "<tool_call>" * MANY,
    "blanks in a function": f"<function=f>{BLANKS}a{BLANKS}",
    "functions that are opened": "<function=f>" * MANY,
    "functions without a name": "<function=" * MANY,
    "invocations that are opened": '<invoke name="f">' * MANY,
}
RESULTS = {
    "blanks in a result": f"<tool_response>{BLANKS}a{BLANKS}",
    "results that are opened": "<tool_response>" * MANY,
    "results that are closed": "<tool_response></tool_response> " * (MANY // 20) + "x",
    "blanks before a result": f"{BLANKS}<tool_response>",
}
SECONDS = 3.0
"""Of a core; each takes a tenth. With patterns that walk back a few thousand blanks took minutes."""


def within(seconds: float, work: Any) -> Any:
    begun = time.process_time()
    made = work()
    assert time.process_time() - begun < seconds
    return made


@pytest.mark.parametrize("what", SYSTEMS)
def test_a_system_text_that_lists_tools_without_end(what: str) -> None:
    items = [{"role": "system", "content": SYSTEMS[what]}, {"role": "user", "content": "a"}]
    assert within(SECONDS, lambda: tools_of_system(items)) == (items, None)
    within(SECONDS, lambda: structure_in_text(Message("system", SYSTEMS[what]), ()))


@pytest.mark.parametrize("what", REPLIES)
def test_a_reply_with_calls_without_end(what: str) -> None:
    within(SECONDS, lambda: structure_in_text(Message("assistant", REPLIES[what]), ()))


@pytest.mark.parametrize("what", RESULTS)
def test_a_result_in_tags_without_end(what: str) -> None:
    text = RESULTS[what]
    within(SECONDS, lambda: structure_in_text(Message("user", text), ()))
    items = [
        {"role": "system", "content": '<tools>{"name": "f"}</tools>'},
        {"role": "tool", "content": text},
    ]
    told, tools = within(SECONDS, lambda: tools_of_system(items))
    assert tools == [{"name": "f"}]
    assert told == [items[1]]


@pytest.mark.parametrize(
    ("text", "results"),
    [
        ("<tool_response> a </tool_response>\n<tool_response>b</tool_response> ", 2),
        ("<tool_result>a</tool_result>", 1),
        ("<tool_response>a</tool_response> and more", 0),
        ("Observation: a", 1),
        ("Observation: <tool_response>a</tool_response>", 0),
        ("a question", 0),
    ],
)
def test_results_are_read_where_a_text_consists_of_them(text: str, results: int) -> None:
    assert bool(structure_in_text(Message("user", text), ())) == bool(results)
