"""Streams, rule by rule: the order of their rows, what is counted and named, where a piece ends."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dialogues import Z1_TEMPLATE
from examples import dialogue, tiny_template
from hints import said
from rows import write_rows

from finetune.data.chat.template import ChatTemplate
from finetune.data.examples import stream as streams
from finetune.data.examples.dataset import LengthPolicy, load_examples, prepare
from finetune.data.examples.preparation import ExampleCounts, Kept
from finetune.data.examples.stream import ExampleStream, Position, StreamSample, StreamSettings
from finetune.data.reading.shards import shards_of
from finetune.data.reading.sources import AS_IS, Reading, SourceSpec
from finetune.data.reading.streams import BadRow

POLICY = LengthPolicy(100)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return tiny_template(tmp_path_factory.mktemp("tokenizer"))


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"question {number}", "response": f"answer {number}", **more}


def places(stream: ExampleStream, number: int) -> list[tuple[int, str]]:
    return [
        (example.index, example.location.rpartition("/")[2])
        for item in islice(stream.items(), number)
        for example in item.examples
    ]


def stream_of(
    path: Path, template: ChatTemplate, *, reading: Reading = AS_IS, packed: bool = False,
    buffer: int = 5, most: int = 100, held_out: Any = None, seed: int = 3, weight: float = 1.0,
) -> ExampleStream:  # fmt: skip
    sources = [SourceSpec(str(path), weight)]
    options = StreamSettings(LengthPolicy(most), reading, seed, buffer, packed)
    return ExampleStream(shards_of(sources), sources, template, options, held_out=held_out)


def test_a_stream_that_a_later_version_reads_has_its_rows_in_the_same_order(
    template: ChatTemplate, tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    for name, count in (("a", 13), ("b", 2), ("c", 6)):
        write_rows(tmp_path / f"rows/{name}.jsonl", [row(n) for n in range(count)])
    plain = places(stream_of(tmp_path / "rows", template), 60)
    found = " ".join(location.replace(".jsonl:", "") for _, location in plain[:42])
    assert found == (
        "c1 b1 a1 b2 a2 c2 a3 a5 c5 c3 a4 c4 c6 a7 a8 a9 a6 a10 a13 a11 a12 "
        "b1 a2 c2 a1 c1 b2 a4 c4 c5 c3 a3 a5 c6 a6 a9 a7 a8 a13 a12 a11 a10"
    )
    assert [index for index, _ in plain] == list(range(60))  # of three passes
    assert len({location for _, location in plain[:21]}) == 21


def test_the_seed_chooses_the_rows_of_half_a_source(template: ChatTemplate, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [row(n) for n in range(40)])

    def chosen(seed: int) -> set[str]:
        stream = stream_of(path, template, weight=0.5, seed=seed)
        return {place for _, place in places(stream, 10)}

    assert chosen(1) == chosen(1)
    assert len(chosen(1)) == 10
    found = [stream_of(path, template, weight=0.5, seed=seed, buffer=99) for seed in (1, 2)]
    first, second = ({place for _, place in places(one, 15)} for one in found)
    assert len(first & second) < 15


def test_packed_rows_stand_in_another_order_in_every_pass_block_and_piece(
    template: ChatTemplate, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [row(0)])
    ids = np.ones(60, np.int32)
    kept = [Kept(ids, [(0, 60, 1.0)], f"f:{n}", (f"{n}.png",)) for n in range(12)]

    def order(seed: int = 3, **begun: int) -> list[int]:
        stream = stream_of(path, template, packed=True, seed=seed)
        items = stream._arranged(kept, Position(examples=40, **begun))
        assert all(item.is_packed and len(item.examples) == 1 for item in items)
        examples = [item.examples[0] for item in items]
        assert all(e.location == f"f:{e.index - 40}" for e in examples)
        assert all(e.images == (f"{e.index - 40}.png",) for e in examples)
        return [example.index - 40 for example in examples]

    found = [order(), order(seed=4), order(number_of_pass=1), order(block=1), order(row=1)]
    assert len(set(map(tuple, found))) == 5
    assert order(taken=5, steps=7) == found[0]
    assert found[0] == [0, 1, 3, 6, 4, 8, 10, 5, 2, 7, 11, 9]
    assert stream_of(path, template, packed=True)._arranged([], Position()) == []


def test_what_a_stream_gave_is_counted_over_all_its_passes(
    template: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_PIECE_ROWS", 3)
    path = write_rows(tmp_path / "a.jsonl", [row(n) for n in range(7)])
    stream = stream_of(path, template, buffer=4)
    stepped = replace(streams.START, steps=5)
    passes = []
    for item in stream.items(stepped):
        stream.position = replace(stream.position, steps=stream.position.steps + 1)
        [example] = item.examples
        passes.append(stream.position.number_of_pass)
        assert example.index == len(passes) - 1
        assert stream.position.steps == 5 + len(passes)
        if len(passes) == 18:
            break
    assert passes == [0] * 7 + [1] * 7 + [2] * 4
    assert stream.read.rows == 14 + 4 == stream.read.kept
    assert stream.position.counts.rows == 14 + 3
    again = stream_of(path, template, buffer=4)
    assert [e.index for item in islice(again.items(stream.position), 3) for e in item.examples] == [18, 19, 20]  # fmt: skip


def test_held_out_rows_of_a_stream_are_named_and_nowhere_counted_as_kept(
    template: ChatTemplate, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [row(n) for n in range(9)])
    dev = write_rows(tmp_path / "dev.jsonl", [row(n) for n in range(7)])
    cache = tmp_path / "cache"
    held_out = load_examples([SourceSpec(str(dev))], template, POLICY, cache_root=cache)
    alone = write_rows(tmp_path / "left.jsonl", [row(n) for n in (7, 8)])
    left = load_examples([SourceSpec(str(alone))], template, POLICY, cache_root=cache).counts
    stream = stream_of(path, template, held_out=held_out.stored.digests(), buffer=50)
    list(islice(stream.items(), 2))
    counts = stream.read
    assert (counts.rows, counts.kept, counts.bad) == (9, 2, 0)
    assert (counts.tokens, counts.supervised_tokens) == (left.tokens, left.supervised_tokens)
    assert counts.dropped == {streams.HELD_OUT: 7}
    assert len(counts.named) == 5
    assert all(line.endswith(f": {streams.HELD_OUT}") for line in counts.named)


def test_bad_rows_of_a_stream_are_named_in_front_of_those_that_are_left_out(
    template: ChatTemplate, tmp_path: Path
) -> None:
    rows = [row(0), {"prompt": "q"}, {"prompt": "fox " * 200, "response": "a"}, row(1, note="read me, please")]  # fmt: skip
    path = write_rows(tmp_path / "a.jsonl", [*rows, *({"prompt": "q"} for _ in range(6))])
    stream = stream_of(path, template, reading=Reading("skip", 0.9), buffer=50)
    list(islice(stream.items(), 2))
    counts = stream.read
    assert (counts.rows, counts.bad, counts.kept) == (10, 7, 2)
    assert counts.unread == {"note": 1}
    assert len(counts.named) == 6
    assert "no trained reply fits" in counts.named[5]
    with pytest.raises(Exception, match=r"^7 rows of the stream cannot be used"):
        next(stream_of(path, template, buffer=50).items())


def test_doubts_of_a_streams_rows_are_counted(template: ChatTemplate, tmp_path: Path) -> None:
    text = "### Instruction:\nSay hi\n\n### Response:\nhi"
    path = write_rows(tmp_path / "a.jsonl", [{"text": text}, {"text": text + "."}])
    stream = stream_of(path, template)
    list(islice(stream.items(), 2))
    assert list(stream.read.doubts.values()) == [2]


@pytest.mark.parametrize(("number", "more"), [(30, ""), (33, "\n  … and 3 more\n")])
def test_of_many_bad_rows_of_a_stream_the_first_are_listed(number: int, more: str) -> None:
    bad = [BadRow(f"f:{n}", "no row") for n in range(number)]
    of: Any = SimpleNamespace(settings=SimpleNamespace(reading=Reading()))
    text = said(ExampleStream._judge, of, bad, ExampleCounts(rows=90, bad=number))
    assert text.startswith(f"{number} rows of the stream")
    assert text.count("\n  f:") == 30
    assert more in text
    assert ("more" in text) == bool(more)


def test_pieces_of_a_stream_end_by_rows_by_characters_and_with_their_block(
    template: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_PIECE_ROWS", 4)
    monkeypatch.setattr(streams, "_PIECE_CHARACTERS", 40)
    stream = stream_of(write_rows(tmp_path / "a.jsonl", [row(0)]), template)
    monkeypatch.setattr(streams, "characters", lambda size: size)
    monkeypatch.setattr(streams, "Row", SimpleNamespace)
    sizes = [1, 1, 1, 1, 39, 1, 40, 5, 100, 3]
    rows: Any = [SimpleNamespace(row=SimpleNamespace(value=size)) for size in sizes]

    def pieces(start: int) -> list[tuple[int, list[int]]]:
        return [
            (first, [r.row.value for r in piece]) for first, piece in stream._pieces(rows, start)
        ]

    whole = [(0, [1, 1, 1, 1]), (4, [39, 1]), (6, [40]), (7, [5, 100]), (9, [3])]
    assert pieces(0) == whole
    assert pieces(6) == whole[2:]
    stream.settings = replace(stream.settings, packed=True)
    assert pieces(0) == [(0, sizes)]
    stream.settings = replace(stream.settings, policy=LengthPolicy(1))
    monkeypatch.setattr(streams, "_PACKED_ROWS", 15)  # at three characters a token
    assert [first for first, _ in pieces(0)] == [0, 7, 9]
    monkeypatch.setattr(streams, "BLOCK_CHARACTERS", 4)
    assert [first for first, _ in pieces(0)] == [0, 4, 5, 7, 8, 9]


def test_the_sample_of_a_stream_is_its_first_items(template: ChatTemplate, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [row(n) for n in range(90)])
    stream = stream_of(path, template, buffer=100)
    sample = StreamSample(stream)
    expected = [e for item in islice(stream.items(), 64) for e in item.examples]
    assert [sample.location(n) for n in range(len(sample))] == [e.location for e in expected]
    assert len(sample) == 64
    assert sample.lengths.tolist() == [len(e.input_ids) for e in expected]
    assert sample.lengths.dtype == np.int32
    assert sample[63].input_ids.tolist() == expected[63].input_ids.tolist()
    assert (sample.fingerprint, sample.counts.rows) == (stream.fingerprint, 90)
    assert sample.images() == []


@pytest.mark.parametrize("saved", [None, [], "x", {}, Position().as_json() | {"format": 0}])
def test_what_is_no_position_is_refused(saved: Any) -> None:
    assert "another version" in said(streams.position_of, saved)


def test_a_stream_reads_rows_as_its_checkpoint_takes_them(
    template: ChatTemplate, tmp_path: Path
) -> None:
    reply = {"role": "assistant", "content": "a", "reasoning_content": "why"}
    asked = {"role": "user", "content": "q"}
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [asked, reply]}])
    z1 = ChatTemplate(replace(template.tokenizer, chat_template=Z1_TEMPLATE))
    [example] = next(stream_of(path, z1).items()).examples
    assert "<think>\nwhy\n</think>" in z1.decode(example.input_ids)
    text = said(next, stream_of(path, template).items())
    assert "a.jsonl:1: message 2: has reasoning in a key of its own" in text
    shows = write_rows(tmp_path / "b.jsonl", [{"messages": [asked | {"image": "x.png"}, reply]}])
    text = said(next, stream_of(shows, template).items())
    assert f"b.jsonl:1: shows an image, but this checkpoint ({template.tokenizer.name})" in text
    elsewhere = ExampleStream((), (), template, stream_of(path, template).settings, cache_root=tmp_path)  # fmt: skip
    assert elsewhere._reader._root == tmp_path / "streams"


def test_turns_of_a_thinking_checkpoint_are_counted_and_those_without_loss_named(
    template: ChatTemplate, tmp_path: Path
) -> None:
    z1 = ChatTemplate(replace(template.tokenizer, chat_template=Z1_TEMPLATE))
    talks = [dialogue(2), dialogue(1, "f:2", train=False), dialogue(1, "f:3", "<think>a</think>b")]
    counts = prepare(talks, z1, POLICY, key="k", cache_root=tmp_path).counts
    assert (counts.rows, counts.kept) == (3, 3)
    assert (counts.turns, counts.without_thought) == (3, 2)
    assert counts.named == ("f:2: no reply that is trained",)
    plain = prepare(talks, template, POLICY, key="k", cache_root=tmp_path).counts
    assert (plain.turns, plain.without_thought) == (0, 0)
