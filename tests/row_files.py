"""Data files: benign spellings of the same two rows, files with one bad row, files that cannot be read on."""

from __future__ import annotations

import gzip
import json
import os

import zstandard

GOOD = '{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}'
VALUE = json.loads(GOOD)

BENIGN = {
    "plain.jsonl": f"{GOOD}\n{GOOD}\n",
    "no_end.jsonl": f"{GOOD}\n{GOOD}",
    "crlf.jsonl": f"{GOOD}\r\n{GOOD}\r\n",
    "cr.jsonl": f"{GOOD}\r{GOOD}\r",
    "bom.jsonl": b"\xef\xbb\xbf" + f"{GOOD}\n{GOOD}\n".encode(),
    "blank_lines.jsonl": f"\n{GOOD}\n\n  \n{GOOD}\n\n",
    "spaces.jsonl": f"  {GOOD}  \n\t{GOOD}\t\n",
    "array.json": f"[{GOOD}, {GOOD}]",
    "pretty_array.json": json.dumps([VALUE, VALUE], indent=2),
    "array_bom_crlf.json": b"\xef\xbb\xbf[\r\n" + f"{GOOD},\r\n{GOOD}\r\n]\r\n".encode(),
    "array_in_jsonl_name.jsonl": f"[{GOOD},{GOOD}]",
    "lines_in_json_name.json": f"{GOOD}\n{GOOD}\n",
    "gzip.jsonl.gz": gzip.compress(f"{GOOD}\n{GOOD}\n".encode()),
    "gzip_members.jsonl.gz": gzip.compress(f"{GOOD}\n".encode()) * 2,
    "gzip_without_the_name.jsonl": gzip.compress(f"{GOOD}\n{GOOD}\n".encode()),
    "zstd.json.zst": zstandard.compress(f"[{GOOD},{GOOD}]".encode()),
    "zstd_frames.jsonl.zst": zstandard.compress(f"{GOOD}\n".encode()) * 2,
}

# name -> (content, line, part of the reason): a good row, then a bad one that is not fatal.
BAD_ROWS = {
    "not_utf8.jsonl": (f"{GOOD}\n".encode() + b'{"a": "\xff"}\n' + GOOD.encode(), 2, "byte 0xff at column 8 is not UTF-8"),
    "cut_character.jsonl": (f"{GOOD}\n".encode() + b'{"a": "\xe4\xbd"}\n', 2, "is not UTF-8"),
    "nul.jsonl": (f'{GOOD}\n{{"a": "\0"}}\n', 2, "control character"),
    "escaped_nul.jsonl": (f'{GOOD}\n{{"a": "\\u0000"}}\n', 2, "NUL"),
    "high_surrogate.jsonl": (f'{GOOD}\n{{"a": ["\\ud83d"]}}\n', 2, "half a surrogate pair, \\ud83d"),
    "low_surrogate.jsonl": (f'{GOOD}\n{{"a": {{"\\uDE00": 1}}}}\n', 2, "half a surrogate pair"),
    "duplicate_key.jsonl": (f'{GOOD}\n{{"a": {{"b": 1, "b": 2}}}}\n', 2, "duplicate key 'b'"),
    "nan.jsonl": (f'{GOOD}\n{{"a": NaN}}\n', 2, "NaN is not JSON"),
    "infinity.jsonl": (f'{GOOD}\n{{"a": -Infinity}}\n', 2, "-Infinity is not JSON"),
    "two_objects.jsonl": (f"{GOOD}\n{GOOD}{GOOD}\n", 2, "more text after the end of the JSON value"),
    "two_objects_apart.jsonl": (f"{GOOD}\n{GOOD} {GOOD}\n", 2, "more text after the end"),
    "trailing_comma.jsonl": (f'{GOOD}\n{{"a": 1,}}\n', 2, "not JSON"),
    "truncated.jsonl": (f"{GOOD}\n{GOOD[:50]}", 2, "cut off"),
    "truncated_in_text.jsonl": (f"{GOOD}\n{GOOD[:45]}", 2, "cut off"),
    "single_quotes.jsonl": (f"{GOOD}\n{{'a': 'b'}}\n", 2, "double quotes"),
    "bare_words.jsonl": (f"{GOOD}\nhello\n", 2, "not JSON"),
    "number.jsonl": (f"{GOOD}\n7\n", 2, "the row is a number, not an object"),
    "text.jsonl": (f'{GOOD}\n"x"\n', 2, "the row is text, not an object"),
    "null.jsonl": (f"{GOOD}\nnull\n", 2, "the row is null, not an object"),
    "list.jsonl": (f"{GOOD}\n[1]\n", 2, "the row is a list, not an object"),
    "deep.jsonl": (f'{GOOD}\n{{"a": {"[" * 5000}{"]" * 5000}}}\n', 2, "nested more than 100 deep"),
    "deep_enough.jsonl": (f'{GOOD}\n{{"a": {"[" * 101}{"]" * 101}}}\n', 2, "nested more than 100"),
    "deep_and_open.jsonl": (f'{GOOD}\n{"[" * 200_000}\n', 2, "nested more than 100 deep"),
    "digits.jsonl": (f'{GOOD}\n{{"a": {"1" * 5000}}}\n', 2, "not JSON that can be read"),
    "duplicate_key.json": (f'[{GOOD},\n{{"b": 1, "b": 2}}, {GOOD}]', 2, "duplicate key 'b'"),
    "nan.json": (f'[{GOOD},\n{{"b": NaN}}]', 2, "NaN is not JSON"),
    "not_utf8.json": (f"[{GOOD},\n".encode() + b'{"a":"\xff"}]', 2, "byte 0xff at column 7 is not UTF-8"),
    "surrogate.json": (f'[{GOOD},\n{{"a": "\\ud800"}}]', 2, "half a surrogate pair"),
    "number.json": (f"[{GOOD},\n12, {GOOD}]", 2, "the row is a number, not an object"),
    "deep_enough.json": (f'[{GOOD},\n{{"a": {"[" * 200}{"]" * 200}}}]', 2, "nested more than 100"),
    "too_few_cells.csv": ("a,b\n1,2\n3\n", 3, "the row has 1 cells, the header has 2"),
    "too_many_cells.csv": ("a,b\n1,2\n3,4,5\n", 3, "the row has 3 cells, the header has 2"),
    "not_utf8.csv": (b"a,b\n1,2\n\xff,4\n", 3, "byte 0xff is not UTF-8"),
    "nul.csv": ("a,b\n1,2\n\0,4\n", 3, "NUL"),
}  # fmt: skip

