"""Streams of shards: which files they are, in which order their rows come, what lies here meanwhile."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hints import said

from finetune.artifacts import hub
from finetune.artifacts.hub import Repository
from finetune.artifacts.remote_files import Listing
from finetune.data.reading import blocks as module
from finetune.data.reading import shards
from finetune.data.reading.blocks import BlockOptions, Blocks, characters
from finetune.data.reading.files import Row
from finetune.data.reading.images import ImageFiles, ImagePolicy
from finetune.data.reading.shards import ShardReader, StreamShard, shards_of
from finetune.data.reading.sources import AS_IS, FileRows, Reading, SourceSpec
from finetune.errors import DataError

COMMIT = "c" * 40


def write(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pair(prompt: str, **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": "A", **columns}


# --- rows of a file from some row on -------------------------------------------------------------


def test_the_layout_of_a_file_that_is_read_on_is_told_by_its_first_rows(tmp_path: Path) -> None:
    # What the later rows alone would be taken for is another layout.
    first = [{"messages": [], "x": n} for n in range(3)]
    later = [{"instruction": "Q", "output": "A", "messages": None, "x": n} for n in range(3, 30)]
    path = Path(write(tmp_path / "a.jsonl", *first, *later))
    source = SourceSpec(str(path), columns=(("y", "x"),))

    def rows(skip: int) -> FileRows:
        images = ImageFiles(ImagePolicy())
        return FileRows(path, source, AS_IS, "train", images, skip=skip)

    for skip in (0, 1, 5, 25):
        found = rows(skip)
        assert found.format == "messages"
        assert [row[0]["y"] for row in found if isinstance(row, Row)] == list(range(skip, 30))
    told = FileRows(path, SourceSpec(str(path), format="alpaca"), AS_IS, "train", ImageFiles(ImagePolicy()), skip=4)  # fmt: skip
    assert (told.format, len(list(told))) == ("alpaca", 26)


def test_names_of_columns_tell_the_layout_and_give_the_dialogue(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.jsonl", *({"q": f"Q{n}", "a": "A", "messages": []} for n in range(9))))  # fmt: skip
    images = ImageFiles(ImagePolicy())
    source = SourceSpec(str(path), columns=(("prompt", "q"), ("response", "a"), ("x", "messages")))
    named = SourceSpec(str(path))
    for skip in (0, 4):
        for spec, reading in ((source, AS_IS), (named, Reading(columns=("q", "a")))):
            rows = FileRows(path, spec, reading, "train", images, skip=skip)
            assert rows.format == "pairs"
            first = next(rows)
            assert isinstance(first, Row)
            assert rows.conversation(first).messages[0].content == f"Q{skip}"  # type: ignore[union-attr]
    shard = StreamShard(0, write(tmp_path / "b.jsonl", pair("Q"), {"prompt": "Q", "response": ""}), 0)  # fmt: skip
    shard = StreamShard(0, shard.name, Path(shard.name).stat().st_size)
    rows = ShardReader([shard], [named], AS_IS, tmp_path).open(0, 1)
    assert "no reply to train" in said(rows.conversation, next(rows))


def test_rows_that_are_all_bad_at_first_say_nothing_of_the_layout(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("x\n" * 25 + json.dumps(pair("Q")) + "\n")
    rows = FileRows(path, SourceSpec(str(path)), AS_IS, "train", ImageFiles(ImagePolicy()))
    assert (rows.unknown, rows.num_unknown) == ([], 0)
    *bad, good = rows
    assert len(bad) == 25
    assert isinstance(good, Row)
    conversation = rows.conversation(good)
    assert conversation is not None
    assert conversation.messages[0].content == "Q"


# --- shards --------------------------------------------------------------------------------------


def test_the_files_of_all_sources_are_shards_in_order(tmp_path: Path) -> None:
    for name in ("two/b.jsonl", "two/a.jsonl", "one.jsonl"):
        write(tmp_path / name, pair(name))
    found = shards_of([SourceSpec(str(tmp_path / "two")), SourceSpec(str(tmp_path / "one.jsonl"))])
    assert [(s.source, Path(s.name).name, s.repository, s.file) for s in found] == [
        (0, "a.jsonl", None, ""), (0, "b.jsonl", None, ""), (1, "one.jsonl", None, ""),
    ]  # fmt: skip
    assert [s.size for s in found] == [Path(s.name).stat().st_size for s in found]


THERE = {"b/two.jsonl": 2, "README.md": 9, "b/one.jsonl": 1, "evil.py": 3, "b/c/three.csv": 4}


@pytest.mark.parametrize(
    ("address", "commit", "expected"),
    [
        ("hf://o/n", COMMIT, [f"hf://o/n@{COMMIT}/{name}" for name in ("b/c/three.csv", "b/one.jsonl", "b/two.jsonl")]),
        ("ms://o/n@v1", None, [f"ms://o/n@v1/{name}" for name in ("b/c/three.csv", "b/one.jsonl", "b/two.jsonl")]),
        ("ms://o/n@v1/b/*.jsonl", COMMIT, [f"ms://o/n@{COMMIT}/{name}" for name in ("b/one.jsonl", "b/two.jsonl")]),
        ("hf://o/n/README.md", COMMIT, [f"hf://o/n@{COMMIT}/README.md"]),
    ],
)  # fmt: skip
def test_the_files_of_a_hub_are_pinned_to_the_commit_they_were_listed_at(
    address: str, commit: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "listed", lambda found: Listing(commit, THERE))
    found = shards_of([SourceSpec(address)])
    assert [shard.name for shard in found] == expected
    for shard in found:
        assert shard.name.endswith(f"/{shard.file}")
        assert shard.size == THERE[shard.file]
        assert shard.repository is not None
        assert (shard.repository.name, shard.repository.files) == ("o/n", "")
        assert shard.repository.revision == (commit or "v1")


def test_an_address_that_means_no_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "listed", lambda found: Listing(COMMIT, {"a.py": 1}))
    for address, what in (("hf://o/n", "no data files"), ("hf://o/n/b.csv", "no file b.csv")):
        assert said(shards_of, [SourceSpec(address)]) == (
            f"{address}: the data set has {what}; correct the name"
        )


class Hub:
    """A hub's files, copied here as its library does; what was asked of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, Path]] = []
        self.locks: list[tuple[str, str]] = []
        self._there = folder / "there"
        monkeypatch.setattr(hub, "fetch_file", self.fetch)
        monkeypatch.setattr(shards, "locked", self.locked)

    def shard(self, name: str, *rows: Any) -> StreamShard:
        write(self._there / name, *rows)
        size = (self._there / name).stat().st_size
        repository = Repository("huggingface", "o/n", COMMIT)
        return StreamShard(0, f"hf://o/n@{COMMIT}/{name}", size, repository, name)

    def fetch(self, repository: Repository, file: str, folder: Path) -> Path:
        assert repository == Repository("huggingface", "o/n", COMMIT)
        self.asked.append((file, folder))
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes((self._there / file).read_bytes())
        return folder / file

    @contextmanager
    def locked(self, path: Path, waiting: str) -> Iterator[None]:
        self.locks.append((path.name, waiting))
        yield


