"""What a path means: which files of a folder or a hub hold rows, and what is said where none do."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
from hints import said

from finetune import console
from finetune.artifacts import hub
from finetune.data.reading import streams
from finetune.data.reading.files import BadRow, Row, expand, read_rows

TABLES = ("jsonl", "json", "ndjson", "parquet", "csv", "tsv", "arrow")
PACKED = ("", ".gz", ".zst")


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("ending", TABLES)
def test_every_kind_of_data_file_is_found_in_a_folder_beside_notes(
    tmp_path: Path, ending: str, packed: str
) -> None:
    for name in (f"rows.{ending}{packed}", "notes.txt", "rows.py", "rows.safetensors", f"{ending}"):
        (tmp_path / name).touch()
    assert expand(str(tmp_path)) == [tmp_path / f"rows.{ending}{packed}"]


@pytest.mark.parametrize(
    "name", ["A.TXT", *(f"a.{end}{more}" for end in ("txt", "md") for more in PACKED)]
)
def test_texts_are_the_data_of_a_folder_without_other_data(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    (tmp_path / "a.py").touch()
    assert expand(str(tmp_path)) == [tmp_path / name]


@pytest.mark.parametrize(
    "name",
    ["dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "cache.json"],
)
def test_records_of_other_libraries_are_no_data(tmp_path: Path, name: str) -> None:
    for file in (name, "inner/rows.json", f"inner/{name}", "state.jsonl"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    assert [p.name for p in expand(str(tmp_path))] == ["rows.json", "state.jsonl"]


@pytest.mark.parametrize(
    "split", ["test", "dev", "valid", "validation", "val", "eval", "held_out", "TEST"]
)
@pytest.mark.parametrize("form", ["{}.jsonl", "{}-0.jsonl", "x_{}_y.jsonl", "{}/a.jsonl"])
def test_every_name_of_a_split_beside_the_training_data_is_told(
    tmp_path: Path, split: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(console, "warn_once", told.append)
    for name in (form.format(split), "train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expand(str(tmp_path))
    assert [f"({', '.join(sorted((split.lower(), 'train')))})" in text for text in told] == [True]
    told.clear()
    expand(str(tmp_path / "train.jsonl"))
    assert not told


@pytest.mark.parametrize(
    "key",
    ["file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"],
)
def test_a_register_of_data_sets_is_known_by_any_of_its_keys(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.json").touch()
    register = tmp_path / "dataset_info.json"
    register.write_text(json.dumps({"mine": {key: "x.json"}}))
    shown = "mine (x.json)" if key == "file_name" else "mine"
    assert f"its dataset_info.json names {shown}; name the files" in said(expand, str(tmp_path))
    many = {f"set{n}": {key: "x"} for n in range(7)} | {"other": {"features": 1}}
    register.write_text(json.dumps(many))
    text = said(expand, str(tmp_path))
    assert " and 2 more; name the files" in text
    assert ("set4" in text, "set5" in text, "other" in text) == (True, False, False)
    register.write_text(json.dumps({f"set{n}": {key: "x"} for n in range(5)}))
    assert " more; name" not in said(expand, str(tmp_path))
    for of_datasets in ({"features": {"dtype": "x"}, "splits": 3}, ["a"], "text"):
        register.write_text(json.dumps(of_datasets))
        assert expand(str(tmp_path)) == [tmp_path / "a.json"]


def test_a_pattern_reaches_into_all_folders_below(tmp_path: Path) -> None:
    for name in ("a.jsonl", "x/b.jsonl", "x/y/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in expand(f"{tmp_path}/**/*.jsonl")] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert [p.name for p in expand(f"{tmp_path}/x/*.jsonl")] == ["b.jsonl"]


MISSING = {
    "trian.jsonl": "; did you mean train.jsonl?; correct the path",
    "data/trian.jsonl": "; did you mean data/train.jsonl?; correct the path",
    "{here}/data/trian.jsonl": "; did you mean {here}/data/train.jsonl?; correct the path",
    "other": " (seen from {here}); correct the path",
    "{here}/other": "; correct the path",
    "no/where.jsonl": " (seen from {here}); correct the path",
    "some/rows-1.x": " (seen from {here}); correct the path",
    "some.one/rows": " (seen from {here}); a data set of a hub is named hf://some.one/rows or ms://some.one/rows",
    "a/b/c": " (seen from {here}); correct the path",
}


@pytest.mark.parametrize("path", MISSING)
def test_a_path_that_is_not_there_is_told_what_is_near(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "data/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    path, expected = (text.format(here=tmp_path) for text in (path, MISSING[path]))
    assert said(expand, path) == f"{path} does not exist{expected}"
    assert said(expand, "*.csv") == (
        f"no file matches *.csv (seen from {tmp_path}); correct the pattern"
    )


def test_of_a_hub_data_and_images_are_fetched_and_never_code_or_a_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fetched(*given: Any) -> Path:
        asked.append(given)
        return tmp_path

    monkeypatch.setattr(hub, "fetch", fetched)
    (tmp_path / "a.jsonl").touch()
    assert expand("hf://owner/name") == [tmp_path / "a.jsonl"]
    ((address, content, patterns),) = asked
    assert (address, content) == ("hf://owner/name", "dataset")
    wanted = [f"x.{end}{more}" for end in (*TABLES, "txt", "md") for more in PACKED]
    wanted += [f"x.{end}" for end in ("png", "jpg", "jpeg", "webp")]
    refused = ["x.py", "x.pkl", "x.pt", "x.bin", "x.safetensors", "x.sh", "x"]
    taken = [
        name
        for name in (*wanted, *refused)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    assert taken == wanted
    # What an address names is fetched alone.
    (tmp_path / "b.jsonl").mkdir()
    assert expand("ms://owner/name/*.jsonl") == [tmp_path / "a.jsonl"]
    assert asked[-1] == ("ms://owner/name/*.jsonl", "dataset", ["*.jsonl"])
    assert said(expand, "hf://owner/name/c.jsonl") == (
        "hf://owner/name/c.jsonl: the data set has no file c.jsonl; correct the name"
    )


def test_a_file_that_cannot_be_opened_is_a_bad_row_with_the_reason(tmp_path: Path) -> None:
    assert list(read_rows(tmp_path)) == [
        BadRow(f"{tmp_path}:1", "the file cannot be read: Is a directory", fatal=True)
    ]


def test_where_a_file_breaks_off_the_last_row_that_was_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip
    import random

    monkeypatch.setattr(streams, "CHUNK", 64)
    draw = random.Random(0)
    rows = [{"prompt": f"{draw.getrandbits(4000):x}"} for _ in range(20)]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    *good, last = read_rows(tmp_path / "a.jsonl.gz")
    assert 5 < len(good) < 15
    assert (last.location, last.fatal) == (good[-1].location, True)  # type: ignore[union-attr]


def test_a_folder_without_data_is_told_what_data_is(tmp_path: Path) -> None:
    (tmp_path / "a.py").touch()
    listed = ", ".join(f".{name}" for name in TABLES)
    assert said(expand, str(tmp_path)) == (
        f"folder {tmp_path} holds no {listed} file, and no .txt or .md (.gz, .zst allowed); name the files that are meant"
    )


# --- what the first bytes and the name say -------------------------------------------------------

CELLS = b"prompt,response\nQ,A\n"
EXPECTED = Row({"prompt": "Q", "response": "A"}, "")


def parquet_bytes(folder: Path) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist([EXPECTED.value]), folder / "made")
    return (folder / "made").read_bytes()


@pytest.mark.parametrize("name", ["a.jsonl", "a", "a.csv", "A.PARQUET", "a.txt"])
def test_parquet_is_known_by_its_first_bytes_whatever_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(parquet_bytes(tmp_path))
    (row,) = read_rows(tmp_path / name)
    assert row[0] == EXPECTED.value


@pytest.mark.parametrize("name", ["a.csv", "A.CSV", "a.tsv", "a.csv.gz", "a.Csv.Gz", "a.csv.zst"])
def test_a_table_of_text_is_known_by_its_name(tmp_path: Path, name: str) -> None:
    import gzip

    import zstandard

    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.lower().rpartition(".")[2])
    (tmp_path / name).write_bytes(pack(CELLS) if pack else CELLS)
    assert list(read_rows(tmp_path / name)) == [EXPECTED._replace(location=f"{tmp_path}/{name}:2")]


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.md", "a.md.zst", "a.txt.gz"])
def test_a_text_is_known_by_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("prompt,response")
    rows = list(read_rows(tmp_path / name))
    if name.endswith(("gz", "zst")):  # which it is not
        assert "is not compressed that way" in rows[0][1]
    else:
        assert rows == [Row({"text": "prompt,response"}, f"{tmp_path}/{name}:1")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.parquet.gz", "a Parquet"), ("A.ARROW.ZST", "an Arrow"), ("a.parquet.zst", "a Parquet")],
)
def test_tables_of_bytes_that_are_packed_again_are_told(
    tmp_path: Path, name: str, kind: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    (row,) = read_rows(tmp_path / name)
    assert row[1].startswith(f"{kind} file inside .{name.rpartition('.')[2]} is not read")  # type: ignore[union-attr]


@pytest.mark.parametrize("first", [0x50, 0x57, 0x5F])
def test_what_decoders_pass_over_in_front_of_zstd_is_passed_over(
    tmp_path: Path, first: int
) -> None:
    import zstandard

    skipped = bytes([first]) + b"\x2a\x4d\x18\x02\x00\x00\x00ab"
    (tmp_path / "a.csv").write_bytes(skipped + zstandard.compress(CELLS))
    assert [row[0] for row in read_rows(tmp_path / "a.csv")] == [EXPECTED.value]
    for other in (0x4F, 0x60):
        (tmp_path / "a.zst").write_bytes(bytes([other]) + skipped[1:] + zstandard.compress(CELLS))
        (row,) = read_rows(tmp_path / "a.zst")
        assert "is not compressed that way" in row[1]


def test_an_empty_file_is_empty_whatever_its_name(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "a.csv.zst", "a.txt"):
        (tmp_path / name).touch()
        (row,) = read_rows(tmp_path / name)
        assert row == BadRow(f"{tmp_path}/{name}:1", "the file is empty: it holds no rows", True)
