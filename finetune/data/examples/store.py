"""Tokenised examples on disk: an Arrow stream file of token ids and supervised spans.

The file is what `datasets.Dataset.from_file` opens. It is written and mapped with pyarrow directly:
measured with datasets 5.2, importing that costs 0.5-0.9 s of CPU and 40-90 MB more, and a row read
through it takes 10 (as lists) to 45 times (as arrays) as long. Labels are not stored: they are the
ids inside the spans.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Span = tuple[int, int, float]
"""Half-open range of tokens and their weight in the loss."""


EXAMPLES_FILE = "examples.arrow"
"""In an entry of the cache."""


class StoredExample(NamedTuple):
    """One row: token ids int32 [T] (read-only, mapped) and spans as three arrays [S]."""

    input_ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    images: tuple[str, ...]
    """Paths of the images that it shows, in reading order."""


class ExampleWriter:
    """Appends record batches to a new file; memory holds one batch at a time."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._schema = pa.schema(
            {
                "input_ids": pa.list_(pa.int32()),
                "starts": pa.list_(pa.int32()),
                "ends": pa.list_(pa.int32()),
                "weights": pa.list_(pa.float32()),
                "where": pa.string(),
                "images": pa.list_(pa.string()),
            }
        )
        self._sink = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._sink, self._schema)

    def __enter__(self) -> ExampleWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
        self._sink.close()

    def append(
        self,
        input_ids: Sequence[npt.NDArray[np.int32]],
        spans: Sequence[Sequence[Span]],
        location: Sequence[str],
        images: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """Writes some examples: their ids, spans, the `file:line` of each and the images it shows."""
        import pyarrow as pa

        if not input_ids:
            return
        span_ends = ends_of([len(of_one) for of_one in spans])
        flat = [span for of_one in spans for span in of_one]
        ends_of_ids, all_ids = ends_of([len(ids) for ids in input_ids]), np.concatenate(input_ids)
        starts, ends, weights = (
            _values([span[place] for span in flat], kind)
            for place, kind in enumerate((np.int32, np.int32, np.float32))
        )
        columns = [
            pa.ListArray.from_arrays(_values(ends_of_ids, np.int32), _values(all_ids, np.int32)),
            *(
                pa.ListArray.from_arrays(_values(span_ends, np.int32), v)
                for v in (starts, ends, weights)
            ),
            _texts(location),
            _lists(images or [()] * len(location)),
        ]
        self.add(pa.record_batch(columns, schema=self._schema))

    def add(self, batch: Any) -> None:
        """Writes a record batch of another such file."""
        self._stream.write_batch(batch)


def copied(files: Sequence[Path], target: Path) -> None:
    """Write the rows of some files into a new one, batch after batch."""
    import pyarrow as pa

    with ExampleWriter(target) as writer:
        for file in files:
            with pa.ipc.open_stream(pa.memory_map(str(file))) as stream:
                for batch in stream:
                    writer.add(batch)


class ExampleFile:
    """Random access to a written file through a memory map: rows cost no memory until touched."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._path = path
        with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
            self._batches = [_Batch(batch) for batch in stream]
        sizes = [len(batch.location) for batch in self._batches]
        self._first = ends_of(sizes)[:-1]
        self._count = sum(sizes)

    def __len__(self) -> int:
        return self._count

    def __reduce__(self) -> tuple[Any, ...]:
        return ExampleFile, (self._path,)  # worker processes map the file themselves

    def __getitem__(self, index: int) -> StoredExample:
        batch, row = self._find(index)
        tokens = slice(*batch.token_ends[row : row + 2])
        spans = slice(*batch.span_ends[row : row + 2])
        return StoredExample(
            batch.input_ids[tokens],
            batch.starts[spans],
            batch.ends[spans],
            batch.weights[spans],
            batch.images_of(row),
        )

    def images(self) -> list[str]:
        """Paths of all images that are shown, each once, in order of first use."""
        shown = (path for batch in self._batches for path in batch.images.values.to_pylist())
        return [*dict.fromkeys(shown)]

    def location(self, index: int) -> str:
        """The `file:line` of a row."""
        batch, row = self._find(index)
        return str(batch.location[row].as_py())

    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of every row, int32 [rows]."""
        pieces = [np.diff(batch.token_ends) for batch in self._batches]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int32)

    def digests(self) -> npt.NDArray[np.uint64]:
        """64 bits of each row's ids and images, uint64 [rows]: equal rows have equal ones."""
        pieces = [batch.digests() for batch in self._batches]
        return np.concatenate(pieces) if pieces else np.empty(0, np.uint64)

    def _find(self, index: int) -> tuple[_Batch, int]:
        if not 0 <= index < self._count:
            raise IndexError(f"row {index} of {self._count}")
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._batches[number], index - int(self._first[number])


