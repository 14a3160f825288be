"""Parquet, Arrow and CSV -> rows."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from finetune import console
from finetune.data.reading.streams import MAX_ROW, BadRow, Row, lines, text_chunks

_ROWS_AT_ONCE = 256
_LINES_TO_TELL_GBK = 1000
_MOST_BLANK = 1_000_000
"""Lines in a row; a small packed file may hold billions of them, each of which takes its time."""


def read_parquet(path: Path, skip: int = 0) -> Iterator[Row | BadRow]:
    """Rows of a Parquet file behind the first `skip`, numbered from 1 in the file.

    A column of structs holds a null for every field that a row does not have; those are left out.
    """
    from pyarrow import parquet

    def batches() -> Iterator[Any]:
        with parquet.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as reader:
            left = skip
            for group in range(reader.num_row_groups):
                size = reader.metadata.row_group(group).num_rows
                if left >= size:
                    left -= size
                    continue
                for batch in reader.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[group]):
                    yield batch.slice(left)
                    left = max(0, left - batch.num_rows)

    yield from _rows_of(batches(), path, "Parquet", skip)


def read_arrow(path: Path) -> Iterator[Row | BadRow]:
    """Rows of an Arrow file, as `datasets.Dataset.save_to_disk` writes it; numbered from 1."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(path)) as source:
            try:
                reader = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:  # the other of Arrow's two file forms
                file = pyarrow.ipc.open_file(source)
                reader = (file.get_batch(number) for number in range(file.num_record_batches))
            for batch in reader:
                for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                    yield batch.slice(start, _ROWS_AT_ONCE)

    yield from _rows_of(batches(), path, "Arrow")


def _rows_of(
    batches: Iterator[Any], path: Path, kind: str, number: int = 0
) -> Iterator[Row | BadRow]:
    import pyarrow

    try:
        for batch in batches:
            for value in _values(batch):
                number += 1
                location = f"{path}:{number}"
                if isinstance(value, str):
                    yield BadRow(location, value)
                else:
                    yield Row(_without_nulls(value), location)
    except (pyarrow.ArrowException, OSError) as error:
        reason = f"the {kind} file is damaged: {str(error).splitlines()[0]}"
        yield BadRow(f"{path}:{number + 1}", reason, fatal=True)


def _values(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a record batch; for one that Python cannot hold, the reason."""
    import pyarrow

    try:
        yield from batch.to_pylist()
        return
    except pyarrow.ArrowException:  # the file is damaged
        raise
    except (ValueError, OverflowError):
        pass  # to_pylist gave nothing yet: again, row by row
    for index in range(batch.num_rows):
        value: dict[str, Any] | str
        try:
            value = batch.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError:
            value = "a text column is not UTF-8"
        except (ValueError, OverflowError) as error:  # such as a date behind the year 9999
            value = f"a column holds what is out of range: {error}"
        yield value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def read_csv(file: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    """Rows of a CSV file with a header line, each by the line that it begins on.

    Commas, semicolons or tabs separate: whichever the header has most of. UTF-8, or GBK as
    spreadsheets in China write it.
    """
    csv.field_size_limit(MAX_ROW)
    text = text_lines(file, name)
    begin = 1
    try:
        head = next(text, None)
        if head is None:
            return
        if "\r" in head.rstrip("\r\n") and '"' not in head:
            raise csv.Error("lines end in CR alone, as on old Macs; save it with LF or CRLF")
        reader = csv.reader(chain([head], text), strict=True, delimiter=_separator(head))
        header = next(reader)
        twice = [column for column, count in Counter(header).items() if count > 1]
        if twice:
            yield BadRow(f"{name}:1", f"duplicate column {twice[0]!r} in the header", fatal=True)
            return
        begin = reader.line_num + 1
        for cells in reader:
            if cells:
                yield _csv_row(header, cells, f"{name}:{begin}")
            begin = reader.line_num + 1
    except csv.Error as error:
        yield BadRow(f"{name}:{begin}", f"not CSV from here on: {error}", fatal=True)


def _separator(head: str) -> str:
    """The separator that the header line has most of, quoted text left out."""
    plain = re.sub(r'"[^"]*"', "", head)
    return max(",;\t", key=plain.count)  # of equal ones the comma


def text_lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Lines with their ends; NUL as U+DC00 and bytes that are not UTF-8 as U+DC80..U+DCFF.

    This way a row with such a byte can be named.
    """
    encoding, blank = "utf-8", 0
    for number, line in lines(text_chunks(file, newlines="keep")):
        if line is None:
            raise csv.Error(f"a line is longer than {MAX_ROW >> 20} MiB")
        blank = 0 if line.strip() else blank + 1
        if blank > _MOST_BLANK:
            raise csv.Error(f"more than {_MOST_BLANK:,} blank lines in a row; remove them")
        if encoding == "utf-8" and number <= _LINES_TO_TELL_GBK and _is_gbk(line):
            console.say(f"{name}: read as GBK from line {number}; save it as UTF-8 to be sure")
            encoding = "gb18030"
        yield line.decode(encoding, errors="surrogateescape").replace("\0", "\udc00") + "\n"


def _is_gbk(line: bytes) -> bool:
    """Whether a line is no UTF-8 and every character of it is one of GB 2312's."""
    try:
        line.decode()
    except UnicodeDecodeError:
        try:
            return any(char >= "\u4e00" for char in line.decode("gb2312"))
        except UnicodeDecodeError:
            return False
    return False


def _csv_row(header: list[str], cells: list[str], location: str) -> Row | BadRow:
    if len(cells) != len(header):
        return BadRow(location, f"the row has {len(cells)} cells, the header has {len(header)}")
    joined = "".join(cells)
    try:
        joined.encode()
    except UnicodeEncodeError as error:
        byte = ord(joined[error.start]) - 0xDC00
        if not byte:
            return BadRow(location, "the text contains a NUL character")
        return BadRow(location, f"byte 0x{byte:02x} is not UTF-8; save the file as UTF-8")
    return Row(dict(zip(header, cells, strict=True)), location)
