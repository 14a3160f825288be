"""JSONL and JSON arrays -> rows. The arrays are streamed too, with the line of every element."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, BinaryIO

from finetune.data.dialogue import strict_json
from finetune.data.dialogue.conversation import RowError
from finetune.data.reading.streams import MAX_ROW, BadRow, Row, lines_with_text, text_chunks

_SPACE = re.compile(r"[ \t\n\r]*")
_TOO_LONG = f"the row is longer than {MAX_ROW >> 20} MiB"


def read_json(file: BinaryIO, name: str, skip: int = 0) -> Iterator[Row | BadRow]:
    """Rows of a JSONL file or of a JSON array; the first character tells which it is.

    The first `skip` rows are passed over, those of a JSONL file without parsing them.
    """
    source: Iterator[bytes] = text_chunks(file)
    line, head = 1, b""
    for head in source:
        if head.strip():
            break
        line += head.count(b"\n")
    source = chain([head], source)
    if head.lstrip().startswith(b"["):
        yield from islice(_Array(source, name, line).rows(), skip, None)
    else:
        yield from _read_lines(lines_with_text(source, line), name, skip)


def _read_lines(
    source: Iterator[tuple[int, bytes | None]], name: str, skip: int
) -> Iterator[Row | BadRow]:
    parse = strict_json.parse
    first = True
    for number, raw in source:
        location = f"{name}:{number}"
        raw = raw if raw is None else raw.strip()
        if skip:
            skip -= 1
            first = False
            continue
        if raw is None:
            yield BadRow(location, _TOO_LONG)
            continue
        if first and raw == b"{":
            yield BadRow(location, "an object over several lines; write one per line", fatal=True)
            return
        first = False
        try:
            value = parse(raw.decode())
        except UnicodeDecodeError as error:
            yield BadRow(location, _not_utf8(raw[error.start], error.start))
        except RowError as error:
            yield BadRow(location, str(error))
        else:
            yield as_row(value, location)


def as_row(value: Any, location: str) -> Row | BadRow:
    """A row if the value is an object."""
    if type(value) is dict:
        return Row(value, location)
    return BadRow(location, f"the row is {strict_json.describe(value)}, not an object")


def _not_utf8(byte: int, offset: int) -> str:
    return f"byte 0x{byte:02x} at column {offset + 1} is not UTF-8; save the file as UTF-8"


class _Array:
    """A JSON array read through a window of text that moves over the file."""

    def __init__(self, source: Iterator[bytes], name: str, line: int = 1) -> None:
        self._source = source
        # Bytes that are not UTF-8 come as U+DC80..U+DCFF, so that only their row is bad.
        self._decode_bytes = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text = ""
        self._at = 0
        self._name = name
        self._line = line
        self._counted = 0  # newlines in _text before this offset are in _line

    def rows(self) -> Iterator[Row | BadRow]:
        """Every element; a syntax error between or in them ends the file with a fatal BadRow."""
        self._peek()
        self._at += 1  # the opening bracket
        if self._peek() == "]":
            self._at += 1
        else:
            while True:
                self._peek()
                row = self._element()
                yield row
                if isinstance(row, BadRow) and row.fatal:
                    return
                mark = self._peek()
                self._at += 1
                if mark == "]":
                    break
                if mark != ",":
                    what = "the end of the file" if not mark else repr(mark)
                    reason = f"expected ',' or ']' after this element, found {what}"
                    yield BadRow(self._where(), reason, fatal=True)
                    return
        if self._peek():
            yield BadRow(self._where(), "more text after the end of the array", fatal=True)

    def _element(self) -> Row | BadRow:
        """The value at the window's position, which moves behind it."""
        location = self._where()
        reason = ""
        try:
            try:
                value, source = self._decode(strict_json.DECODER)
            except RowError as error:  # a duplicate key or the like: the element can be left behind
                reason = str(error)
                value, source = self._decode(strict_json.LENIENT)
        except json.JSONDecodeError as error:
            if len(self._text) - self._at > MAX_ROW:
                return BadRow(location, _TOO_LONG, fatal=True)
            return BadRow(self._where(error.pos), strict_json.syntax_reason(error), fatal=True)
        except RecursionError:
            return BadRow(location, f"nested more than {strict_json.MAX_DEPTH} deep", fatal=True)
        except ValueError as error:  # an integer of more than 4,300 digits
            return BadRow(location, f"not JSON that can be read: {error}", fatal=True)
        try:
            strict_json.check_value(source, value)
            source.encode()
        except UnicodeEncodeError as error:
            byte = ord(source[error.start]) - 0xDC00
            return BadRow(location, _not_utf8(byte, error.start))
        except RowError as error:
            return BadRow(location, str(error))
        return BadRow(location, reason) if reason else as_row(value, location)

    def _decode(self, decoder: json.JSONDecoder) -> tuple[Any, str]:
        """The next value and its text, reading on while it may only be incomplete."""
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = strict_json.is_cut_off(error) or error.pos > len(self._text) - 16
                if not cut or len(self._text) - self._at > MAX_ROW or not self._fill():
                    raise
                continue
            if end < len(self._text) or not self._fill():  # a number may go on in the next chunk
                break
        source = self._text[self._at : end]
        self._at = end
        return value, source

    def _peek(self) -> str:
        """The next character that is not white space, where the window then stands; "" at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text) or not self._fill():
                return self._text[self._at : self._at + 1]

    def _fill(self) -> bool:
        """Move the window on to one more chunk; False at the end of the file."""
        chunk = next(self._source, None)
        if chunk is None:
            return False
        self._where()
        more = self._decode_bytes(chunk)
        self._text = self._text[self._at :] + more
        self._counted = 0
        self._at = 0
        return True

    def _where(self, at: int | None = None) -> str:
        """`file:line` of an offset in the window, by default of its position."""
        at = self._at if at is None else at
        if at > self._counted:
            self._line += self._text.count("\n", self._counted, at)
            self._counted = at
        return f"{self._name}:{self._line}"
