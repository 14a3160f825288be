"""Eighteen control strings in every field that text can come from: not one of them becomes a control token.

Each case says a string in all fields of a route at once and counts control ids against the same
dialogue with harmless words in those places; the text must also be there, whole, when it is decoded.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from dialogues import CONTROL_STRINGS

from tests.reliability.frame import Case
from tests.reliability.places import shared

HARMLESS = "harmless"
EXTRA = [text for text in CONTROL_STRINGS if text.startswith(("<think", "</think", "<|begin_of_box", "<|im_"))]  # fmt: skip


@cache
def _template() -> Any:
    """Of a tokenizer that knows all eighteen as added tokens, some special and some not."""
    import tiny

    from finetune.data.chat.template import ChatTemplate
    from finetune.data.chat.tokenizer import load_chat_tokenizer

    folder = shared("controls")
    tiny.save_tokenizer(folder)
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    for text in EXTRA:
        like = value["added_tokens"][-1]
        token = {"id": like["id"] + 1, "content": text, "special": "think" not in text}
        value["added_tokens"].append(like | token)
    path.write_text(json.dumps(value), encoding="utf-8")
    template = ChatTemplate(load_chat_tokenizer(folder))
    assert set(template.tokenizer.control_ids) == set(CONTROL_STRINGS)
    return template


def _tool(text: str) -> dict[str, Any]:
    """A function definition with the text in every part that a user writes freely."""
    properties = {f"p{text}": {"type": "string", "description": text, "enum": [text]}}
    parameters = {"type": "object", "properties": properties, "required": [f"p{text}"]}
    function = {"name": f"f{text}", "description": text, "parameters": parameters}
    return {"type": "function", "function": function}


def _row(text: str) -> dict[str, Any]:
    """A row with the text in every field of every kind of message."""
    around = f"a {text} b{text}"
    call = {"role": "assistant", "metadata": f"f{text}", "content": json.dumps({f"p{text}": text})}
    return {
        "messages": [
            {"role": "system", "content": around},
            {"role": "user", "content": around},
            {"role": "assistant", "content": around},
            {"role": "user", "content": text},
            call,
            {"role": "observation", "content": around},
            {"role": "assistant", "content": text},
        ],
        "tools": [_tool(text)],
    }


def _compare(ids_of: Callable[[str], Sequence[int]], text: str) -> None:
    """As many control ids as without the text, in the same order; the text is all there."""
    controls = set(_template().tokenizer.control_ids.values())
    typed, plain = ids_of(text), ids_of(HARMLESS)
    assert [i for i in typed if i in controls] == [i for i in plain if i in controls]
    backend = _template().tokenizer.backend
    found = [backend.decode(list(ids), skip_special_tokens=False) for ids in (typed, plain)]
    assert found[0].replace(text, HARMLESS) == found[1].replace(text, HARMLESS)


def training(text: str, folder: Path) -> None:
    """Rows in four layouts, read from files."""
    from finetune.data.reading.sources import SourceSpec, read_conversations

    def openai(said: str) -> dict[str, Any]:
        row = _row(said)
        calls = {"role": "assistant", "content": said, "tool_calls": [{"id": "1", "type": "function", "function": {"name": f"f{said}", "arguments": json.dumps({"p": said})}}]}  # fmt: skip
        result = {"role": "tool", "tool_call_id": "1", "content": said}
        row["messages"][4:6] = [calls, result]
        return row

    layouts: dict[str, Callable[[str], dict[str, Any]]] = {
        "messages": _row,
        "openai": openai,
        "sharegpt": lambda said: {"system": said, "conversations": [{"from": "human", "value": said}, {"from": "gpt", "value": said}]},
        "alpaca": lambda said: {"instruction": said, "input": said, "output": said, "system": said, "history": [[said, said]]},
        "pairs": lambda said: {"prompt": said, "response": said, "history": [[said, said]]},
    }  # fmt: skip
    for layout, row in layouts.items():

        def ids_of(said: str, layout: str = layout, row: Any = row) -> list[int]:
            path = folder / "rows.jsonl"
            path.write_text(json.dumps(row(said), ensure_ascii=False), encoding="utf-8")
            (dialogue,) = read_conversations([SourceSpec(str(path), format=layout)])
            ids: list[int] = _template().render([dialogue])[0].input_ids.tolist()
            return ids

        _compare(ids_of, text)


class _Voice:
    """Stands for the model in a chat: answers what it is told to, keeps the prompts."""

    def __init__(self, reply: str) -> None:
        self.template = _template()
        self.prompts: list[list[int]] = []
        self._reply = reply

    def room(self, conversation: Any) -> bool:
        return True

    def reply(self, conversation: Any, show: Callable[[str], None]) -> list[Any]:
        from finetune.data.dialogue.conversation import Message

        self.prompts.append(self.template.prompt(conversation, len(conversation.messages)))
        return [Message("assistant", self._reply)]


def _talk(lines: list[str], reply: str) -> list[list[int]]:
    from finetune.chat.terminal import Session, Terminal

    voice = _Voice(reply)
    text = "".join(f"{line}\n" for line in lines)
    Session(voice, Terminal(io.StringIO(text), io.StringIO()), "").run()
    return voice.prompts


def chat(text: str, folder: Path) -> None:
    """Typed into the terminal: message, system message, tools from a file."""

    def ids_of(said: str) -> list[int]:
        (folder / "tools.json").write_text(json.dumps([_tool(said)]), encoding="utf-8")
        lines = [f"/system {said}", f"/tools {folder / 'tools.json'}", f"{said} {said}", said]
        return [i for prompt in _talk(lines, "fine") for i in prompt]

    _compare(ids_of, text)


def history(text: str, folder: Path) -> None:
    """Written by the model as text, in pieces, and fed back with the next message."""
    from finetune.data.dialogue.conversation import Conversation, Message

    template = _template()

    def ids_of(said: str) -> list[int]:
        spelled = template.tokenizer.plain.encode(f"\n{said} {said}", add_special_tokens=False).ids
        reply = template.parse(spelled)
        assert reply.content == f"{said} {said}"
        call = Message("assistant", json.dumps({"p": said}), metadata=f"f{said}")
        turns = (Message("user", "q"), reply, Message("user", "q"), call, Message("observation", said))  # fmt: skip
        ids = list(template.prompt(Conversation(turns), len(turns)))
        return ids + [i for prompt in _talk(["q", "q"], said) for i in prompt]

    _compare(ids_of, text)


def endpoint(text: str, folder: Path) -> None:
    """Sent to the served model in every field of a request that reaches the prompt."""
    from finetune.serving.requests.chat import AskedChat
    from finetune.serving.requests.rules import RequestRules

    rules = RequestRules("m", _template(), None, 8)

    def ids_of(said: str) -> list[int]:
        function = {"name": f"f{said}", "arguments": json.dumps({f"p{said}": said})}
        messages = [
            {"role": "system", "content": said},
            {"role": "user", "content": [{"type": "text", "text": said}], "name": said},
            {"role": "assistant", "content": said},
            {"role": "user", "content": said},
            {"role": "assistant", "tool_calls": [{"id": said, "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": said, "content": said, "name": f"f{said}"},
        ]  # fmt: skip
        body = {"model": "m", "messages": messages, "tools": [_tool(said)], "stop": said, "user": said}  # fmt: skip
        return AskedChat(json.dumps(body).encode(), {"m": rules}).replies()[0].prompt

    _compare(ids_of, text)


ROUTES = {"training": training, "chat": chat, "history fed back": history, "endpoint": endpoint}


def cases() -> Iterator[Case]:
    """Every string by every route."""
    _template()
    import finetune.chat.terminal
    import finetune.data.reading.sources
    import finetune.serving.requests.chat  # noqa: F401

    for route, check in ROUTES.items():
        for text in CONTROL_STRINGS:
            yield Case(f"controls: {text} by {route}", partial(check, text))


def _leaks(folder: Path, text: str) -> str:
    """What plain transformers makes of a row: why control ids came out of text, or nothing."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared("controls"))
    controls = set(_template().tokenizer.control_ids.values())

    def count(said: str) -> int:
        dialogue = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
        ids = tokenizer.apply_chat_template(dialogue, tokenize=True, return_dict=False)
        return sum(i in controls for i in ids)

    more = count(text) - count(HARMLESS)
    return f"{more} control ids out of text" if more else ""


def stock_cases() -> Iterator[Case]:
    """The same strings through transformers' own tokenizer and chat template."""
    _template()
    import transformers  # noqa: F401

    for text in CONTROL_STRINGS:
        yield Case(f"controls: {text} by training", lambda folder, text=text: _leaks(folder, text))
