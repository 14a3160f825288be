"""Files to rows: what is benign loads alike, what is not gets `file:line: reason`."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from row_files import BAD_ROWS, BENIGN, FATAL, GOOD, VALUE

from finetune.data.dialogue import strict_json
from finetune.data.reading import json_rows, streams
from finetune.data.reading.files import BadRow, Row, expand, read_rows
from finetune.errors import DataError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def values(path: Path) -> list[Any]:
    rows = list(read_rows(path))
    assert not [row for row in rows if isinstance(row, BadRow)]
    return [row.value for row in rows]


def lines_of(path: Path) -> list[int]:
    return [int(row.location.rpartition(":")[2]) for row in read_rows(path)]


@pytest.mark.parametrize("name", BENIGN)
def test_benign_spellings_of_a_file_give_the_same_rows(tmp_path: Path, name: str) -> None:
    assert values(write(tmp_path, name, BENIGN[name])) == [VALUE, VALUE]


@pytest.mark.parametrize(
    "text", ["a\u2028b", "a\u0085b", "a\u2029b", "a\x0cb", "a\x1eb", "😀", "\\n"]
)
def test_only_line_ends_split_lines(tmp_path: Path, text: str) -> None:
    raw = json.dumps({"t": text}, ensure_ascii=False)
    assert values(write(tmp_path, "a.jsonl", f"{raw}\n{raw}")) == [{"t": text}] * 2
    assert values(write(tmp_path, "a.json", f"[{raw},\n{raw}]")) == [{"t": text}] * 2


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_line_and_reason(tmp_path: Path, name: str) -> None:
    content, line, reason = BAD_ROWS[name]
    path = write(tmp_path, name, content)
    rows = list(read_rows(path))
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [row.location for row in bad] == [f"{path}:{line}"]
    assert reason in bad[0].reason
    assert not bad[0].fatal
    assert isinstance(rows[0], Row)


def test_of_two_byte_order_marks_the_second_is_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", f"\ufeff\ufeff{GOOD}\n{GOOD}\n")
    assert [isinstance(row, BadRow) for row in read_rows(path)] == [True, False]


def test_a_bad_row_hides_no_other(tmp_path: Path) -> None:
    bad = ['{"a": NaN}', "7", '{"a": 1, "a": 2}', '{"a": "\\ud800"}', '{"a": "\0"}', "{", GOOD * 2]
    mixed = [line for text in bad for line in (text, GOOD)]
    rows = list(read_rows(write(tmp_path, "a.jsonl", "\n".join([GOOD, *mixed]))))
    assert [isinstance(row, BadRow) for row in rows] == [False, *[True, False] * len(bad)]
    mixed = [line for text in bad[:4] for line in (text, GOOD)]
    rows = list(read_rows(write(tmp_path, "a.json", "[" + ",".join([GOOD, *mixed]) + "]")))
    assert [isinstance(row, BadRow) for row in rows] == [False, *[True, False] * 4]


@pytest.mark.parametrize("name", FATAL)
def test_where_a_file_cannot_be_read_on_the_last_row_says_so(tmp_path: Path, name: str) -> None:
    content, line, reason = FATAL[name]
    path = write(tmp_path, name, content)
    *_, last = read_rows(path)
    assert isinstance(last, BadRow)
    assert last.fatal
    assert (last.location, reason in last.reason) == (f"{path}:{line}", True), last


def test_a_row_of_20_mb_is_refused_without_holding_it(tmp_path: Path) -> None:
    huge = '{"a": "' + "x" * 20_000_000 + '"}'
    bad, good = read_rows(write(tmp_path, "a.jsonl", f"{huge}\n{GOOD}\n"))
    assert isinstance(bad, BadRow)
    assert bad.reason == "the row is longer than 8 MiB"
    assert good == Row(VALUE, f"{tmp_path}/a.jsonl:2")
    (only,) = read_rows(write(tmp_path, "a.json", f"[{huge}]"))
    assert isinstance(only, BadRow)
    assert (only.reason, only.fatal) == ("the row is longer than 8 MiB", True)


def test_rows_of_an_array_have_the_line_they_begin_on(tmp_path: Path) -> None:
    text = f"[\n{GOOD}, {GOOD},\n\n{json.dumps(VALUE, indent=1)},\n{GOOD}\n]\n"
    assert lines_of(write(tmp_path, "a.json", text)) == [2, 2, 4, 16]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_lines_are_counted_wherever_the_chunks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, newline: str
) -> None:
    monkeypatch.setattr(streams, "CHUNK", chunk)
    array = newline.join(["[", f"{GOOD},", "", GOOD, "]"])
    assert lines_of(write(tmp_path, "a.json", array)) == [2, 4]
    lines = newline.join([GOOD, "", GOOD, "x"])
    assert lines_of(write(tmp_path, "a.jsonl", lines)) == [1, 3, 4]


def test_rows_of_a_csv_have_the_line_they_begin_on(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'a,b\n1,"x\ny\nz"\n\n"2, 3","4 ""5"""\r\n')
    assert values(path) == [{"a": "1", "b": "x\ny\nz"}, {"a": "2, 3", "b": '4 "5"'}]
    assert lines_of(path) == [2, 6]


