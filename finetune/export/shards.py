"""Writes a safetensors file from another one, piece by piece, changing some of its tensors on the way.

Memory is a few buffers, whatever the size of the file. Each byte passes through once: read and changed
where a tensor is, by one thread; hashed by a second and written by a third while the next ones are read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.artifacts.weights import ITEM_SIZE, TensorInfo
from finetune.errors import ModelError
from finetune.export.adapter import Update
from finetune.export.checks import ProductCheck
from finetune.export.numbers import STORAGE, is_finite, narrow, widen

_BUFFER = 4 << 20
_BUFFERS = 4
_PAGE = 4096
# Elements that are computed on at once: few enough for the processor's caches, and enough for threads
# not to pass the interpreter's lock around all the time.
_BLOCK = 1 << 17


@dataclass(frozen=True)
class Output:
    """One tensor of the file to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[TensorInfo, ...] = ()
    """Its rows, one tensor's after the other's; or none, and a constant."""
    update: Update | None = None
    checked: bool = False
    """Whether every row that the update changes is checked by a product."""
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


class CancelledError(Exception):
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

    ``advance`` hears of the bytes written; ``stop`` ends the writing early by CancelledError.
    """
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with _Sink(descriptor, stop, advance) as sink:
            sink.write(plan.header)
            work = _Workspace()
            for output in plan.outputs:
                sink.write(output.constant)
                for source in output.sources:
                    _take(output, source, sink, work)
            sink.finish()
        os.fsync(descriptor)
        return sink.size, sink.hexdigest()
    finally:
        os.close(descriptor)


class _Sink:
    """Writes and hashes in order, a buffer at a time, while the next ones are filled.

    Past the file cache where the file system can: the output is to be durable, and a cache filled with
    it would only be emptied again.
    """

    def __init__(
        self, descriptor: int, stop: threading.Event, advance: Callable[[int], None]
    ) -> None:
        self.size = 0
        self._descriptor, self._stop, self._advance = descriptor, stop, advance
        self._digest = hashlib.sha256()
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        # Whole pages of memory, as writing past the cache asks for.
        self._buffers = deque(memoryview(mmap.mmap(-1, _BUFFER)) for _ in range(_BUFFERS))
        self._pending: deque[tuple[Future[None], Future[None]]] = deque()
        self._filled = 0
        self._set_direct(True)

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._hasher, self._writer):
            pool.shutdown(cancel_futures=True)

    def room(self, size: int) -> memoryview:
        """Where the next bytes go: space for ``size`` of them or less; ``fill`` it before the next call."""
        return self._buffers[0][self._filled : min(_BUFFER, self._filled + size)]

    def fill(self, size: int) -> None:
        """That many bytes are in the room now."""
        self._filled += size
        if self._filled == _BUFFER:
            self._hand_on()

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``."""
        rest = memoryview(data)
        while rest:
            room = self.room(len(rest))
            room[:] = rest[: len(room)]
            self.fill(len(room))
            rest = rest[len(room) :]

    def finish(self) -> None:
        """Everything is hashed, and with the system, when this returns."""
        self._hand_on()
        while self._pending:
            self._await_oldest()

    def hexdigest(self) -> str:
        """The SHA-256 of what was handed on."""
        return self._digest.hexdigest()

    def _hand_on(self) -> None:
        """Pass the current buffer to the other threads, and take the next when they are through with it."""
        if self._stop.is_set():
            raise CancelledError
        data = self._buffers[0][: self._filled]
        self.size += len(data)
        hashed = self._hasher.submit(self._digest.update, data)
        self._pending.append((hashed, self._writer.submit(self._write_all, data)))
        self._buffers.rotate(-1)
        self._filled = 0
        if len(self._pending) == _BUFFERS:
            self._await_oldest()

    def _await_oldest(self) -> None:
        for future in self._pending.popleft():
            future.result()

    def _write_all(self, data: memoryview) -> None:
        if len(data) % _PAGE:  # the last one
            self._set_direct(False)
        written = 0
        while written < len(data):
            written += self._write(data[written:])
        self._advance(written)

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
            self._set_direct(False)  # this file system writes through its cache only
            return os.write(self._descriptor, data)

    def _set_direct(self, wanted: bool) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        flag = getattr(os, "O_DIRECT", 0)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | flag if wanted else flags & ~flag)
        except OSError:
            wanted = False
        self._direct = wanted and bool(flag)


