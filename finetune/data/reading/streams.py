"""A file -> its bytes, decompressed, and what its first bytes say that it is.

Nothing here holds more than a chunk; a compressed file that ends early or is damaged raises
StreamError instead of looking like a shorter file.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

CHUNK = 1 << 20
MAX_ROW = 8 << 20
"""Longest row in bytes: some two million tokens, more than any model takes."""

Layout = Literal["json", "csv", "parquet", "arrow", "text"]
TEXT_SUFFIXES = (".txt", ".md")

_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"
"""Behind a byte from 0x50 to 0x5f: what pzstd and others put in front, and decoders pass over."""
_LFS = b"version https://git-lfs.github.com/spec/"
_OTHER_KINDS = {
    _LFS: "it is a Git LFS pointer, not the data; fetch the data with `git lfs pull`",
    b"PK\x03\x04": "it is a ZIP archive or an Excel table; unpack it, or save the table as CSV",
    b"BZh": "it is compressed with bzip2; decompress it (gzip and zstd are read)",
    b"\xfd7zXZ": "it is compressed with xz; decompress it (gzip and zstd are read)",
    b"SQLite format 3": "it is an SQLite database; export the table as CSV or JSONL",
}
"""First bytes of files that are not read, and what to do."""
_UTF8_BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One row as it was read."""

    value: dict[str, Any]
    location: str
    """`file:line`; for Parquet `file:row`, counted from 1."""


class BadRow(NamedTuple):
    """A row that cannot be used, and why."""

    location: str
    reason: str
    fatal: bool = False
    """What follows in the file cannot be read either, so `on_bad_row: skip` does not apply."""


class StreamError(ValueError):
    """The file as a whole cannot be read; the text is the reason."""


class Stream(NamedTuple):
    """An open, decompressed file."""

    file: BinaryIO
    layout: Layout


def _refuse_other_kinds(head: bytes) -> None:
    """StreamError for the first bytes of a file that is no file of rows."""
    for start, what in _OTHER_KINDS.items():
        if head.startswith(start):
            raise StreamError(what)


@contextmanager
def open_stream(path: Path) -> Iterator[Stream]:
    """The file's decompressed bytes and its layout; StreamError or OSError if it has none."""
    with path.open("rb") as raw:
        head = raw.read(len(_LFS))
        _refuse_other_kinds(head)
        head = head[:4]
        raw.seek(0)
        name = path.name.lower()
        if head == _PARQUET or name.endswith(".parquet"):
            if head != _PARQUET:
                raise StreamError(
                    "the file is named .parquet but is not a Parquet file; rename it, or save it as Parquet"
                )
            yield Stream(raw, "parquet")
            return
        if name.endswith(".arrow"):
            yield Stream(raw, "arrow")
            return
        plain = name.removesuffix(".gz").removesuffix(".zst")
        if plain.endswith((".parquet", ".arrow")):
            raise StreamError(
                f"{'a Parquet' if plain.endswith('.parquet') else 'an Arrow'} file inside {path.suffix} is "
                "not read; decompress it first (Parquet can compress its own columns)"
            )
        layout: Layout = "csv" if plain.endswith((".csv", ".tsv")) else "json"
        if plain.endswith(TEXT_SUFFIXES):
            layout = "text"
        if head.startswith(_GZIP):
            yield Stream(gzip.GzipFile(fileobj=raw), layout)  # type: ignore[arg-type]
        elif head == _ZSTD or (head[1:] == _ZSTD_SKIPPABLE and 0x50 <= head[0] < 0x60):
            yield Stream(io.BufferedReader(_ZstdReader(raw)), layout)
        elif head and name.endswith((".gz", ".zst")):
            raise StreamError(
                f"the file is named {path.suffix} but is not compressed that way; rename it, or compress it"
            )
        else:
            yield Stream(raw, layout)


class _ZstdReader(io.RawIOBase):
    """Decompressed zstd frames; unlike zstandard's own reader it notices a missing end."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._at_start = True  # of a frame: here the file may end
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer with at least one byte; 0 at the end of the last frame."""
        while not self._ready:
            # Small pieces: one of 4 KiB can grow to more than 100 MiB at zstd's best ratio.
            piece = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._at_start = self._new_frame(), True
            piece = piece or self._raw.read(4096)
            if not piece:
                if self._at_start:
                    return 0
                raise StreamError(
                    "the zstd file is cut off: its last frame has no end; copy it again"
                )
            try:
                self._ready = memoryview(self._frame.decompress(piece))
            except self._error as error:
                raise StreamError(f"the zstd file is damaged: {error}; copy it again") from None
            self._at_start = False
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def text_chunks(file: BinaryIO, *, newlines: Literal["unify", "keep"] = "unify") -> Iterator[bytes]:
    """Chunks of a UTF-8 text without its byte order mark, every line end as one newline.

    A lone carriage return ends a line too. Neither can stand in a JSON string unescaped; in
    quoted CSV cells they can, hence `keep`.
    """
    held = b""
    first = True
    while True:
        chunk = held + read_chunk(file)
        if first:
            _refuse_other_encodings(chunk)
            chunk = chunk.removeprefix(_UTF8_BOM)
        if len(chunk) == len(held) and not first:
            if held:
                yield b"\n"
            return
        held, first = b"", False
        if newlines == "unify" and b"\r" in chunk:
            if chunk.endswith(b"\r"):
                chunk, held = chunk[:-1], b"\r"
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        yield chunk


def read_chunk(file: BinaryIO) -> bytes:
    """Up to CHUNK bytes; StreamError when the compressed data is damaged or ends early."""
    try:
        return file.read(CHUNK)
    except EOFError:
        raise StreamError("the gzip file is cut off: its end is missing; copy it again") from None
    except (zlib.error, gzip.BadGzipFile) as error:
        raise StreamError(f"the gzip file is damaged: {error}; copy it again") from None


def _refuse_other_encodings(start: bytes) -> None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start[:2]:
        raise StreamError("the file is UTF-16 or UTF-32; save it as UTF-8")


def lines(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line without its end) of each line; None for one longer than MAX_ROW."""
    number = 0
    tail = b""
    too_long = False
    for chunk in chunks:
        pieces = (tail + chunk).split(b"\n")
        tail = pieces.pop()
        for piece in pieces:
            number += 1
            yield number, None if too_long or len(piece) > MAX_ROW else piece
            too_long = False
        if len(tail) > MAX_ROW:
            tail, too_long = b"", True
    if tail or too_long:
        yield number + 1, None if too_long else tail


_TEXT = re.compile(rb"\S[^\n]*")


def lines_with_text(chunks: Iterable[bytes], number: int = 1) -> Iterator[tuple[int, bytes | None]]:
    """(number, text without white space in front) of each line that has any; None for one longer than MAX_ROW.

    Lines without text are counted, a gigabyte of them in seconds. `number` is that of the first.
    """
    tail = b""
    too_long = False
    for chunk in chunks:
        whole, end, tail = (tail + chunk).rpartition(b"\n")
        whole += end
        if too_long and not whole:
            tail = b""
        elif too_long:
            whole, number, too_long = whole.partition(b"\n")[2], number + 1, False
        counted = 0
        for line in _TEXT.finditer(whole):
            number += whole.count(b"\n", counted, line.start())
            counted = line.start()
            yield number, None if len(line[0]) > MAX_ROW else line[0]
        number += whole.count(b"\n", counted)
        tail = tail.lstrip()
        if len(tail) > MAX_ROW:
            yield number, None
            tail, too_long = b"", True
    if tail:
        yield number, tail
