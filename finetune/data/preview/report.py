"""What `finetune data check`, `show` and `tokens` tell about data, before anything is trained."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.chat.thinking import thoughts
from finetune.data.dialogue import strict_json
from finetune.data.dialogue.conversation import Conversation, Message, calls_in_words, kind
from finetune.data.dialogue.tool_calls import tool_name
from finetune.data.examples.preparation import notes_of, thought_notes
from finetune.data.preview.show import ShowResult, show, template_of, tokens
from finetune.data.reading.files import BadRow
from finetune.data.reading.section import AS_DEFAULT, reading_of, sources_of, with_rows
from finetune.data.reading.sources import KEPT_REASONS, ConversationStream, read_conversations

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate

__all__ = ["CheckReport", "Lengths", "ShowResult", "SourceReport", "check", "show", "tokens"]

_BATCH = 256
_LANGUAGE_SAMPLE = 400  # characters of a dialogue by which its language is guessed
_SCRIPTS = (
    ("Korean", "\uac00", "\ud7a3"),
    ("Japanese", "\u3040", "\u30ff"),  # before Chinese, whose characters it shares
    ("Chinese", "\u4e00", "\u9fff"),
    ("Cyrillic script", "\u0400", "\u04ff"),
    ("Arabic script", "\u0600", "\u06ff"),
)


@dataclass(frozen=True)
class Lengths:
    """Tokens per example, its stops included."""

    tokens: int
    supervised: int
    """Tokens that carry loss when every reply is trained."""
    shortest: int
    median: int
    p90: int
    p99: int
    longest: int
    over_max_length: int | None
    """Dialogues over the `max_length` that was asked about."""

    @property
    def supervised_share(self) -> float:
        """Supervised tokens over all tokens, 0..1."""
        return self.supervised / max(self.tokens, 1)


@dataclass(frozen=True)
class SourceReport:
    """What one path holds; counts are of its valid dialogues unless they say rows."""

    path: str
    formats: Mapping[str, str]
    """File -> layout."""
    rows: int
    bad_rows: int
    dialogues: int
    turns: int
    """User messages."""
    replies: int
    """Plain replies, without calls."""
    masked_replies: int
    """Replies and calls that carry no loss: `train: false` or weight 0."""
    calls: int
    results: int
    system_messages: int
    images: int
    dialogues_with_tools: int
    tools: int
    """Different tool names defined."""
    undeclared_calls: int
    """Calls of a function that the dialogue does not define."""
    calls_in_words: int
    """Plain replies that a tool result follows: the call stands in their text."""
    characters: int
    languages: Mapping[str, int]
    """Dialogues per language, roughly, told from the script."""
    unread: Mapping[str, int]
    """Columns and message keys whose text is not read -> in how many rows."""
    doubts: Mapping[str, int]
    """What can be trained but is hardly meant -> how often."""
    duplicates: int
    """Dialogues that stand in the source before."""
    seen_before: int
    """Dialogues that an earlier source has too: validation that is trained on."""
    lengths: Lengths | None
    texts: int = 0
    """Documents of plain text among the dialogues."""
    turns_with_loss: int = 0
    """Turns of the model that carry loss, counted under a thinking checkpoint."""
    without_thought: int = 0
    """Those of them without reasoning."""


@dataclass(frozen=True)
class CheckReport:
    """The answer of `check`."""

    sources: tuple[SourceReport, ...]
    bad_rows: tuple[BadRow, ...]
    """At most 1,000 per source; the sources have the full counts."""
    max_length: int | None = None

    @property
    def num_bad(self) -> int:
        """Bad rows of all sources."""
        return sum(source.bad_rows for source in self.sources)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "sources": [asdict(source) for source in self.sources],
            "bad_rows": [
                {"where": row.location, "reason": row.reason, "fatal": row.fatal}
                for row in self.bad_rows
            ],
            "num_bad": self.num_bad,
            "max_length": self.max_length,
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(headers, rows) with a column per source; lines in which all are zero are left out."""
        columns = [_facts(source, self.max_length) for source in self.sources]
        lines = [[name, *(column[name] for column in columns)] for name in columns[0]]
        kept = [line for line in lines if any(cell not in ("0", "") for cell in line[1:])]
        return ["", *(source.path for source in self.sources)], kept

    def notes(self) -> list[str]:
        """What deserves a second look although every row is valid, in sentences."""
        found = []
        for source in self.sources:
            found += [f"{source.path}: {note}" for note in _notes(source, self.max_length)]
        return found