def test_a_hubs_shard_is_fetched_once_and_stays_under_the_readers_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Hub(tmp_path, monkeypatch)
    one, two = there.shard("x/a.jsonl", pair("1"), pair("2")), there.shard("y/a.jsonl", pair("3"))
    reader = ShardReader([one, two], [SourceSpec("x", weight=0.25)], AS_IS, tmp_path / "cache")
    assert [row[0]["prompt"] for row in reader.open(0, 0)] == ["1", "2"]
    assert [row[0]["prompt"] for row in reader.open(0, 1)] == ["2"]
    assert [row[0]["prompt"] for row in reader.open(1, 0)] == ["3"]
    folder = tmp_path / "cache/streams" / f"o--n@{COMMIT}"
    assert there.asked == [("x/a.jsonl", folder), ("y/a.jsonl", folder)]
    assert len({name for name, _ in there.locks}) == 2
    assert one.name in there.locks[0][1]
    own = tmp_path / "cache/streams/readers" / f"{socket.gethostname()}:{os.getpid()}"
    assert sorted(p.name for p in own.iterdir()) == ["0-a.jsonl", "1-a.jsonl"]
    (folder / "x/a.jsonl").unlink()  # another reader is done with it
    assert len(list(reader.open(0, 0))) == 2
    other = ShardReader([one], [SourceSpec("x")], AS_IS, tmp_path / "cache")
    other.open(0, 0)
    assert there.locks[-1] == there.locks[0]
    reader.close(1)
    assert sorted(p.name for p in own.iterdir()) == ["0-a.jsonl"]
    assert not (folder / "y/a.jsonl").exists()
    reader.close(1)  # once more does nothing


