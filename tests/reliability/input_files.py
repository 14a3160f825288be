"""Data files: benign ones train the same tokens, the others are refused row by row before torch."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet
from row_files import BAD_ROWS, BENIGN, FATAL, GOOD, VALUE
from row_parts import REASONS, REPLY, USER

from tests.reliability.frame import Case
from tests.reliability.places import light, shared, tokenizer_folder, write_config

# What a text may hold and stay a text: characters that other readers take for the end of a line.
INNER = {
    "line separator": "a\u2028b",
    "paragraph separator": "a\u2029b",
    "next line": "a\u0085b",
    "form feed": "a\x0cb",
    "record separator": "a\x1eb",
    "byte order mark": "a\ufeffb",
    "zero width": "a\u200bb",
    "astral": "😀👩‍💻",
    "right to left": "مرحبا \u202e",
}


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(table, sink)
    return sink.getvalue()


def _messages(*items: Any) -> str:
    return json.dumps({"messages": list(items)}, ensure_ascii=False)


@cache
def _tables() -> tuple[dict[str, bytes | str], dict[str, tuple[bytes | str, str]]]:
    """Tables: benign ones, and others with what is said of them behind the file's name."""
    question, reply = "Q", "A"
    rows = [VALUE, VALUE]
    broken = pa.array([b"Q", b"\xff"]).cast(pa.string(), safe=False)
    benign: dict[str, bytes | str] = {
        "messages.parquet": _parquet(pa.Table.from_pylist(rows)),
        "pairs.parquet": _parquet(pa.table({"prompt": [question] * 2, "response": [reply] * 2})),
        "pairs.csv": "prompt,response\nQ,A\nQ,A\n",
        "crlf.csv": "prompt,response\r\nQ,A\r\nQ,A\r\n",
        "bom.csv": b"\xef\xbb\xbfprompt,response\nQ,A\nQ,A\n",
        "quoted.csv": '"prompt","response"\n"Q","A"\n"Q","A"\n',
        "pairs.jsonl": '{"content": "Q", "summary": "A"}\n' * 2,
        "openai.jsonl": _messages(USER, {**REPLY, "content": [{"type": "text", "text": "A"}]}) + "\n" + GOOD,
        "sharegpt.json": json.dumps([{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}] * 2),
        "alpaca.json": json.dumps([{"instruction": "Q", "input": "", "output": "A"}] * 2),
        "null_fields.jsonl": '{"prompt": "Q", "response": "A", "system": null, "history": null, "tools": null}\n' * 2,
    }  # fmt: skip
    bad: dict[str, tuple[bytes | str, str]] = {
        "not_utf8.parquet": (_parquet(pa.table({"prompt": broken, "response": ["A", "A"]})), ":2: a text column is not UTF-8"),
        "null_cell.parquet": (_parquet(pa.table({"prompt": ["Q", "Q"], "response": ["A", None]})), ":2: the row has no pair of columns prompt/response"),
        "number_cell.parquet": (_parquet(pa.table({"prompt": ["Q"], "response": [3]})), ":1: response: is a number, not text"),
        "no_rows.parquet": (_parquet(pa.table({"prompt": pa.array([], pa.string())})), ":1: the file is empty"),
        "other_columns.parquet": (_parquet(pa.table({"x": ["Q"]})), ":1: the layout is not known by its columns ('x')"),
        "cut.parquet": (_parquet(pa.table({"prompt": ["Q"]}))[:-20], ":1: the Parquet file is damaged"),
        "other_columns.csv": ("x,y\nQ,A\n", ":1: the layout is not known by its columns ('x', 'y')"),
        "empty_cell.csv": ("prompt,response\nQ,A\nQ,\n", ":3: response: is empty; no reply to train"),
        "messages_cell.csv": ('messages\n"[{""role"": ""user""}]"\n', ":2: message 1: content is null, not text"),
        "semicolons.csv": ("prompt;response\nQ;A\n", ":1: the layout is not known by its columns"),
        "20_mb_line.jsonl": (GOOD + '\n{"messages": "' + "x" * 20_000_000 + '"}\n', ":2: the row is longer than 8 MiB"),
        "20_mb_element.json": (f'[{GOOD},\n"' + "x" * 20_000_000 + '"]', ":2: the row is longer than 8 MiB"),
        "20_mb_cell.csv": ("prompt,response\nQ,A\nQ," + "x" * 20_000_000 + "\n", ":3: not CSV from here on"),
        "prose.jsonl": ("It was a dark night.\n", ":1: not JSON at column 1"),
        "binary.jsonl": (bytes(range(256)), ":1: the file is UTF-16 or UTF-32"),
        "html.json": ("<html><body>404</body></html>", ":1: not JSON at column 1"),
        "python.jsonl": (str(VALUE), ":1: not JSON at column 2: text stands in double quotes"),
        "only_masked.jsonl": (_messages(USER, {**REPLY, "train": False}), ":1: nothing to learn"),
        "list_as_row.json": (f"[[{GOOD}]]", ":1: the row is a list, not an object"),
        "messages_null.jsonl": (f'{GOOD}\n{{"messages": null}}', ":2: messages: is null, not a list"),
        "messages_text.jsonl": (f'{GOOD}\n{{"messages": "Q"}}', ":2: not JSON at column 1"),
        "messages_object.jsonl": (f'{GOOD}\n{{"messages": {{"role": "user"}}}}', ":2: messages: is an object"),
    }  # fmt: skip
    return benign, bad