def test_parquet_gives_rows_without_the_nulls_that_fill_structs(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows = [
        {"messages": [{"role": "user", "content": "Q"}, call], "tools": '[{"name": "f"}]'},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    ]
    parquet.write_table(pa.Table.from_pylist(rows + rows * 299), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == rows * 300
    assert lines_of(tmp_path / "a.parquet") == list(range(1, 601))


class Planted:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("planted",))


@pytest.mark.parametrize("kind", ["arrow.py_extension_type", "arrow.json", "of.another"])
def test_a_parquet_type_of_others_is_read_as_what_it_lies_in_and_its_pickle_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    of_type = {"ARROW:extension:name": kind, "ARROW:extension:metadata": pickle.dumps(Planted())}
    field = pa.field("prompt", pa.string(), metadata=of_type)
    table = pa.table({"prompt": ['"a"']}, schema=pa.schema([field]))
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet"))
    assert not (tmp_path / "planted").exists()
    pickle.loads(of_type["ARROW:extension:metadata"])  # so would it be
    assert (tmp_path / "planted").exists()


def test_a_parquet_text_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    text = pa.array([b"good", b"\xff", b"good"]).cast(pa.string(), safe=False)
    parquet.write_table(pa.table({"prompt": text}), tmp_path / "a.parquet")
    rows = list(read_rows(tmp_path / "a.parquet"))
    assert [type(row) for row in rows] == [Row, BadRow, Row]
    assert rows[1] == BadRow(f"{tmp_path}/a.parquet:2", "a text column is not UTF-8")


FAR = {
    "a duration": pa.array([1, 2**62, 3], pa.duration("s")),
    "a date": pa.array([1, 2**61, 3], pa.timestamp("us")),
}


@pytest.mark.parametrize("what", FAR)
@pytest.mark.parametrize("arrow", [True, False])
def test_a_value_that_python_cannot_hold_is_one_bad_row(
    tmp_path: Path, what: str, arrow: bool
) -> None:
    table = pa.table({"prompt": ["a", "b", "c"], "when": FAR[what]})
    path = tmp_path / ("a.arrow" if arrow else "a.parquet")
    if arrow:
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    else:
        parquet.write_table(table, path)
    rows = list(read_rows(path))
    assert [type(row) for row in rows] == [Row, BadRow, Row]
    assert isinstance(rows[1], BadRow)
    assert "out of range" in rows[1].reason


def test_a_table_of_100_000_columns_costs_no_minutes(tmp_path: Path) -> None:
    names = ",".join(f"c{number}" for number in range(100_000))
    (tmp_path / "a.csv").write_text(f"{names}\n{'x,' * 99_999}x\n")
    begun = time.process_time()
    (row,) = read_rows(tmp_path / "a.csv")
    assert isinstance(row, Row)
    assert len(row.value) == 100_000
    assert time.process_time() - begun < 3


def test_a_table_with_the_line_ends_of_old_macs_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"prompt,response\ra,b\r")
    (row,) = read_rows(tmp_path / "a.csv")
    assert isinstance(row, BadRow)
    assert "CR alone" in row.reason


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\n é\u2028"), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(st.dictionaries(st.text("kl"), json_values, max_size=3), min_size=1, max_size=5),
    chunk=st.integers(1, 40),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_what_was_written_is_read_wherever_the_chunks_end(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[dict[str, Any]],
    chunk: int,
    ascii_only: bool,
    indent: int | None,
    newline: str,
) -> None:
    monkeypatch.setattr(streams, "CHUNK", chunk)
    texts = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    array = json.dumps(rows, ensure_ascii=ascii_only, indent=indent)
    expected = [json.loads(text) for text in texts]
    jsonl = write(tmp_path, "a.jsonl", newline.join(texts))
    whole = write(tmp_path, "a.json", array.replace("\n", newline))
    assert values(jsonl) == expected
    assert values(whole) == expected