def test_a_shard_that_disappears_as_it_is_fetched_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Hub(tmp_path, monkeypatch)
    shard = there.shard("a.jsonl", pair("1"))
    given, gone = there.fetch, 4

    def fetch(*asked: Any) -> Path:
        path = given(*asked)
        if len(there.asked) <= gone:
            path.unlink()
        return path

    monkeypatch.setattr(hub, "fetch_file", fetch)
    reader = ShardReader([shard], [SourceSpec("x")], AS_IS, tmp_path)
    assert len(list(reader.open(0, 0))) == 1
    there.asked.clear()
    gone = 5
    again = ShardReader([shard], [SourceSpec("x")], AS_IS, tmp_path)
    assert "disappears" in said(again.open, 0, 0)
    assert len(there.asked) == 5


def test_where_a_disk_has_no_links_the_common_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = Hub(tmp_path, monkeypatch).shard("a.jsonl", pair("1"))
    monkeypatch.setattr(shards, "second_name", lambda file, name: False)
    reader = ShardReader([shard], [SourceSpec("x")], AS_IS, tmp_path)
    assert len(list(reader.open(0, 0))) == 1
    assert reader._links[0] == reader._common(0)


def test_only_folders_of_this_machines_dead_processes_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "is_running", lambda process: process in (7, os.getpid()))
    monkeypatch.setattr(socket, "gethostname", lambda: "a:b")  # whatever a machine is called
    readers = tmp_path / shards.FOLDER / "readers"
    for name in ("a:b:7", "a:b:8", "c:8", "a:8", "a:b:9"):
        (readers / name).mkdir(parents=True)
        for file in ("0-x", "1-y"):
            (readers / name / file).touch()
    (readers / "ab.lock").touch()
    ShardReader([], [], AS_IS, tmp_path)._own_folder()
    left = {entry.name for entry in readers.iterdir()}
    assert left == {"a:b:7", "c:8", "a:8", f"a:b:{os.getpid()}", "ab.lock"}
    assert len(list((readers / "c:8").iterdir())) == 2


def test_images_of_a_stream_are_looked_at_under_the_root_of_the_run(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "pictures/a.png")
    path = Path(write(tmp_path / "a.jsonl", pair("Q", image="a.png"), pair("Q", image="b.png")))
    shard = StreamShard(0, str(path), path.stat().st_size)
    reading = Reading(images=ImagePolicy(root=str(tmp_path / "pictures")))
    rows = ShardReader([shard], [SourceSpec("x")], reading, tmp_path).open(0, 0)
    first, second = list(rows)
    assert rows.conversation(first).images == (f"{tmp_path}/pictures/a.png",)  # type: ignore[arg-type, union-attr]
    assert "no such file" in said(rows.conversation, second)


# --- blocks --------------------------------------------------------------------------------------


def blocks_of(
    folder: Path, sizes: str, order: list[int], *, rows: int = 100, seed: int = 0, sources: Any = (), **start: Any
) -> tuple[Blocks, ShardReader]:  # fmt: skip
    """Blocks of files a, b, … with so many rows each, of source 0 unless `sources` are more."""
    given = list(sources) or [SourceSpec("x")]
    listed = []
    for number, size in enumerate(map(int, sizes.split())):
        name = "abcdefgh"[number]
        path = write(folder / f"{name}.jsonl", *(pair(f"{name}{n}") for n in range(size)))
        listed.append(StreamShard(number % len(given), path, Path(path).stat().st_size))
    reader = ShardReader(listed, given, AS_IS, folder / "cache")
    return Blocks(listed, order, given, reader, BlockOptions(seed, rows), **start), reader


def prompts(block: list[Any]) -> list[str]:
    return [placed.row.value["prompt"] for placed in block]


def test_four_shards_are_read_in_turn_and_the_next_is_opened_for_one_that_ends(
    tmp_path: Path,
) -> None:
    blocks, _ = blocks_of(tmp_path, "2 1 3 1 2 1", [2, 1, 0, 3, 5, 4])
    assert prompts(blocks.next()) == [
        "c0", "b0", "a0", "d0", "c1", "a1", "c2", "f0", "e0", "e1",
    ]  # fmt: skip
    assert (blocks.opened, blocks.next()) == (6, [])


def test_a_block_ends_with_a_row_of_each_open_shard(tmp_path: Path) -> None:
    blocks, _ = blocks_of(tmp_path, "5 5 5", [0, 1, 2], rows=6)
    assert [len(blocks.next()) for _ in range(4)] == [6, 6, 3, 0]
    odd, _ = blocks_of(tmp_path, "5 5 5", [0, 1, 2], rows=4)
    assert [len(odd.next()) for _ in range(4)] == [6, 6, 3, 0]


