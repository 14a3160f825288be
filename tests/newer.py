"""Tokenizers and dialogues in the forms of GLM-4.1V, 4.5, 4.7 and GLM-OCR."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import tiny
from dialogues import dialogue
from hypothesis import strategies as st
from tokenizers import Tokenizer

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.conversation import Conversation
from scripts.fixtures.newer_templates import TEMPLATES, TOKENS, write_tokenizer

TAGGED = tuple(name for name in TEMPLATES if name != "GLM-4.1V")
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "description": "查 <b>&'\"", "parameters": {
        "type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}}}
    for name in "fg"
)  # fmt: skip


def save_tokenizer(folder: Path, name: str) -> Path:
    """The tiny ranks with the control tokens and the template of a newer checkpoint."""
    ranks = json.loads(tiny.bare_tokenizer()) | {"added_tokens": []}
    write_tokenizer(folder, Tokenizer.from_str(json.dumps(ranks)), name)
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text('{"model_type": "glm4_moe"}')
    return folder


def save_model(folder: Path, name: str) -> Path:
    """A tiny GLM-4-0414 that talks in the layout of a newer checkpoint."""
    tiny.save_model(folder, "glm4", vocab_size=tiny.NUM_RANKS + len(TOKENS))
    (folder / "tokenizer_config.json").unlink()
    return save_tokenizer(folder, name)


@lru_cache(maxsize=8)
def template_of(folder: Path, name: str) -> ChatTemplate:
    """The layout of a newer checkpoint, over the tiny ranks."""
    return ChatTemplate(load_chat_tokenizer(save_tokenizer(folder / name, name)))


_text = st.text('ab \n你😀.,"', min_size=1, max_size=8).filter(str.strip)


def _objects(characters: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    """JSON objects whose texts are of these characters."""
    values = st.recursive(
        st.none() | st.booleans() | st.integers(-(10**20), 10**20)
        | st.floats(allow_nan=False, allow_infinity=False) | st.text(characters, max_size=8),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(st.text(characters, max_size=4), inner, max_size=3),
        max_leaves=6,
    )  # fmt: skip
    return st.dictionaries(st.text(characters, min_size=1, max_size=5), values, max_size=3)


arguments = _objects(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
_untagged = _objects(st.characters(exclude_characters="\0<[/", exclude_categories=["Cs"]))
"""Without what begins a tag: a template's own rendering cannot tell typed tags from its own."""


@st.composite
def dialogues_with_calls(draw: st.DrawFn, thoughts: bool = True) -> Conversation:
    """Questions with thoughts, text before calls, several calls at once, results."""

    def thought() -> str:
        said = draw(_text).strip() if thoughts and draw(st.booleans()) else ""
        return f"<think>\n{said}\n</think>\n\n" if said else ""

    turns: list[tuple[Any, ...]] = []
    if draw(st.booleans()):
        turns.append(("system", draw(_text)))
    for _ in range(draw(st.integers(1, 3))):
        turns.append(("user", draw(_text)))
        for _ in range(draw(st.integers(0, 2))):
            calls = draw(st.integers(1, 2))
            has_text = draw(st.booleans())
            if has_text:
                turns.append(("reply", thought() + draw(_text).strip()))
            for number in range(calls):
                before = "" if number or has_text else thought()
                made = json.dumps(draw(_untagged), ensure_ascii=False)
                turns.append(("call", before + made, draw(st.sampled_from("fg"))))
            turns += [("tool", draw(_text)) for _ in range(calls)]
        turns.append(("reply", thought() + draw(_text).strip()))
    return dialogue(*turns, tools=TOOLS if draw(st.booleans()) else ())


__all__ = ["TAGGED", "TEMPLATES", "TOKENS", "TOOLS", "dialogues_with_calls", "template_of"]