def test_an_array_is_never_held_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CHUNK", 1000)
    longest = 0
    original = json_rows._Array._fill

    def watch(self: Any) -> bool:
        nonlocal longest
        longest = max(longest, len(self._text))
        return original(self)

    monkeypatch.setattr(json_rows._Array, "_fill", watch)
    path = write(tmp_path, "a.json", "[" + ",\n".join([GOOD] * 2000) + "]")
    assert len(values(path)) == 2000
    assert longest < 3000


def test_strict_json_reads_what_json_reads() -> None:
    text = '{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00 \\uD55C é"], "b": {"a": {}}}'
    assert strict_json.parse(f" {text}\n") == json.loads(text)
    assert strict_json.parse('{"{[": "' + "[{" * 200 + '"}') == {"{[": "[{" * 200}


# Paths


def test_a_folder_means_its_data_files_sorted(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.jsonl", "a.json.gz", "sub/c.parquet", "d.CSV", "README.md", ".hidden/x.jsonl", ".y.json"):  # fmt: skip
        (tmp_path / name).touch()
    names = [str(path.relative_to(tmp_path)) for path in expand(str(tmp_path))]
    assert names == ["a.json.gz", "b.jsonl", "d.CSV", "sub/c.parquet"]


def test_a_glob_means_the_files_that_match(tmp_path: Path) -> None:
    for name in ("a1.jsonl", "a2.jsonl", "b.jsonl", "odd[1].jsonl"):
        (tmp_path / name).touch()
    assert [p.name for p in expand(f"{tmp_path}/a*.jsonl")] == ["a1.jsonl", "a2.jsonl"]
    assert [p.name for p in expand(f"{tmp_path}/odd[1].jsonl")] == ["odd[1].jsonl"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "is not a path"),
        ("a\0b", "is not a path"),
        ("https://example.org/a.jsonl", "is a URL"),
        ("s3://bucket/a.jsonl", "is a URL"),
        ("missing.jsonl", "does not exist"),
        ("nowhere/a.jsonl", "does not exist"),
        ("*.jsonl", "no file matches"),
        ("x" * 300, "cannot be opened"),
        ("trian.jsonl", "did you mean train.json"),
        ("pipe", "neither a regular file nor a folder"),
        ("/dev/null", "neither a regular file nor a folder"),
        ("empty", "holds no"),
        ("loop", "is a link to nowhere"),
        ("linked", "is not a regular file"),
    ],
)
def test_a_path_that_means_no_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.json").touch()
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(DataError, match=reason):
        expand(path)


@pytest.mark.parametrize(
    "name", ["with space.jsonl", "中文.jsonl", "qu'o\"te.jsonl", "$(x);y.jsonl"]
)
def test_unusual_names_of_files_are_only_names(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, GOOD)
    assert expand(str(path)) == [path]
    assert values(path) == [VALUE]


@pytest.mark.parametrize(
    ("name", "separator"), [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")]
)
@pytest.mark.parametrize("encoding", ["utf-8", "gbk"])
def test_a_table_is_read_whatever_separates_its_cells(
    tmp_path: Path, name: str, separator: str, encoding: str
) -> None:
    text = f"prompt{separator}response\n长椅在哪里？{separator}在二楼, 左边; 那儿\n".replace(
        "在二楼, 左边; 那儿", '"在二楼, 左边; 那儿"'
    )
    (tmp_path / name).write_bytes(text.encode(encoding))
    (row,) = read_rows(tmp_path / name)
    assert isinstance(row, Row)
    assert row.value == {"prompt": "长椅在哪里？", "response": "在二楼, 左边; 那儿"}


def test_latin_letters_are_not_taken_for_gbk(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("prompt,response\nné à Lörrach,oui\n".encode("latin-1"))
    (row,) = read_rows(tmp_path / "a.csv")
    assert isinstance(row, BadRow)
    assert "is not UTF-8" in row.reason


@pytest.mark.parametrize("form", [pa.ipc.new_stream, pa.ipc.new_file])
def test_a_folder_that_datasets_saved_is_read(tmp_path: Path, form: Any) -> None:
    rows = [{"prompt": f"Q{number}", "response": "A", "system": None} for number in range(600)]
    batch = pa.RecordBatch.from_pylist(rows)
    with form(tmp_path / "data-00000-of-00001.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    (path,) = expand(str(tmp_path))
    read = [row.value for row in read_rows(path) if isinstance(row, Row)]
    assert read == [{"prompt": row["prompt"], "response": "A"} for row in rows]
