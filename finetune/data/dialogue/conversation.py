"""What a valid dialogue is: the one form in which every input format arrives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Role = Literal["system", "user", "assistant", "observation"]
Purpose = Literal["train", "predict"]
PLACEHOLDER = "<image>"
"""What LLaMA-Factory and LLaVA write into the text where an image stands."""


class RowError(ValueError):
    """Why a row is not a dialogue; the text goes behind `file:line: `."""


class ShownImage(NamedTuple):
    """An image where it stands in a message."""

    path: str
    """Of a file; before the rows' images are looked for, a data URL too."""
    at: int = 0
    """Characters of the content in front of it."""
    marked: bool = False
    """Whether a placeholder in the text said where."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. A tool call is an assistant message whose metadata is the function's name."""

    role: Role
    content: str
    metadata: str = ""
    train: bool | None = None
    """Whether this reply carries loss; None leaves it to `data.train_on`."""
    weight: float = 1.0
    """Weight of this reply's tokens in the loss."""
    images: tuple[ShownImage, ...] = ()
    """What the message shows, in the order of `at`."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A dialogue: system messages first, then user, observation and assistant messages."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Tool definitions as `{"type": "function", "function": {...}}` or `{"type": "python"}`."""
    location: str = ""
    """`file:line` for reports."""
    unread: tuple[str, ...] = ()
    """Columns and message keys of the row whose text was not read."""
    doubts: tuple[str, ...] = ()
    """What can be trained but is hardly meant, such as a call written as text; one entry each."""
    text: str = ""
    """Plain text in place of messages: a document, of which everything is learned."""
    thinks: bool | None = None
    """Whether the model is to think, where its template has a switch; None leaves it to the template."""
    category: str = ""
    """What the row says it is an example of; scores are looked at by it, and nothing else."""

    @property
    def images(self) -> tuple[str, ...]:
        """Paths of the images that it shows, in reading order."""
        return tuple(image.path for message in self.messages for image in message.images)


# Which kinds of message may stand before which; "start" is the beginning of the dialogue. A call
# may follow a reply because OpenAI's `content` beside `tool_calls` arrives as reply + call.
_MAY_FOLLOW = {
    "system": frozenset({"start", "system"}),
    "user": frozenset({"start", "system", "reply"}),
    "reply": frozenset({"user", "observation"}),
    "call": frozenset({"user", "observation", "reply", "call"}),
    "observation": frozenset({"call", "observation"}),
}


def _may_follow_leniently(now: str, before: str) -> bool:
    """Openings and system messages that `data.turns: merge` takes besides `_MAY_FOLLOW`."""
    if now == "reply":
        return before in ("start", "system")
    if now == "system":
        return before in ("user", "reply", "observation")
    return before == "system" and now in ("user", "call")


def kind(message: Message) -> str:
    """The role, with `assistant` told apart into `reply` (text) and `call` (a tool call)."""
    if message.role == "assistant":
        return "call" if message.metadata else "reply"
    return message.role


def validate(
    conversation: Conversation,
    purpose: Purpose = "train",
    positions: Sequence[int] | None = None,
    *,
    lenient: bool = False,
) -> Conversation:
    """The conversation itself when it can be rendered; RowError with the first problem otherwise.

    Args:
        conversation: What is checked.
        purpose: For `train` the dialogue ends in a reply and at least one reply carries loss;
            for `predict` it may also end in a user message or a tool result.
        positions: The number of each message in the row it came from, for the reason given.
        lenient: A reply may open the dialogue, and system messages may stand anywhere.
    """
    messages = conversation.messages
    if not messages:
        raise RowError("the dialogue has no messages")
    at = positions or range(1, len(messages) + 1)
    before = "start"
    for index, message in enumerate(messages):
        role = message.role
        now = kind(message) if role == "assistant" else role
        follows = before in _MAY_FOLLOW[now] or (lenient and _may_follow_leniently(now, before))
        if not follows and not _calls_in_words(conversation, index):
            raise RowError(_order_reason(messages, at, index))
        content = message.content
        if (not content or content.isspace()) and role != "system" and not message.images:
            raise RowError(_empty_reason(now, at[index]))
        before = now
    check_contents(messages, at)
    _check_end(messages, purpose, at)
    return conversation


def check_contents(messages: Sequence[Message], positions: Sequence[int] | None = None) -> None:
    """Raise RowError when a message says what cannot be rendered, wherever it stands.

    Metadata that is no tool's name, an image that neither a user nor a tool shows, text that no
    tokenizer takes.
    """
    at = positions or range(1, len(messages) + 1)
    if any(m.metadata or m.images or m.weight != 1.0 or m.train is not None for m in messages):
        for index, message in enumerate(messages):
            _check_fields(message, at[index])
        _check_images(messages, at)
    _check_text(messages, at)