def check(
    paths: Sequence[str] | str,
    *,
    model: str | Path | None = None,
    max_length: int | None = None,
    **rows: Any,
) -> CheckReport:
    """What the sources hold, with every bad row; nothing is raised for bad rows.

    Args:
        paths: Files, globs or folders, each its own source; with training data first and
            validation data second, `seen_before` of the second is their overlap.
        model: A folder with a tokenizer; with it the report has token lengths.
        max_length: Counts the dialogues that are longer.
        rows: What rows are like, as `with_rows` takes it.

    Raises:
        DataError: When a path means no file.
    """
    template = template_of(model) if model is not None else None
    section = with_rows(AS_DEFAULT, **rows)
    reading = replace(reading_of(section), on_bad_row="collect")
    reading = replace(reading, images=replace(reading.images, check=True))
    if template is not None:
        reading = reading.for_checkpoint(template)
    reports: list[SourceReport] = []
    bad: list[BadRow] = []
    earlier: set[int] = set()
    for path in [paths] if isinstance(paths, str) else paths:
        stream = read_conversations(sources_of(section, path), reading)
        census = _Census(template, max_length)
        while batch := list(islice(stream, _BATCH)):
            census.add(batch)
        reports.append(census.report(path, stream, earlier))
        earlier |= census.digests
        bad += stream.bad_rows[:KEPT_REASONS]
    return CheckReport(tuple(reports), tuple(bad), max_length)


@dataclass
class _Census:
    """Counts over one source. Kept per dialogue: a 64-bit digest and, with a model, a length."""

    template: ChatTemplate | None
    max_length: int | None
    kinds: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    tools: set[str] = field(default_factory=set)
    digests: set[int] = field(default_factory=set)
    lengths: array[int] = field(default_factory=lambda: array("i"))
    supervised: int = 0
    turns: int = 0
    without_thought: int = 0

    def add(self, batch: Sequence[Conversation]) -> None:
        for conversation in batch:
            self._count(conversation)
        if self.template is None:
            return
        template = self.template
        for taught in template.examples(batch, "every_reply"):
            for conversation, rendered in taught:
                spans = template.trained_spans(rendered, conversation, "every_reply")
                self.lengths.append(len(rendered.input_ids))
                self.supervised += sum(end - start for start, end, _ in spans)
                if template.layout.thinking and not conversation.text:
                    found = thoughts(conversation)
                    self.turns += len(found)
                    self.without_thought += found.count(False)

    def _count(self, conversation: Conversation) -> None:
        kinds, messages = self.kinds, conversation.messages
        kinds["dialogues"] += 1
        kinds["with_tools"] += bool(conversation.tools)
        kinds["in_words"] += len(calls_in_words(conversation))
        names = {tool_name(tool) for tool in conversation.tools}
        self.tools |= names
        kinds["texts"] += bool(conversation.text)
        kinds["characters"] += len(conversation.text)
        for message in messages:
            kinds[kind(message)] += 1
            kinds["characters"] += len(message.content)
            kinds["images"] += len(message.images)
            if message.role == "assistant":
                kinds["masked"] += message.train is False or message.weight == 0
                kinds["undeclared"] += bool(message.metadata) and message.metadata not in names
        text = (Message("user", conversation.text),) if conversation.text else ()
        self.languages[_language(messages or text)] += 1
        digest = _digest(conversation)
        kinds["duplicates"] += digest in self.digests
        self.digests.add(digest)

    def report(self, path: str, stream: ConversationStream, earlier: set[int]) -> SourceReport:
        kinds = self.kinds
        return SourceReport(
            path=path,
            formats=dict(stream.formats),
            rows=stream.rows,
            bad_rows=stream.num_bad,
            dialogues=kinds["dialogues"],
            turns=kinds["user"],
            replies=kinds["reply"],
            masked_replies=kinds["masked"],
            calls=kinds["call"],
            results=kinds["observation"],
            system_messages=kinds["system"],
            images=kinds["images"],
            dialogues_with_tools=kinds["with_tools"],
            tools=len(self.tools),
            undeclared_calls=kinds["undeclared"],
            calls_in_words=kinds["in_words"],
            characters=kinds["characters"],
            languages=dict(self.languages.most_common()),
            unread=dict(stream.unread),
            doubts=dict(stream.doubts),
            duplicates=kinds["duplicates"],
            seen_before=len(self.digests & earlier),
            lengths=self._lengths() if self.lengths else None,
            texts=kinds["texts"],
            turns_with_loss=self.turns,
            without_thought=self.without_thought,
        )

    def _lengths(self) -> Lengths:
        import numpy as np

        lengths = np.frombuffer(self.lengths, dtype=np.int32)
        low, median, p90, p99, high = (
            int(value)
            for value in np.percentile(lengths, [0, 50, 90, 99, 100], method="closest_observation")
        )
        over = None if self.max_length is None else int((lengths > self.max_length).sum())
        return Lengths(int(lengths.sum()), self.supervised, low, median, p90, p99, high, over)


