r"""Replies of a thinking checkpoint (GLM-Z1), whose generation prompt ends in `<|assistant|>\n<think>`.

The checkpoint's template drops the reasoning of replies that are past, so no dialogue as a whole holds
what the model writes at each of its turns. Every turn that carries loss is therefore an example of its
own: the dialogue up to it as the template lays it out, the generation prompt, and what the model writes
behind it, which is the reply's reasoning or an empty thought, and then the text or the call:

    …<|user|>\nQ<|assistant|>\n<think>«\n\n</think>\n\nA<|user|>»
    …<|user|>\nQ<|assistant|>\n<think>«\nWhere?\n</think>\n\nget_weather\n{"city": "北京"}<|observation|>»

Further calls of the same turn follow as the template writes them: the model goes on by itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from finetune.data.chat.spans import TrainOn
from finetune.data.dialogue.conversation import Conversation, Message

THINK, THINK_END = "<think>", "</think>"
EMPTY_THOUGHT = "\n\n"
"""What stands between the tags of a reply without reasoning."""

_FUNCTION_NAME = re.compile(r"[\w.-]+")


class Thought(NamedTuple):
    """A reply's text in two."""

    thought: str
    """What stands between the tags; empty without reasoning."""
    said: str
    """What stands behind them, its white space too."""

    @property
    def is_empty(self) -> bool:
        """Whether there is no reasoning."""
        return not self.thought.strip()


def split(content: str) -> Thought:
    """The reasoning and the rest of a reply; the opening tag may be missing."""
    thought, end, said = content.rpartition(THINK_END)
    if not end:
        return Thought("", content)
    tagged = thought.lstrip()
    return Thought(tagged.removeprefix(THINK) if tagged.startswith(THINK) else thought, said)


def turns_with_loss(conversation: Conversation, train_on: TrainOn) -> list[Conversation]:
    """Per turn of the model that carries loss the dialogue up to its end, with loss on it alone."""
    if conversation.text:
        return [conversation]
    messages = conversation.messages
    replies = [index for index, message in enumerate(messages) if message.role == "assistant"]
    found = []
    for index in replies:
        if index + 1 < len(messages) and messages[index + 1].role == "assistant":
            continue
        start = turn_start(messages, index + 1)
        assert start is not None
        marked = [
            replace(m, train=place >= start and _is_trained(m, place == replies[-1], train_on))
            if m.role == "assistant"
            else m
            for place, m in enumerate(messages[: index + 1])
        ]
        if any(m.train and m.weight for m in marked):
            found.append(replace(conversation, messages=tuple(marked)))
    return found


def _is_trained(message: Message, is_last: bool, train_on: TrainOn) -> bool:
    return message.train if message.train is not None else train_on == "every_reply" or is_last


def turn_start(messages: Sequence[Message], stop: int) -> int | None:
    """The first message of the model's turn that ends before `stop`; None when none does."""
    start = stop
    while start and messages[start - 1].role == "assistant":
        start -= 1
    return start if start < stop else None


def behind_prompt(message: Message, name: str, visible: str) -> str:
    """What the model writes behind `<think>`.

    Args:
        message: The first message of its turn.
        name: The function's name, or empty for a plain reply.
        visible: The content as the checkpoint's template writes it.
    """
    thought = split(message.content)
    if name:
        return f"{thought.thought or EMPTY_THOUGHT}{THINK_END}\n\n{name}\n{visible}"
    if thought.is_empty:
        return f"{EMPTY_THOUGHT}{THINK_END}\n\n{visible}"
    return f"{thought.thought}{THINK_END}{thought.said}".rstrip()


def has_thought(conversation: Conversation) -> bool:
    """Whether the dialogue's last turn was thought out."""
    start = turn_start(conversation.messages, len(conversation.messages))
    return start is not None and not split(conversation.messages[start].content).is_empty


def as_message(content: str) -> Message:
    """The message that a plain reply's text holds: a call behind a thought, or the text.

    An empty thought goes; a call's thought goes too, as a call has no place for it.
    """
    thought, end, said = content.partition(THINK_END)
    if not end:
        return Message("assistant", content)
    said = said.strip()
    name, _, arguments = said.partition("\n")
    if _FUNCTION_NAME.fullmatch(name) and arguments.startswith("{"):
        return Message("assistant", arguments, metadata=name)
    is_empty = not thought.removeprefix(THINK).strip()
    return Message("assistant", said if is_empty else content)