class _Batch:
    """The columns of one record batch as arrays over the mapped file."""

    def __init__(self, batch: Any) -> None:
        ids, starts, ends, weights, self.location, self.images = batch.columns
        self.token_ends = _numbers(ids.offsets, np.int32)
        self.span_ends = _numbers(starts.offsets, np.int32)
        self.input_ids = _numbers(ids.values, np.int32)
        self.starts = _numbers(starts.values, np.int32)
        self.ends = _numbers(ends.values, np.int32)
        self.weights = _numbers(weights.values, np.float32)
        self._has_images = len(self.images.values) > 0

    def images_of(self, row: int) -> tuple[str, ...]:
        """Paths of the images that a row shows."""
        return tuple(self.images[row].as_py()) if self._has_images else ()

    def digests(self) -> npt.NDArray[np.uint64]:
        """`digests` of its rows."""
        shown = self.images.to_pylist() if self._has_images else [()] * len(self.images)
        return digests(self.input_ids, self.token_ends, shown)


def digests(
    input_ids: npt.NDArray[np.int32], ends: npt.NDArray[np.int32], images: Sequence[Sequence[str]]
) -> npt.NDArray[np.uint64]:
    """Of each example: the sum of its ids times a fixed random number per position, and its images.

    A multilinear hash: two examples that differ collide with a chance of about 2^-64.

    Args:
        input_ids: Those of all examples, one after another, none of them empty.
        ends: Where each begins, and the end of the last.
        images: Paths of the images that each shows.
    """
    starts, lengths = ends[:-1], np.diff(ends)
    factors = np.random.default_rng(0).integers(
        1 << 63, size=int(lengths.max(initial=0)) + 1, dtype=np.uint64
    )
    places = np.arange(len(input_ids)) - np.repeat(starts - starts[0], lengths)
    terms = (input_ids.astype(np.uint64) + np.uint64(1)) * factors[places + 1]
    sums = np.add.reduceat(terms, starts - starts[0]) + lengths.astype(np.uint64) * factors[0]
    shown = [hashlib.blake2b("\0".join(p).encode(), digest_size=8).digest() for p in images]
    return np.asarray(sums ^ np.frombuffer(b"".join(shown), np.uint64), np.uint64)


def _values(values: npt.ArrayLike, kind: npt.DTypeLike) -> Any:
    """Numbers as an Arrow array.

    `pa.array` would import pandas first, if it is installed: 0.15 s of CPU and 40 MB.
    """
    import pyarrow as pa

    array = np.ascontiguousarray(values, dtype=kind)
    return pa.Array.from_buffers(
        pa.from_numpy_dtype(array.dtype), len(array), [None, pa.py_buffer(array.data)]
    )


def _texts(texts: Sequence[str]) -> Any:
    """Strings as an Arrow array, without pandas too."""
    import pyarrow as pa

    encoded = [text.encode() for text in texts]
    ends = ends_of([len(text) for text in encoded])
    buffers = [None, pa.py_buffer(ends.data), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(encoded), buffers)


def _lists(texts: Sequence[Sequence[str]]) -> Any:
    """Lists of strings as an Arrow array."""
    import pyarrow as pa

    ends = _values(ends_of([len(of_one) for of_one in texts]), np.int32)
    return pa.ListArray.from_arrays(ends, _texts([text for of_one in texts for text in of_one]))


def _numbers(array: Any, kind: npt.DTypeLike) -> npt.NDArray[Any]:
    """An Arrow array without nulls as NumPy's, over the same memory."""
    count, offset = len(array), array.offset
    return np.frombuffer(array.buffers()[-1], dtype=kind)[offset : offset + count]


def ends_of(sizes: Sequence[int]) -> npt.NDArray[np.int32]:
    """`[0, n0, n0 + n1, ...]`, the offsets of Arrow lists."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int32)
