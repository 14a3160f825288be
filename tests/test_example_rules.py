"""Examples and batches, rule by rule: who gets what, what is counted, what stands where."""

from __future__ import annotations

import gc
import itertools
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from examples import dialogue, tiny_template
from hints import said

from finetune.config.schema import DataSection, ModelSection, Source
from finetune.data.chat.image import ImageSpec
from finetune.data.chat.spans import MessageRun, Rendered, blocks
from finetune.data.chat.template import ChatTemplate
from finetune.data.dialogue.conversation import Conversation
from finetune.data.examples import preparation, selection
from finetune.data.examples.batch_plan import BatchPlan, deal, grouped_order, shuffled_order
from finetune.data.examples.collate import Collator
from finetune.data.examples.dataset import Example, LengthPolicy, example_of, load_examples
from finetune.data.examples.packing import pack
from finetune.data.examples.preparation import ExampleCounts, Tally, total
from finetune.data.examples.shards import of_shard
from finetune.data.examples.store import ExampleFile, ExampleWriter
from finetune.data.examples.stream import ExampleStream
from finetune.data.reading.parts import Part
from finetune.data.reading.sources import Reading, SourceSpec
from finetune.data.reading.streams import BadRow
from finetune.errors import DataError

POLICY = LengthPolicy(100)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return tiny_template(tmp_path_factory.mktemp("tokenizer"))


