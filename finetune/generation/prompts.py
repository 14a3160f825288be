"""Dialogues -> prompts: for the replies that they hold, as an evaluation asks, or for the one that comes next.

A prompt is the dialogue before the reply, so it never contains its reference.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune import console
from finetune.config.schema import EvaluationSection
from finetune.data.chat.image import ImagePrompt
from finetune.data.chat.spans import keeps_first_turn
from finetune.data.dialogue.conversation import Conversation, Message

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate

Replies = Literal["every_reply", "last_reply", "next_reply"]
BATCHES_PER_WINDOW = 64
"""Batches whose prompts are sorted by length together, and whose replies are kept together."""
_SAMPLE_SEED = 0
"""The sample of replies is the same in every run, whatever its training seed."""
_NAMED = 5
_BATCH = 256


def window_size(batch_size: int) -> int:
    """Prompts of a window."""
    return batch_size * BATCHES_PER_WINDOW


class Question(NamedTuple):
    """A dialogue and the place of the reply that is asked for."""

    conversation: Conversation
    reply: int
    """Number of messages before it."""


@dataclass(frozen=True, slots=True, eq=False)
class ReplyPrompt:
    """One reply to ask for."""

    prompt_ids: npt.NDArray[np.int32] | ImagePrompt
    """int32 [T]; ends where the reply begins."""
    conversation: Conversation
    index: int
    """Place of the reply among the dialogue's messages."""
    template: ChatTemplate = field(repr=False)

    @property
    def location(self) -> str:
        """`file:line` of the dialogue."""
        return self.conversation.location

    @property
    def name(self) -> str:
        """The prompt in messages."""
        return f"{self.location} message {self.index + 1}"

    @property
    def tools(self) -> tuple[Mapping[str, Any], ...]:
        """What the dialogue offers."""
        return self.conversation.tools

    @property
    def opened(self) -> str:
        """What the prompt ends in behind `<|assistant|>`, such as `<think>`."""
        return self.template.layout.opens(self.conversation, self.index)

    @property
    def reference(self) -> Message:
        """The reply that the dialogue has there, as one is read; a call is compared without its thought."""
        reference = self.conversation.messages[self.index]
        if not reference.metadata:
            return self.template.layout.as_read(reference)
        return replace(reference, content=self.template.visible(reference))

    @property
    def turns(self) -> int:
        """User messages of the dialogue before the reply, also those that did not fit."""
        before = self.conversation.messages[: self.index]
        return sum(message.role == "user" for message in before)

    @property
    def text(self) -> str:
        """The prompt as text, control tokens spelled out."""
        return self.template.decode(self.prompt_ids)

    @property
    def images(self) -> tuple[str, ...]:
        """Paths of the images that the prompt shows."""
        return self.prompt_ids.paths if isinstance(self.prompt_ids, ImagePrompt) else ()


@dataclass(frozen=True)
class PromptCounts:
    """What became of the replies in the dialogues."""

    replies: int
    """Replies there are to ask for."""
    sampled: int
    """Replies chosen, all of them without a `max_samples`."""
    shortened: int
    """Prompts that lost their oldest turns."""
    dropped: int
    """Replies left out because even their last turn is too long."""
    named: tuple[str, ...]
    """The first of those left out, as `file:line: reason`."""

    def say(self) -> None:
        """What was left out, and why."""
        if self.sampled < self.replies:
            console.say(
                f"generating {self.sampled} of {self.replies} replies, always the same ones"
            )
        if self.shortened:
            console.say(f"{self.shortened} prompts lost their oldest turns to fit into the context")
        if self.dropped:
            named = "".join(f"\n  {line}" for line in self.named)
            console.warn(f"{self.dropped} prompts do not fit into the context, left out:{named}")


