"""Dialogues for tests: written by hand in one line each, or drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tiny
from hypothesis import strategies as st

from finetune.data.dialogue.conversation import Conversation, Message

CONTROL_STRINGS = (
    *tiny.CONTROL_TOKENS, "<think>", "</think>", "<|begin_of_box|>", "<|im_start|>"
)  # fmt: skip

# The 0414 layout with Z1's treatment of text; GLM-4-0414's prompt ends in <|assistant|> alone.
Z1_TEMPLATE = (
    "[gMASK]<sop>{%- if tools -%}<|system|>\n# 可用工具{%- for tool in tools %}"
    "{%- set function = tool.function if tool.get('function') else tool %}\n\n\n"
    "## {{ function.name }}\n\n{{ function | tojson(indent=4, ensure_ascii=False) }}"
    "{%- endfor %}{%- endif -%}"
    "{%- for m in messages if m.role == 'system' -%}<|system|>\n{{ m.content }}{%- endfor -%}"
    "{%- for m in messages if m.role != 'system' -%}"
    "{%- set visible = m.content.split('</think>')[-1].strip() -%}<|{{ m.role }}|>"
    "{{- m.get('metadata', '') if m.role == 'assistant' else '' }}\n{{ visible }}{%- endfor -%}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
)
GLM4_0414_TEMPLATE = Z1_TEMPLATE.replace("<|assistant|>\n<think>", "<|assistant|>")
TOOLS = ({"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}},)


def dialogue(*turns: tuple[Any, ...], tools: Iterable[Any] = ()) -> Conversation:
    """(role, content[, metadata]) per message; `call`, `tool` and `reply` for short."""
    roles = {"call": "assistant", "reply": "assistant", "tool": "observation"}
    messages = tuple(Message(roles.get(role, role), *rest) for role, *rest in turns)
    return Conversation(messages, tuple(tools), location="file.jsonl:1")


_typed = st.sampled_from([*CONTROL_STRINGS, "\n", "\n\n", " ", "<|", "|>"])
_free = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
any_text = st.lists(st.one_of(_free, _typed), min_size=1, max_size=4).map("".join).filter(bool)
"""Any text that is not empty, control strings among it."""
plain_text = st.text('ab \n你好😀{}":.', min_size=1, max_size=12)
"""Text without control strings, such as a template's rendering can be compared on."""


@st.composite
def dialogues(draw: st.DrawFn, content: st.SearchStrategy[str] = any_text) -> Conversation:
    """One to three turns, calls in some of them, perhaps system text, perhaps tools."""
    turns: list[tuple[Any, ...]] = []
    if draw(st.booleans()):
        turns.append(("system", draw(content)))
    for _ in range(draw(st.integers(1, 3))):
        turns.append(("user", draw(content)))
        for _ in range(draw(st.integers(0, 2))):
            calls = draw(st.integers(1, 2))
            turns += [("call", draw(content), draw(st.sampled_from("fg"))) for _ in range(calls)]
            turns += [("tool", draw(content)) for _ in range(calls)]
        turns.append(("reply", draw(content)))
    return dialogue(*turns, tools=TOOLS if draw(st.booleans()) else ())
