"""Dialogues to stored examples: rendered in batches, shortened by whole turns, counted.

Nothing is held but one batch of dialogues. Every dialogue that gives no example is counted under
a reason, and the first of each reason are named.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune import console
from finetune.data.chat.spans import blocks
from finetune.data.chat.thinking import thoughts
from finetune.data.examples.store import ExampleWriter, Span
from finetune.errors import DataError

if TYPE_CHECKING:
    from finetune.data.chat.spans import Rendered
    from finetune.data.chat.template import ChatTemplate
    from finetune.data.dialogue.conversation import Conversation

BATCH = 1000
"""Dialogues rendered in one call of the tokenizer and written as one record batch."""
_TEXT_AT_ONCE = 4 << 20
"""Characters of plain text that are held at a time."""
NAMED = 5
"""Rows named per reason."""
_LISTED = 20
"""Too long dialogues listed in an error."""


@dataclass(frozen=True)
class LengthPolicy:
    """How long an example may be, and which replies it teaches."""

    max_length: int
    train_on: Literal["every_reply", "last_reply"] = "every_reply"
    on_too_long: Literal["drop_oldest_turns", "drop", "error"] = "drop_oldest_turns"


@dataclass(frozen=True)
class ExampleCounts:
    """What became of the rows of a preparation; lengths and tokens are of the kept examples."""

    rows: int = 0
    """Rows read, bad ones among them."""
    bad: int = 0
    """Rows that are no dialogue, left out with `on_bad_row: skip`."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Dialogues left out, by reason."""
    named: tuple[str, ...] = ()
    """The first dropped dialogues of every reason, as `file:line: reason`."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """Columns and message keys whose text was not read -> in how many rows."""
    doubts: Mapping[str, int] = field(default_factory=dict)
    """What was trained but is hardly meant, such as a call written as text -> how often."""
    duplicates: int = 0
    """Examples that are left out because another says the same (`data.deduplicate`)."""
    text_blocks: int = 0
    """Examples that are plain text, at most `max_length` tokens each; a document gives one or more."""
    turns: int = 0
    """Turns of the model in them, counted under a thinking checkpoint."""
    without_thought: int = 0
    """Those of them that are trained behind an empty thought."""
    truncated: int = 0
    """Dialogues that lost their oldest turns."""
    messages_removed: int = 0
    """Messages in those turns."""
    kept: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0

    def notes(self) -> list[str]:
        """What deserves a second look although every row is valid, in sentences."""
        return notes_of(self.unread, self.doubts) + thought_notes(self.turns, self.without_thought)


def total(before: ExampleCounts, more: ExampleCounts) -> ExampleCounts:
    """Both together; of named rows the first ones."""
    numbers = {
        name: getattr(before, name) + getattr(more, name)
        for name in ("rows", "bad", "duplicates", "text_blocks", "turns", "without_thought", "truncated",
                     "messages_removed", "kept", "tokens", "supervised_tokens")
    }  # fmt: skip
    return ExampleCounts(
        **numbers,
        dropped=_added(before.dropped, more.dropped),
        unread=_added(before.unread, more.unread),
        doubts=_added(before.doubts, more.doubts),
        named=(*before.named, *more.named)[:_LISTED],
        longest=max(before.longest, more.longest),
    )


def _added(before: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    return dict(Counter(before) + Counter(more))


def thought_notes(turns: int, without: int) -> list[str]:
    """A sentence about the turns that a thinking checkpoint is taught without reasoning."""
    if not without:
        return []
    return [
        f"{without:,} of {turns:,} turns with loss have no reasoning and are trained behind an empty "
        "thought; data.reasoning: require refuses replies without"
    ]


def notes_of(unread: Mapping[str, int], doubts: Mapping[str, int]) -> list[str]:
    """Sentences about text that was not read, and about what is hardly meant."""
    columns = [
        f"{name}: what {count:,} rows hold there is not read; data.ignore_columns says that it is meant"
        for name, count in sorted(unread.items(), key=lambda item: (-item[1], item[0]))
    ]
    return columns + [f"{count:,} × {what}" for what, count in doubts.items()]


def write_examples(
    numbered: Iterable[tuple[int, Conversation]],
    template: ChatTemplate,
    policy: LengthPolicy,
    file: Path,
    *,
    num_sources: int = 1,
) -> dict[str, Any]:
    """Writes the examples of (source, dialogue) into a new `file`; returns what was counted."""
    tally = Tally()
    with (
        ExampleWriter(file) as writer,
        console.progress(None, "tokenising dialogues") as meter,
        _collecting_by_hand(),
    ):
        for batch in _batches(numbered):
            kept = list(examples_of(batch, template, policy, tally))
            columns = [[getattr(k, name) for k in kept] for name in Kept._fields]
            writer.append(*columns)
            meter.advance(len(batch))
            batch.clear()  # whoever made it has it still, and the collector would walk over it
            del kept
            gc.collect(0)
    tally.raise_if_refused(policy.max_length)
    tally.raise_if_nothing_is_left()
    return tally.facts(num_sources)


def _batches(
    numbered: Iterable[tuple[int, Conversation]],
) -> Iterator[list[tuple[int, Conversation]]]:
    """BATCH dialogues at a time, fewer where they are long documents."""
    batch: list[tuple[int, Conversation]] = []
    size = 0
    for item in numbered:
        batch.append(item)
        size += len(item[1].text)
        if len(batch) == BATCH or size >= _TEXT_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _collecting_by_hand() -> Iterator[None]:
    """Without the collector of reference cycles, which finds none among a million token ids.

    It would run hundreds of times per batch, a fifth of the time outside the tokenizer.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Kept(NamedTuple):
    """What is kept of an example: its ids, the spans that carry loss, its place and images."""

    ids: npt.NDArray[np.int32]
    spans: Sequence[Span]
    location: str
    images: tuple[str, ...]


