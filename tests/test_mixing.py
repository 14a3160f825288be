"""What an epoch holds: a held-out part by group, sources mixed and capped, repeats left out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examples import tiny_template
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config.schema import DataSection
from finetune.data.chat.template import ChatTemplate
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.data.examples.dataset import LengthPolicy, PreparedDataset, load_examples
from finetune.data.examples.selection import Selection, mixed, repeats
from finetune.data.preview.report import check
from finetune.data.reading.parts import Part
from finetune.data.reading.section import (
    AS_DEFAULT,
    reading_of,
    training_sources,
    validation_sources,
    with_rows,
)
from finetune.data.reading.sources import Reading, SourceSpec, read_conversations
from finetune.data.reading.split import split
from finetune.errors import ConfigError, DataError

POLICY = LengthPolicy(400)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return tiny_template(tmp_path_factory.mktemp("tokenizer"))


def write(path: Path, *pairs: tuple[str, str], **columns: Any) -> str:
    rows = [{"prompt": p, "response": r, **columns} for p, r in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompts(sources: Any) -> list[str]:
    return [c.messages[0].content for c in read_conversations(sources)]


def test_of_two_sources_with_one_weight_other_rows_are_chosen() -> None:
    rows = np.arange(40)
    view = mixed([rows, rows + 100], [0.5, 0.5], Selection(), 0)
    assert len(view) == 40
    assert {*view[view < 100]} != {*(view[view >= 100] - 100)}


def test_a_share_is_held_out_by_what_is_asked(tmp_path: Path) -> None:
    pairs = [(f"question {n // 2}", f"answer {n}") for n in range(400)]
    section = DataSection(train=write(tmp_path / "a.jsonl", *pairs), validation="10%")
    train, held = prompts(training_sources(section)), prompts(validation_sources(section))
    assert sorted(train + held) == sorted(p for p, _ in pairs)
    assert not set(train) & set(held)
    assert set(Counter(held).values()) == {2}
    assert 10 < len(held) < 80
    stream = read_conversations(validation_sources(section))
    assert (len(list(stream)), stream.rows - stream.elsewhere) == (len(held), len(held))
    # More rows before and behind move nobody to the other side.
    more = DataSection(
        train=write(tmp_path / "b.jsonl", ("new", "x"), *pairs, ("newer", "x")), validation="10%"
    )
    assert set(held) <= set(prompts(validation_sources(more)))


def test_a_column_groups_what_belongs_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "response": "a", "customer": f"c{n % 20}"} for n in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataSection(train=str(tmp_path / "a.jsonl"), validation="30%", group_by="customer")
    held = {int(p[1:]) % 20 for p in prompts(validation_sources(section))}
    assert held
    assert not held & {int(p[1:]) % 20 for p in prompts(training_sources(section))}
    stream = read_conversations(training_sources(section))
    assert list(stream)
    assert not stream.unread
    with pytest.raises(DataError, match=r"a.jsonl:1: the row has no 'shop', by which"):
        prompts(training_sources(section.model_copy(update={"group_by": "shop"})))


def test_a_share_that_holds_out_nobody_is_an_error(tmp_path: Path) -> None:
    section = DataSection(train=write(tmp_path / "a.jsonl", ("q", "a")), validation="1%")
    with pytest.raises(DataError, match=r"of 1 dialogues none is held out at 1.0%"):
        prompts(validation_sources(section))


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=5), reply=st.text(max_size=5), share=st.floats(0.01, 0.99))
def test_every_dialogue_is_on_exactly_one_side(text: str, reply: str, share: float) -> None:
    conversation = Conversation((Message("user", text), Message("assistant", reply)))
    sides = [Part(share, held_out=side).takes({}, conversation) for side in (True, False)]
    assert sides in ([True, False], [False, True])


def test_split_writes_both_sides_with_the_rows_as_they_are(tmp_path: Path) -> None:
    pairs = [(f"q{n // 2}", f"a{n}") for n in range(100)]
    source = [SourceSpec(write(tmp_path / "a.jsonl", *pairs, note=["x", 1]))]
    part = Part(0.2, held_out=True)
    counts = split(source, tmp_path / "out", part, Reading())
    sides = [
        [json.loads(line) for line in (tmp_path / "out" / name).read_text("utf-8").splitlines()]
        for name in ("train.jsonl", "held_out.jsonl")
    ]
    assert [len(side) for side in sides] == [counts.train, counts.held_out]
    assert {row["prompt"] for row in sides[0]}.isdisjoint({row["prompt"] for row in sides[1]})
    assert {row["response"] for side in sides for row in side} == {a for _, a in pairs}
    assert all(row["note"] == ["x", 1] for side in sides for row in side)
    with pytest.raises(ConfigError, match="exist; give --overwrite"):
        split(source, tmp_path / "out", part, Reading())


def test_commands_read_rows_by_the_same_options_as_a_config(tmp_path: Path) -> None:
    user, reply = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [user, user, reply], "x": "y"}))
    file = str(tmp_path / "a.jsonl")
    assert "data.turns: merge does" in check(file).bad_rows[0].reason
    (source,) = check(file, options=["turns=merge", "ignore_columns=x,z"]).sources
    assert (source.dialogues, dict(source.unread)) == (1, {})
    asked = with_rows(AS_DEFAULT, options=["reasoning=drop"])
    assert reading_of(asked).rules.reasoning == "drop"
    for wrong, said in (
        ("turns=both", "--rows turns=both: Input should be 'strict' or 'merge'"),
        ("train=x", "--rows train=x: write name=value with one of turns, calls_in_text"),
        ("turns", "--rows turns: write name=value"),
    ):
        with pytest.raises(ConfigError, match=said):
            check(file, options=[wrong])


@pytest.mark.parametrize(
    ("sizes", "weights", "selection", "rows"),
    [
        ([1000, 100], [1, 1], Selection(), [1000, 100]),
        ([1000, 100], [1, 1], Selection(stop="first"), [100, 100]),
        ([1000, 100], [1, 1], Selection(stop="all"), [1000, 1000]),
        ([1000, 100], [3, 1], Selection(stop="first"), [300, 100]),
        ([10_000, 100], [1, 1], Selection(stop="first", temperature=2), [1000, 100]),
        ([10_000, 100], [1, 1], Selection(stop="all", temperature=1), [10_000, 100]),
        ([100, 0], [1, 1], Selection(stop="first"), [100, 0]),
    ],
)
def test_shares_of_the_mixture_say_how_often_rows_are_seen(
    sizes: list[int], weights: list[float], selection: Selection, rows: list[int]
) -> None:
    often = repeats(sizes, weights, selection)
    assert [round(size * o) for size, o in zip(sizes, often, strict=True)] == rows


def counted(data: PreparedDataset) -> Counter[str]:
    return Counter(Path(data.location(n)).name.partition(".")[0] for n in range(len(data)))


def test_an_epoch_of_mixed_and_capped_sources(template: ChatTemplate, tmp_path: Path) -> None:
    large = write(tmp_path / "large.jsonl", *((f"q{n}", "a") for n in range(90)))
    small = write(tmp_path / "small.jsonl", *((f"r{n}", "a") for n in range(10)))

    def epoch(selection: Selection, cap: int | None = None) -> Counter[str]:
        sources = [SourceSpec(large, max_rows=cap), SourceSpec(small)]
        return counted(
            load_examples(
                sources, template, POLICY, selection=selection, cache_root=tmp_path / "cache"
            )
        )

    assert epoch(Selection()) == {"large": 90, "small": 10}
    assert epoch(Selection(), cap=30) == {"large": 30, "small": 10}
    assert epoch(Selection(stop="first")) == {"large": 10, "small": 10}
    assert epoch(Selection(stop="all")) == {"large": 90, "small": 90}


def test_repeats_of_earlier_and_of_held_out_examples_are_left_out(
    template: ChatTemplate, tmp_path: Path
) -> None:
    pairs = [("one", "a"), ("two", "b"), ("one", "a"), ("three", "c")]
    train = [SourceSpec(write(tmp_path / "train.jsonl", *pairs))]
    held = [SourceSpec(write(tmp_path / "held.jsonl", ("two", "b"), ("two", "b")))]

    def load(sources: Any, selection: Selection) -> PreparedDataset:
        return load_examples(
            sources, template, POLICY, selection=selection, cache_root=tmp_path / "cache"
        )

    held_out = load(held, Selection(deduplicate="exact"))
    assert (len(held_out), held_out.counts.duplicates) == (1, 1)
    data = load(train, Selection(deduplicate="exact", held_out=held_out))
    assert [data.location(n).rpartition(":")[2] for n in range(len(data))] == ["1", "4"]
    assert data.counts.duplicates == 2
    assert held_out.shared_with(data) == []
    (location,) = held_out.shared_with(load(train, Selection()))  # of two that are stored
    assert location.endswith("held.jsonl:1")
    fingerprints = {load(train, s).fingerprint for s in (
        Selection(), Selection(deduplicate="exact"),
        Selection(deduplicate="exact", held_out=held_out),
    )}  # fmt: skip
    assert len(fingerprints) == 3


def test_near_duplicates_are_left_out_and_other_questions_under_the_same_system_text_stay(
    template: ChatTemplate, tmp_path: Path
) -> None:
    pytest.importorskip("datasketch", reason="the extra `near` is not installed")
    text = " ".join(f"word{n}" for n in range(40))
    pairs = [(text, "yes"), (text + " indeed", "yes"), ("another thing", "no")]
    system = " ".join(f"rule{n} holds" for n in range(2000))
    file = write(tmp_path / "a.jsonl", *pairs, system=system)
    data = load_examples(
        [SourceSpec(file)],
        template,
        LengthPolicy(80_000),
        selection=Selection(deduplicate="near"),
        cache_root=tmp_path / "cache",
    )
    assert [data.location(n).rpartition(":")[2] for n in range(len(data))] == ["1", "3"]


def test_near_duplicates_of_held_out_examples_are_left_out(
    template: ChatTemplate, tmp_path: Path
) -> None:
    pytest.importorskip("datasketch", reason="the extra `near` is not installed")
    text = " ".join(f"word{n}" for n in range(40))

    def load(name: str, *pairs: tuple[str, str], selection: Selection) -> PreparedDataset:
        file = [SourceSpec(write(tmp_path / name, *pairs))]
        return load_examples(
            file, template, POLICY, selection=selection, cache_root=tmp_path / "cache"
        )

    held_out = load("held.jsonl", (text, "yes"), selection=Selection(deduplicate="near"))
    near = Selection(deduplicate="near", held_out=held_out)
    data = load("train.jsonl", (text + " indeed", "yes"), ("another thing", "no"), selection=near)
    assert [data.location(n).rpartition(":")[2] for n in range(len(data))] == ["2"]
