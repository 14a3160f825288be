"""Generated ids -> messages, and the rows that `predict` writes them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finetune.data.chat.layouts.glm45 import Glm45Layout
from finetune.data.chat.thinking import arguments_of
from finetune.data.dialogue.conversation import Message
from finetune.data.dialogue.images import with_placeholders
from finetune.generation.stream import FUNCTION_NAME, reply_stream

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate
    from finetune.generation.generate import Reply
    from finetune.generation.prompts import ReplyPrompt


def as_reply(message: Message, tools: Sequence[Mapping[str, Any]]) -> Message:
    """The message, its first line a function's name only where a function can be meant.

    Without tools, or where the line is no name, the whole reply is text.
    """
    if not message.metadata or (tools and FUNCTION_NAME.fullmatch(message.metadata)):
        return message
    return Message("assistant", f"{message.metadata}\n{message.content}")


def reply_messages(
    ids: Sequence[int], template: ChatTemplate, tools: Sequence[Mapping[str, Any]]
) -> list[Message]:
    """The messages that generated ids hold: one, or several of one turn."""
    messages = template.messages(ids, tools)
    if isinstance(template.layout, Glm45Layout):  # a call there is one by its tokens
        return (
            messages if tools or not any(m.metadata for m in messages) else as_text(ids, template)
        )
    found: list[Message] = []
    for message in messages:
        found.append(as_reply(message, tools))
        if not found[-1].metadata:
            break
    return found


def as_text(ids: Sequence[int], template: ChatTemplate) -> list[Message]:
    """A reply whose tags of calls are text, as nothing can be called."""
    stream = reply_stream(template, ())
    pieces = [piece for token in ids for piece in stream.take(int(token))] + stream.finish()
    return [Message("assistant", "".join(piece.text for piece in pieces if not piece.is_thought))]


def without_thought(message: Message) -> Message:
    """The message, of a call its arguments alone."""
    return replace(message, content=arguments_of(message)) if message.metadata else message


def message_json(message: Message) -> dict[str, Any]:
    """The message as rows of the `messages` layout hold it."""
    plain: dict[str, Any] = {"role": message.role}
    if message.metadata:
        plain["metadata"] = message.metadata
    if [(image.at, image.marked) for image in message.images] == [(0, False)]:
        return plain | {"content": message.content, "image": message.images[0].path}
    plain["content"] = with_placeholders(message)
    if message.images:
        plain["images"] = [image.path for image in message.images]
    return plain


def reply_row(prompt: ReplyPrompt, reply: Reply) -> dict[str, Any]:
    """The line that `predict` writes: the dialogue and the reply behind it."""
    conversation = prompt.conversation
    new = reply_messages(reply.ids, prompt.template, conversation.tools)
    messages = [*conversation.messages[: prompt.index], *new]
    row: dict[str, Any] = {
        "where": conversation.location,
        "messages": [message_json(message) for message in messages],
    }
    if conversation.tools:
        row["tools"] = list(conversation.tools)
    if calls := [message for message in new if message.metadata]:
        row["tool_calls"] = [
            {
                "id": f"call_{number}",
                "type": "function",
                "function": {"name": call.metadata, "arguments": arguments_of(call)},
            }
            for number, call in enumerate(calls)
        ]
    if prompt.index < len(conversation.messages):
        row["reference"] = message_json(prompt.reference)
    return row | {"stopped": reply.stopped}
