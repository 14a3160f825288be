"""Examples, what no single rule says: what is passed on, what goes on from where, what never changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from examples import dialogue, tiny_template
from hints import said
from rows import write_rows
from test_stream_rules import POLICY, row

from finetune.config.schema import DataSection, ModelSection, Source
from finetune.data.chat.image import ImageSpec
from finetune.data.chat.template import ChatTemplate
from finetune.data.dialogue.conversation import Conversation, Message, ShownImage
from finetune.data.examples import ahead, preparation, selection
from finetune.data.examples.batch_plan import BatchPlan, grouped_order, shuffled_order
from finetune.data.examples.collate import Collator
from finetune.data.examples.dataset import Example, LengthPolicy, example_of, load_examples, prepare
from finetune.data.examples.packing import pack
from finetune.data.examples.preparation import ExampleCounts, Tally, notes_of, thought_notes
from finetune.data.examples.selection import Selection
from finetune.data.examples.shards import of_shard
from finetune.data.examples.store import ExampleFile, ExampleWriter, digests, ends_of
from finetune.data.reading.section import reading_of
from finetune.data.reading.sources import Reading, SourceSpec


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return tiny_template(tmp_path_factory.mktemp("tokenizer"))


def told(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


# --- what a later version must not change ---------------------------------------------------------


def test_a_run_that_a_later_version_resumes_sees_its_examples_in_the_same_order() -> None:
    """Whoever changes one of these changes what a resumed run is trained on."""
    lengths = np.arange(400) * 7 % 301 + 5
    orders = [
        order(lengths, 8, seed, epoch).tolist()
        for order in (grouped_order, shuffled_order)
        for seed, epoch in ((0, 0), (0, 1), (5, 2))
    ]
    plans = [
        [part.tolist() for turn in plan.dealt(3) for part in turn]
        for grouped in (False, True)
        for plan in [BatchPlan(lengths, 3, 2, 2, seed=9, group_by_length=grouped)]
    ]
    many = np.arange(3000) * 13 % 59 + 4
    assert [told(orders), told(plans), told(pack(many, 64, 7))] == [
        "84ce912742382258",
        "aa5ded4554739ec3",
        "320c4d68cff73d3c",
    ]


def test_padding_is_that_of_the_epoch_that_is_asked_for() -> None:
    plan = BatchPlan(np.arange(90) % 17 + 1, 4, 2, 2, seed=1)
    found = []
    for epoch in range(3):
        parts = [plan.lengths[part] for turn in plan.dealt(epoch) for part in turn if len(part)]
        cells = sum(int(part.max()) * len(part) for part in parts)
        found.append(1 - sum(int(part.sum()) for part in parts) / cells)
        assert plan.padding(epoch) == pytest.approx(found[-1])
    assert len(set(found)) == 3
    with pytest.raises(ValueError, match="3 examples in batches of 0"):
        BatchPlan(np.ones(3, int), 0)


# --- preparation ---------------------------------------------------------------------------------


def test_messages_that_a_long_dialogue_loses_are_counted(
    template: ChatTemplate, tmp_path: Path
) -> None:
    longest, middle = (len(r.input_ids) for r in template.render([dialogue(4), dialogue(3)]))
    for most, lost in ((longest, 0), (longest - 1, 2), (middle - 1, 4)):
        data = prepare([dialogue(4)], template, LengthPolicy(most), key=str(most), cache_root=tmp_path)  # fmt: skip
        found = data.counts
        assert (found.truncated, found.messages_removed) == (int(lost > 0), lost)


def test_of_a_shortened_dialogue_only_images_that_are_left_are_shown(
    template: ChatTemplate,
) -> None:
    class Several(ImageSpec):
        rule = SimpleNamespace(most=None, roles=("user",), check=lambda messages: None)

    seeing = ChatTemplate(replace(template.tokenizer, image=Several(28, 1, 0)))
    seeing.__dict__["image_rule"] = Several.rule
    turns = [
        one
        for n in range(3)
        for one in (Message("user", f"q {n}", images=(ShownImage(f"{n}.png"),)), Message("assistant", "a"))
    ]  # fmt: skip
    talk = Conversation(tuple(turns), location="f:1")
    length = len(seeing.render([talk])[0].input_ids)
    for most, shown in ((length, ("0.png", "1.png", "2.png")), (length - 1, ("1.png", "2.png"))):
        [kept] = preparation.examples_of([(0, talk)], seeing, LengthPolicy(most), Tally())
        assert kept.images == shown


def test_dialogues_are_written_a_thousand_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(number: int) -> list[int]:
        talk = dialogue()
        return [len(batch) for batch in preparation._batches((0, talk) for _ in range(number))]

    assert sizes(2001) == [1000, 1000, 1]
    assert sizes(1000) == [1000]
    assert sizes(0) == []


def test_notes_name_most_rows_first_and_no_thought_where_there_is_none() -> None:
    columns = [line.partition(":")[0] for line in notes_of({"b": 1, "a": 1, "z": 7}, {})]
    assert columns == ["z", "a", "b"]
    assert notes_of({}, {"odd": 1234}) == ["1,234 × odd"]
    assert thought_notes(5, 0) == []
    assert thought_notes(5000, 1000)[0].startswith("1,000 of 5,000 turns with loss")
    counts = ExampleCounts(unread={"a": 1}, doubts={"d": 1}, turns=2, without_thought=1)
    assert len(counts.notes()) == 3


def test_files_are_prepared_ahead_as_a_run_prepares_them(
    template: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def loaded(sources: Sequence[SourceSpec], *given: Any, **named: Any) -> Any:
        asked.append((list(sources), given, named))
        return SimpleNamespace(counts=ExampleCounts(rows=len(asked), kept=1))

    opened: list[Any] = []
    monkeypatch.setattr(ahead, "load_examples", loaded)
    monkeypatch.setattr(ahead, "load_chat_tokenizer", lambda *of: opened.append(of) or template.tokenizer)  # fmt: skip
    files = [str(write_rows(tmp_path / f"{name}.jsonl", [row(0)])) for name in "abc"]
    section = DataSection(
        train=[Source(path=file, weight=0.5) for file in files], max_length=77, train_on="last_reply",
        on_too_long="drop", on_bad_row="skip", max_bad_rows=0.3, cache_dir=str(tmp_path / "kept"),
    )  # fmt: skip
    model = ModelSection(path="m", revision="r")
    assert ahead.prepare_ahead(section, model, 5, None).rows == 1
    [(sources, (_, policy), named)] = asked
    assert [source.path for source in sources] == files
    assert policy == LengthPolicy(77, "last_reply", "drop")
    assert named == {"reading": reading_of(section), "seed": 5, "cache_root": tmp_path / "kept"}
    assert opened == [("m", "r")]
    asked.clear()
    counts = ahead.prepare_ahead(section, model, 5, "1/2")
    assert (counts.rows, counts.kept) == (1 + 2, 2)
    assert [(source.path, source.weight) for [source], _, _ in asked] == [(files[0], 1.0), (files[2], 1.0)]  # fmt: skip
    assert all(policy == LengthPolicy(77, "last_reply", "drop") for _, (_, policy), _ in asked)
    capped = section.model_copy(update={"train": [Source(path=files[0], max_rows=1)]})
    assert ahead.prepare_ahead(capped, model, 5, None).kept == 1
    assert "--shard takes files one by one" in said(ahead.prepare_ahead, capped, model, 5, "1/1")


@pytest.mark.parametrize("shard", ["a/2", "1/b", "/2", "1/", "٣/x", "1.5/2", "-1/2"])
def test_a_shard_is_two_whole_numbers(shard: str) -> None:
    assert "is not i/n" in said(of_shard, [Path("a")] * 9, shard)


def test_files_whose_rows_are_chosen_among_all_are_not_put_together_from_parts(
    template: ChatTemplate, tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    for name in "ab":
        write_rows(tmp_path / f"rows/{name}.jsonl", [row(n, name=name) for n in range(8)])

    def number(path: Path) -> int:
        source = SourceSpec(str(path), max_rows=3)
        return len(load_examples([source], template, POLICY, cache_root=tmp_path / "cache"))

    assert [number(tmp_path / f"rows/{name}.jsonl") for name in "ab"] == [3, 3]
    assert number(tmp_path / "rows") == 3


def test_repeats_are_left_out_of_each_source_before_it_is_weighed(
    template: ChatTemplate, tmp_path: Path
) -> None:
    first = write_rows(tmp_path / "a.jsonl", [row(0), row(0), row(1), row(2)])
    second = write_rows(tmp_path / "b.jsonl", [row(2), row(3), row(4)])
    third = write_rows(tmp_path / "c.jsonl", [row(5)])
    sources = [SourceSpec(str(first)), SourceSpec(str(second), weight=2.0), SourceSpec(str(third))]
    data = load_examples(
        sources, template, POLICY, selection=Selection(deduplicate="exact"), cache_root=tmp_path / "cache"
    )  # fmt: skip
    seen = [data.location(n).rpartition("/")[2] for n in range(len(data))]
    assert sorted(seen) == [
        "a.jsonl:1", "a.jsonl:3", "a.jsonl:4", "b.jsonl:2", "b.jsonl:2", "b.jsonl:3", "b.jsonl:3", "c.jsonl:1",
    ]  # fmt: skip
    assert (data.counts.duplicates, data.counts.kept) == (2, 8)


def test_what_was_not_read_and_what_is_doubtful_is_counted_with_the_examples(
    template: ChatTemplate, tmp_path: Path
) -> None:
    text = "### Instruction:\nSay hi\n\n### Response:\nhi"
    rows = [row(0, note="read me, please"), row(1, note="and me, please"), {"prompt": "x"}, row(2)]
    rows.append({"prompt": "fox " * 90, "response": "a"})
    path = write_rows(tmp_path / "a.jsonl", rows)
    other = write_rows(
        tmp_path / "b.jsonl",
        [{"text": text}, {"text": "word " * 90}],
    )
    data = load_examples(
        [SourceSpec(str(path)), SourceSpec(str(other))], template, LengthPolicy(60),
        reading=Reading("skip", 0.5), cache_root=tmp_path / "cache",
    )  # fmt: skip
    counts = data.counts
    assert (counts.rows, counts.bad) == (7, 1)
    assert counts.unread == {"note": 2}
    assert list(counts.doubts.values()) == [1]
    assert counts.named[0].startswith(f"{path}:3: ")
    assert counts.named[1].startswith(f"{path}:5: no trained reply fits")
    assert counts.text_blocks == counts.kept - 3 > 2


# --- what is alike -------------------------------------------------------------------------------


@pytest.fixture
def near(template: ChatTemplate, tmp_path: Path) -> Any:
    pytest.importorskip("datasketch", reason="the extra `near` is not installed")

    def kept(*prompts: str) -> list[int]:
        path = write_rows(tmp_path / "near.jsonl", [{"prompt": p, "response": "a"} for p in prompts])  # fmt: skip
        data = load_examples(
            [SourceSpec(str(path))], template, LengthPolicy(9000), selection=Selection(deduplicate="near"),
            cache_root=tmp_path / "cache",
        )  # fmt: skip
        return [int(data.location(n).rpartition(":")[2]) for n in range(len(data))]

    return kept


def test_examples_that_share_half_of_their_words_or_all_in_another_order_are_no_repeats(
    near: Any,
) -> None:
    words = [f"{n * 7919 % 1000}" for n in range(120)]
    half = [*words[:80], *(f"other{n}" for n in range(40))]
    mixed = sorted(words)
    almost = [*words[:118], "the", "end"]
    texts = [" ".join(each) for each in (words, half, mixed, almost)]
    assert near(*texts) == [1, 2, 3]


def test_an_example_shorter_than_a_run_and_a_document_without_a_question_have_runs() -> None:
    def runs(ids: list[int]) -> list[list[int]]:
        file: Any = [SimpleNamespace(input_ids=np.array(ids, np.int32), images=())]
        [found] = selection._runs(file, 7)
        return [np.frombuffer(one, np.int32).tolist() for one in found]

    assert runs([1, 2, 7, 3]) == [[7, 3]]
    assert runs([1, 2, 3, 4, 5, 6]) == [[1, 2, 3, 4, 5], [2, 3, 4, 5, 6]]
    assert runs([9, 7, 1, 1, 1, 1, 1, 1, 1, 7]) == [[1] * 5, [1, 1, 1, 1, 7], [7, 1, 1, 1, 1]]


def test_digests_of_a_file_are_those_of_its_rows_in_whatever_batch(tmp_path: Path) -> None:
    rows = [([1, 2, 3], ("a",)), ([4], ()), ([1, 2, 3], ()), ([4], ()), ([4], ("a", "b"))]
    (tmp_path / "f").write_bytes(b"of an earlier try")
    with ExampleWriter(tmp_path / "f") as writer:
        for batch in (rows[:2], rows[2:4], rows[4:]):
            writer.append(
                [np.array(ids, np.int32) for ids, _ in batch], [[] for _ in batch],
                ["f:1" for _ in batch], [shown for _, shown in batch],
            )  # fmt: skip
    found = ExampleFile(tmp_path / "f").digests().tolist()
    for number, (ids, shown) in enumerate(rows):
        assert found[number] == digests(np.array(ids, np.int32), ends_of([len(ids)]), [shown])[0]
    assert found[1] == found[3]
    assert len(set(found)) == 4


# --- batches of images ---------------------------------------------------------------------------


def test_the_images_of_packed_rows_are_counted_on_from_row_to_row() -> None:
    given: list[Any] = []

    class Grids:
        rules, size, begin_id, patch_token = "", 0, 1, ""

        def arrays(self, images: Any) -> dict[str, Any]:
            given.extend(images)
            return {"image_grid_thw": np.array([[1, n, n] for n in range(len(images))])}

        def positions(self, ids: Any, grids: Any) -> Any:
            return np.tile(np.array([0, *grids[:, 1]]), (3, 1)) + np.array([[0], [100], [200]])

    def example(length: int, *images: str) -> Example:
        ids = np.ones(length, np.int32)
        return example_of(ids, [], index=0, location=f"f:{length}", images=images)

    spec: Any = Grids()
    batch = Collator(0, image=spec)([[example(3, "a", "b"), example(2)], [example(4, "c", "d", "e")]])  # fmt: skip
    assert given == [("a", "f:3"), ("b", "f:3"), ("c", "f:4"), ("d", "f:4"), ("e", "f:4")]
    assert batch["position_ids"][0].tolist() == [[0, 0, 1, 0, 1], [0, 2, 3, 4, 0]]
    assert batch["position_ids"][2].tolist() == [[200, 200, 201, 0, 1], [200, 202, 203, 204, 0]]
    given.clear()
    asked: list[list[str]] = []

    def features(paths: Sequence[str]) -> dict[str, Any]:
        asked.append(list(paths))
        return {"image_features": "made"}

    kept = Collator(0, image=spec, features=features)([example(2, "b", "a"), example(1, "c")])
    assert (asked, given, kept["image_features"]) == ([["b", "a", "c"]], [], "made")
    assert "position_ids" not in kept
    assert "image_features" not in Collator(0, image=spec, features=features)([example(2)])
    assert set(Collator(0)([example(2, "a")])) == {"input_ids", "labels", "sample_ids"}
