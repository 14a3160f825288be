"""Files as other frameworks and published data sets have them: none is read wrongly in silence."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from foreign_oddities import NOTED, REFUSED
from foreign_rows import DIALOGUES, ONE, READ, SINGLE, TOOL, Foreign, messages
from pyarrow import parquet

from finetune.data.chat.image import ImageSpec
from finetune.data.dialogue.conversation import Conversation
from finetune.data.preview.report import check
from finetune.data.reading.sources import Reading, SourceSpec, read_conversations

Row = dict[str, Any]


def as_turns(conversation: Conversation) -> list[tuple[str, ...]]:
    """What the dialogue says, calls with their function."""
    return [
        ("call", m.metadata, m.content) if m.metadata else (m.role, m.content)
        for m in conversation.messages
    ]


def read(path: Path, foreign: Foreign) -> Conversation:
    stream = read_conversations([SourceSpec(str(path))], Reading(rules=foreign.rules))
    (conversation,) = stream
    assert not stream.unread
    assert not stream.doubts
    return conversation


def write_lines(path: Path, row: Row) -> Path:
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("foreign", READ, ids=lambda foreign: foreign.name)
def test_a_file_is_read_as_it_is_meant(foreign: Foreign, tmp_path: Path) -> None:
    conversation = read(write_lines(tmp_path / "rows.jsonl", foreign.row), foreign)
    if foreign.image:  # GLM-4V's layout, which no line break between image and question comes into
        first, *others = conversation.messages
        text = "".join(ImageSpec(56, 4, 0).laid(first, first.content))
        conversation = replace(conversation, messages=(replace(first, content=text), *others))
    assert as_turns(conversation) == foreign.expected
    shown = [*conversation.images]
    assert shown == ([str(tmp_path / foreign.image)] if foreign.image else [])
    if any(turn[0] == "call" for turn in foreign.expected):
        assert [tool["function"]["name"] for tool in conversation.tools] == ["weather"]
    else:
        assert not conversation.tools
    if "TRL conversational" in foreign.name:
        replies = [m for m in conversation.messages if m.role == "assistant"]
        assert [m.train for m in replies] == [False] * (len(replies) - 1) + [None]


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_means_something_else_is_refused(name: str, tmp_path: Path) -> None:
    row, reason = REFUSED[name]
    report = check(str(write_lines(tmp_path / "rows.jsonl", row)))
    assert report.num_bad == 1
    assert reason in report.bad_rows[0].reason


@pytest.mark.parametrize("name", NOTED)
def test_a_file_of_which_something_is_not_read_is_noted(name: str, tmp_path: Path) -> None:
    row, note = NOTED[name]
    report = check(str(write_lines(tmp_path / "rows.jsonl", row)))
    assert report.num_bad == 0
    assert any(note in line for line in report.notes())


def table(row: Row, separator: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row), delimiter=separator)
    writer.writeheader()
    writer.writerow(row)
    return text.getvalue()


def containers(row: Row) -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """Other files that the same row lies in."""
    line = json.dumps(row, ensure_ascii=False)
    yield "a.json", lambda path: path.write_text(f"[\n {line}\n]", encoding="utf-8")
    yield "b.jsonl", lambda path: path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    yield "c.jsonl.gz", lambda path: path.write_bytes(gzip.compress(line.encode()))
    yield "d.txt", lambda path: path.write_text(line, encoding="utf-8")
    yield "e.parquet", lambda path: parquet.write_table(pa.Table.from_pylist([row]), path)

    def arrow(path: Path) -> None:
        rows = pa.Table.from_pylist([row])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as stream:
            stream.write_table(rows)

    yield "f.arrow", arrow


@pytest.mark.parametrize("name", DIALOGUES)
def test_the_same_rows_are_read_out_of_other_files(name: str, tmp_path: Path) -> None:
    turns = DIALOGUES[name]
    foreign = Foreign(name, {"messages": messages(turns), "id": "1"}, turns)
    for file, write in containers(foreign.row):
        write(tmp_path / file)
        assert as_turns(read(tmp_path / file, foreign)) == turns, file


@pytest.mark.parametrize(("file", "separator", "encoding"), [
    ("a.csv", ",", "utf-8"), ("b.csv", ";", "utf-8"), ("c.tsv", "\t", "utf-8"),
    ("d.csv", ",", "utf-8-sig"), ("e.csv", ",", "gb18030"),
])  # fmt: skip
@pytest.mark.parametrize("columns", [
    ("instruction", "output"), ("question", "answer"), ("prompt", "completion"),
    ("query", "response"),
])  # fmt: skip
def test_tables_are_read(
    file: str, separator: str, encoding: str, columns: tuple[str, str], tmp_path: Path
) -> None:
    for turns in SINGLE.values():
        # A character outside GBK's table of common ones says that a file is no GBK.
        said = [text.replace("😀", "") if encoding == "gb18030" else text for _, text in turns]
        row = dict(zip(columns, said, strict=True))
        (tmp_path / file).write_bytes(table(row, separator).encode(encoding))
        stream = read_conversations([SourceSpec(str(tmp_path / file))])
        assert [m.content for m in next(stream).messages] == said


def test_columns_of_a_table_may_hold_json(tmp_path: Path) -> None:
    row = {"messages": json.dumps(messages(ONE)), "tools": json.dumps([TOOL])}
    (tmp_path / "a.csv").write_text(table(row, ","), encoding="utf-8")
    (conversation,) = read_conversations([SourceSpec(str(tmp_path / "a.csv"))])
    assert as_turns(conversation) == ONE
    assert len(conversation.tools) == 1


PACKED = {
    "rows.xlsx": (b"PK\x03\x04\x14\0", "save the table as CSV"),
    "rows.jsonl.bz2": (b"BZh91AY&SY", "compressed with bzip2; decompress it"),
    "rows.jsonl.xz": (b"\xfd7zXZ\0\0", "compressed with xz; decompress it"),
    "rows.db": (b"SQLite format 3\0", "export the table as CSV or JSONL"),
}


@pytest.mark.parametrize("file", PACKED)
def test_a_file_of_another_kind_is_told_what_it_is(file: str, tmp_path: Path) -> None:
    head, said = PACKED[file]
    (tmp_path / file).write_bytes(head + b"x" * 64)
    report = check(str(tmp_path / file))
    assert report.num_bad == 1
    assert said in report.bad_rows[0].reason


def test_there_are_more_than_three_hundred_files() -> None:
    in_containers, tables = 6 * len(DIALOGUES), 2 * 5 * 4
    single = len(READ) + len(REFUSED) + len(NOTED)
    assert single + in_containers + tables + len(PACKED) == 354
    assert len({foreign.name for foreign in READ}) == len(READ)
