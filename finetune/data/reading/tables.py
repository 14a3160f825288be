"""Parquet and CSV -> rows."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from finetune.data.reading.rows import BadRow, Row
from finetune.data.reading.streams import MAX_ROW, lines, text_chunks

_ROWS_AT_ONCE = 256


def read_parquet(path: Path) -> Iterator[Row | BadRow]:
    """Rows of a Parquet file, numbered from 1.

    A column of structs holds a null for every field that a row does not have; those are left out.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as reader:
            for batch in reader.iter_batches(batch_size=_ROWS_AT_ONCE):
                for value in _values(batch):
                    number += 1
                    where = f"{path}:{number}"
                    if value is None:
                        yield BadRow(where, "a text column is not UTF-8")
                    else:
                        yield Row(_without_nulls(value), where)
    except (pyarrow.ArrowException, OSError) as error:
        reason = f"the Parquet file is damaged: {str(error).splitlines()[0]}"
        yield BadRow(f"{path}:{number + 1}", reason, fatal=True)


def _values(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a record batch; None for one whose text is not UTF-8."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass  # to_pylist gave nothing yet: again, row by row
    for index in range(batch.num_rows):
        try:
            value = batch.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError:
            value = None
        yield value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def read_csv(file: BinaryIO, name: str) -> Iterator[Row | BadRow]:
    """Rows of a CSV file with a header line, each by the line that it begins on."""
    csv.field_size_limit(MAX_ROW)
    reader = csv.reader(_text_lines(file), strict=True)
    begin = 1
    try:
        header = next(reader, None)
        if header is None:
            return
        twice = [column for column in header if header.count(column) > 1]
        if twice:
            yield BadRow(f"{name}:1", f"column {twice[0]!r} stands twice in the header", fatal=True)
            return
        begin = reader.line_num + 1
        for cells in reader:
            if cells:
                yield _csv_row(header, cells, f"{name}:{begin}")
            begin = reader.line_num + 1
    except csv.Error as error:
        yield BadRow(f"{name}:{begin}", f"not CSV from here on: {error}", fatal=True)


def _text_lines(file: BinaryIO) -> Iterator[str]:
    """Lines with their ends; NUL as U+DC00 and bytes that are not UTF-8 as U+DC80..U+DCFF.

    Python before 3.11 takes no NUL in CSV; this way the row can be named.
    """
    for _, line in lines(text_chunks(file, newlines="keep")):
        if line is None:
            raise csv.Error(f"a line is longer than {MAX_ROW >> 20} MiB")
        yield line.decode(errors="surrogateescape").replace("\0", "\udc00") + "\n"


def _csv_row(header: list[str], cells: list[str], where: str) -> Row | BadRow:
    if len(cells) != len(header):
        return BadRow(where, f"the row has {len(cells)} cells, the header has {len(header)}")
    joined = "".join(cells)
    try:
        joined.encode()
    except UnicodeEncodeError as error:
        byte = ord(joined[error.start]) - 0xDC00
        if not byte:
            return BadRow(where, "the text contains a NUL character")
        return BadRow(where, f"byte 0x{byte:02x} is not UTF-8; save the file as UTF-8")
    return Row(dict(zip(header, cells, strict=True)), where)
