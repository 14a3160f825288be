"""What a chat layout is: it turns messages into pieces of a dialogue, and reply ids into messages.

A piece is one message, as control tokens and texts. Texts are numbered here and encoded later, all
of a batch in one call, by a tokenizer that knows no control string.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from finetune.data.chat.image import span_ids
from finetune.data.chat.jinja import JsonMessage
from finetune.data.chat.spans import TrainOn
from finetune.data.chat.tokenizer import ChatTokenizer
from finetune.data.dialogue.conversation import Conversation, Message


class PlannedRun(NamedTuple):
    """A run of tokens before encoding. An op below 0 is the token `~op`, else the number of a text."""

    message: int | None
    ops: tuple[int, ...]
    given: int = 1
    """Tokens at the start of a reply that the prompt ends in: its header, and what follows it there."""
    stops: bool = True
    """Of a reply: the next token is its stop, which is trained with it."""


@dataclass(slots=True)
class Texts:
    """Texts of one call into the tokenizer, equal ones once."""

    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, text: str) -> int:
        """The text's number, which stands for it in a piece."""
        return self.numbers.setdefault(text, len(self.numbers))

    def ops(self, *parts: str | int) -> tuple[int, ...]:
        """Parts as ops; texts that follow each other are encoded as one, as the template's are."""
        return tuple(self.number(p) if isinstance(p, str) else p for p in merged(parts))


def parts_with_images(message: Message, body: str, tokenizer: ChatTokenizer) -> Iterator[str | int]:
    """The text of a message as the template writes it, `body`, with the ops of its images where they stand."""
    if not message.images:
        yield body
        return
    assert tokenizer.image is not None  # `check_images` was asked
    first, *others = tokenizer.image.laid(message, body)
    yield first
    for image, text in zip(message.images, others, strict=True):
        yield from (~i for i in span_ids(tokenizer.image, tokenizer.control_ids, image.path))
        yield text


def merged(parts: Iterable[str | int]) -> list[str | int]:
    """The parts with texts that follow each other as one, and without empty ones."""
    found: list[str | int] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part != "":
            found.append(part)
    return found


class ExamplePart(NamedTuple):
    """What one example of a dialogue is made of."""

    conversation: Conversation
    """The dialogue up to the end of the example."""
    stop: str
    """The role whose header ends the last reply."""
    opened: int | None = None
    """The message that is laid out behind the generation prompt, where the template's own rendering
    of it does not begin so."""


class TemplateInput(NamedTuple):
    """A dialogue as the checkpoint's own template takes it."""

    messages: list[JsonMessage]
    tools: Sequence[Mapping[str, Any]] | None
    options: Mapping[str, Any] = MappingProxyType({})
    """What the template takes besides, such as `enable_thinking`."""


class Layout(ABC):
    """How a checkpoint lays dialogues out."""

    name: ClassVar[str]
    prefix: str
    """What comes before the first message: `[gMASK]<sop>`."""
    suffix: str
    """What a generation prompt writes after `<|assistant|>`."""
    thinking: bool
    """The model writes its reasoning in front of a reply, so what an example holds depends on its turn."""
    has_switch: bool
    """The template says whether the model is to think (`enable_thinking`)."""
    takes_tools: bool
    """The checkpoint's template has a place for tool definitions."""
    spoken: Mapping[int, str]
    """Control tokens that are part of a reply's text, such as `<answer>` of GLM-4.1V."""
    lead: str
    """What a plain reply without a thought begins with behind the generation prompt."""
    rules: str
    """Changes when the same dialogue would take other tokens than under another layout."""

    @abstractmethod
    def pieces(
        self, conversation: Conversation, stop: int, texts: Texts, opened: int | None = None
    ) -> list[PlannedRun]:
        """Tools and `messages[:stop]`; DataError, with the message's number, for what has no place.

        Message `opened` stands behind the generation prompt.
        """

    @abstractmethod
    def opening(self, conversation: Conversation, reply: int) -> tuple[int, ...]:
        """The ops that end the prompt of message `reply`."""

    def opens(self, conversation: Conversation, reply: int) -> str:
        """The text behind `<|assistant|>` that `opening` ends in."""
        return self.suffix

    @abstractmethod
    def asked(self, conversation: Conversation, reply: int) -> int | None:
        """The message that is laid out behind the generation prompt where `reply` goes on from it."""

    @abstractmethod
    def parts(self, conversation: Conversation, train_on: TrainOn) -> list[ExamplePart]:
        """What is learned from a dialogue: all of it at once, or a turn at a time."""

    @abstractmethod
    def parse(self, ids: Iterable[int], tools: Sequence[Mapping[str, Any]] = ()) -> Message:
        """The message that reply ids say, with or without their stop."""

    def stop(self, conversation: Conversation) -> str:
        """The role whose header the model writes at the end of the dialogue's last reply."""
        return "user"

    @abstractmethod
    def messages(self, ids: Iterable[int], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
        """The messages that generated ids hold: one, or several of one turn."""

    @abstractmethod
    def visible(self, message: Message) -> str:
        """What the template keeps of a reply once it is past."""

    def as_read(self, message: Message) -> Message:
        """A reply that is no call as `parse` gives it back, for a comparison."""
        return message

    @abstractmethod
    def template_input(self, conversation: Conversation) -> TemplateInput:
        """The dialogue for the checkpoint's own template."""

    @abstractmethod
    def probes(self, probe: Conversation) -> list[Conversation]:
        """Dialogues to compare with the checkpoint's own template, made of one that holds much."""
