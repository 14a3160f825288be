"""Shards -> blocks of rows that are permuted together, from any block of a pass on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from finetune.data.reading.shards import ShardReader, StreamShard
from finetune.data.reading.sources import LISTED, FileRows, SourceSpec
from finetune.data.reading.streams import BadRow, Row
from finetune.errors import DataError

OPEN_SHARDS = 4
"""Shards that are read in turn, so that rows of one file do not come all together."""
BLOCK_CHARACTERS = 32 << 20
"""Characters of text after which a block is full, whatever the number of its rows."""

Cursors = tuple[tuple[int, int], ...]
"""Each open shard, by its place in the order of the pass, and its rows that were read."""


class PlacedRow(NamedTuple):
    """A row of a block, what knows its layout, and the number of its source."""

    row: Row | BadRow
    file: FileRows
    source: int


@dataclass(frozen=True)
class BlockOptions:
    """How rows become blocks."""

    seed: int
    rows: int
    """Of a block, about: it ends with a row of each open shard."""


class Blocks:
    """The blocks of one pass: a row of each open shard in turn, a new one opened for each that ends."""

    def __init__(
        self,
        shards: Sequence[StreamShard],
        order: Sequence[int],
        sources: Sequence[SourceSpec],
        reader: ShardReader,
        options: BlockOptions,
        *,
        cursors: Cursors = (),
        opened: int = 0,
    ) -> None:
        self._shards = shards
        self._order = order
        """Numbers of the shards as this pass opens them."""
        self._sources = sources
        self._reader = reader
        self._options = options
        self.opened = opened
        """Shards that were opened in this pass."""
        self._files: list[tuple[int, FileRows]] = []
        self._rows: dict[int, int] = {}
        for place, row in cursors:
            self._open(place, row)

    @property
    def cursors(self) -> Cursors:
        """Where the next block begins."""
        return tuple((place, self._rows[place]) for place, _ in self._files)

    def next(self) -> list[PlacedRow]:
        """The rows of the next block; none at the end of the pass."""
        rows: list[PlacedRow] = []
        size = 0
        while len(rows) < self._options.rows and size < BLOCK_CHARACTERS and self._fill():
            for place, file in list(self._files):
                item = next(file, None)
                if item is None:
                    self._close(place)
                    continue
                self._rows[place] += 1
                shard = self._shards[self._order[place]]
                copies = self._copies(shard, self._rows[place])
                if isinstance(item, Row):
                    size += copies * characters(item.value)
                if shard.repository is not None:
                    item = item._replace(
                        location=f"{shard.name}:{item.location.rpartition(':')[2]}"
                    )
                rows += [PlacedRow(item, file, shard.source)] * copies
        return rows

    def _fill(self) -> bool:
        """Open as many shards as are read in turn; whether any is open."""
        while len(self._files) < OPEN_SHARDS and self.opened < len(self._order):
            self.opened += 1
            self._open(self.opened - 1, 0)
        return bool(self._files)

    def _open(self, place: int, row: int) -> None:
        file = self._reader.open(self._order[place], row)
        if file.unknown:
            raise DataError(
                "\n".join(f"{bad.location}: {bad.reason}" for bad in file.unknown[:LISTED])
            )
        self._files.append((place, file))
        self._rows[place] = row

    def _close(self, place: int) -> None:
        self._files = [(other, file) for other, file in self._files if other != place]
        del self._rows[place]
        self._reader.close(self._order[place])

    def _copies(self, shard: StreamShard, row: int) -> int:
        """How often a row is seen: the whole part of its source's weight, and once more by chance."""
        weight = self._sources[shard.source].weight
        whole, fraction = int(weight), weight - int(weight)
        if not fraction:
            return whole
        said = f"{self._options.seed}:{shard.name.rpartition('/')[2]}:{row}"
        chance = int.from_bytes(blake2b(said.encode(), digest_size=8).digest(), "big") / 2**64
        return whole + (chance < fraction)


def characters(value: Any) -> int:
    """About how much text a row holds."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(characters, value.values()))
    return sum(map(characters, value)) if isinstance(value, list) else 0
