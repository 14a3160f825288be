"""Sources, parts, shards and reports of data, rule by rule."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hints import said
from PIL import Image

from finetune import console
from finetune.artifacts.hub import Repository
from finetune.config.schema import DataSection, Source
from finetune.data.dialogue.conversation import Conversation, Message, ShownImage
from finetune.data.preview.report import _language, check
from finetune.data.reading import shards, sources, streams
from finetune.data.reading.blocks import BlockOptions, Blocks
from finetune.data.reading.files import BadRow, Row, data_files, expand, read_rows
from finetune.data.reading.images import ImageFiles, ImagePolicy, _under
from finetune.data.reading.parts import Part
from finetune.data.reading.section import reading_of, sources_of, validation_sources, with_rows
from finetune.data.reading.shards import ShardReader, StreamShard
from finetune.data.reading.sources import AS_IS, Reading, SourceSpec, read_conversations, weighted
from finetune.data.reading.split import split
from finetune.errors import ConfigError, DataError


def write(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def pair(prompt: str, **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": "A", **columns}


# --- sources -------------------------------------------------------------------------------------


def test_as_many_bad_rows_as_are_allowed_are_allowed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pair("1"), "x", pair("2"), pair("3"))
    assert len(list(read_conversations([SourceSpec(path)], Reading("skip", 0.25)))) == 3
    with pytest.raises(DataError):
        list(read_conversations([SourceSpec(path)], Reading("skip", 0.249)))


def test_one_bad_row_stops_a_run_though_the_rest_is_good(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "x", *(pair(str(n)) for n in range(9)))
    stream = read_conversations([SourceSpec(path)])
    assert "1 of 10 rows cannot be used" in said(list, stream)


def test_a_file_that_is_nearly_all_bad_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MOST_BAD", 4)
    monkeypatch.setattr(sources, "KEPT_REASONS", 3)
    bad = read_conversations([SourceSpec(write(tmp_path / "a.jsonl", pair("1"), *["x"] * 200))], Reading("collect"))  # fmt: skip
    assert len(list(bad)) == 1
    assert bad.num_bad < 60
    assert len(bad.bad_rows) == 3
    mixed = write(tmp_path / "b.jsonl", *([pair("1"), "x"] * 100))
    stream = read_conversations([SourceSpec(mixed)], Reading("collect"))
    assert (len(list(stream)), stream.num_bad, stream.rows) == (100, 100, 200)


def test_a_layout_that_is_unknown_counts_the_rows_that_were_looked_at(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"body": 1}, "x", *[{"body": 1}] * 30)
    stream = read_conversations([SourceSpec(path)], Reading("collect"))
    assert (list(stream), stream.rows, stream.num_bad) == ([], 20, 2)
    assert [row.location.rpartition(":")[2] for row in stream.bad_rows] == ["1", "2"]
    skipped = read_conversations([SourceSpec(path)], Reading("skip", 1.0))
    assert "cannot be skipped" in said(list, skipped)


def test_a_source_gives_its_first_rows_and_columns_their_own_names(tmp_path: Path) -> None:
    rows = [{"question one": str(n), "response": "A"} for n in range(9)]
    spec = SourceSpec(write(tmp_path / "a.jsonl", *rows), max_rows=3, columns=(("prompt", "question one"),))  # fmt: skip
    found = [c.messages[0].content for c in read_conversations([spec])]
    assert found == ["0", "1", "2"]


def test_other_rows_of_every_block_are_chosen() -> None:
    chosen = list(weighted(range(4096), 0.25, "0"))
    blocks = [{n % 1024 for n in chosen if n // 1024 == block} for block in range(4)]
    assert [len(block) for block in blocks] == [256] * 4
    assert blocks[0] != blocks[1] != blocks[2]
    assert list(weighted(range(2), 2.0, "0")) == [0, 0, 1, 1]
    assert len(list(weighted(range(1), 0.5, "0"))) == 1  # round half up


def test_a_group_is_what_is_asked_first_with_its_images(tmp_path: Path) -> None:
    part = Part(0.5, held_out=True)

    def group(*messages: Message) -> str:
        return part._group({}, Conversation(messages))

    asked, answer = Message("user", "Q"), Message("assistant", "A")
    assert group(asked, answer) == group(asked, Message("assistant", "B"))
    assert group(asked, answer, Message("user", "more")) == group(asked, answer)
    assert group(Message("user", "Q", images=(ShownImage("a"),))) != group(asked)
    assert group(Message("system", "Q")) != group(asked)
    assert Part(0.5, True, "who")._group({"who": 3}, Conversation(())) == "3"
    assert "none is held out" in Part(0.1, True).nothing_left("a", 1)
    assert "none is left to train on" in Part(0.1, False).nothing_left("a", 1)


def test_a_held_out_share_is_of_all_rows_once(tmp_path: Path) -> None:
    source = Source(path="a", weight=3.0, max_rows=5, format="pairs")
    section = DataSection(
        train=[source, "b"], validation="10%", format="openai", ignore_columns=["x"]
    )
    first, second = validation_sources(section)
    assert (first.weight, first.max_rows, first.format) == (1.0, None, "pairs")
    assert first.part == Part(0.1, held_out=True)
    assert second.format == "openai"
    (as_section,) = sources_of(section, [Source(path="a")])
    assert as_section.format == "openai"
    assert reading_of(section).rules.ignore_columns == ("x",)
    assert with_rows(section, options=["ignore_columns=a,b"]).ignore_columns == ["a", "b"]


def test_split_refuses_either_file_and_writes_each_side_to_its_own(tmp_path: Path) -> None:
    source = [SourceSpec(write(tmp_path / "a.jsonl", *(pair(str(n)) for n in range(40))))]
    part, out = Part(0.3, held_out=True), tmp_path / "out"
    counts = split(source, out, part, Reading())
    for name, side, number in (("train.jsonl", False, counts.train), ("held_out.jsonl", True, counts.held_out)):  # fmt: skip
        lines = (out / name).read_text().splitlines()
        assert len(lines) == number
        for line in lines:
            conversation = Conversation((Message("user", json.loads(line)["prompt"]),))
            assert part.takes({}, conversation) == side
        (out / name).rename(tmp_path / name)
        with pytest.raises(ConfigError, match="exist"):
            split(source, out, part, Reading())
        (tmp_path / name).rename(out / name)
    whole = Part(1e-12, held_out=True)
    assert "none is held out" in said(split, source, tmp_path / "none", whole, Reading())


# --- paths ---------------------------------------------------------------------------------------


def test_files_in_hidden_folders_and_those_beside_data_are_no_data() -> None:
    names = [
        "a.jsonl",
        ".git/b.jsonl",
        "x/.y/c.jsonl",
        "dataset_info.json",
        "x/state.json",
        "d.txt",
    ]
    assert data_files(map(Path, names)) == [Path("a.jsonl")]
    assert data_files([Path("d.txt"), Path(".e.txt")]) == [Path("d.txt")]


@pytest.mark.parametrize(
    ("names", "told"),
    [(("train.jsonl", "test.jsonl"), True), (("train-1.jsonl", "train-2.jsonl"), False),
     (("test.jsonl", "dev.jsonl"), False), (("a.jsonl", "b.jsonl"), False)],
)  # fmt: skip
def test_a_folder_of_a_training_split_and_another_is_told(
    tmp_path: Path, names: tuple[str, ...], told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    monkeypatch.setattr(console, "warn_once", texts.append)
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.jsonl").mkdir()
    assert [p.name for p in expand(f"{tmp_path}/*.jsonl")] == sorted(names)
    (tmp_path / "folder.jsonl").rmdir()
    expand(str(tmp_path))
    assert bool(texts) == told


def test_blank_lines_in_front_of_the_rows_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "CHUNK", 2)
    for name, text in (
        ("a.jsonl", '\n\n\n\n\n{"a": 1}\n{\n'),
        ("a.json", '\n\n\n\n\n[{"a": 1}\n]'),
    ):
        (tmp_path / name).write_text(text)
        first, *rest = read_rows(tmp_path / name)
        assert first == Row({"a": 1}, f"{tmp_path}/{name}:6")
        assert all(isinstance(row, BadRow) and not row.fatal for row in rest)


def test_files_that_an_address_names_come_sorted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.artifacts import hub

    class Folder(type(tmp_path)):  # type: ignore[misc]
        def glob(self, pattern: str) -> Any:
            return iter(sorted(super().glob(pattern), reverse=True))

    for name in "cab":
        (tmp_path / f"{name}.jsonl").touch()
    monkeypatch.setattr(hub, "fetch", lambda *_: Folder(tmp_path))
    found = [path.name for path in expand("hf://owner/name/*.jsonl")]
    assert found == ["a.jsonl", "b.jsonl", "c.jsonl"]


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_a_number_in_an_array_is_whole_wherever_the_chunks_end(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "CHUNK", chunk)
    (tmp_path / "a.json").write_text('[12345, {"a": 1}]')
    _, second = read_rows(tmp_path / "a.json")
    assert second == Row({"a": 1}, f"{tmp_path}/a.json:1")


# --- images --------------------------------------------------------------------------------------

PIXEL = "data:image/png;base64,"


def test_bytes_of_an_image_are_kept_whole_under_their_hash(tmp_path: Path) -> None:
    files = ImageFiles(ImagePolicy(cache_root=str(tmp_path)))
    path = Path(files._path(PIXEL + "YWJj", tmp_path))
    assert path.read_bytes() == b"abc"
    assert path.is_relative_to(tmp_path / "images")
    assert files._path("data:image;base64,YWJj", tmp_path) == str(path)
    path.write_bytes(b"a")  # cut off
    assert Path(files._path(PIXEL + "YWJj", tmp_path)).read_bytes() == b"abc"
    for wrong in ("YW-Jj", "é", "YWJ"):
        assert "holds no base64" in said(files._path, PIXEL + wrong, tmp_path)


def test_images_stay_under_their_root(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "out.png").touch()
    (tmp_path / "data/link.png").symlink_to("../out.png")
    assert _under(tmp_path / "data", "a/../b.png") == f"{tmp_path}/data/b.png"
    assert "is outside" in said(_under, tmp_path / "data", "../out.png")
    assert "leads out of" in said(_under, tmp_path / "data", "link.png")
    alone = ImageFiles(ImagePolicy(file_alone=True))
    assert "lies beside the rows" in said(alone._path, "a.png", tmp_path)
    rooted = ImageFiles(ImagePolicy(file_alone=True, root=str(tmp_path)))
    assert rooted._path("a.png", Path("/elsewhere")) == f"{tmp_path}/a.png"


# --- shards and blocks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "pattern", "matches"),
    [("a/b.jsonl", "a/*.jsonl", True), ("a/b/c.jsonl", "a/*.jsonl", False), ("b.jsonl", "a/*.jsonl", False),
     ("a/b/c.jsonl", "a/**/*.jsonl", True), ("a/c.jsonl", "a/**/*.jsonl", True), ("a/b", "a", False), ("a", "a/b", False)],
)  # fmt: skip
def test_a_pattern_of_a_hubs_files_matches_as_one_of_a_path(
    path: str, pattern: str, matches: bool
) -> None:
    assert shards._matches(path, pattern) == matches


def reader(folder: Path, *files: str, **options: Any) -> tuple[list[StreamShard], ShardReader]:
    listed = [StreamShard(0, file, Path(file).stat().st_size) for file in files]
    spec = [SourceSpec(str(folder), **options)]
    return listed, ShardReader(listed, spec, AS_IS, folder / "cache")


def test_a_shard_that_changed_since_it_was_listed_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", pair("1"))
    _, rows = reader(tmp_path, file, weight=0.5)
    assert len(list(rows.open(0, 0))) == 1
    with Path(file).open("a") as more:
        more.write("\n")
    assert "was changed or removed" in said(rows.open, 0, 0)
    Path(file).unlink()
    assert "was changed or removed" in said(rows.open, 0, 0)


def test_a_hubs_shard_that_was_read_is_removed_with_its_link(tmp_path: Path) -> None:
    there = StreamShard(0, "hf://a/b/a.jsonl", 1, Repository("huggingface", "a/b", "c"), "a.jsonl")
    rows = ShardReader([there], [SourceSpec("x")], AS_IS, tmp_path)
    common, link = rows._common(0), tmp_path / "link"
    for file in (common, link):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    rows._links[0] = link
    rows.close(0)
    assert not common.exists() | link.exists()


def test_images_beside_a_hubs_shard_were_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(write(tmp_path / "a.jsonl", pair("Q", images=["a.png"])))
    there = StreamShard(0, "hf://a/b/a.jsonl", 1, Repository("huggingface", "a/b", "c"), "a.jsonl")
    for shard, reason in ((there, "lies beside the rows"), (StreamShard(0, str(file), file.stat().st_size), "no such file")):  # fmt: skip
        rows = ShardReader([shard], [SourceSpec("x")], AS_IS, tmp_path)
        monkeypatch.setattr(rows, "_here", lambda _: file)
        opened = rows.open(0, 0)
        assert reason in said(opened.conversation, next(opened))


def test_links_of_readers_that_are_gone_are_removed_and_those_of_others_stay(
    tmp_path: Path,
) -> None:
    _, rows = reader(tmp_path)
    readers = tmp_path / "cache" / shards.FOLDER / "readers"
    host = socket.gethostname()
    for name in (f"{host}:999999999", f"{host}:{os.getppid()}", "elsewhere:999999999"):
        (readers / name).mkdir(parents=True)
        (readers / name / "0-a").touch()
    own = rows._own_folder()
    assert own.name == f"{host}:{os.getpid()}"
    assert {f.name for f in readers.iterdir()} == {
        own.name,
        f"{host}:{os.getppid()}",
        "elsewhere:999999999",
    }


def blocks(folder: Path, weight: float, seed: int, rows: int = 10, **more: Any) -> Blocks:
    files = [
        write(folder / f"{name}.jsonl", *(pair(f"{name}{n}") for n in range(20))) for name in "ab"
    ]
    listed, of = reader(folder, *files, weight=weight)
    spec = [SourceSpec(str(folder), weight=weight)]
    return Blocks(listed, [0, 1], spec, of, BlockOptions(seed, rows), **more)


def prompts(of: Blocks) -> list[str]:
    found: list[str] = []
    while block := of.next():
        found += [placed.row.value["prompt"] for placed in block if isinstance(placed.row, Row)]
    return found


def test_every_row_is_in_a_block_as_often_as_its_weight_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(prompts(blocks(tmp_path, 1.0, 0))) == sorted(f"{s}{n}" for s in "ab" for n in range(20))  # fmt: skip
    assert len(prompts(blocks(tmp_path, 2.0, 0))) == 80
    rare, often = (prompts(blocks(tmp_path, weight, 0)) for weight in (0.1, 0.9))
    assert len(rare) < 15 < 25 < len(often)
    assert set(rare) < set(often)
    assert prompts(blocks(tmp_path, 0.5, 0)) != prompts(blocks(tmp_path, 0.5, 1))
    closed: list[int] = []
    monkeypatch.setattr(ShardReader, "close", lambda _, number: closed.append(number))
    prompts(blocks(tmp_path, 1.0, 0))
    assert sorted(closed) == [0, 1]
    from finetune.data.reading import blocks as module

    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 12)
    assert len(blocks(tmp_path, 1.0, 0).next()) < 10


# --- reports -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "language"),
    [("hello", "Latin script"), ("你好，世界", "Chinese"), ("今日は天気がいいですね", "Japanese"),
     ("漢字漢字漢字漢字漢字漢字の", "Chinese"), ("東京都渋谷区神宮前の店", "Chinese"), ("東京都の神宮前の店", "Japanese"),
     ("안녕하세요", "Korean"), ("привет", "Cyrillic script"), ("مرحبا", "Arabic script"), ("hello 你", "Latin script"), ("", "Latin script")],
)  # fmt: skip
def test_a_language_is_guessed_by_its_letters(text: str, language: str) -> None:
    assert _language([Message("user", text)]) == language


def test_a_report_counts_what_carries_no_loss_repeats_or_was_there_before(tmp_path: Path) -> None:
    def talk(prompt: str, **marks: Any) -> dict[str, Any]:
        replies = [{"role": "assistant", "content": "A", **marks}, {"role": "user", "content": "R"}, {"role": "assistant", "content": "B"}]  # fmt: skip
        return {"messages": [{"role": "user", "content": prompt}, *replies]}

    first = write(
        tmp_path / "a.jsonl", talk("1"), talk("1"), talk("2", weight=0), talk("3", train=False), "x"
    )
    second = write(tmp_path / "b.jsonl", talk("1"), talk("9"), "x")
    third = write(tmp_path / "c.jsonl", talk("3"), talk("9"))
    found = check([first, second, third])
    assert [s.masked_replies for s in found.sources] == [2, 0, 0]
    assert [s.duplicates for s in found.sources] == [1, 0, 0]
    assert [s.seen_before for s in found.sources] == [0, 1, 2]
    assert [row.location for row in found.bad_rows] == [f"{first}:5", f"{second}:3"]
    assert found.num_bad == 2


def test_the_same_words_with_an_image_elsewhere_are_another_dialogue(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")

    def row(content: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}], "images": ["a.png"]}  # fmt: skip

    (source,) = check(write(tmp_path / "a.jsonl", row("<image>ab"), row("a<image>b"), row("<image>ab"))).sources  # fmt: skip
    assert (source.dialogues, source.duplicates) == (3, 1)
