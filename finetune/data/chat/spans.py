"""Where messages and replies lie in a rendered dialogue, and what of it is trained or dropped.

Everything here is arithmetic on positions; nothing is encoded. `T` is the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune.data.dialogue.conversation import Conversation, Message

Ids = npt.NDArray[np.int32]
TrainOn = Literal["every_reply", "last_reply"]


class MessageRun(NamedTuple):
    """Tokens `start:end` of one message, header included; None for the prefix, tools and final stop."""

    start: int
    end: int
    message: int | None


class ReplySpan(NamedTuple):
    """Tokens `start:end` that carry loss when reply `message` is trained: its text and its stop."""

    message: int
    start: int
    end: int


class TrainedSpan(NamedTuple):
    """Tokens `start:end` that carry loss, all with the same weight."""

    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class Rendered:
    """A dialogue as token ids. Its runs follow each other without a gap from 0 to the end."""

    input_ids: Ids
    """[T], read-only; after a reply that ends the dialogue comes its stop."""
    runs: tuple[MessageRun, ...]
    replies: tuple[ReplySpan, ...]


def trained_spans(
    rendered: Rendered, conversation: Conversation, train_on: TrainOn
) -> list[TrainedSpan]:
    """The tokens that carry loss: replies chosen by `train_on`, or by a message's own `train`.

    Each reply is trained with its stop; neighbours of equal weight are merged. Of plain text all of
    it is, but the prefix.
    """
    if conversation.text:
        return [TrainedSpan(rendered.runs[0].end, rendered.runs[-1].end, 1.0)]
    spans: list[TrainedSpan] = []
    last = rendered.replies[-1].message if rendered.replies else None
    for index, start, end in rendered.replies:
        message = conversation.messages[index]
        trained = message.train
        if trained is None:
            trained = train_on == "every_reply" or index == last
        if not trained or message.weight == 0:
            continue
        if spans and spans[-1].end == start and spans[-1].weight == message.weight:
            spans[-1] = spans[-1]._replace(end=end)
        else:
            spans.append(TrainedSpan(start, end, message.weight))
    return spans


def blocks(rendered: Rendered, max_length: int) -> Iterator[Rendered]:
    """Plain text in pieces of at most `max_length` tokens, each behind the prefix; nothing is lost."""
    if len(rendered.input_ids) <= max_length:
        yield rendered
        return
    ids, head = rendered.input_ids, rendered.runs[0].end
    for start in range(head, len(ids), max_length - head):
        piece = np.concatenate((ids[:head], ids[start : start + max_length - head]))
        piece.flags.writeable = False
        yield Rendered(piece, (MessageRun(0, head, None), MessageRun(head, len(piece), None)), ())


def shorten(
    rendered: Rendered,
    conversation: Conversation,
    max_length: int,
    train_on: TrainOn = "every_reply",
) -> Rendered | None:
    """The same dialogue without its oldest turns, at most `max_length` tokens; nothing is re-encoded.

    A turn reaches from a user message to the next. Tools and system messages always stay, and so does the
    first turn where it alone shows images; where later turns show some too, a turn goes with its images.
    None when nothing that carries loss would fit. Message numbers keep pointing into `conversation`.
    """
    if len(rendered.input_ids) <= max_length:
        return rendered
    fixed = _fixed_runs(rendered, conversation)
    head = rendered.runs[fixed - 1].end
    for place in _turn_starts(rendered, conversation)[1:]:
        cut = rendered.runs[place].start
        if head + len(rendered.input_ids) - cut > max_length:
            continue
        shorter = _without(rendered, fixed, place)
        return shorter if trained_spans(shorter, conversation, train_on) else None
    return None


def _fixed_runs(rendered: Rendered, conversation: Conversation) -> int:
    """How many runs always stay: prefix, tools, system messages, a first turn that alone shows images."""
    for place, run in enumerate(rendered.runs):
        if run.message is None or conversation.messages[run.message].role == "system":
            continue
        stays = keeps_first_turn(conversation.messages[run.message :])
        later = _users(rendered, conversation, place + 1) if stays else [place]
        return later[0] if later else len(rendered.runs)
    return len(rendered.runs)


def keeps_first_turn(messages: Sequence[Message]) -> bool:
    """Whether the turn that the messages begin with shows images, and no later one does.

    Later questions are about what it shows; where they bring images of their own, they are about these.
    """
    users = [place for place, message in enumerate(messages) if message.role == "user"]
    end = users[1] if len(users) > 1 else len(messages)
    shows = any(message.images for message in messages[:end])
    return shows and not any(message.images for message in messages[end:])


def _turn_starts(rendered: Rendered, conversation: Conversation) -> list[int]:
    """Places in `runs` where a turn that may go starts."""
    first = _fixed_runs(rendered, conversation)
    return [first, *_users(rendered, conversation, first + 1)]


def _users(rendered: Rendered, conversation: Conversation, first: int) -> list[int]:
    """Places of user messages from `first` on; a tool result is never the first thing after one."""
    roles = [
        None if run.message is None else conversation.messages[run.message].role
        for run in rendered.runs
    ]
    return [
        place
        for place in range(first, len(roles))
        if roles[place] == "user" and roles[place + 1 : place + 2] != ["observation"]
    ]


def _without(rendered: Rendered, start: int, stop: int) -> Rendered:
    """`rendered` without runs `start:stop`."""
    head, cut = rendered.runs[start].start, rendered.runs[stop].start
    gone = cut - head
    later = [MessageRun(s - gone, e - gone, m) for s, e, m in rendered.runs[stop:]]
    ids = np.concatenate((rendered.input_ids[:head], rendered.input_ids[cut:]))
    ids.flags.writeable = False
    stay = [reply for reply in rendered.replies if reply.start < head]  # of a turn with images
    follow = [ReplySpan(m, s - gone, e - gone) for m, s, e in rendered.replies if s >= cut]
    return Rendered(ids, (*rendered.runs[:start], *later), (*stay, *follow))