def write(path: Path, *prompts: str, **columns: Any) -> SourceSpec:
    rows = [{"prompt": one, "response": "a", **columns} for one in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SourceSpec(str(path))


# --- batches -------------------------------------------------------------------------------------


def test_the_direction_turns_with_every_pass_and_the_first_process_with_every_step() -> None:
    step = np.arange(8)
    dealt = {number: [[p.tolist() for p in turn] for turn in deal(step, number, 1, 4)] for number in range(5)}  # fmt: skip
    assert dealt[0] == [[[0], [1], [2], [3]], [[7], [6], [5], [4]]]
    assert dealt[1] == [[[3], [0], [1], [2]], [[4], [7], [6], [5]]]
    assert dealt[3] == [[[1], [2], [3], [0]], [[6], [5], [4], [7]]]
    assert dealt[4] == dealt[0]
    uneven = [[p.tolist() for p in turn] for turn in deal(np.arange(5), 0, 2, 2)]
    assert uneven == [[[0, 1], [2, 3]], [[], [4]]]


@pytest.mark.parametrize("order", [shuffled_order, grouped_order])
@pytest.mark.parametrize("place", range(10))
def test_the_longest_example_is_in_the_first_full_batch(order: Any, place: int) -> None:
    lengths = [5] * 10
    lengths[place] = 9
    for seed in range(8):
        found = order(lengths, 4, seed, 0).tolist()
        assert sorted(found) == list(range(10))
        assert place in found[:4]


def test_epochs_of_a_small_set_have_other_batches_and_long_ones_come_at_any_time() -> None:
    lengths = np.arange(40)
    batches = [{frozenset(b) for b in grouped_order(lengths, 4, 0, epoch).reshape(-1, 4).tolist()} for epoch in range(6)]  # fmt: skip
    assert all(one != other for one, other in itertools.pairwise(batches))
    order = grouped_order(np.arange(400), 4, 0, 0).reshape(-1, 4).mean(axis=1)
    assert abs(np.corrcoef(order, np.arange(100))[0, 1]) < 0.5


def test_a_plan_counts_its_steps_and_passes() -> None:
    plan = BatchPlan(np.full(21, 3), 2, accumulation=3, world_size=2)
    assert (plan.global_batch, plan.steps_per_epoch) == (12, 2)
    assert plan.passes_per_epoch == len(list(plan.dealt(0))) == 3 + 3
    assert BatchPlan(np.full(24, 3), 2, 3, 2).passes_per_epoch == 6
    assert BatchPlan(np.full(25, 3), 2, 3, 2).passes_per_epoch == 7
    with pytest.raises(ValueError, match="0 examples"):
        BatchPlan(np.array([]), 1)


def test_rows_are_filled_with_the_longest_first() -> None:
    assert sorted(map(sorted, pack([6, 4, 5, 5, 10], 10, 0))) == [[0, 1], [2, 3], [4]]
    assert sorted(map(sorted, pack([7, 7, 3, 3], 10, 0))) in ([[0, 2], [1, 3]], [[0, 3], [1, 2]])
    with pytest.raises(ValueError, match="a document of 11 tokens"):
        pack([11], 10, 0)


def example(number: int, length: int, **more: Any) -> Example:
    ids = np.arange(length, dtype=np.int32)
    spans = more.pop("spans", [(0, length, 1.0)])
    return example_of(ids, spans, index=number, location="f:1", images=more.get("images", ()))


def test_every_document_of_a_packed_row_and_its_padding_count_from_zero() -> None:
    batch = Collator(9)([[example(0, 3), example(1, 2)], [example(2, 1)]])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    assert batch["input_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 9, 9, 9, 9]]
    assert batch["labels"].tolist()[1] == [0, -100, -100, -100, -100]
    assert "position_ids" not in Collator(9)([example(0, 3)])


def test_weights_are_there_when_a_token_weighs_other_than_one() -> None:
    plain, light = example(0, 2), example(1, 2, spans=[(1, 2, 0.5)])
    mixed = example(2, 3, spans=[(0, 1, 1.0), (1, 2, 0.5)])
    assert plain.loss_weights is None
    assert light.loss_weights is not None
    assert mixed.loss_weights is not None
    found = Collator(0)([plain, light, mixed])["loss_weights"]
    assert found.tolist() == [[1, 1, 0], [0, 0.5, 0], [1, 0.5, 0]]


# --- counts --------------------------------------------------------------------------------------


def test_counts_of_two_parts_are_their_sums_the_longest_and_the_first_names() -> None:
    one = ExampleCounts(
        rows=3, bad=1, kept=2, tokens=9, longest=7, dropped={"a": 1}, named=("x",) * 15
    )
    two = ExampleCounts(rows=2, kept=1, tokens=4, longest=5, dropped={"a": 1, "b": 2}, named=("y",) * 15, turns=4, without_thought=1, truncated=1, messages_removed=2, text_blocks=1, duplicates=1, supervised_tokens=3, unread={"u": 1}, doubts={"d": 2})  # fmt: skip
    assert total(one, two) == total(ExampleCounts(), ExampleCounts(
        rows=5, bad=1, kept=3, tokens=13, longest=7, dropped={"a": 2, "b": 2}, turns=4,
        without_thought=1, truncated=1, messages_removed=2, text_blocks=1, duplicates=1,
        supervised_tokens=3, unread={"u": 1}, doubts={"d": 2}, named=("x",) * 15 + ("y",) * 5,
    ))  # fmt: skip


def test_what_is_dropped_or_refused_is_named_up_to_a_number() -> None:
    tally = Tally()
    for number in range(8):
        tally.drop(f"f:{number}", "too long", "9 tokens")
    named = [f"f:{number}: too long (9 tokens)" for number in range(5)]
    assert tally.facts(1)["counts"]["named"] == tuple(named)
    assert "none of 0 dialogues" in said(tally.raise_if_nothing_is_left)
    for number in range(23):
        tally.refuse(f"f:{number}")
    text = said(tally.raise_if_refused, 8)
    assert text.count("\n  f:") == 20
    assert text.startswith("23 dialogues are longer")
    assert text.endswith("... and 3 more")
    tally.keep_turns([True, False, False])
    counts = tally.facts(1)["counts"]
    assert (counts["turns"], counts["without_thought"]) == (3, 2)


def test_the_collector_of_cycles_is_as_it_was_afterwards() -> None:
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            with preparation._collecting_by_hand():
                assert not gc.isenabled()
            assert gc.isenabled() == enabled
        finally:
            gc.enable()


def test_a_dialogue_of_exactly_the_longest_length_is_whole(
    template: ChatTemplate, tmp_path: Path
) -> None:
    talk = dialogue(2)
    length = len(template.render([talk])[0].input_ids)
    for most, truncated in ((length, 0), (length - 1, 1)):
        tally = Tally()
        policy = LengthPolicy(most)
        (kept,) = preparation.examples_of([(0, talk)], template, policy, tally)
        assert tally.facts(1)["counts"]["truncated"] == truncated
        assert len(kept.ids) <= most


def test_plain_text_is_cut_without_a_gap_and_all_but_the_prefix_is_counted(
    template: ChatTemplate,
) -> None:
    ids = np.arange(23, dtype=np.int32)
    whole = Rendered(ids, (MessageRun(0, 2, None), MessageRun(2, 23, None)), ())
    pieces = [piece.input_ids.tolist() for piece in blocks(whole, 9)]
    assert pieces == [[0, 1, *range(n, n + 7)] for n in (2, 9, 16)]
    tally = Tally()
    text = Conversation((), location="f:1", text="a b c d e f g h i j k l m n")
    kept = list(preparation.examples_of([(0, text)], template, LengthPolicy(6), tally))
    counts = tally.facts(1)["counts"]
    assert counts["text_blocks"] == len(kept)
    assert counts["supervised_tokens"] == counts["tokens"] - 2 * len(kept)


# --- data sets -----------------------------------------------------------------------------------


def test_rows_of_a_held_out_part_are_not_counted_as_the_other_parts(
    template: ChatTemplate, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.jsonl", *(f"q{n}" for n in range(50)))
    found = []
    for side in (True, False):
        part = SourceSpec(source.path, part=Part(0.3, side))
        counts = load_examples([part], template, POLICY, cache_root=tmp_path).counts
        assert counts.rows == counts.kept
        found.append(counts.rows)
    assert sum(found) == 50


def test_a_shard_takes_every_nth_file_and_there_may_be_as_many_as_files() -> None:
    files = [Path(name) for name in "abcd"]
    assert of_shard(files, "1/2") == [Path("a"), Path("c")]
    assert of_shard(files, "2/2") == [Path("b"), Path("d")]
    assert of_shard(files, "4/4") == [Path("d")]
    for wrong in ("0/4", "5/4", "1/5", "-1/4"):
        assert "--shard" in said(of_shard, files, wrong)


def test_an_image_that_was_replaced_since_the_run_began_is_refused_and_a_gone_one_left_to_its_opener(
    tmp_path: Path,
) -> None:
    from finetune.data.examples.dataset import PreparedDataset, _image_states

    image = tmp_path / "a.png"
    image.write_bytes(b"one")
    with ExampleWriter(tmp_path / "f") as writer:
        writer.append([np.array([1, 2], np.int32)], [[(0, 1, 1.0)]], ["f:1"], [(str(image),)])
    data = PreparedDataset(ExampleFile(tmp_path / "f"), ExampleCounts(), "", images=_image_states([str(image)]))  # fmt: skip
    assert data[0].images == (str(image),)
    image.write_bytes(b"other")
    assert "was replaced since this run began" in said(data.__getitem__, 0)
    image.unlink()
    assert data[0].images == (str(image),)


def test_examples_are_prepared_again_when_an_image_under_the_same_name_is_another(
    template: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.data.examples import dataset

    image = tmp_path / "a.png"
    image.write_bytes(b"one")
    source, prepared = write(tmp_path / "a.jsonl", "q"), []

    def examples(numbered: Any, _t: Any, _p: Any, file: Path, *, num_sources: int = 1) -> Any:
        prepared.append(len(list(numbered)))
        with ExampleWriter(file) as writer:
            writer.append([np.array([1], np.int32)], [[(0, 1, 1.0)]], ["f:1"], [(str(image),)])
        return {"counts": {**Tally().facts(1)["counts"]}, "kept_per_source": [1]}

    monkeypatch.setattr(dataset, "write_examples", examples)

    def told() -> str:
        return load_examples([source], template, POLICY, cache_root=tmp_path).fingerprint

    first = told()
    assert told() == first
    image.touch()  # another time, the same content
    assert told() == first
    assert prepared == [1]
    image.write_bytes(b"other")
    second = told()
    assert second != first
    assert prepared == [1, 1]
    assert told() == second
    image.write_bytes(b"one")
    assert told() == first
    assert prepared == [1, 1]


def test_a_file_of_examples_is_mapped_anew_by_another_process(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with ExampleWriter(tmp_path / "sub/f") as writer:
        for paths in ((), ("b", "a"), ("a",)):
            writer.append([np.array([1], np.int32)], [[]], ["f:1"], [paths])
    file = pickle.loads(pickle.dumps(ExampleFile(tmp_path / "sub/f")))
    assert file.images() == ["b", "a"]
    assert [file[n].images for n in range(3)] == [(), ("b", "a"), ("a",)]
    with pytest.raises(IndexError):
        file[3]


def test_patches_of_an_image_have_one_position() -> None:
    spec = ImageSpec(28, 4, begin_id=7)
    ids = np.array([1, 7, 0, 0, 0, 0, 8, 2], np.int32)
    assert spec.positions(ids).tolist() == [0, 1, 2, 2, 2, 2, 3, 4]


def test_the_share_of_bad_rows_of_a_stream_is_judged_when_there_are_enough(
    template: ChatTemplate,
) -> None:
    bad, fatal = BadRow("f:1", "no row"), BadRow("f:2", "cut off", fatal=True)

    def judged(row: BadRow, rows: int, num_bad: int, most: float = 0.05) -> str:
        of: Any = SimpleNamespace(settings=SimpleNamespace(reading=Reading("skip", most)))
        counts = ExampleCounts(rows=rows, bad=num_bad)
        try:
            ExampleStream._judge(of, [row], counts)
        except DataError as error:
            return str(error)
        return ""

    assert "cannot be skipped" in judged(fatal, 10, 1)
    assert judged(bad, 999, 900) == ""
    assert judged(bad, 1000, 50) == ""
    assert "data.max_bad_rows" in judged(bad, 1000, 51)


def test_a_file_that_is_prepared_ahead_is_counted_whatever_its_weight(
    template: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.data.examples import ahead

    asked: list[SourceSpec] = []

    def loaded(sources: Any, *_: Any, **__: Any) -> Any:
        asked.extend(sources)
        return SimpleNamespace(counts=ExampleCounts(rows=1))

    monkeypatch.setattr(ahead, "load_examples", loaded)
    monkeypatch.setattr(ahead, "load_chat_tokenizer", lambda *_: template.tokenizer)
    file = write(tmp_path / "a.jsonl", "q").path
    section = DataSection(train=[Source(path=file, weight=0.1)])
    ahead.prepare_ahead(section, ModelSection(path="m"), 0, "1/1")
    assert [source.weight for source in asked] == [1.0]


def test_runs_of_tokens_are_those_behind_the_first_question_and_of_their_images() -> None:
    def runs(ids: list[int], *images: str) -> list[bytes]:
        [found] = selection._runs(cast("Any", [SimpleNamespace(input_ids=np.array(ids), images=images)]), 7)  # fmt: skip
        return found

    ids = [1, 7, 2, 3, 4, 5, 6]
    assert len(runs(ids)) == 2
    assert runs(ids) == runs([9, 9, *ids[1:]])
    assert not set(runs(ids, "a.png")) & set(runs(ids))
    assert not set(runs(ids, "a.png")) & set(runs(ids, "b.png"))
