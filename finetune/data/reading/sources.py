"""Sources -> conversations, streamed, with every bad row named in one report."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from finetune.data.dialogue.columns import Columns
from finetune.data.dialogue.conversation import Conversation, Purpose, RowError
from finetune.data.dialogue.formats import PLAIN, RowRules, detect, to_conversation
from finetune.data.reading.files import BadRow, Row, expand, read_rows
from finetune.data.reading.images import ImageFiles, ImagePolicy
from finetune.data.reading.parts import Part
from finetune.errors import DataError

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate

KEPT_REASONS = 1000
"""Bad rows whose reason is kept; the others are only counted."""
MOST_BAD = 100_000
"""Of one file when nearly none of its rows is good: reading on would take time and tell nothing."""
LISTED = 30
"""Bad rows that an error message lists."""
_SAMPLE = 20  # rows by which a file's layout is told
_BLOCK = 1024  # rows within which a fractional weight chooses

Item = TypeVar("Item")


@dataclass(frozen=True)
class SourceSpec:
    """One source, as the config says it."""

    path: str
    """A file, a glob or a folder."""
    weight: float = 1.0
    """2.0: each row twice per epoch; 0.5: a seeded half of them."""
    format: str = "auto"
    """One of `formats.FORMATS`, or `auto`, which is told per file."""
    columns: tuple[tuple[str, str], ...] = ()
    """(our column, its name in the file) of columns that are named otherwise."""
    max_rows: int | None = None
    """At most this many of its dialogues, the first ones."""
    part: Part | None = None
    """Which of its dialogues are meant; None for all."""

    @property
    def chosen(self) -> dict[str, Any]:
        """What decides which of its dialogues are read; empty for all."""
        said = {"max_rows": self.max_rows, "part": asdict(self.part) if self.part else None}
        return {name: value for name, value in said.items() if value is not None}


NEXT_TO_DATA = ImagePolicy()
"""Paths are relative to the data file, and images are not opened again."""


@dataclass(frozen=True)
class Reading:
    """How rows are read: the options of the config's `data` section."""

    on_bad_row: Literal["error", "skip", "collect"] = "error"
    """`error` stops for any bad row, `skip` leaves them out, `collect` never raises (for reports)."""
    max_bad_rows: float = 0.01
    """With `skip`, the share of bad rows above which it is an error all the same."""
    columns: Columns | None = None
    """Names of the prompt and response columns, for `pairs`."""
    images: ImagePolicy = NEXT_TO_DATA
    """Where images lie, and whether each is decoded once to see that it can be."""
    rules: RowRules = PLAIN
    """What is done about rows that can be read in more than one way."""

    def for_checkpoint(self, template: ChatTemplate) -> Reading:
        """The same for a checkpoint: whether it writes its reasoning, which images it takes."""
        thinks, images = template.layout.thinking, template.image_rule
        return replace(self, rules=replace(self.rules, thinks=thinks, images=images))


AS_IS = Reading()
"""The defaults."""


class FileRows(Iterator["Row | BadRow"]):
    """The rows of one file, and what dialogue each of them is.

    The layout is the source's, or told from the file's first rows; where that cannot be told, there
    are no rows, and `unknown` says why.
    """

    def __init__(
        self,
        path: Path,
        source: SourceSpec,
        reading: Reading,
        purpose: Purpose,
        images: ImageFiles,
        *,
        skip: int = 0,
    ) -> None:
        self.format = source.format
        """One of `formats.FORMATS`."""
        self.unknown: list[BadRow] = []
        """Why the layout is unknown, and what else is wrong with the first rows."""
        self.num_unknown = 0
        """The rows that were looked at in vain."""
        self._source, self._reading, self._purpose = source, reading, purpose
        self._images, self._folder = images, path.parent
        self._items = _renamed(read_rows(path, skip), source.columns)
        if self.format == "auto":
            self._tell(path, again=bool(skip))

    def _tell(self, path: Path, *, again: bool) -> None:
        """Tell the layout by the first rows, which are then still to come."""
        rows = _renamed(read_rows(path), self._source.columns) if again else self._items
        sample = list(islice(rows, _SAMPLE))
        if not again:
            self._items = chain(sample, self._items)
        good = [item.value for item in sample if isinstance(item, Row)]
        if not good:
            return
        try:
            self.format = detect(good, self._reading.columns)
        except RowError as error:
            unread = BadRow(f"{path}:1", str(error), fatal=True)
            self.unknown = [unread, *(item for item in sample if isinstance(item, BadRow))]
            self.num_unknown = len(sample)
            self._items = iter(())

    def __next__(self) -> Row | BadRow:
        """The next row."""
        return next(self._items)

    def conversation(self, row: Row) -> Conversation | None:
        """The dialogue of a row; None when it belongs to the other part of the source, RowError if bad."""
        conversation = to_conversation(
            row.value, self.format, location=row.location, columns=self._reading.columns, purpose=self._purpose,
            rules=self._reading.rules,
        )  # fmt: skip
        part = self._source.part
        if part is not None and not part.takes(row.value, conversation):
            return None
        return self._images.placed(conversation, self._folder)

    def unread(self, conversation: Conversation) -> list[str]:
        """Columns and keys of its row whose text was not read."""
        grouped = self._source.part.group_by if self._source.part else ""
        return [name for name in conversation.unread if name != grouped]


