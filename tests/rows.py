"""Rows, replies and a stand-in for generation, for the tests of evaluation and prediction."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.data.chat.template import ChatTemplate
from finetune.data.dialogue.conversation import Message

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "weather",
        "parameters": {"type": "object", "properties": {"city": {}}, "required": ["city"]},
    },
}
CALL = '{"city": "北京"}'
Rows = list[dict[str, Any]]


def write_rows(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def read_rows(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def answering(
    monkeypatch: pytest.MonkeyPatch, text_of: Callable[[int], tuple[list[int], bool]]
) -> None:
    """Puts replies that `text_of(index)` gives in the place of a model's."""

    from finetune.generation import generate as generation

    def fake(generator: Any, windows: Any, **_: Any) -> Iterator[list[generation.Reply]]:
        first = 0
        for window in windows:
            answers = [text_of(first + index) for index in range(len(window.prompts))]
            first += len(answers)
            yield [
                generation.Reply(i, tuple(ids), stopped) for i, (ids, stopped) in enumerate(answers)
            ]

    monkeypatch.setattr(generation.Generator, "replies", fake)
    monkeypatch.setattr(generation, "check_context", lambda *_, **__: None)
    monkeypatch.setattr(generation, "context_length", lambda _: None)


def spoken(template: ChatTemplate, message: Message) -> list[int]:
    text = f"{message.metadata}\n{message.content}"
    return list(template.tokenizer.plain.encode(text, add_special_tokens=False).ids)