def calls_in_words(conversation: Conversation) -> list[int]:
    """Indexes of plain replies that write a call into their text and are answered by a tool.

    Such dialogues are in published data. They can be rendered, but they teach the model to end
    ordinary text with the stop of a call; `finetune data check` counts them.
    """
    found = range(1, len(conversation.messages))
    return [i - 1 for i in found if _calls_in_words(conversation, i)]


def _calls_in_words(conversation: Conversation, index: int) -> bool:
    """Whether message `index` is a tool result and the reply before it ends in a JSON object."""
    if index == 0 or not conversation.tools:
        return False
    before, message = conversation.messages[index - 1], conversation.messages[index]
    return (
        message.role == "observation"
        and kind(before) == "reply"
        and "{" in before.content
        and before.content.rstrip().endswith("}")
    )


def _order_reason(messages: Sequence[Message], at: Sequence[int], index: int) -> str:
    """What is wrong with message `index` standing where it stands, and what to do."""
    now = kind(messages[index])
    here = f"message {at[index]} is {messages[index].role!r}"
    if index == 0:
        return (
            f"{here}, but a dialogue begins with 'user' (after 'system' messages, if any); "
            "data.turns: merge takes a reply that opens it"
        )
    before = kind(messages[index - 1])
    previous = f"message {at[index - 1]}"
    if now == "system":
        return f"{here}, but GLM-4 allows system messages only at the start; move it, or set data.turns: merge"
    if now == "observation":
        return f"{here} (a tool result), but {previous} is not a tool call"
    if before == "call":
        return f"{here}, but the tool call in {previous} has no result"
    if now == "user" and before == "observation":
        return f"{here}, but the tool result in {previous} has no reply yet"
    if now == before:
        turn = "the user turn" if now == "reply" else "the reply"
        return f"{here} but {previous} is too; merge them (data.turns: merge does) or add {turn}"
    return f"{here}, but {previous} is {messages[index - 1].role!r}; add the user turn before it"


def _empty_reason(now: str, position: int) -> str:
    if now == "call":
        return f"message {position}: the arguments are empty; write {{}} for a call without any"
    return f"message {position}: content is empty; GLM-4's template drops such a message"


def _check_fields(message: Message, position: int) -> None:
    """Raise RowError when metadata, train or weight do not fit the role."""
    plain = message.role not in ("assistant", "observation")
    if message.metadata and plain:
        raise RowError(f"message {position}: metadata (a tool's name) on {message.role!r}")
    if "\n" in message.metadata or message.metadata != message.metadata.strip():
        raise RowError(f"message {position}: metadata {message.metadata!r} is not a tool's name")
    if message.train and message.role != "assistant":
        raise RowError(f"message {position}: train is true on {message.role!r}; only replies train")
    if not math.isfinite(message.weight) or message.weight < 0:
        raise RowError(f"message {position}: weight is {message.weight}; it must be 0 or more")


def _check_images(messages: Sequence[Message], at: Sequence[int]) -> None:
    """Raise RowError for an image that nobody shows, and for a placeholder that stands for none."""
    if not any(message.images for message in messages):
        return
    for message, position in zip(messages, at, strict=True):
        if message.images and message.role not in ("user", "observation"):
            raise RowError(
                f"message {position}: an image on {message.role!r}; only users and tools show one"
            )
        if PLACEHOLDER in message.content:
            raise RowError(
                f"message {position}: {PLACEHOLDER} stands in the text, and the row has no image for it; "
                "add the image, or remove it"
            )


def _check_text(messages: Sequence[Message], at: Sequence[int]) -> None:
    """Raise RowError for text that no tokenizer takes: NUL and lone surrogates."""
    if not text_problem("".join([m.metadata + m.content for m in messages])):
        return
    for message, position in zip(messages, at, strict=True):
        problem = text_problem(message.metadata + message.content)
        if problem:
            raise RowError(f"message {position}: {problem}")


def text_problem(text: str) -> str:
    """Why the text cannot be encoded, or an empty string."""
    if "\0" in text:
        return "the text contains a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"the text contains half a surrogate pair, \\u{ord(text[error.start]):04x}"
    return ""


def _check_end(messages: Sequence[Message], purpose: Purpose, at: Sequence[int]) -> None:
    """Raise RowError unless the last message fits the purpose and something is trained."""
    last = messages[-1]
    if last.role == "system":
        raise RowError("the dialogue has only system messages")
    if purpose == "predict":
        return
    if last.role != "assistant":
        raise RowError(
            f"the dialogue ends with message {at[-1]}, {last.role!r}; "
            "for training the last message must be a reply"
        )
    if not any(m.role == "assistant" and m.train is not False and m.weight > 0 for m in messages):
        raise RowError("nothing to learn: every reply has train: false or weight 0")