class PromptStream(Iterator[ReplyPrompt]):
    """A prompt for every reply of the dialogues, or for a fixed random `max_samples` of them.

    `next_reply` asks for the one at a dialogue's end, before a reply that is there; it has no reference.
    Earlier turns come from the dialogue itself. A prompt over `max_prompt` tokens loses whole
    oldest turns. Replies with `train: false` are not asked for: they are no references.
    """

    def __init__(
        self,
        conversations: Iterable[Conversation],
        template: ChatTemplate,
        *,
        replies: Replies = "every_reply",
        max_prompt: int | None = None,
        max_samples: int | None = None,
    ) -> None:
        self._tally = Counter[str]()
        self._named: list[str] = []
        self._template = template
        self._max_prompt = max_prompt
        questions = _counted(_questions(conversations, replies), self._tally)
        self._items = self._run(questions, max_samples)

    @classmethod
    def of(
        cls,
        conversations: Iterable[Conversation],
        template: ChatTemplate,
        section: EvaluationSection,
        positions: int | None,
    ) -> PromptStream:
        """The prompts that `section` asks for, the same in training and afterwards.

        Args:
            conversations: the held-out dialogues.
            template: the checkpoint's.
            section: which replies, how many, and how long they may be.
            positions: `context_length(model)`; a prompt that leaves no room for a reply loses its
                oldest turns.
        """
        return cls(
            conversations,
            template,
            replies=section.replies,
            max_prompt=None if positions is None else positions - section.max_new_tokens,
            max_samples=section.max_samples,
        )

    def __next__(self) -> ReplyPrompt:
        """The next prompt."""
        return next(self._items)

    @property
    def counts(self) -> PromptCounts:
        """What became of the replies read so far."""
        tally = self._tally
        return PromptCounts(
            replies=tally["replies"],
            sampled=tally["asked"] + tally["dropped"],
            shortened=tally["shortened"],
            dropped=tally["dropped"],
            named=tuple(self._named),
        )

    def _run(self, questions: Iterator[Question], max_samples: int | None) -> Iterator[ReplyPrompt]:
        if max_samples is not None:
            questions = iter(_sample(questions, max_samples))
        template, tally = self._template, self._tally
        while batch := list(islice(questions, _BATCH)):
            for question, full in zip(batch, template.prompts(batch), strict=True):
                ids = _shortened(question, full, template, self._max_prompt)
                if ids is None:
                    tally["dropped"] += 1
                    if len(self._named) < _NAMED:
                        self._named.append(_too_long(question))
                    continue
                tally["asked"] += 1
                tally["shortened"] += len(ids) < len(full)
                yield _prompt(question, ids, template)


def prompts_of(
    conversations: Iterable[Conversation],
    template: ChatTemplate,
    section: EvaluationSection,
    positions: int | None,
) -> list[ReplyPrompt]:
    """All of `PromptStream.of`; says what is left out."""
    stream = PromptStream.of(conversations, template, section, positions)
    prompts = list(stream)
    stream.counts.say()
    return prompts


def _questions(conversations: Iterable[Conversation], replies: Replies) -> Iterator[Question]:
    for conversation in conversations:
        messages = conversation.messages
        if replies == "next_reply":
            end = len(messages)
            while end and messages[end - 1].role == "assistant":
                end -= 1
            yield Question(conversation, end)
            continue
        asked = [
            index
            for index, message in enumerate(messages)
            if message.role == "assistant" and message.train is not False
        ]
        for index in asked if replies == "every_reply" else asked[-1:]:
            yield Question(conversation, index)


def _counted(questions: Iterator[Question], tally: Counter[str]) -> Iterator[Question]:
    for question in questions:
        tally["replies"] += 1
        yield question


def _sample(questions: Iterator[Question], count: int) -> list[Question]:
    """`count` of the questions in their order, each as likely; memory holds no others.

    Vitter's reservoir (Algorithm R).
    """
    chooser = random.Random(_SAMPLE_SEED)
    chosen: list[tuple[int, Question]] = []
    for place, question in enumerate(questions):
        if place < count:
            chosen.append((place, question))
        elif (slot := chooser.randrange(place + 1)) < count:
            chosen[slot] = (place, question)
    return [question for _, question in sorted(chosen, key=itemgetter(0))]


def _shortened(
    question: Question, full: list[int], template: ChatTemplate, max_prompt: int | None
) -> list[int] | None:
    """The prompt with as many turns as fit, or None when not even its last turn does.

    A turn reaches from a user message to the next; system messages and tools always stay, and the first
    turn where it alone shows images.
    """
    if max_prompt is None or len(full) <= max_prompt:
        return full
    conversation, reply = question
    messages = conversation.messages
    stays = {place for place in range(reply) if messages[place].role == "system"}
    turns = [place for place in range(reply) if messages[place].role == "user"]
    if turns and keeps_first_turn(messages[turns[0] : reply]):
        stays |= set(range(turns.pop(0), turns[0] if turns else reply))
    turns = turns[1:]
    fitting = None
    first, stop = 0, len(turns)  # the fewest dropped turns that suffice are searched by halves
    while first < stop:
        middle = (first + stop) // 2
        begin = turns[middle]
        kept = (*(messages[place] for place in sorted(stays) if place < begin), *messages[begin:reply])  # fmt: skip
        # The reply stays, as its prompt may say whether it has a thought.
        shorter = replace(conversation, messages=(*kept, *messages[reply : reply + 1]))
        ids = template.prompt(shorter, len(kept))
        if len(ids) <= max_prompt:
            fitting, stop = ids, middle
        else:
            first = middle + 1
    return fitting


def _prompt(question: Question, ids: list[int], template: ChatTemplate) -> ReplyPrompt:
    prompt_ids = ids if isinstance(ids, ImagePrompt) else np.array(ids, dtype=np.int32)
    return ReplyPrompt(prompt_ids, question.conversation, question.reply, template)


def _too_long(question: Question) -> str:
    return (
        f"{question.conversation.location}: the prompt of message {question.reply + 1} is too long"
    )