def _tokens(folder: Path, name: str, content: str | bytes) -> list[dict[str, Any]]:
    """What training would see of a file: ids and trained spans of each row."""
    path = _write(folder, name, content)
    seen = light().run("data", "tokens", path, "--model", tokenizer_folder(), cwd=folder)
    assert seen.code == 0, seen.err
    seen.cheap()
    rows = [json.loads(line) for line in seen.out.splitlines()]
    return [{key: row[key] for key in ("input_ids", "trained_spans")} for row in rows]


def _write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@cache
def _plain() -> list[dict[str, Any]]:
    rows = _tokens(shared(""), "plain.jsonl", f"{GOOD}\n{GOOD}\n")
    assert len(rows) == 2
    assert rows[0]["trained_spans"]
    return rows


def loads_as_plain(name: str, content: str | bytes, folder: Path) -> None:
    """Another spelling of the same rows gives the same tokens."""
    assert _tokens(folder, name, content) == _plain()


def keeps_inner(text: str, folder: Path) -> None:
    """A character inside a text splits no row, escaped or not, in JSONL, an array and CSV."""
    row = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    raw = json.dumps({"messages": row}, ensure_ascii=False)
    escaped = _tokens(folder, "a.jsonl", json.dumps({"messages": row}) + "\n")
    assert len(escaped) == 1
    assert _tokens(folder, "b.jsonl", raw) == escaped
    assert _tokens(folder, "c.json", f"[{raw}]") == escaped
    assert _tokens(folder, "d.csv", f'prompt,response\n"{text}","{text}"\n') == escaped


def is_refused(name: str, content: str | bytes, said: tuple[str, ...], folder: Path) -> None:
    """`finetune train` ends with 2 and names the file, the line and the reason; nothing is left."""
    path = _write(folder, name, content)
    write_config(folder, name)
    outcome = light().run("train", "x.yaml", cwd=folder)
    outcome.refused(name, *said)
    assert re.search(rf"{re.escape(name)}:\d+: ", outcome.err), outcome.err
    left = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert left <= {path.name, "x.yaml", "run/.lock"}, left


def names_every_bad_row(folder: Path) -> None:
    """Fifty bad rows among good ones: thirty are listed with their lines, the rest are counted."""
    bad = ['{"a": NaN}', "7", '{"messages": []}', '{"a": 1, "a": 2}', "{"]
    lines = [line for number in range(50) for line in (GOOD, bad[number % len(bad)])]
    listed = [f"many.jsonl:{2 * number + 2}: " for number in range(30)]
    said = ("50 of 100 rows", *listed, "and 20 more")
    is_refused("many.jsonl", "\n".join(lines), said, folder)


def names_rows_of_every_file(folder: Path) -> None:
    """Two training files: what is wrong with both comes at once."""
    _write(folder, "a.jsonl", f"{GOOD}\n7\n")
    _write(folder, "b.jsonl", f"7\n{GOOD}\n")
    write_config(folder, "unused", data__train=["a.jsonl", "b.jsonl"])
    light().run("train", "x.yaml", cwd=folder).refused("a.jsonl:2: ", "b.jsonl:1: ")


def cases() -> Iterator[Case]:
    """Every file and every row."""
    tokenizer_folder()
    _plain()
    benign, bad = _tables()
    for name, content in {**BENIGN, **benign}.items():
        yield Case(f"files: benign {name}", partial(loads_as_plain, name, content))
    for name, text in INNER.items():
        yield Case(f"files: benign text with {name}", partial(keeps_inner, text))
    for name, (content, line, reason) in {**BAD_ROWS, **FATAL}.items():
        said = (f"{name}:{line}: ", reason)
        yield Case(f"files: {name}", partial(is_refused, name, content, said))
    for name, (content, reason) in bad.items():
        yield Case(f"files: {name}", partial(is_refused, name, content, (f"{name}{reason}",)))
    yield Case("files: fifty bad rows at once", names_every_bad_row)
    yield Case("files: bad rows of two files at once", names_rows_of_every_file)
    for number, (items, reason) in enumerate(REASONS, 1):
        if row := _as_line(items):
            run = partial(is_refused, "r.jsonl", row, (f"r.jsonl:1: {reason}",))
            yield Case(f"rows: {number}, {reason}", run)


def _as_line(items: list[Any]) -> str | None:
    """The row as JSON; None for what JSON cannot say or BAD_ROWS has (NUL, surrogates, infinity)."""
    row = _messages(*items)
    unclean = any(0xD800 <= ord(char) < 0xE000 for char in row)
    return None if unclean or "Infinity" in row or "\\u0000" in row else row