class ConversationStream(Iterator[Conversation]):
    """Valid conversations in order; at the end DataError if too many rows were bad.

    Once the run is sure to stop, nothing more is handed out: the rest is only checked, so that
    one report has it all. With `on_bad_row: collect`, for reports, it never raises.
    """

    def __init__(
        self,
        sources: Sequence[SourceSpec],
        *,
        reading: Reading,
        purpose: Purpose,
        seed: int,
    ) -> None:
        self.source = 0
        """Number of the source that the last conversation came from."""
        self.row: dict[str, Any] = {}
        """The row that the last conversation was read from, where sources have weight 1."""
        self.rows = 0
        """Rows read so far, good and bad, each once whatever its source's weight."""
        self.elsewhere = 0
        """Good rows among them that belong to the other part of a source that is split."""
        self.num_bad = 0
        """Bad rows among them."""
        self.bad_rows: list[BadRow] = []
        """The first of the bad rows, at most KEPT_REASONS."""
        self.unread: Counter[str] = Counter()
        """Columns and message keys whose text was not read -> in how many rows."""
        self.doubts: Counter[str] = Counter()
        """What can be trained but is hardly meant -> how often; see `formats`."""
        self.formats: dict[str, str] = {}
        """Layout of each file read so far."""
        self._must_stop = False
        self._reading = reading
        self._purpose: Purpose = purpose
        self._images = ImageFiles(reading.images)
        files = [(source, expand(source.path)) for source in sources]
        self._items = self._run(files, seed)

    def __next__(self) -> Conversation:
        """The next conversation."""
        return next(self._items)

    def _run(
        self, sources: Sequence[tuple[SourceSpec, list[Path]]], seed: int
    ) -> Iterator[Conversation]:
        given = 0
        for number, (source, paths) in enumerate(sources):
            found = chain.from_iterable(self._file(path, source) for path in paths)
            good = islice(found, source.max_rows)  # None: all
            for conversation in weighted(good, source.weight, f"{seed}:{number}"):
                if not self._must_stop:
                    given += 1
                    self.source = number
                    yield conversation
        if self._reading.on_bad_row == "collect":
            return
        share = self.num_bad / max(self.rows, 1)
        if self._must_stop or (self.num_bad and share > self._reading.max_bad_rows):
            raise DataError(self.report())
        if not given:
            paths_given = ", ".join(source.path for source, _ in sources)
            if (part := sources[0][0].part) is not None and self.rows > self.num_bad:
                raise DataError(part.nothing_left(paths_given, self.rows - self.num_bad))
            raise DataError(
                f"{paths_given}: there is no row that can be used; `finetune data check` says why"
            )

    def _file(self, path: Path, source: SourceSpec) -> Iterator[Conversation]:
        """The good rows of one file; the bad ones are noted."""
        file = FileRows(path, source, self._reading, self._purpose, self._images)
        if file.unknown:
            for bad in file.unknown:
                self._bad(bad)
            self.rows += file.num_unknown
            return
        self.formats[str(path)] = file.format
        rows_before, bad_before = self.rows, self.num_bad
        for item in file:
            bad_here = self.num_bad - bad_before
            if bad_here > MOST_BAD and bad_here > 0.9 * (self.rows - rows_before):
                self._bad(BadRow(item.location, "nearly all rows so far are bad; the rest is not read", fatal=True))  # fmt: skip
                return
            self.rows += 1
            if isinstance(item, BadRow):
                self._bad(item)
                continue
            try:
                conversation = file.conversation(item)
            except RowError as error:
                self._bad(BadRow(item.location, str(error)))
                continue
            if conversation is None:
                self.elsewhere += 1
                continue
            if conversation.unread or conversation.doubts:  # few rows; the others pay nothing
                self.unread.update(file.unread(conversation))
                self.doubts.update(conversation.doubts)
            self.row = item.value
            yield conversation

    def _bad(self, row: BadRow) -> None:
        self.num_bad += 1
        if len(self.bad_rows) < KEPT_REASONS:
            self.bad_rows.append(row)
        if self._reading.on_bad_row != "collect":
            self._must_stop = self._must_stop or row.fatal or self._reading.on_bad_row == "error"

    def report(self) -> str:
        """What is wrong with the rows, as an error message says it."""
        listed = [f"  {row.location}: {row.reason}" for row in self.bad_rows[:LISTED]]
        if self.num_bad > len(listed):
            listed.append(f"  … and {self.num_bad - len(listed)} more")
        return "\n".join(
            [f"{self.num_bad} of {self.rows} rows cannot be used:", *listed, self._advice()]
        )

    def _advice(self) -> str:
        if self._reading.on_bad_row == "skip" and not self._must_stop:
            share = self.num_bad / max(self.rows, 1)
            return f"That is {share:.1%}, more than data.max_bad_rows allows ({self._reading.max_bad_rows:.1%}). Fix them, or raise it."
        if self._reading.on_bad_row == "skip" or any(row.fatal for row in self.bad_rows):
            return "Fix the files: nothing after such a place can be read, so it cannot be skipped."
        return "Fix these rows; a training run with data.on_bad_row: skip leaves them out."


