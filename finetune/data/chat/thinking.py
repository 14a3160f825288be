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
from itertools import groupby
from typing import NamedTuple

from finetune.data.chat.spans import TrainOn
from finetune.data.dialogue.conversation import Conversation, Message

THINK, THINK_END = "<think>", "</think>"
EMPTY_THOUGHT = "\n\n"
"""What stands between the tags of a reply without reasoning."""

SPOKEN = (THINK, THINK_END, "<answer>", "</answer>", "<|begin_of_box|>", "<|end_of_box|>")
"""Tags that a model writes into its replies, where its tokenizer has tokens for them."""
_PARTS = re.compile(
    r"(\s*)(?:(<think>)(.*?)(</think>))?(\s*)(?:(<answer>)(.*)(</answer>)(\s*)\Z)?", re.DOTALL
)
_TAG_GROUPS = (1, 3, 5, 7)
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


class SpokenPart(NamedTuple):
    """A tag of a reply, or text before, between or behind tags."""

    text: str
    is_tag: bool


def spoken_parts(text: str) -> list[SpokenPart]:
    """A reply cut at the tags of the thought that it begins with, and of the answer that it ends in."""
    match = _PARTS.match(text)
    assert match is not None
    groups = [*enumerate(match.groups()), (-1, text[match.end() :])]
    runs = groupby(groups, key=lambda group: group[0] in _TAG_GROUPS and bool(group[1]))
    joined = (("".join(part or "" for _, part in run), is_tag) for is_tag, run in runs)
    return [SpokenPart(part, is_tag) for part, is_tag in joined if part]


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
            replace(m, train=place >= start and is_trained(m, place == replies[-1], train_on))
            if m.role == "assistant"
            else m
            for place, m in enumerate(messages[: index + 1])
        ]
        if any(m.train and m.weight for m in marked):
            found.append(replace(conversation, messages=tuple(marked)))
    return found


def is_trained(message: Message, is_last: bool, train_on: TrainOn) -> bool:
    """Whether a reply carries loss."""
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
        visible: The content as the checkpoint's template writes it, of a plain reply.
    """
    thought = split_message(message)
    if name:
        return f"{thought.thought or EMPTY_THOUGHT}{THINK_END}\n\n{name}\n{thought.said.strip()}"
    if thought.is_empty:
        return f"{EMPTY_THOUGHT}{THINK_END}\n\n{visible}"
    return f"{thought.thought}{THINK_END}{thought.said}".rstrip()


def split_message(message: Message) -> Thought:
    """The reasoning and the rest of a reply or of a call, whose arguments may speak of tags."""
    content = message.content
    if not message.metadata or THINK_END not in content or content.lstrip().startswith("{"):
        return split(content) if not message.metadata else Thought("", content)
    thought, _, said = content.partition(THINK_END)
    return Thought(thought.lstrip().removeprefix(THINK), said)


def arguments_of(call: Message) -> str:
    """The arguments of a call, without the thought that may stand in front of them."""
    return split_message(call).said.strip() if call.content.startswith(THINK) else call.content


def thoughts(conversation: Conversation) -> list[bool]:
    """For each turn of the model that may carry loss whether it was thought out."""
    found = []
    for role, run in groupby(conversation.messages, key=lambda message: message.role):
        turn = list(run)
        if role == "assistant" and any(message.train is not False for message in turn):
            found.append(not split_message(turn[0]).is_empty)
    return found


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
