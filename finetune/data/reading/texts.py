"""Files of plain text -> rows with a column `text`: a row per file, long files in pieces."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from finetune.data.reading.json_rows import read_json
from finetune.data.reading.streams import BadRow, Row
from finetune.data.reading.tables import text_lines

_PIECE = 1 << 20
"""Characters from which the next empty line, or at twice as many the next line, begins a new row."""
_JSON = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:\{\s*\"|\[\s*\{)")


def read_text(file: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    """The file's text; as JSON rows when it begins like them, whatever its name says.

    UTF-8, or GBK. A byte that is neither makes its row a bad one.
    """
    peekable: Any = file  # all streams that are opened here can be looked into
    if _JSON.match(peekable.peek(4096)[:4096]):
        yield from read_json(file, name)
        return
    try:
        yield from _pieces(file, name)
    except csv.Error as error:
        yield BadRow(f"{name}:1", str(error), fatal=True)


def _pieces(file: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    held: list[str] = []
    begin, size = 1, 0
    for number, line in enumerate(text_lines(file, name), 1):
        if size >= 2 * _PIECE or (size >= _PIECE and not line.strip()):
            yield _row(held, name, begin)
            held, begin, size = [], number, 0
        held.append(line)
        size += len(line)
    if held:
        yield _row(held, name, begin)


def _row(lines: list[str], name: str, begin: int) -> Row | BadRow:
    """The row of some lines, from its first one that is not empty on; `begin` is the number of the first."""
    whole = "".join(lines).replace("\r\n", "\n").replace("\r", "\n")
    text = whole.strip("\n")
    begin += len(whole) - len(whole.lstrip("\n")) if text else 0
    location = f"{name}:{begin}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        line = begin + text.count("\n", 0, error.start)
        reason = (
            "the text contains a NUL character" if not byte else f"byte 0x{byte:02x} is not UTF-8"
        )
        return BadRow(location, f"line {line}: {reason}; save the file as UTF-8 text")
    return Row({"text": text}, location)
