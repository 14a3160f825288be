"""`data.turns: merge`: dialogues whose sides do not take turns, as chats between people do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finetune.data.dialogue.conversation import Message


def merged(messages: Sequence[Message]) -> list[Message]:
    """The messages with neighbours of one side joined by a line break.

    Two users, two replies, two system messages become one; calls and results stay as they are. A
    joined reply carries loss if both parts do. A reply that opens the dialogue stays and carries no
    loss, as nothing asks for it; a system message in the middle stays where it is.
    """
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else None
        if before is not None and _same_side(before, message):
            joined[-1] = _joined(before, message)
        else:
            joined.append(message)
    first = next((n for n, message in enumerate(joined) if message.role != "system"), None)
    if first is not None and joined[first].role == "assistant":
        joined[first] = replace(joined[first], train=False)
    return joined


def _same_side(before: Message, message: Message) -> bool:
    return (
        before.role == message.role != "observation"
        and not before.metadata
        and not message.metadata
    )


def _joined(before: Message, message: Message) -> Message:
    train = False if False in (before.train, message.train) else before.train or message.train
    weight = min(before.weight, message.weight)
    content = f"{before.content}\n{message.content}"
    behind = len(before.content) + 1
    images = (*before.images, *(i._replace(at=i.at + behind) for i in message.images))
    return replace(before, content=content, train=train, weight=weight, images=images)