class _Workspace:
    """The arrays of one thread, each as large as was ever asked for."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}

    def array(self, name: str, size: int, dtype: Any) -> NDArray[Any]:
        """``size`` elements that nobody else uses by that name."""
        found = self._arrays.get(name)
        if found is None or found.size < size or found.dtype != dtype:
            found = self._arrays[name] = np.empty(size, dtype)
        return found[:size]


def _take(output: Output, source: TensorInfo, sink: _Sink, work: _Workspace) -> None:
    descriptor = os.open(source.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if output.update is None and output.dtype == source.dtype:
            _copy(source, descriptor, sink)
        else:
            _compute(output, source, descriptor, sink, work)
    finally:
        os.close(descriptor)


def _read(descriptor: int, place: int, out: memoryview) -> None:
    done = 0
    while done < len(out):
        read = os.preadv(descriptor, [out[done:]], place + done)
        if read == 0:
            raise ModelError(
                "a weight file of the base became shorter while it was read; give the same command again when nothing writes to it"
            )
        done += read


def _copy(source: TensorInfo, descriptor: int, sink: _Sink) -> None:
    place, item = source.start, ITEM_SIZE[source.dtype]
    while place < source.end:
        room = sink.room(source.end - place)
        room = room[: len(room) // item * item]
        data = room or memoryview(bytearray(item))  # one element that two buffers share
        _read(descriptor, place, data)
        if source.dtype in STORAGE and not is_finite(
            np.frombuffer(data, STORAGE[source.dtype]), source.dtype
        ):
            raise ModelError(
                f"{source.name} in {source.file} holds numbers that are not finite; use another checkpoint"
            )
        if room:
            sink.fill(len(room))
        else:
            sink.write(data)
        place += len(data)


def _compute(
    output: Output, source: TensorInfo, descriptor: int, sink: _Sink, work: _Workspace
) -> None:
    rows, columns = source.shape if len(source.shape) == 2 else (1, 0)
    if output.update is None:  # only the dtype changes: any split into rows will do
        rows, columns = source.size // ITEM_SIZE[source.dtype], 1
    if rows * columns == 0:
        return
    storage, target = STORAGE[source.dtype], STORAGE[output.dtype]
    check = None
    if output.update is not None and output.checked:
        check = ProductCheck(output.name, output.update, output.dtype)
    per_block = max(1, _BLOCK // columns)
    for first in range(0, rows, per_block):
        height = min(per_block, rows - first)
        size = height * columns
        stored = work.array("stored", size, storage)
        place = source.start + first * columns * storage.itemsize
        _read(descriptor, place, stored.view(np.uint8).data)
        values = work.array("values", size, np.float32)
        widen(stored, source.dtype, values)
        matrix, factors = values.reshape(height, columns), None
        before = check.before(matrix) if check else None
        if output.update is not None:
            delta = work.array("delta", size, np.float32).reshape(height, columns)
            with np.errstate(over="ignore", invalid="ignore"):  # found by the check
                factors = output.update.apply(slice(first, first + height), matrix, delta)
        room = sink.room(size * target.itemsize)
        fits = len(room) == size * target.itemsize
        result = np.frombuffer(room, target) if fits else work.array("result", size, target)
        narrow(values, output.dtype, result, work.array("bits", size, np.uint32))
        known = source.dtype != "F32" or is_finite(stored, "F32")
        if not known or not is_finite(result, output.dtype):
            raise ModelError(
                f"{output.name} would hold numbers that are not finite in {output.dtype}; "
                "the base or the adapter is broken, or the dtype too small; use another checkpoint, or a larger --dtype"
            )
        if check is not None and before is not None:
            widen(result, output.dtype, values)
            check.after(first, before, matrix, factors)
        if fits:
            sink.fill(len(room))
        else:
            sink.write(result.view(np.uint8).data)