def examples_of(
    batch: Sequence[tuple[int, Conversation]],
    template: ChatTemplate,
    policy: LengthPolicy,
    tally: Tally,
) -> Iterator[Kept]:
    """The examples that the dialogues of a batch give; what they do not give goes into `tally`."""
    dialogues = [conversation for _, conversation in batch]
    for (source, whole), taught in zip(
        batch, template.examples(dialogues, policy.train_on), strict=True
    ):
        tally.rows += 1
        if not taught:
            tally.drop(whole.location, "no reply that is trained")
        if whole.text:
            ((_, rendered),) = taught
            for block in blocks(rendered, policy.max_length):
                spans = template.trained_spans(block, whole, policy.train_on)
                tally.keep(source, len(block.input_ids), spans[0].end - spans[0].start)
                tally.keep_block()
                yield Kept(block.input_ids, spans, whole.location, ())
            continue
        for conversation, rendered in taught:
            kept = _kept(source, conversation, rendered, template, policy, tally)
            if kept is not None:
                yield kept


def _kept(
    source: int,
    conversation: Conversation,
    rendered: Rendered,
    template: ChatTemplate,
    policy: LengthPolicy,
    tally: Tally,
) -> Kept | None:
    """What is stored of an example; None after noting why there is nothing."""
    fitting: Rendered | None = rendered
    if len(rendered.input_ids) > policy.max_length:
        fitting = _fit(rendered, conversation, template, policy, tally)
    if fitting is None:
        return None
    spans = template.trained_spans(fitting, conversation, policy.train_on)
    if not spans:
        tally.drop(conversation.location, "no reply that is trained")
        return None
    if fitting is not rendered:
        tally.truncate(len(rendered.runs) - len(fitting.runs))
    tally.keep(source, len(fitting.input_ids), sum(s.end - s.start for s in spans))
    if template.layout.thinking:
        tally.keep_turns(thoughts(conversation))
    return Kept(fitting.input_ids, spans, conversation.location, _images(fitting, conversation))


def _images(rendered: Rendered, conversation: Conversation) -> tuple[str, ...]:
    """Paths of the images of the messages that are left, in reading order."""
    left = (run.message for run in rendered.runs if run.message is not None)
    return tuple(image.path for index in left for image in conversation.messages[index].images)


