"""A stream of examples from files of any size: shuffled in blocks, tokenised on the way, resumable.

    shards -> rows -> blocks of `shuffle_buffer` rows, permuted -> pieces -> examples or packed rows

Everything that comes out is a function of (files, seed, options), whoever reads it and from where:
`Position` says where a stream is, and one that starts there gives what would have come next. A
position is small, because the shuffled rows are not in it but the place where their block began.
`datasets.IterableDataset` has a `state_dict` too, but loses the rows of its shuffle buffer.

Every reader reads and tokenises all of the stream and takes its part: no process has to ask another
how many examples a row has given, and the examples of a step depend on no number of processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finetune.data.dialogue.conversation import Conversation, RowError
from finetune.data.examples.batch_plan import permutation
from finetune.data.examples.dataset import Example, example_of
from finetune.data.examples.packing import pack
from finetune.data.examples.preparation import (
    NAMED,
    ExampleCounts,
    Kept,
    LengthPolicy,
    Tally,
    examples_of,
    total,
)
from finetune.data.examples.store import digests, ends_of
from finetune.data.reading.blocks import (
    BLOCK_CHARACTERS,
    BlockOptions,
    Blocks,
    Cursors,
    PlacedRow,
    characters,
)
from finetune.data.reading.shards import ShardReader, StreamShard
from finetune.data.reading.sources import LISTED, Reading, SourceSpec
from finetune.data.reading.streams import BadRow, Row
from finetune.errors import DataError
from finetune.storage.cache import default_root, key_of

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate

FORMAT = 1
"""Version of what a stream gives for the same files and of its positions."""
HELD_OUT = "left out: a held-out example says the same"

_SAMPLE = 64
"""Items that are looked at before training begins."""
_PIECE_ROWS = 256
_PIECE_CHARACTERS = 1 << 20
_PACKED_ROWS = 100
"""Rows of `max_length` tokens that are packed together, at about 3 characters a token."""
_ENOUGH_ROWS = 1000
"""Rows after which the share of bad ones is judged."""


@dataclass(frozen=True)
class StreamSettings:
    """What decides the examples of a stream besides its files."""

    policy: LengthPolicy
    reading: Reading
    seed: int
    shuffle_buffer: int
    """Rows that are permuted together."""
    packed: bool = False
    """Whether an item is a row of several examples, together at most `policy.max_length` tokens."""


@dataclass(frozen=True)
class Position:
    """Where a stream is: behind `taken` items of the piece that begins at row `row` of a block."""

    number_of_pass: int = 0
    """Passes over all shards before this one."""
    block: int = 0
    """Blocks of this pass before this one."""
    cursors: Cursors = ()
    """Where this block began: each open shard, by its place in the pass, and its rows that were read."""
    opened: int = 0
    """Shards of this pass that had been opened then."""
    row: int = 0
    taken: int = 0
    examples: int = 0
    """Examples that this piece and those before it gave out before."""
    steps: int = 0
    """Optimizer steps that took all this."""
    counts: ExampleCounts = field(default_factory=ExampleCounts)
    """What was read before this piece."""

    def as_json(self) -> dict[str, Any]:
        """What `position_of` reads."""
        return {"format": FORMAT, **asdict(self)}


START = Position()


def position_of(saved: Any) -> Position:
    """A position that `as_json` gave; DataError for another version's."""
    names = {f.name for f in fields(Position)}
    if (
        not isinstance(saved, Mapping)
        or saved.get("format") != FORMAT
        or set(saved) != {*names, "format"}
    ):
        raise DataError(
            "data.streaming: the position was saved by another version; start the run anew"
        )
    counts = ExampleCounts(**{**saved["counts"], "named": tuple(saved["counts"]["named"])})
    cursors = tuple((int(shard), int(row)) for shard, row in saved["cursors"])
    rest = {name: saved[name] for name in names - {"counts", "cursors"}}
    return Position(**rest, counts=counts, cursors=cursors)


