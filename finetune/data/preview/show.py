"""One dialogue as training sees it, and whole files as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.dialogue.conversation import Conversation
from finetune.data.reading.section import AS_DEFAULT, reading_of, sources_of, with_rows
from finetune.data.reading.sources import ConversationStream, read_conversations
from finetune.errors import DataError

if TYPE_CHECKING:
    from rich.text import Text

    from finetune.data.chat.template import ChatTemplate

_BATCH = 256
_BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class ShownToken:
    """A token, or several that share a character, with what they say."""

    ids: tuple[int, ...]
    text: str
    supervised: bool
    control: bool


@dataclass(frozen=True)
class ShowResult:
    """The answer of `show`."""

    location: str
    """`file:line`."""
    format: str
    num_examples: int
    """What the dialogue gives; the last one is shown. More than one only under a thinking checkpoint."""
    num_tokens: int
    num_supervised: int
    tokens: tuple[ShownToken, ...]
    prompt: str
    """What the model is given before the last reply."""
    stop: str
    """The token that ends the last reply, and generation."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        return {"where": values.pop("location"), **values}

    def plain(self) -> str:
        """The dialogue's text with « » around what carries loss."""
        parts: list[str] = []
        marked = False
        for token in self.tokens:
            if token.supervised != marked:
                parts.append("«" if token.supervised else "»")
                marked = token.supervised
            parts.append(token.text)
        return "".join(parts) + ("»" if marked else "")

    def text(self) -> Text:
        """The same in colour: supervised tokens green, neighbours in two shades, control tokens bold."""
        from rich.text import Text

        shown = Text()
        for number, token in enumerate(self.tokens):
            shades = ("green", "bright_green") if token.supervised else ("bright_black", "white")
            style = shades[number % 2] + (" bold" if token.control else "")
            # A line break would hide that it is a token of its own.
            shown.append(token.text.replace("\n", "⏎\n"), style)
        return shown


def show(
    path: str,
    *,
    model: str | Path,
    index: int | None = None,
    line: int | None = None,
    **rows: Any,
) -> ShowResult:
    """One dialogue with its tokens, those that carry loss marked.

    Args:
        path: A file; a glob or folder when `index` is used.
        model: A folder with a tokenizer.
        index: The dialogue's place, from 0; the first one when `line` is not given either.
        line: Or the line (for Parquet the row) on which it stands, from 1.
        rows: What rows are like, as `with_rows` takes it.

    Raises:
        DataError: When there is no such dialogue, or its row is bad.
    """
    template = template_of(model)
    section = with_rows(AS_DEFAULT, **rows)
    reading = replace(reading_of(section), on_bad_row="collect")
    reading = reading.for_checkpoint(template)
    stream = read_conversations(sources_of(section, path), reading)
    if line is None:
        conversation = _at_index(stream, path, index or 0)
    else:
        conversation = _at_line(stream, path, line)
    return shown(conversation, template, list(stream.formats.values())[-1])


def tokens(
    path: str,
    model: str | Path,
    **rows: Any,
) -> Iterator[dict[str, list[Any]]]:
    """`{"input_ids", "trained_spans"}` of every dialogue in order, streamed.

    A thinking checkpoint is given one example per turn with loss, so several rows a dialogue. The spans are half-open, with every reply trained that does not say otherwise; adjacent ones
    are merged.

    Raises:
        DataError: At the end, naming every bad row.
    """
    template = template_of(model)
    section = with_rows(AS_DEFAULT, **rows)
    reading = reading_of(section).for_checkpoint(template)
    stream = read_conversations(sources_of(section, path), reading)
    while batch := list(islice(stream, _BATCH)):
        for conversation, rendered in chain.from_iterable(template.examples(batch, "every_reply")):
            spans = template.trained_spans(rendered, conversation, "every_reply")
            yield {
                "input_ids": rendered.input_ids.tolist(),
                "trained_spans": merged((start, end) for start, end, _ in spans),
            }


def merged(spans: Iterator[tuple[int, int]]) -> list[list[int]]:
    """Half-open spans in order, those that touch as one."""
    joined: list[list[int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1][1] = end
        else:
            joined.append([start, end])
    return joined


def template_of(model: str | Path) -> ChatTemplate:
    """The chat template of a model's folder or hub id."""
    from finetune.data.chat.template import ChatTemplate
    from finetune.data.chat.tokenizer import load_chat_tokenizer

    return ChatTemplate(load_chat_tokenizer(model))


def _at_index(stream: ConversationStream, path: str, index: int) -> Conversation:
    number = -1
    for number, conversation in enumerate(stream):
        if number == index:
            return conversation
    if number < 0 and stream.num_bad:
        raise DataError(f"{path} holds no dialogue. {stream.report()}")
    bad = f". {stream.report()}" if stream.num_bad else ""
    raise DataError(
        f"{path} has no dialogue {index}; it has {number + 1}; give an --index from 0 on{bad}"
    )


def _at_line(stream: ConversationStream, path: str, line: int) -> Conversation:
    for conversation in stream:
        if conversation.location.endswith(f":{line}"):
            return conversation
    for row in stream.bad_rows:
        if row.location.endswith(f":{line}"):
            raise DataError(f"{row.location}: {row.reason}")
    raise DataError(f"{path} has no row that begins on line {line}; give the line of another row")


def shown(conversation: Conversation, template: ChatTemplate, layout: str) -> ShowResult:
    """The dialogue's tokens under a template; DataError when no reply carries loss."""
    examples = template.examples([conversation], "every_reply")[0]
    if not examples:
        raise DataError(
            f"{conversation.location}: no reply carries loss, so there is nothing to show; show another one with --index"
        )
    conversation, rendered = examples[-1]
    ids: list[int] = rendered.input_ids.tolist()
    spans = template.trained_spans(rendered, conversation, "every_reply")
    supervised = [False] * len(ids)
    for start, end, _ in spans:
        supervised[start:end] = [True] * (end - start)
    if conversation.text:
        prompt, stop = template.decode(ids[: rendered.runs[0].end]), ids[-1:]
    else:
        last = rendered.replies[-1]
        prompt = template.decode(template.prompt(conversation, last.message))
        stop = ids[last.end - 1 : last.end]
    return ShowResult(
        location=conversation.location,
        format=layout,
        num_examples=len(examples),
        num_tokens=len(ids),
        num_supervised=sum(supervised),
        tokens=tuple(_pieces(ids, supervised, template)),
        prompt=prompt,
        stop=template.decode(stop),
    )


def _pieces(
    ids: Sequence[int], supervised: Sequence[bool], template: ChatTemplate
) -> Iterator[ShownToken]:
    """Tokens with their text; those of a split character, or of an image, come together."""
    control = frozenset(template.tokenizer.control_ids.values())
    image = template.image
    image_end = template.tokenizer.control_ids.get("<|end_of_image|>")
    start = 0
    for end in range(1, len(ids) + 1):
        text = template.decode(ids[start:end])
        at_border = end == len(ids) or supervised[end] != supervised[start] or ids[end] in control
        if _BROKEN in text and not at_border:
            continue
        if image and ids[start] == image.begin_id and ids[end - 1] != image_end:
            continue
        yield ShownToken(tuple(ids[start:end]), text, supervised[start], ids[start] in control)
        start = end