GZIPPED = gzip.compress(os.urandom(5000))
FATAL = {
    "empty.jsonl": ("", 1, "it holds no rows"),
    "blank.jsonl": ("\n \n\n", 1, "it holds no rows"),
    "bom_only.jsonl": (b"\xef\xbb\xbf", 1, "it holds no rows"),
    "empty.json": ("[]", 1, "it holds no rows"),
    "empty.csv": ("", 1, "it holds no rows"),
    "header_only.csv": ("a,b\n", 1, "it holds no rows"),
    "empty.jsonl.gz": (gzip.compress(b""), 1, "it holds no rows"),
    "utf16.jsonl": (GOOD.encode("utf-16"), 1, "UTF-16"),
    "utf16_without_bom.jsonl": (GOOD.encode("utf-16-le"), 1, "UTF-16"),
    "utf32.json": (f"[{GOOD}]".encode("utf-32"), 1, "UTF-32"),
    "utf16.csv": ("a,b\n1,2\n".encode("utf-16"), 1, "UTF-16"),
    "object_over_lines.json": (json.dumps(VALUE, indent=1), 1, "an object over several lines"),
    "cut_array.json": (f"[{GOOD},\n{GOOD[:40]}", 2, "cut off"),
    "open_array.json": (f"[{GOOD},\n{GOOD}", 2, "found the end of the file"),
    "missing_comma.json": (f"[{GOOD}\n{GOOD}]", 2, "expected ',' or ']'"),
    "trailing_comma.json": (f"[{GOOD},\n]", 2, "not JSON"),
    "after_array.json": (f"[{GOOD}]\nx", 2, "more text after the end of the array"),
    "two_arrays.json": (f"[{GOOD}]\n[{GOOD}]", 2, "more text after the end of the array"),
    "deep.json": (f"[{GOOD},\n{'[' * 200_000}]", 2, "nested more than 100 deep"),
    "cut.jsonl.gz": (gzip.compress(GOOD.encode() * 50)[:-10], 1, "gzip file is cut off"),
    "damaged.jsonl.gz": (GZIPPED[:100] + b"\0\1\2" * 50 + GZIPPED[250:], 1, "gzip file is damaged"),
    "cut.jsonl.zst": (zstandard.compress(GOOD.encode() * 50)[:-3], 1, "zstd file is cut off"),
    "damaged.jsonl.zst": (zstandard.compress(os.urandom(999))[:9] + b"\1" * 90, 1, "zstd file is"),
    "not_compressed.jsonl.gz": (GOOD, 1, "is not compressed that way"),
    "not_compressed.jsonl.zst": (GOOD, 1, "is not compressed that way"),
    "compressed.parquet.gz": (gzip.compress(b"PAR1"), 1, "a Parquet file inside .gz is not read"),
    "compressed.parquet.zst": (
        zstandard.compress(b"PAR1"),
        1,
        "a Parquet file inside .zst is not read",
    ),
    "compressed.arrow.gz": (gzip.compress(b"ARROW1"), 1, "an Arrow file inside .gz is not read"),
    "not_parquet.parquet": (GOOD, 1, "is not a Parquet file"),
    "damaged.parquet": (b"PAR1" + b"\1" * 50 + b"PAR1", 1, "Parquet file is damaged"),
    "open_quote.csv": ('a,b\n1,"2\n3,4\n', 2, "not CSV from here on"),
    "text_after_quote.csv": ('a,b\n1,2\n"3"x,4\n', 3, "not CSV from here on"),
    "column_twice.csv": ("a,a\n1,2\n", 1, "duplicate column 'a'"),
}