def _digest(conversation: Conversation) -> int:
    """64 bits of what the model would see; where it stands and its weights do not matter."""
    digest = blake2b(conversation.text.encode(), digest_size=8)
    for message in conversation.messages:
        shown = [(image.path, image.at) for image in message.images]
        text = f"{message.role}\0{message.metadata}\0{message.content}\0{shown}\0"
        digest.update(text.encode())
    if conversation.tools:
        digest.update(strict_json.dump(conversation.tools).encode())
    if conversation.thinks is not None:
        digest.update(str(conversation.thinks).encode())
    return int.from_bytes(digest.digest(), "little")


def _language(messages: Iterable[Message]) -> str:
    """A rough guess by script; most of the letters decide."""
    text = "".join(
        m.content[:_LANGUAGE_SAMPLE] for m in messages if m.role in ("user", "assistant")
    )
    text = text[:_LANGUAGE_SAMPLE]
    if text.isascii():
        return "Latin script"
    letters = [char for char in text if char.isalpha()]
    counts = {
        name: sum(first <= char <= last for char in letters) for name, first, last in _SCRIPTS
    }
    if counts["Japanese"] * 10 > counts["Chinese"] + counts["Japanese"]:
        counts["Japanese"] += counts["Chinese"]
    name = max(counts, key=lambda key: counts[key])
    # A Chinese character says as much as two Latin letters.
    return name if counts[name] * 3 > len(letters) else "Latin script"


def _facts(source: SourceReport, max_length: int | None) -> dict[str, str]:
    """Name -> value of each line of the table."""
    facts: dict[str, str] = {
        "layout": ", ".join(sorted(set(source.formats.values()))),
        "files": str(len(source.formats)),
        "rows": str(source.rows),
        "bad rows": str(source.bad_rows),
        "dialogues": str(source.dialogues),
        "of them plain text": str(source.texts),
        "user turns": str(source.turns),
        "replies": str(source.replies),
        "tool calls": str(source.calls),
        "tool results": str(source.results),
        "system messages": str(source.system_messages),
        "replies without loss": str(source.masked_replies),
        "images": str(source.images),
        "dialogues with tools": str(source.dialogues_with_tools),
        "different tools": str(source.tools),
        "characters": str(source.characters),
        "languages": ", ".join(f"{name} {count}" for name, count in source.languages.items()),
        "duplicates": str(source.duplicates),
        "also in an earlier source": str(source.seen_before),
    }
    lengths = source.lengths
    facts["tokens"] = str(lengths.tokens) if lengths else ""
    facts["supervised"] = f"{lengths.supervised_share:.1%}" if lengths else ""
    for name in ("shortest", "median", "p90", "p99", "longest"):
        facts[f"tokens, {name}"] = str(getattr(lengths, name)) if lengths else ""
    if max_length is not None:
        facts[f"over {max_length} tokens"] = str(lengths.over_max_length) if lengths else ""
    return facts


def _notes(source: SourceReport, max_length: int | None) -> Iterator[str]:
    yield from notes_of(source.unread, source.doubts)
    yield from thought_notes(source.turns_with_loss, source.without_thought)
    if source.seen_before:
        yield f"{source.seen_before} dialogues are in an earlier source too; scores on them say nothing"
    if source.duplicates:
        yield f"{source.duplicates} dialogues repeat an earlier one of the same source"
    if source.calls_in_words:
        yield (
            f"{source.calls_in_words} replies write a call into their text and a tool answers; they "
            "teach the model to end plain text with <|observation|>"
        )
    if source.undeclared_calls:
        yield f"{source.undeclared_calls} calls name a tool that their dialogue does not define"
    if source.lengths and source.lengths.over_max_length:
        yield f"{source.lengths.over_max_length} dialogues are over {max_length} tokens"