def read_conversations(
    sources: Sequence[SourceSpec],
    reading: Reading = AS_IS,
    *,
    purpose: Purpose = "train",
    seed: int = 0,
) -> ConversationStream:
    """The conversations of all sources, streamed; DataError with every bad row at the end.

    Args:
        sources: What is read, in this order.
        reading: How rows are read, and what becomes of bad ones.
        purpose: `predict` also takes dialogues that end in a user message or a tool result.
        seed: Chooses the rows that a fractional weight repeats.

    Raises:
        DataError: At once when a path means nothing, at the end for bad rows.
    """
    return ConversationStream(sources, reading=reading, purpose=purpose, seed=seed)


def weighted(items: Iterable[Item], weight: float, seed: str) -> Iterator[Item]:
    """Each item `weight` times: the whole part for all, the fraction for a seeded share of them.

    Of n items round(n x fraction) are chosen, spread over blocks of 1,024: 10 items with weight
    0.5 give 5, with 2.5 they give 25. Copies of an item follow each other.
    """
    whole, fraction = int(weight), weight - int(weight)
    if not fraction:
        for item in items:
            for _ in range(whole):
                yield item
        return
    stream = iter(items)
    seen = chosen = number = 0
    while block := list(islice(stream, _BLOCK)):
        seen += len(block)
        more = int(seen * fraction + 0.5) - chosen
        chosen += more
        extra = Counter(random.Random(f"{seed}:{number}").sample(range(len(block)), more))
        number += 1
        for index, item in enumerate(block):
            for _ in range(whole + extra[index]):
                yield item


def _renamed(
    items: Iterator[Row | BadRow], columns: Sequence[tuple[str, str]]
) -> Iterator[Row | BadRow]:
    """The rows with our names for the columns that are named otherwise in the file."""
    if not columns:
        yield from items
        return
    ours = {theirs: name for name, theirs in columns}
    for item in items:
        if isinstance(item, Row):
            yield item._replace(value={ours.get(key, key): v for key, v in item.value.items()})
        else:
            yield item
