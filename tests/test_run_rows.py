"""What a run reads of its sources: which rows, on which side of a split, and what is said at the end."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from hints import said
from PIL import Image
from pyarrow import parquet
from test_source_rules import pair, write

from finetune.config.schema import DataSection, Source
from finetune.data.dialogue.conversation import Conversation, Message, ShownImage
from finetune.data.dialogue.formats import RowRules
from finetune.data.dialogue.images import ImageRule
from finetune.data.reading import images, sources
from finetune.data.reading.images import ImageFiles, ImagePolicy
from finetune.data.reading.parts import Part
from finetune.data.reading.section import (
    reading_of,
    sources_of,
    training_sources,
    validation_sources,
    with_rows,
)
from finetune.data.reading.sources import Reading, SourceSpec, read_conversations
from finetune.data.reading.split import split
from finetune.errors import ConfigError, DataError


def pairs(count: int, **columns: Any) -> list[dict[str, Any]]:
    return [pair(str(n), **columns) for n in range(count)]


# --- sources -------------------------------------------------------------------------------------


def test_sources_come_one_after_the_other_each_with_its_number_and_its_own_choice(
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "a.jsonl", *pairs(40))
    half = SourceSpec(file, weight=0.5)
    stream = read_conversations([half, half, SourceSpec(file, max_rows=3)], seed=0)
    found = [(stream.source, c.messages[0].content) for c in stream]
    assert [number for number, _ in found] == [0] * 20 + [1] * 20 + [2] * 3
    first, second = ({said for n, said in found if n == number} for number in (0, 1))
    assert first != second
    assert stream.rows == 40 + 40 + 3


def test_nothing_is_handed_out_once_the_run_is_sure_to_stop(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", pair("1"), "x", pair("2"), pair("3"))
    stream = read_conversations([SourceSpec(file)])
    assert next(stream).messages[0].content == "1"
    assert "1 of 4 rows cannot be used" in said(next, stream)
    # A place behind which nothing can be read stops it as well, and bad rows that may be skipped do not.
    broken = write(tmp_path / "b.json", f"[{json.dumps(pair('1'))}, x]")
    given: list[str] = []
    skipping = read_conversations([SourceSpec(file), SourceSpec(broken), SourceSpec(file)], Reading("skip", 0.9))  # fmt: skip
    with pytest.raises(DataError, match="cannot be skipped"):
        given.extend(c.messages[0].content for c in skipping)
    assert given == ["1", "2", "3", "1"]


def test_a_place_that_nothing_can_be_read_behind_is_advised_alike_in_every_mode(
    tmp_path: Path,
) -> None:
    broken = write(tmp_path / "b.json", f"[{json.dumps(pair('1'))}, x]")
    for reading in (Reading("error"), Reading("skip", 1.0)):
        text = said(list, read_conversations([SourceSpec(broken)], reading))
        assert text.endswith("nothing after such a place can be read, so it cannot be skipped.")
    assert len(list(read_conversations([SourceSpec(broken)], Reading("collect")))) == 1


def test_sources_without_a_row_that_can_be_used_are_named(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, "x", "y") for name in ("a.jsonl", "b.jsonl"))
    part = Part(0.5, held_out=True)
    for of_part in (None, part):
        given = [SourceSpec(path, part=of_part) for path in (one, two)]
        assert said(list, read_conversations(given, Reading("skip", 1.0))) == (
            f"{one}, {two}: there is no row that can be used; `finetune data check` says why"
        )
    none = SourceSpec(write(tmp_path / "c.jsonl", "x", *pairs(3)), part=Part(1e-9, held_out=True))
    text = said(list, read_conversations([none], Reading("skip", 1.0)))
    assert text.startswith(f"{none.path}: of 3 dialogues none is held out at 0.0%")
    assert list(read_conversations([none], Reading("collect"))) == []


def test_each_file_is_judged_by_its_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MOST_BAD", 4)
    bad = write(tmp_path / "bad.jsonl", pair("1"), *["x"] * 200)
    good = write(tmp_path / "a.jsonl", *pairs(300))
    mixed = write(tmp_path / "b.jsonl", *pairs(80), *["x"] * 20)
    few = write(tmp_path / "c.jsonl", "x", *["x"] * 2, *pairs(30))

    def read(*paths: str) -> sources.ConversationStream:
        stream = read_conversations([SourceSpec(path) for path in paths], Reading("collect"))
        list(stream)
        return stream

    assert read(good, bad).rows < 400
    assert read(mixed, few).rows == 133
    assert read(bad, good).rows > 300  # the next file is read again
    stopped = read(bad)
    last = stopped.bad_rows[-1]
    assert last.reason == "nearly all rows so far are bad; the rest is not read"
    assert last.fatal
    assert last.location == f"{bad}:{stopped.rows + 1}"


def test_bad_rows_of_renamed_columns_are_bad_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"q": "Q", "response": "A"}, "x", {"q": "R", "response": "A"})  # fmt: skip
    stream = read_conversations([SourceSpec(file, columns=(("prompt", "q"),))], Reading("collect"))
    assert [c.messages[0].content for c in stream] == ["Q", "R"]
    assert [row.location for row in stream.bad_rows] == [f"{file}:2"]


def test_a_reading_is_for_a_purpose_a_seed_and_a_checkpoint(tmp_path: Path) -> None:
    file = SourceSpec(write(tmp_path / "a.jsonl", {"prompt": "Q"}, pair("R")))
    assert "no pair of columns" in said(list, read_conversations([file], Reading("skip", 0.1)))
    asked = read_conversations([file], purpose="predict")
    assert [len(c.messages) for c in asked] == [1, 2]
    half = SourceSpec(write(tmp_path / "b.jsonl", *pairs(40)), weight=0.5)
    drawn = [[c.messages[0].content for c in read_conversations([half], seed=n)] for n in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]
    rule, layout = ImageRule("x", most=0), SimpleNamespace(thinking=True)
    template: Any = SimpleNamespace(layout=layout, image_rule=rule)
    given = Reading("skip", rules=RowRules(turns="merge"))
    found = given.for_checkpoint(template)
    assert found == Reading("skip", rules=RowRules(turns="merge", thinks=True, images=rule))


def test_a_thousand_reasons_are_kept_and_the_rest_is_counted(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *["x"] * 1500, *pairs(200))
    stream = read_conversations([SourceSpec(file)], Reading("collect"))
    assert (len(list(stream)), stream.num_bad, len(stream.bad_rows)) == (200, 1500, 1000)
    assert stream.bad_rows[-1].location == f"{file}:1000"


def test_what_a_row_was_read_from_and_how_often_something_is_unread_is_kept(tmp_path: Path) -> None:
    rows = [pair("1", remarks="x"), pair("<image>2", remarks="y", more="z"), pair("3")]
    stream = read_conversations([SourceSpec(write(tmp_path / "a.jsonl", *rows))])
    for row in rows:
        next(stream)
        assert stream.row == row
    assert dict(stream.unread) == {"remarks": 2, "more": 1}
    assert list(stream.doubts.values()) == [1]


def test_what_chooses_dialogues_of_a_source_is_said_only_where_something_does() -> None:
    assert SourceSpec("a", weight=2.0, format="pairs").chosen == {}
    assert SourceSpec("a", max_rows=0).chosen == {"max_rows": 0}
    part = Part(0.1, held_out=True, group_by="who")
    assert SourceSpec("a", part=part).chosen == {
        "part": {"share": 0.1, "held_out": True, "group_by": "who"}
    }


# --- the data section ----------------------------------------------------------------------------


def test_every_option_about_rows_arrives_at_the_reading() -> None:
    section = DataSection(
        train="a", on_bad_row="skip", max_bad_rows=0.3, turns="merge", calls_in_text="error",
        reasoning="drop", ignore_columns=["x", "y"], columns={"prompt": "Q", "response": "A"},
        image_root="pictures", cache_dir="cache",
    )  # fmt: skip
    found = reading_of(section)
    assert (found.on_bad_row, found.max_bad_rows, found.columns) == ("skip", 0.3, ("Q", "A"))
    assert found.images == ImagePolicy(root="pictures", cache_root="cache")
    rules = found.rules
    assert (rules.turns, rules.calls_in_text, rules.reasoning, rules.ignore_columns) == (
        "merge", "error", "drop", ("x", "y"),
    )  # fmt: skip
    assert reading_of(DataSection(train="a")) == Reading()


def test_a_command_line_changes_only_what_it_says() -> None:
    section = DataSection(train="a", turns="merge", format="openai", image_root="x", reasoning="drop")  # fmt: skip
    assert with_rows(section) == section
    changed = with_rows(section, columns=("Q", "A"), format="pairs", image_root="y")
    assert (changed.columns.prompt, changed.columns.response) == ("Q", "A")  # type: ignore[union-attr]
    assert (changed.format, changed.image_root) == ("pairs", "y")
    assert (changed.turns, changed.reasoning) == ("merge", "drop")
    many = with_rows(section, options=["calls_in_text=read", "reasoning=require", "turns=strict"])
    assert (many.calls_in_text, many.reasoning, many.turns) == ("read", "require", "strict")


def test_a_source_keeps_all_that_is_said_of_it() -> None:
    source = Source(path="p", weight=2.5, format="alpaca", columns={"instruction": "Q", "output": "A"}, max_rows=7)  # fmt: skip
    section = DataSection(train=["a", source], format="pairs", validation="dev")
    expected = SourceSpec("p", 2.5, "alpaca", (("instruction", "Q"), ("output", "A")), 7)
    assert sources_of(section, section.train) == (SourceSpec("a", format="pairs"), expected)
    assert sources_of(section, None) == ()
    assert training_sources(section) == (SourceSpec("a", format="pairs"), expected)
    assert validation_sources(section) == (SourceSpec("dev", format="pairs"),)
    shared = DataSection(train=["a", source], validation="20%", group_by="who")
    parts = [source.part for source in training_sources(shared)]
    assert parts == [Part(0.2, held_out=False, group_by="who")] * 2
    assert training_sources(shared)[1].weight == 2.5
    assert training_sources(shared)[1].max_rows == 7
    alone = DataSection(train="a", validation="20%")
    assert training_sources(alone)[0].part == Part(0.2, held_out=False)
    assert validation_sources(alone)[0].part == Part(0.2, held_out=True)
    held = [source.part for source in validation_sources(shared)]
    assert held == [Part(0.2, held_out=True, group_by="who")] * 2


# --- parts ---------------------------------------------------------------------------------------


def asked(text: str, **more: Any) -> Conversation:
    return Conversation((Message("user", text), Message("assistant", "A")), **more)


QUESTIONS = [7, 8, 11, 19]
GROUPS = [2, 6, 17, 18, 23, 29]
DOCUMENTS = [15, 26, 27]


def test_the_share_is_the_share_and_who_is_held_out_never_changes() -> None:
    for share in (0.05, 0.3, 0.8):
        part = Part(share, held_out=True)
        held = sum(part.takes({}, asked(f"question {n}")) for n in range(4000))
        assert abs(held / 4000 - share) < 0.02
    # Those of earlier versions, so that a run that goes on trains on none of them.
    part = Part(0.2, held_out=True)
    assert [n for n in range(30) if part.takes({}, asked(f"question {n}"))] == QUESTIONS
    who = Part(0.2, held_out=True, group_by="who")
    assert [n for n in range(30) if who.takes({"who": n}, asked("Q"))] == GROUPS
    told = [n for n in range(30) if part.takes({}, Conversation((), text=f"document {n}"))]
    assert told == DOCUMENTS


def test_a_group_may_be_any_value_but_none() -> None:
    who = Part(0.5, held_out=True, group_by="who")
    for value in (0, "", False):
        assert who.takes({"who": value}, asked("Q")) in (True, False)
    assert "the row has no 'who', by which" in said(who.takes, {"who": None}, asked("Q"))
    part = Part(0.5, held_out=True)

    def group(*messages: Message) -> str:
        return part._group({}, Conversation(messages))

    assert group(Message("user", "Q ")) != group(Message("user", "Q"))
    two = (Message("user", "Q", images=(ShownImage("a"), ShownImage("b"))),)
    assert group(*two) != group(replaced := Message("user", "Q", images=(ShownImage("a"),)))
    assert group(replaced) != group(Message("user", "Q"))
    assert group(Message("user", "a"), Message("user", "b")) != group(Message("user", "b"), Message("user", "a"))  # fmt: skip


# --- split ---------------------------------------------------------------------------------------

SHARE = Part(0.3, held_out=True)


def test_a_split_writes_over_earlier_files_only_when_it_is_told_to(tmp_path: Path) -> None:
    source, out = [SourceSpec(write(tmp_path / "a.jsonl", *pairs(40)))], tmp_path / "out/deep"
    split(source, out, SHARE, Reading())
    (out / "train.jsonl").write_text("of somebody")
    assert said(split, source, out, SHARE, Reading()) == (
        f"{out}/train.jsonl and {out}/held_out.jsonl exist; give --overwrite, or another --output"
    )
    (out / "held_out.jsonl").unlink()
    assert said(split, source, out, SHARE, Reading()).startswith(f"{out}/train.jsonl exist;")
    counts = split(source, out, SHARE, Reading(), overwrite=True)
    assert counts.train + counts.held_out == 40
    assert len((out / "train.jsonl").read_text().splitlines()) == counts.train


def test_a_split_never_writes_over_what_it_reads(tmp_path: Path) -> None:
    for name in ("train.jsonl", "held_out.jsonl"):
        folder = tmp_path / name.partition(".")[0]
        read = write(folder / name, *pairs(40))
        before = Path(read).read_text()
        for path in (read, str(folder), f"{folder}/*.jsonl"):
            with pytest.raises(ConfigError, match="is read"):
                split([SourceSpec(path)], folder, SHARE, Reading(), overwrite=True)
        assert Path(read).read_text() == before
        assert [p.name for p in folder.iterdir()] == [name]
    others = Path(write(tmp_path / "others/a.jsonl", *pairs(40))).parent
    with pytest.raises(ConfigError, match="lies inside"):
        split([SourceSpec(str(others))], others, SHARE, Reading())


def test_a_split_that_fails_leaves_no_file(tmp_path: Path) -> None:
    bad = write(tmp_path / "a.jsonl", *pairs(20), "x")
    lone = write(tmp_path / "b.jsonl", *pairs(3, who="x"), pair("Q"))
    for path, part, reason in (
        (bad, SHARE, "1 of 21 rows"),
        (lone, Part(0.5, True, "who"), f"{lone}:4: the row has no 'who'"),
        (lone, Part(1e-9, True), "of 4 dialogues none is held out at 0.0%"),
        (lone, Part(1 - 1e-12, True), "of 4 dialogues none is left to train on at 100.0%"),
        (lone, Part(1e-9, True), "change --share, or take a file of its own"),
    ):
        text = said(split, [SourceSpec(path)], tmp_path / "out", part, Reading())
        assert reason in text, text
        assert not list((tmp_path / "out").iterdir())


def test_values_of_a_table_that_json_lacks_are_written_as_text_and_images_as_urls(
    tmp_path: Path,
) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    rows = [
        pair(f"长椅 {n}", day=datetime.date(2024, 5, n + 1), images=[content]) for n in range(20)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    out = tmp_path / "out"
    policy = Reading(images=ImagePolicy(cache_root=str(tmp_path / "cache")))
    split([SourceSpec(str(tmp_path / "a.parquet"))], out, SHARE, policy)
    text = (out / "train.jsonl").read_text() + (out / "held_out.jsonl").read_text()
    assert text.count("长椅") == 20
    assert '"day": "2024-05-01"' in text
    again = read_conversations([SourceSpec(str(out / "*.jsonl"))], policy)
    shown = [Path(path).read_bytes() for conversation in again for path in conversation.images]
    assert shown == [content] * 20


# --- images --------------------------------------------------------------------------------------


def test_each_image_is_looked_at_once_and_only_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    monkeypatch.setattr(images, "check_image", looked.append)
    shown = Message("user", "Q", images=(ShownImage("a", 1, True), ShownImage("b"), ShownImage("a")))  # fmt: skip
    given = Conversation((Message("system", "S"), shown, Message("assistant", "A", train=False)))
    files = ImageFiles(ImagePolicy(check=True))
    for _ in range(2):
        placed = files.placed(given, tmp_path)
        assert placed.messages[1].images == (
            ShownImage(f"{tmp_path}/a", 1, True), ShownImage(f"{tmp_path}/b"), ShownImage(f"{tmp_path}/a"),
        )  # fmt: skip
        assert placed.messages[::2] == given.messages[::2]
    assert looked == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert ImageFiles(ImagePolicy()).placed(given, tmp_path) == placed
    assert len(looked) == 2
    plain = Conversation((Message("user", "Q"),))
    assert files.placed(plain, tmp_path) is plain


def test_paths_of_images_are_as_this_process_opens_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    assert images._under(Path("rows"), "x/../a.png") == "rows/a.png"
    assert "'../a.png' is outside rows" in said(images._under, Path("rows"), "../a.png")
    assert images._under(Path("rows"), f"{tmp_path}/rows/a.png") == f"{tmp_path}/rows/a.png"
    (tmp_path / "rows/loop").symlink_to("loop")
    assert images._under(Path("rows"), "loop") == "rows/loop"
