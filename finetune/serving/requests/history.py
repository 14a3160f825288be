"""The messages of a request -> a dialogue that can be answered, whatever its client has been through.

Chats are not training data: a reply was empty or cut, a tool failed or was cancelled, a question was
asked twice. The messages are laid out in the order in which they came, and:

    an empty message                       is left out, as the published chat template does
    an empty tool result or last question  stays, as a blank; an image without a question too
    arguments of a call that are no JSON   stay as they are; none at all are {}
    results of several calls               stand in the order of the calls where their ids tell it
    a refusal, reasoning of earlier turns  the refusal is the reply's text; the reasoning is left out,
                                           but where the template has a place for it (GLM-4.5)

`--history strict` takes none of this: there, a request is read as training data is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from finetune.data.dialogue import strict_json
from finetune.data.dialogue.conversation import Conversation, Message, RowError, check_contents
from finetune.data.dialogue.formats import to_conversation
from finetune.data.dialogue.messages import MessageReader
from finetune.data.dialogue.tool_calls import (
    BUILT_IN,
    arguments_text,
    order_results,
    read_tools,
)

BLANK = " "
"""What stands for a text that is empty and may not be left out: the template would drop the message."""
_NOT_TEXT = ("refusal", "audio", "reasoning_content", "reasoning", "thinking")


def strict(messages: Sequence[Any], tools: Any) -> Conversation:
    """The dialogue as training data would be read; RowError with the reason when it is none."""
    row = {"messages": list(messages), "tools": tools}
    conversation = to_conversation(row, "openai", location="messages", purpose="predict")
    if conversation.messages[-1].role == "assistant":
        raise RowError("messages must end with a user or tool message")
    return conversation


def lenient(messages: Sequence[Any], tools: Any, *, thoughts: bool = False) -> Conversation:
    """The dialogue by the rules above; RowError for what is no message at all.

    `thoughts`: the reasoning of earlier replies is kept, for a template that has a place for it.
    """
    reader = MessageReader(read_tools(tools))
    for number, message in enumerate(messages, 1):
        try:
            _read(reader, message, number, thoughts=thoughts)
        except RowError as error:
            reason = re.sub(r"^message \d+: ", "", str(error))
            raise RowError(f"message {number}: {reason}") from error
    kept = [message for message in _kept(_ordered(reader)) if message.content]
    if not kept or all(message.role == "system" for message in kept):
        raise RowError("there is nothing to answer: the messages are empty")
    check_contents(kept)
    return Conversation(tuple(kept), reader.tools, "messages")


def _read(reader: MessageReader, message: Any, number: int, *, thoughts: bool) -> None:
    """Appends what one message says."""
    if not isinstance(message, dict):
        raise RowError(f"is {strict_json.describe(message)}, not an object")
    item = {key: value for key, value in message.items() if value is not None}
    content = item.get("content") or item.get("refusal") or ""
    calls = item.pop("tool_calls", None) or item.pop("function_call", None) or []
    thought = _thought(item) if thoughts else ""
    item = {key: value for key, value in item.items() if key not in (*_NOT_TEXT, "function_call")}
    item["content"] = _without_refusals(content)
    if item.get("role") != "assistant":
        reader.read([item])
        return
    if item["content"] or not calls:
        if isinstance(item["content"], str):
            item["content"], thought = thought + item["content"], ""
        elif isinstance(item["content"], list) and thought:
            item["content"] = [{"type": "text", "text": thought}, *item["content"]]
            thought = ""
        reader.read([item])
    for call in calls if isinstance(calls, list) else [calls]:
        name, arguments, call_id = _call(call)
        reader.add(Message("assistant", thought + arguments, name), number, call_id)
        thought = ""


def _thought(item: Mapping[str, Any]) -> str:
    """The reasoning that a reply came with, as it stands in front of it."""
    text = item.get("reasoning_content") or item.get("reasoning")
    is_said = item.get("role") == "assistant" and isinstance(text, str) and text.strip()
    return f"<think>\n{str(text).strip()}\n</think>\n\n" if is_said else ""


def _call(call: Any) -> tuple[str, str, Any]:
    """Name, arguments and id of a call that some model once wrote, whole or not."""
    outer = call if isinstance(call, dict) else {}
    function = outer.get("function", outer)
    function = function if isinstance(function, dict) else {}
    name, call_id = function.get("name"), outer.get("id")
    if not isinstance(name, str) or not name.strip() or "\n" in name:
        raise RowError("a call has no function name")
    given = function.get("arguments")
    if given is None or (isinstance(given, str) and not given.strip()):
        return name.strip(), BLANK if name in BUILT_IN else "{}", call_id
    try:
        return name.strip(), arguments_text(name, given, 0), call_id
    except RowError:
        text = given if isinstance(given, str) else strict_json.dump(given)
        return name.strip(), text, call_id


def _without_refusals(content: Any) -> Any:
    """A content whose parts are text or images: a refusal is text too, and null is no text."""
    if not isinstance(content, list):
        return content
    parts = [
        {"type": "text", "text": part.get("refusal")}
        if isinstance(part, dict) and part.get("type") == "refusal"
        else part
        for part in content
    ]
    return [
        {**part, "text": ""}
        if isinstance(part, dict) and part.get("type") == "text" and part.get("text") is None
        else part
        for part in parts
    ]


def _ordered(reader: MessageReader) -> list[Message]:
    try:
        return order_results(reader.messages, reader.call_ids, reader.positions)
    except RowError:  # an id that no call has
        return reader.messages


def _kept(messages: Sequence[Message]) -> Iterator[Message]:
    """The messages with a blank where an empty one must stand."""
    for place, message in enumerate(messages):
        is_question = message.role == "user" and (
            bool(message.images) or place == len(messages) - 1
        )
        if not message.content and (is_question or message.role == "observation"):
            yield replace(message, content=BLANK)
        else:
            yield message


def sizes(messages: Sequence[Any]) -> Mapping[str, int]:
    """How much work the messages are: what is counted before any of it is done."""
    dicts = [message for message in messages if isinstance(message, dict)]
    parts = [part for one in dicts for part in _listed(one.get("content"))]
    shown = [p for p in parts if isinstance(p, dict) and p.get("type") in ("image", "image_url")]
    calls = sum(len(_listed(one.get("tool_calls"))) for one in dicts)
    return {"messages": len(messages), "content parts": len(parts), "calls": calls, "images": len(shown)}  # fmt: skip


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