def test_a_block_is_full_by_its_text_whatever_its_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three characters a row: Q with its number, and A.
    for limit, weight, expected in ((7, 1.0, 3), (6, 1.0, 2), (7, 2.0, 4), (18, 3.0, 6)):
        monkeypatch.setattr(module, "BLOCK_CHARACTERS", limit)
        sources = [SourceSpec("x", weight=weight)]
        blocks, _ = blocks_of(tmp_path, "9", [0], sources=sources)
        assert len(blocks.next()) == expected
    assert characters({"a": "xy", "b": [{"c": "z"}, None, 7], "d": b"1234", "e": True}) == 7
    assert characters(["ab", ["c"]]) == 3
    monkeypatch.undo()
    monkeypatch.setattr(module, "characters", lambda value: 1 << 20)
    assert len(blocks_of(tmp_path, "50", [0])[0].next()) == 32


def test_what_is_done_with_is_closed_by_its_own_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, reader = blocks_of(tmp_path, "1 4 2", [2, 0, 1], rows=1)
    closed: list[int] = []
    monkeypatch.setattr(reader, "close", closed.append)
    while blocks.next():
        pass
    assert closed == [0, 2, 1]
    assert blocks.cursors == ()


def test_blocks_go_on_where_they_stood(tmp_path: Path) -> None:
    whole, _ = blocks_of(tmp_path, "3 9 5 1 4 2", [5, 3, 1, 0, 2, 4], rows=3)
    expected, places = [], [(whole.cursors, whole.opened)]
    while block := whole.next():
        expected.append(prompts(block))
        places.append((whole.cursors, whole.opened))
    assert len(set(places)) == len(places)
    assert places[1][0] == ((0, 1), (1, 1), (2, 1), (3, 1))
    for number, (cursors, opened) in enumerate(places):
        again, _ = blocks_of(tmp_path, "3 9 5 1 4 2", [5, 3, 1, 0, 2, 4], rows=3, cursors=cursors, opened=opened)  # fmt: skip
        assert again.cursors == cursors
        assert [prompts(block) for block in iter(again.next, [])] == expected[number:]


def test_each_shard_has_the_weight_of_its_own_source(tmp_path: Path) -> None:
    sources = [SourceSpec("x", weight=1.0), SourceSpec("y", weight=3.0)]
    blocks, _ = blocks_of(tmp_path, "2 2", [1, 0], sources=sources)
    block = blocks.next()
    assert prompts(block) == ["b0"] * 3 + ["a0"] + ["b1"] * 3 + ["a1"]
    assert [placed.source for placed in block] == [1] * 3 + [0] + [1] * 3 + [0]
    assert {placed.file.format for placed in block} == {"pairs"}


def test_a_fraction_of_the_rows_is_drawn_by_seed_file_and_row(tmp_path: Path) -> None:
    def often(folder: Path, seed: int = 0, weight: float = 0.3) -> list[str]:
        sources = [SourceSpec("x", weight=weight)]
        blocks, _ = blocks_of(folder, "400 400", [0, 1], rows=9999, seed=seed, sources=sources)
        return sorted(prompts(blocks.next()))

    found = often(tmp_path / "one")
    assert 190 < len(found) < 290  # of 800 rows 240
    assert found == often(tmp_path / "moved/elsewhere")
    assert found != often(tmp_path / "one", seed=1)
    of_a = {name[1:] for name in found if name[0] == "a"}
    of_b = {name[1:] for name in found if name[0] == "b"}
    assert of_a != of_b
    more = often(tmp_path / "one", weight=2.3)
    assert len(more) == 1600 + len(found)
    assert {name for name in more if more.count(name) == 3} == set(found)


def test_a_shard_whose_layout_is_unknown_ends_the_stream(tmp_path: Path) -> None:
    blocks, _ = blocks_of(tmp_path, "1", [0])
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": 1}\n' + "x\n" * 40)
    shard = StreamShard(0, str(path), path.stat().st_size)
    reader = ShardReader([shard], [SourceSpec("x")], AS_IS, tmp_path)
    blocks = Blocks([shard], [0], [SourceSpec("x")], reader, BlockOptions(0, 9))
    with pytest.raises(DataError) as error:
        blocks.next()
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{path}:1: the layout is not known")
    assert lines[1].startswith(f"{path}:2: not JSON")
    assert len(lines) == 20


def test_rows_of_a_hub_stand_at_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = Hub(tmp_path, monkeypatch).shard("x/a.jsonl", pair("1"), 3, pair("2"))
    reader = ShardReader([shard], [SourceSpec("x")], Reading("skip"), tmp_path / "cache")
    blocks = Blocks([shard], [0], [SourceSpec("x")], reader, BlockOptions(0, 9))
    places = [placed.row.location for placed in blocks.next()]
    assert places == [f"hf://o/n@{COMMIT}/x/a.jsonl:{n}" for n in (1, 2, 3)]
