"""Reading files, rule by rule: places in them, what is cut off, what is chosen of them."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from finetune.data.reading import json_rows, streams, tables, texts
from finetune.data.reading.files import BadRow, Row, read_rows

ROWS: list[dict[str, Any]] = [{"prompt": f"Q{n}", "response": "A"} for n in range(10)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


def arrow(path: Path, *, whole: bool) -> None:
    table = pa.Table.from_pylist(ROWS)
    form = pa.ipc.new_file if whole else pa.ipc.new_stream
    with form(str(path), table.schema) as writer:
        for batch in table.to_batches(max_chunksize=4):
            writer.write_batch(batch)


def csv_text() -> str:
    rows = "".join(f'{row["prompt"]},"A\n{n}"\n' for n, row in enumerate(ROWS))
    return f"prompt,response\n\n{rows}\n"


CONTAINERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_text("\n\n" + JSONL.replace("}\n", "}\n\n")),
    "bad.jsonl": lambda path: path.write_text(JSONL.replace(json.dumps(ROWS[3]), "{")),
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "a.csv": lambda path: path.write_text(csv_text()),
    "a.parquet": lambda path: parquet.write_table(
        pa.Table.from_pylist(ROWS), path, row_group_size=3
    ),
    "a.arrow": lambda path: arrow(path, whole=False),
    "b.arrow": lambda path: arrow(path, whole=True),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(JSONL.encode())),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(JSONL.encode())),
    "a.txt": lambda path: path.write_text("one\n\ntwo\n\nthree\n"),
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("at_once", [1, 2, 256])
def test_reading_on_behind_some_rows_gives_the_others_at_their_places(
    tmp_path: Path, name: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_ROWS_AT_ONCE", at_once)
    monkeypatch.setattr(texts, "_PIECE", 1)
    CONTAINERS[name](tmp_path / name)
    whole = list(read_rows(tmp_path / name))
    assert len(whole) == (3 if name == "a.txt" else 10)
    for skip in range(len(whole) + 1):
        assert list(read_rows(tmp_path / name, skip)) == whole[skip:]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def only_bad(path: Path) -> BadRow:
    bad = [row for row in read_rows(path) if isinstance(row, BadRow)]
    assert len(bad) == 1, bad
    return bad[0]


def test_what_an_empty_cell_of_a_table_says_is_kept_but_for_nulls(tmp_path: Path) -> None:
    row = {"a": "", "b": 0, "c": False, "d": [], "e": None, "f": {"g": None, "h": [{"i": None}]}}
    parquet.write_table(pa.Table.from_pylist([row, row | {"f": {"g": 1, "h": [{"i": 2}]}}]), tmp_path / "a.parquet")  # fmt: skip
    (first, _) = read_rows(tmp_path / "a.parquet")
    assert isinstance(first, Row)
    assert first.value == {"a": "", "b": 0, "c": False, "d": [], "f": {"h": [{}]}}


def test_a_damaged_table_is_named_behind_the_last_row_that_was_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    values = pa.table({"text": [f"row {n} of many" for n in range(6)]})
    parquet.write_table(values, path, row_group_size=3, write_page_checksum=True, compression="none", use_dictionary=False)  # fmt: skip
    content = bytearray(path.read_bytes())
    content[content.index(b"row 4")] ^= 1
    path.write_bytes(content)
    *good, last = read_rows(path)
    assert len(good) == 3
    assert isinstance(last, BadRow)
    assert (last.location, last.fatal) == (f"{path}:4", True)
    assert "the Parquet file is damaged: " in last.reason


def test_a_cell_of_a_table_may_be_as_long_as_any_row(tmp_path: Path) -> None:
    long = "x" * 200_000
    (row,) = read_rows(write(tmp_path, "a.csv", f"prompt,response\n{long},A\n"))
    assert isinstance(row, Row)
    assert row.value["prompt"] == long


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a,a\n1,2\n", 1, "duplicate column 'a'"),
        ("a,b\n1\n", 2, "the row has 1 cells, the header has 2"),
        ("a,b\n1,2,3\n", 2, "the row has 3 cells, the header has 2"),
        ('a,b\n1,"2"3\n', 2, "not CSV from here on"),
        ('a,b\n1,2\n3,"4\n', 3, "not CSV from here on"),
        ("a,b\n1,\0\n", 2, "the text contains a NUL character"),
        (b"a,b\n1,\xff\n", 2, "byte 0xff is not UTF-8"),
        ("a,b\n1,2\n\n\n\n\n3,4\n", 6, "more than 3 blank lines in a row"),
    ],
)
def test_what_is_wrong_with_a_table_is_named_by_its_line(
    tmp_path: Path, text: str | bytes, line: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_MOST_BLANK", 3)
    path = write(tmp_path, "a.csv", text)
    bad = only_bad(path)
    assert (bad.location, reason in bad.reason) == (f"{path}:{line}", True), bad


def test_blank_lines_are_counted_in_a_row_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_MOST_BLANK", 3)
    path = write(tmp_path, "a.csv", "a,b\n\n\n\n1,2\n\n\n\n3,4\n")
    assert len(list(read_rows(path))) == 2


@pytest.mark.parametrize(
    ("head", "separator"),
    [("a,b", ","), ("a;b,c;d", ";"), ("a\tb", "\t"), ("a", ","), ('"x;y;z;w",b,c', ","), ("a;b,c", ",")],
)  # fmt: skip
def test_the_separator_is_what_the_header_has_most_of_outside_of_quotes(
    head: str, separator: str
) -> None:
    assert tables._separator(head) == separator


def test_a_line_is_gbk_when_it_holds_a_common_character_of_it() -> None:
    assert tables._is_gbk("你好".encode("gb2312"))
    assert not tables._is_gbk("你好".encode())
    assert not tables._is_gbk("「…」".encode("gb2312"))  # signs alone may be anything
    assert not tables._is_gbk("你喆".encode("gbk"))  # one that GB 2312 has not
    assert not tables._is_gbk(b"\xff\xfe")


# --- compressed files and encodings --------------------------------------------------------------

FRAMES = zstandard.compress(JSONL[:100].encode()) + zstandard.compress(JSONL[100:].encode())
SKIPPED = b"\x5f\x2a\x4d\x18\x04\x00\x00\x00abcd"


@pytest.mark.parametrize("content", [FRAMES, SKIPPED + FRAMES, FRAMES + SKIPPED])
def test_all_frames_of_a_zstd_file_are_read(tmp_path: Path, content: bytes) -> None:
    assert len(list(read_rows(write(tmp_path, "a.jsonl.zst", content)))) == 10


BROKEN = [
    ("a.jsonl.zst", FRAMES[:-3], "the zstd file is cut off"),
    ("a.jsonl.zst", FRAMES[:40] + b"\0" * 40, "the zstd file is damaged"),
    ("a.jsonl.gz", gzip.compress(os.urandom(4000))[:-30], "the gzip file is cut off"),
    ("a.jsonl.gz", gzip.compress(JSONL.encode())[:10] + b"\xff" * 60, "the gzip file is damaged"),
    ("a.jsonl.gz", gzip.compress(JSONL.encode())[:-8] + b"\0" * 8, "the gzip file is damaged"),
    ("a.jsonl.gz", b"plain text", "named .gz but is not compressed that way"),
    ("a.jsonl.zst", b"plain text", "named .zst but is not compressed that way"),
    ("a.parquet", b"plain text", "named .parquet but is not a Parquet file"),
    ("a.parquet.gz", b"plain text", "a Parquet file inside .gz is not read"),
    ("a.arrow.zst", b"plain text", "an Arrow file inside .zst is not read"),
    ("a.jsonl", JSONL.encode("utf-16-le"), "UTF-16 or UTF-32"),
    ("a.jsonl", b"\xfe\xff" + JSONL.encode("utf-16-be"), "UTF-16 or UTF-32"),
    ("a.jsonl", JSONL.encode("utf-16"), "UTF-16 or UTF-32"),
    ("a.jsonl", JSONL.encode("utf-32"), "UTF-16 or UTF-32"),
    ("a.jsonl", JSONL.encode("utf-32-be"), "UTF-16 or UTF-32"),
    ("a.jsonl", b"", "the file is empty"),
]


@pytest.mark.parametrize(
    ("name", "content", "reason"), BROKEN, ids=[f"{one[0]} {n}" for n, one in enumerate(BROKEN)]
)
def test_a_file_that_is_cut_off_or_damaged_never_looks_like_a_shorter_one(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    *_, last = read_rows(write(tmp_path, name, content))
    assert isinstance(last, BadRow)
    assert last.fatal
    assert reason in last.reason


def test_a_line_is_too_long_only_above_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_ROW", 20)
    for read in (streams.lines, streams.lines_with_text):
        for chunk in (7, 11, 22, 100):
            for length, taken in ((20, True), (21, False), (50, False)):
                text = b"a\n" + b"x" * length + b"\n\nb"
                pieces = [text[i : i + chunk] for i in range(0, len(text), chunk)]
                found = [(number, line) for number, line in read(pieces) if line != b""]
                middle = b"x" * length if taken else None
                assert found == [(1, b"a"), (2, middle), (4, b"b")], (read, chunk, length)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("one\n\ntwo\n\nthree", [(1, "one"), (3, "two"), (5, "three")]),
        ("a\nb\n", [(1, "a\nb")]),
        ("\n\nlong\nlonger\nrest", [(3, "long\nlonger"), (5, "rest")]),
    ],
)
def test_pieces_of_a_text_have_the_line_they_begin_on(
    tmp_path: Path, text: str, rows: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_PIECE", 4)
    path = write(tmp_path, "a.txt", text)
    found = [Row({"text": said}, f"{path}:{line}") for line, said in rows]
    assert list(read_rows(path)) == found


def test_a_byte_of_a_text_that_is_not_utf8_is_named_by_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_PIECE", 3)
    bad = only_bad(write(tmp_path, "a.txt", b"one\n\ntwo\nx\xff\n"))
    assert "line 4: byte 0xff is not UTF-8" in bad.reason


# --- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", range(1, 14))
def test_words_and_numbers_of_an_array_are_whole_wherever_the_chunks_end(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "CHUNK", chunk)
    text = '\t[\r\n\t{"a": [false, true, null, -12.5e-3, "\\ud83d\\ude00é", {}, []]\t}\t,\r\n \t{"b": 1}\t]\t\r\n'
    path = write(tmp_path, "a.json", text)
    assert list(read_rows(path)) == [
        Row({"a": [False, True, None, -0.0125, "😀é", {}, []]}, f"{path}:2"),
        Row({"b": 1}, f"{path}:3"),
    ]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('[\n{"a": 1,\n"b": 2,\n"c": x}]', 4, "not JSON at column 6"),
        ('[\n{"a": 1},\n\n{"a": 1,\n"b"', 5, "the JSON is cut off"),
        ('[{"a":\n1}\n{"a": 1}]', 3, "expected ',' or ']' after this element, found '{'"),
        ('[{"a": 1},\n{"a": ' + "1" * 5000 + "}]", 2, "not JSON that can be read"),
        ("[1]\n\n\n]", 4, "more text after the end of the array"),
    ],
)
def test_what_ends_an_array_is_named_by_the_line_it_stands_on(
    tmp_path: Path, text: str, line: int, reason: str
) -> None:
    path = write(tmp_path, "a.json", text)
    *_, last = read_rows(path)
    assert isinstance(last, BadRow)
    assert (last.location, last.fatal) == (f"{path}:{line}", True)
    assert last.reason.startswith(reason)


def test_an_element_of_an_array_is_too_long_only_above_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "CHUNK", 16)
    monkeypatch.setattr(json_rows, "MAX_ROW", 64)
    for length, taken in ((40, True), (120, False)):
        rows = list(read_rows(write(tmp_path, "a.json", f'[{{"a": "{"x" * length}"}}, {{}}]')))
        assert [isinstance(row, Row) for row in rows] == ([True, True] if taken else [False])


# --- tables and texts ----------------------------------------------------------------------------


def test_a_damaged_arrow_file_says_so(tmp_path: Path) -> None:
    bad = only_bad(write(tmp_path, "a.arrow", b"ARROW1" + b"\1" * 90))
    assert (bad.location, bad.fatal) == (f"{tmp_path}/a.arrow:1", True)
    assert bad.reason.startswith("the Arrow file is damaged: ")


def test_a_batch_that_is_damaged_is_not_read_row_by_row() -> None:
    class Batch:
        num_rows = 1

        def __init__(self, error: Exception) -> None:
            self.error = error

        def to_pylist(self) -> list[Any]:
            raise self.error

        def slice(self, start: int, length: int) -> Batch:
            return self

    with pytest.raises(pa.ArrowInvalid):
        list(tables._values(Batch(pa.ArrowInvalid("damaged"))))
    assert list(tables._values(Batch(OverflowError("far")))) == [
        "a column holds what is out of range: far"
    ]


def test_a_line_of_a_table_or_text_that_is_too_long_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_ROW", 20)
    for name, line in (("a.csv", 3), ("a.txt", 1)):
        path = write(tmp_path, name, "a,b\n1,2\n" + "x" * 21 + ",3\n")
        bad = only_bad(path)
        assert (bad.location, bad.fatal) == (f"{path}:{line}", True)
        assert "a line is longer than 8 MiB" in bad.reason


def test_gbk_is_told_by_the_first_lines_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(tables.console, "say", told.append)
    monkeypatch.setattr(tables, "_LINES_TO_TELL_GBK", 2)
    rows = "a,b\n长椅,二楼\n好的,在吗\n".encode("gbk")
    path = write(tmp_path, "a.csv", rows)
    assert [row[0] for row in read_rows(path)] == [
        {"a": "长椅", "b": "二楼"},
        {"a": "好的", "b": "在吗"},
    ]
    rare = write(tmp_path, "r.csv", "a,b\n长椅,二楼\n朱镕,喆\n".encode("gbk"))
    assert [row[0]["a"] for row in read_rows(rare)] == ["长椅", "朱镕"]  # type: ignore[index, call-overload]
    assert told.pop().startswith(f"{rare}: read as GBK from line 2")
    assert told == [f"{path}: read as GBK from line 2; save it as UTF-8 to be sure"]
    assert "is not UTF-8" in only_bad(write(tmp_path, "b.csv", b"a,b\n1,2\n" + rows[-10:])).reason
    assert len(told) == 1


def test_a_carriage_return_in_quotes_is_part_of_its_cell(tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path, "a.csv", b'a,"b\rc"\n1,"2\r\n3"\n'))
    assert row[0] == {"a": "1", "b\rc": "2\r\n3"}


@pytest.mark.parametrize(
    ("text", "is_rows"),
    [
        ('{"a": "b"}', True), ('\ufeff { "a": "b"}', True), ('[{"a": "b"}]', True), (' [ {"a": "b"} ]', True),
        ("{a}", False), ('["a"]', False), ("[1] {", False), ('so: {"a": "b"}', False),
    ],
)  # fmt: skip
def test_a_text_that_begins_like_rows_is_rows(tmp_path: Path, text: str, is_rows: bool) -> None:
    (row,) = read_rows(write(tmp_path, "a.txt", text))
    assert row[0] == ({"a": "b"} if is_rows else {"text": text})


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("ab\n\ncd", ["ab\n\ncd"]),  # an empty line below the size begins nothing
        ("abcde\nf\ng", ["abcde\nf\ng"]),  # nor does a line below twice the size
        ("abcdefghi\nj\nk", ["abcdefghi", "j\nk"]),
        ("abcd\n\n\nx", ["abcd", "x"]),
    ],
)
def test_a_text_is_divided_at_empty_lines_and_where_it_is_twice_as_long_at_any(
    tmp_path: Path, text: str, rows: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_PIECE", 5)
    assert [row[0] for row in read_rows(write(tmp_path, "a.txt", text))] == [
        {"text": said} for said in rows
    ]
