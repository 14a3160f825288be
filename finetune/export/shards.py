"""Writes a safetensors file from another one, piece by piece, changing some of its tensors on the way.

Memory is a few buffers, whatever the size of the file. Each byte passes through once: read, changed
where a tensor is, written, and hashed beside the writing.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import ModelError
from finetune.export.adapter import Update
from finetune.export.numbers import F16_LARGEST, STORAGE, Floats, narrow, widen
from finetune.weights import ITEM_SIZE, TensorInfo

_PIECE = 4 << 20
# Elements that are computed on at once: small enough for the processor's caches.
_BLOCK = 1 << 16


@dataclass(frozen=True)
class Output:
    """One tensor of the file to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[TensorInfo, ...] = ()
    """Its rows, one tensor's after the other's; or none, and a constant."""
    update: Update | None = None
    constant: bytes = b""

    @property
    def size(self) -> int:
        """Bytes."""
        same = sum(source.size for source in self.sources if source.dtype == self.dtype)
        others = [source for source in self.sources if source.dtype != self.dtype]
        items = sum(source.size // ITEM_SIZE[source.dtype] for source in others)
        return len(self.constant) + same + items * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class ShardPlan:
    """One file to be written."""

    name: str
    header: bytes
    outputs: tuple[Output, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.header) + sum(output.size for output in self.outputs)


class GivenUpError(Exception):
    """The writing was given up because something else failed."""


def make_header(outputs: Sequence[Output], metadata: dict[str, str]) -> bytes:
    """The header of a safetensors file with ``outputs`` in this order."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for output in outputs:
        offsets = [position, position + output.size]
        entries[output.name] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": offsets,
        }
        position = offsets[1]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_shard(
    plan: ShardPlan,
    target: Path,
    *,
    stop: threading.Event,
    advance: Callable[[int], None],
) -> tuple[int, str]:
    """Write ``target`` as planned and make it durable; returns its size and SHA-256.

    ``advance`` hears of the bytes written; ``stop`` ends the writing early by GivenUpError.
    """
    with target.open("xb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        sink = _Sink(file.fileno(), pool, stop, advance)
        sink.write(memoryview(plan.header))
        work = _Workspace()
        for output in plan.outputs:
            if output.constant:
                sink.write(memoryview(output.constant))
            for source in output.sources:
                descriptor = os.open(source.file, os.O_RDONLY)
                try:
                    if output.update is None and output.dtype == source.dtype:
                        _copy(source, descriptor, sink, work)
                    else:
                        _compute(output, source, descriptor, sink, work)
                finally:
                    os.close(descriptor)
        os.fsync(file.fileno())
        return sink.size, sink.hexdigest()


class _Sink:
    """Writes in order and hashes the same bytes meanwhile."""

    def __init__(
        self,
        descriptor: int,
        pool: ThreadPoolExecutor,
        stop: threading.Event,
        advance: Callable[[int], None],
    ) -> None:
        self.size = 0
        self._descriptor, self._pool, self._stop, self._advance = descriptor, pool, stop, advance
        self._digest = hashlib.sha256()
        self._hashing: Future[None] | None = None

    def write(self, data: memoryview) -> None:
        """Append ``data``, which the caller may change again once the next call has returned."""
        if self._stop.is_set():
            raise GivenUpError
        if self._hashing is not None:
            self._hashing.result()
        self._hashing = self._pool.submit(self._digest.update, data)
        written = 0
        while written < len(data):
            written += os.write(self._descriptor, data[written:])
        self.size += written
        self._advance(written)

    def hexdigest(self) -> str:
        if self._hashing is not None:
            self._hashing.result()
        return self._digest.hexdigest()


class _Workspace:
    """The buffers of one thread; pieces alternate, since the one before is still being hashed."""

    def __init__(self) -> None:
        self._pieces = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self.raw = np.empty(0, np.uint8)
        self.values = np.empty(0, np.float32)
        self.delta = np.empty(0, np.float32)
        self.bits = np.empty(0, np.uint32)

    def piece(self, size: int) -> NDArray[np.uint8]:
        self._pieces.reverse()
        if self._pieces[0].size < size:
            self._pieces[0] = np.empty(size, np.uint8)
        return self._pieces[0][:size]

    def reserve(self, raw: int, block: int) -> None:
        if self.raw.size < raw:
            self.raw = np.empty(raw, np.uint8)
        if self.values.size < block:
            self.values, self.delta = np.empty(block, np.float32), np.empty(block, np.float32)
            self.bits = np.empty(block, np.uint32)


def _read(descriptor: int, place: int, out: NDArray[np.uint8]) -> None:
    view, done = out.data, 0
    while done < len(view):
        read = os.preadv(descriptor, [view[done:]], place + done)
        if read == 0:
            raise ModelError("a weight file of the base became shorter while it was read")
        done += read


def _copy(source: TensorInfo, descriptor: int, sink: _Sink, work: _Workspace) -> None:
    for place in range(source.start, source.end, _PIECE):
        piece = work.piece(min(_PIECE, source.end - place))
        _read(descriptor, place, piece)
        sink.write(piece.data)


def _compute(
    output: Output, source: TensorInfo, descriptor: int, sink: _Sink, work: _Workspace
) -> None:
    rows, columns = source.shape if len(source.shape) == 2 else (1, 0)
    if output.update is None:  # only the number format changes: any split into rows will do
        rows, columns = source.size // ITEM_SIZE[source.dtype], 1
    if rows * columns == 0:
        return
    storage, target = STORAGE[source.dtype], STORAGE[output.dtype]
    per_block = max(1, _BLOCK // columns)
    per_piece = max(per_block, _PIECE // (columns * storage.itemsize) // per_block * per_block)
    work.reserve(per_piece * columns * storage.itemsize, per_block * columns)
    for first in range(0, rows, per_piece):
        count = min(per_piece, rows - first)
        raw = work.raw[: count * columns * storage.itemsize]
        _read(descriptor, source.start + first * columns * storage.itemsize, raw)
        piece = work.piece(count * columns * target.itemsize)
        stored, result = raw.view(storage), piece.view(target)
        for row in range(0, count, per_block):
            height = min(per_block, count - row)
            part = slice(row * columns, (row + height) * columns)
            values = work.values[: height * columns]
            widen(stored[part], source.dtype, values)
            if output.update is not None:
                here = slice(first + row, first + row + height)
                delta = work.delta[: height * columns].reshape(height, columns)
                with np.errstate(over="ignore", invalid="ignore"):  # found by the check
                    output.update.apply(here, values.reshape(height, columns), delta)
            _check_finite(values, output)
            narrow(values, output.dtype, result[part], work.bits[: height * columns])
        sink.write(piece.data)


def _check_finite(values: Floats, output: Output) -> None:
    # A product with itself shows a NaN or an infinity in one fast pass; then look closer.
    largest = F16_LARGEST if output.dtype == "F16" else np.finfo(np.float32).max
    with np.errstate(over="ignore", invalid="ignore"):
        if np.dot(values, values) <= largest or np.abs(values).max() <= largest:
            return
    raise ModelError(
        f"{output.name} would hold numbers that are not finite in {output.dtype}; "
        "the base or the adapter is broken, or the number format too small"
    )
