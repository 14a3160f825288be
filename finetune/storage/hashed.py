"""Files that are hashed while they are written, so that sealing their folder need not read them again.

    with hashing(stage) as written:
        with hashed_file(stage / "optimizer.pt") as file:
            torch.save(state, file)
    seal(stage, written)

Every file is on the disk (fsync) when its block ends. Only what is written in here, by this process, is
known; of files of others `seal` says the same after reading them.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from finetune.storage.files import moved

_BESIDE = 1 << 20
"""Bytes from which hashing runs beside writing; for fewer a thread costs more than it wins."""
_PIECE = 16 << 20

_ledgers: list[tuple[Path, dict[str, tuple[int, str]]]] = []
_guard = threading.Lock()


@contextmanager
def hashing(folder: Path) -> Iterator[dict[str, tuple[int, str]]]:
    """Size and SHA-256 by relative name of the files that are written below `folder` meanwhile."""
    written: dict[str, tuple[int, str]] = {}
    entry = (folder, written)
    with _guard:
        _ledgers.append(entry)
    try:
        yield written
    finally:
        with _guard:
            _ledgers.remove(entry)


@contextmanager
def hashed_file(path: Path) -> Iterator[HashedFile]:
    """A new binary file; complete and on the disk when the block ends."""
    with path.open("wb") as raw:
        file = HashedFile(raw)
        try:
            yield file
        finally:
            file.stop()
        raw.flush()
        os.fsync(raw.fileno())
    with _guard:
        for folder, written in _ledgers:
            if path.is_relative_to(folder):
                written[path.relative_to(folder).as_posix()] = (file.size, file.digest())


def hashed_text(path: Path, text: str) -> None:
    """A new text file."""
    with hashed_file(path) as file:
        file.write(text.encode())


def hashed_copy(source: Path, path: Path) -> None:
    """A new file with the bytes of `source`."""
    with source.open("rb") as original, hashed_file(path) as file:
        while piece := original.read(_PIECE):
            file.write(piece)


class HashedFile:
    """What torch.save and others write to: bytes go to a file and through SHA-256, side by side."""

    def __init__(self, raw: BinaryIO) -> None:
        self.size = 0
        self._raw = raw
        self._hash = hashlib.sha256()
        self._pool: ThreadPoolExecutor | None = None

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data`; it may change as soon as this returns."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE):
            self._write(view[start : start + _PIECE])
            moved(min(_PIECE, len(view) - start))
        self.size += len(view)
        return len(view)

    def _write(self, piece: memoryview) -> None:
        if len(piece) < _BESIDE:
            self._hash.update(piece)
            self._raw.write(piece)
            return
        self._pool = self._pool or ThreadPoolExecutor(1, "hash")
        hashed = self._pool.submit(self._hash.update, piece)
        try:
            self._raw.write(piece)
        finally:
            hashed.result()

    def flush(self) -> None:
        """Hand what is held back to the operating system."""
        self._raw.flush()

    def stop(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown()

    def digest(self) -> str:
        """SHA-256 of what was written."""
        return self._hash.hexdigest()