class Item(NamedTuple):
    """One example, or one packed row of them."""

    examples: list[Example]
    is_packed: bool

    @property
    def tokens(self) -> int:
        """Of all of them."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def value(self) -> Example | Sequence[Example]:
        """As the collator takes it."""
        return self.examples if self.is_packed else self.examples[0]


class ExampleStream:
    """Items without an end, pass after pass over the shards; `position` is behind the last one."""

    def __init__(
        self,
        shards: Sequence[StreamShard],
        sources: Sequence[SourceSpec],
        template: ChatTemplate,
        settings: StreamSettings,
        *,
        held_out: npt.NDArray[np.uint64] | None = None,
        cache_root: Path | None = None,
    ) -> None:
        self.shards = tuple(shards)
        self.sources = tuple(sources)
        self.position = START
        self.read = START.counts
        """What was read up to the end of the piece that the last item came from."""
        self._template = template
        reading = settings.reading.for_checkpoint(template)
        self.settings = replace(settings, reading=reading)
        self._held_out = held_out
        """Digests of held-out examples, which are left out."""
        self._reader = ShardReader(shards, sources, reading, cache_root or default_root())

    @property
    def fingerprint(self) -> str:
        """Changes when the stream does; of files only names and sizes count, as nothing reads them all."""
        chosen = [(s.weight, s.format, s.columns) for s in self.sources]
        settings_of = asdict(self.settings)
        for name in ("on_bad_row", "max_bad_rows", "images"):
            del settings_of["reading"][name]
        del settings_of["reading"]["rules"]["images"]  # the template's fingerprint tells it
        return key_of(
            {
                "stream": FORMAT,
                "template": self._template.fingerprint,
                "shards": [(s.source, Path(s.name).name, s.size) for s in self.shards],
                "sources": chosen,
                "options": settings_of,
            }
        )

    def items(self, start: Position = START) -> Generator[Item, None, None]:
        """What comes behind `start`; DataError for a row that cannot be used, as the config says."""
        position = start
        while True:
            given = position.examples
            yield from self._of_pass(position)
            if self.position.examples == given:  # of a whole pass: one that goes on has given some
                raise DataError(
                    f"none of {self.position.counts.rows:,} rows of a whole pass is left to learn "
                    "from; change the rows or data.max_length:\n  "
                    + "\n  ".join(self.position.counts.named)
                )
            done = self.position
            position = Position(
                done.number_of_pass + 1,
                examples=done.examples,
                steps=done.steps,
                counts=done.counts,
            )

    def _of_pass(self, start: Position) -> Iterator[Item]:
        """The items that are left of a pass; `self.position` ends behind its last piece."""
        self.position = start
        seed, number = self.settings.seed, start.number_of_pass
        order = permutation(len(self.shards), seed, number, 1)
        blocks = Blocks(
            self.shards, order.tolist(), self.sources, self._reader,
            BlockOptions(seed, self.settings.shuffle_buffer),
            cursors=start.cursors, opened=start.opened,
        )  # fmt: skip
        while block := blocks.next():
            places = permutation(len(block), seed, number, self.position.block, 2)
            rows = [block[place] for place in places]
            for first, piece in self._pieces(rows, self.position.row):
                yield from self._of_piece(piece, first)
            self.position = replace(
                self.position, block=self.position.block + 1, cursors=blocks.cursors,
                opened=blocks.opened, row=0, taken=0,
            )  # fmt: skip

    def _of_piece(self, piece: Sequence[PlacedRow], first: int) -> Iterator[Item]:
        """The items of a piece that come behind the position, which moves with each of them."""
        begun = self.position
        kept, counts = self._kept(piece, begun.counts)
        self.read = counts
        for number, item in enumerate(self._arranged(kept, begun)):
            if number >= begun.taken:
                self.position = replace(begun, taken=number + 1, steps=self.position.steps)
                yield item
        self.position = replace(
            begun, row=first + len(piece), taken=0, steps=self.position.steps, counts=counts,
            examples=begun.examples + len(kept),
        )  # fmt: skip

    def _pieces(
        self, rows: Sequence[PlacedRow], start: int
    ) -> Iterator[tuple[int, list[PlacedRow]]]:
        """Rows that are tokenised, and packed, together; always cut at the same places of a block."""
        text, most = _PIECE_CHARACTERS, _PIECE_ROWS
        if self.settings.packed:
            text = min(_PACKED_ROWS * self.settings.policy.max_length * 3, BLOCK_CHARACTERS)
            most = len(rows)
        first = size = 0
        for number, row in enumerate(rows):
            size += characters(row.row.value) if isinstance(row.row, Row) else 0
            last = number == len(rows) - 1
            if size >= text or number - first + 1 >= most or last:
                if first >= start:
                    yield first, list(rows[first : number + 1])
                first, size = number + 1, 0

    def _kept(
        self, piece: Sequence[PlacedRow], before: ExampleCounts
    ) -> tuple[list[Kept], ExampleCounts]:
        """What the rows of a piece give, and what was read up to its end."""
        bad: list[BadRow] = []
        unread: Counter[str] = Counter()
        doubts: Counter[str] = Counter()
        dialogues: list[tuple[int, Conversation]] = []
        for row, file, source in piece:
            if isinstance(row, BadRow):
                bad.append(row)
                continue
            try:
                conversation = file.conversation(row)
            except RowError as error:
                bad.append(BadRow(row.location, str(error)))
                continue
            assert conversation is not None, "a stream has no held-out part"
            unread.update(file.unread(conversation))
            doubts.update(conversation.doubts)
            dialogues.append((source, conversation))
        tally = Tally()
        given = list(examples_of(dialogues, self._template, self.settings.policy, tally))
        tally.raise_if_refused(self.settings.policy.max_length)
        kept, left_out = self._without_held_out(given)
        counts = ExampleCounts(**tally.facts(len(self.sources))["counts"])
        if left_out:
            named = tuple(f"{k.location}: {HELD_OUT}" for k in left_out[:NAMED])
            counts = replace(
                counts,
                dropped={**counts.dropped, HELD_OUT: len(left_out)},
                named=(*counts.named, *named),
                kept=len(kept),
                tokens=sum(len(k.ids) for k in kept),
                supervised_tokens=sum(end - start for k in kept for start, end, _ in k.spans),
            )
        named_bad = (f"{row.location}: {row.reason}" for row in bad[:NAMED])
        counts = replace(
            counts, rows=len(piece), bad=len(bad), named=(*named_bad, *counts.named),
            unread=dict(unread), doubts=dict(doubts),
        )  # fmt: skip
        counts = total(before, counts)
        self._judge(bad, counts)
        return kept, counts

    def _judge(self, bad: Sequence[BadRow], counts: ExampleCounts) -> None:
        """DataError for bad rows that the config does not let pass."""
        reading = self.settings.reading
        if not bad:
            return
        listed = "\n".join(f"  {row.location}: {row.reason}" for row in bad[:LISTED])
        more = f"\n  … and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        fatal = any(row.fatal for row in bad)
        if fatal or reading.on_bad_row == "error":
            advice = (
                "Fix the file: nothing after such a place can be read, so it cannot be skipped."
                if fatal
                else "data.on_bad_row: skip leaves such rows out, and the run then goes on from its last checkpoint"
            )
            raise DataError(
                f"{len(bad)} rows of the stream cannot be used:\n{listed}{more}\n{advice}"
            )
        share = counts.bad / counts.rows
        if counts.rows >= _ENOUGH_ROWS and share > reading.max_bad_rows:
            raise DataError(
                f"{counts.bad:,} of {counts.rows:,} rows so far cannot be used, the last ones:\n{listed}{more}\n"
                f"That is {share:.1%}, more than data.max_bad_rows allows ({reading.max_bad_rows:.1%}). Fix them, or raise it."
            )

    def _without_held_out(self, kept: list[Kept]) -> tuple[list[Kept], list[Kept]]:
        if self._held_out is None or not kept:
            return kept, []
        found = digests(
            np.concatenate([k.ids for k in kept]),
            ends_of([len(k.ids) for k in kept]),
            [k.images for k in kept],
        )
        same = np.isin(found, self._held_out).tolist()
        return (
            [k for k, is_same in zip(kept, same, strict=True) if not is_same],
            [k for k, is_same in zip(kept, same, strict=True) if is_same],
        )

    def _arranged(self, kept: Sequence[Kept], begun: Position) -> list[Item]:
        """The items of a piece: its examples in order, or packed rows of them in a seeded order."""
        examples = [
            example_of(
                k.ids, k.spans, index=begun.examples + number, location=k.location, images=k.images
            )
            for number, k in enumerate(kept)
        ]
        if not self.settings.packed:
            return [Item([example], is_packed=False) for example in examples]
        if not examples:
            return []
        lengths = [len(example.input_ids) for example in examples]
        rows = pack(lengths, self.settings.policy.max_length, self.settings.seed)
        order = permutation(
            len(rows), self.settings.seed, begun.number_of_pass, begun.block, begun.row
        )
        return [Item([examples[i] for i in rows[place]], is_packed=True) for place in order]


class StreamSample:
    """The first examples of a stream, for what has to be known before it is read."""

    def __init__(self, stream: ExampleStream) -> None:
        with closing(stream.items()) as items:
            taken = list(islice(items, _SAMPLE))
        self._examples = [example for item in taken for example in item.examples]
        self.lengths = np.array([len(e.input_ids) for e in self._examples], dtype=np.int32)
        """Tokens of each, int32 [examples]."""
        self.fingerprint = stream.fingerprint
        self.counts = stream.read

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def location(self, index: int) -> str:
        """The `file:line` of an example."""
        return self._examples[index].location

    def images(self) -> list[str]:
        """None that could be known of all."""
        return []