def _fit(
    rendered: Rendered,
    conversation: Conversation,
    template: ChatTemplate,
    policy: LengthPolicy,
    tally: Tally,
) -> Rendered | None:
    """A shorter rendering, or None after noting why there is none."""
    length = len(rendered.input_ids)
    if policy.on_too_long == "error":
        tally.refuse(f"{conversation.location}: {length} tokens")
        return None
    if policy.on_too_long == "drop":
        tally.drop(conversation.location, "too long", f"{length} tokens")
        return None
    fitting = template.shorten(rendered, conversation, policy.max_length, policy.train_on)
    if fitting is None:
        tally.drop(conversation.location, "no trained reply fits", f"{length} tokens")
    return fitting


class Tally:
    """Counts while examples are made."""

    def __init__(self) -> None:
        self.rows = 0
        self._totals: Counter[str] = Counter()
        self._longest = 0
        self._kept_per_source: Counter[int] = Counter()
        self._dropped: Counter[str] = Counter()
        self._named: list[str] = []
        self._refused: list[str] = []
        self._num_refused = 0

    def keep(self, source: int, tokens: int, supervised: int) -> None:
        """One example."""
        self._kept_per_source[source] += 1
        self._totals["tokens"] += tokens
        self._totals["supervised_tokens"] += supervised
        self._longest = max(self._longest, tokens)

    def keep_block(self) -> None:
        """One of them is a block of plain text."""
        self._totals["text_blocks"] += 1

    def keep_turns(self, thought_out: Sequence[bool]) -> None:
        """One of them holds turns of a dialogue of a thinking checkpoint, with and without thoughts."""
        self._totals["turns"] += len(thought_out)
        self._totals["without_thought"] += thought_out.count(False)

    def truncate(self, num_messages: int) -> None:
        """A dialogue lost its oldest turns."""
        self._totals["truncated"] += 1
        self._totals["messages_removed"] += num_messages

    def drop(self, location: str, reason: str, detail: str = "") -> None:
        """A dialogue gives no example."""
        self._dropped[reason] += 1
        if self._dropped[reason] <= NAMED:
            self._named.append(f"{location}: {reason}" + (f" ({detail})" if detail else ""))

    def refuse(self, problem: str) -> None:
        """A dialogue is too long, and that is an error."""
        self._num_refused += 1
        if len(self._refused) < _LISTED:
            self._refused.append(problem)

    def raise_if_refused(self, max_length: int) -> None:
        """DataError with those that are too long."""
        if not self._num_refused:
            return
        more = self._num_refused - len(self._refused)
        raise DataError(
            f"{self._num_refused} dialogues are longer than data.max_length ({max_length}); raise "
            "it, or set data.on_too_long to drop_oldest_turns or drop:\n  "
            + "\n  ".join([*self._refused, *([f"... and {more} more"] if more else [])])
        )

    def raise_if_nothing_is_left(self) -> None:
        """DataError when there is no example."""
        if self._kept_per_source:
            return
        raise DataError(
            f"none of {self.rows} dialogues is left to learn from; change the rows or data.max_length:\n  "
            + "\n  ".join(self._named)
        )

    def facts(self, num_sources: int) -> dict[str, Any]:
        """What the manifest keeps: the fields of ExampleCounts, and how many rows each source gave."""
        counts = ExampleCounts(
            rows=self.rows,
            dropped=dict(self._dropped),
            named=tuple(self._named),
            kept=sum(self._kept_per_source.values()),
            longest=self._longest,
            text_blocks=self._totals["text_blocks"],
            turns=self._totals["turns"],
            without_thought=self._totals["without_thought"],
            truncated=self._totals["truncated"],
            messages_removed=self._totals["messages_removed"],
            tokens=self._totals["tokens"],
            supervised_tokens=self._totals["supervised_tokens"],
        )
        return {
            "counts": asdict(counts),
            "kept_per_source": [self._kept_per_source[i] for i in range(num_sources)],
        }
