"""Dialogues to examples on disk: what is kept, what carries loss, what is dropped."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from examples import LONG, dialogue, tiny_template

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.data.examples.dataset import (
    IGNORED,
    LengthPolicy,
    PreparedDataset,
    load_examples,
    prepare,
)
from finetune.data.examples.store import ExampleFile, ExampleWriter
from finetune.data.reading.sources import SourceSpec
from finetune.errors import DataError

STOPS = (151336, 151337, 151338)  # <|user|>, <|assistant|> between two calls, <|observation|>


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return tiny_template(tmp_path_factory.mktemp("tokenizer"))


def supervised_text(template: ChatTemplate, dataset: PreparedDataset, index: int = 0) -> str:
    labels = dataset[index].labels
    return template.decode(labels[labels != IGNORED])


# Examples


def test_an_example_has_the_rendered_ids_and_labels_on_replies_with_their_stops(template, tmp_path):
    talk = dialogue(2)
    dataset = prepare([talk], template, LONG, key="k", cache_root=tmp_path)
    example = dataset[0]
    rendered = template.render([talk])[0]
    assert example.input_ids.tolist() == rendered.input_ids.tolist()
    expected = np.full(len(rendered.input_ids), -100)
    for _, start, end in rendered.replies:
        expected[start:end] = rendered.input_ids[start:end]
    assert example.labels.tolist() == expected.tolist()
    assert supervised_text(template, dataset) == "\nanswer 0<|user|>\nanswer 1<|user|>"
    assert (example.input_ids.dtype, example.labels.dtype) == (np.int32, np.int64)
    assert example.loss_weights is None
    assert (example.index, example.location) == (0, "f:1")


def test_only_the_last_reply_carries_loss_when_the_policy_says_so(template, tmp_path):
    policy = LengthPolicy(10_000, train_on="last_reply")
    dataset = prepare([dialogue(3)], template, policy, key="k", cache_root=tmp_path)
    assert supervised_text(template, dataset) == "\nanswer 2<|user|>"


def test_a_reply_that_weighs_other_than_one_brings_weights(template, tmp_path):
    talk = Conversation(
        (
            Message("user", "a"),
            Message("assistant", "b", weight=0.5),
            Message("user", "c"),
            Message("assistant", "d"),
        )
    )
    example = prepare([talk], template, LONG, key="k", cache_root=tmp_path)[0]
    assert example.loss_weights is not None
    assert example.loss_weights.dtype == np.float32
    first, second = template.render([talk])[0].replies
    assert set(example.loss_weights[first.start : first.end].tolist()) == {0.5}
    assert set(example.loss_weights[second.start : second.end].tolist()) == {1.0}
    assert (example.loss_weights[example.labels == IGNORED] == 0).all()


def test_examples_of_several_batches_keep_their_order_and_place(template, tmp_path):
    talks = [dialogue(location=f"f:{line}", word=f"word{line}") for line in range(2_500)]
    dataset = prepare(iter(talks), template, LONG, key="k", cache_root=tmp_path)
    assert len(dataset) == 2_500
    assert dataset.lengths.tolist() == [len(dataset[i].input_ids) for i in range(2_500)]
    for index in (0, 999, 1000, 1999, 2000, 2499):
        assert supervised_text(template, dataset, index) == f"\nword{index} 0<|user|>"
        assert dataset[index].location == dataset.location(index) == f"f:{index}"
        assert dataset[index].index == index


def test_iterating_ends_after_the_last_example(template, tmp_path):
    dataset = prepare([dialogue()] * 3, template, LONG, key="k", cache_root=tmp_path)
    assert [example.index for example in dataset] == [0, 1, 2]
    with pytest.raises(IndexError, match="example -1 of 3"):
        dataset[-1]


def test_a_dataset_can_be_sent_to_worker_processes(template, tmp_path):
    dataset = prepare([dialogue()] * 3, template, LONG, key="k", cache_root=tmp_path)
    sent = pickle.loads(pickle.dumps(dataset))
    assert sent[2].input_ids.tolist() == dataset[2].input_ids.tolist()
    assert len(pickle.dumps(dataset)) < 2_000


def test_datasets_opens_the_file(template, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    dataset = prepare([dialogue(2)], template, LONG, key="k", cache_root=tmp_path)
    (file,) = (tmp_path / "examples").glob("*/examples.arrow")
    row = datasets.Dataset.from_file(str(file))[0]
    assert row["input_ids"] == dataset[0].input_ids.tolist()
    assert len(row["starts"]) == len(row["ends"]) == len(row["weights"]) == 2


# Length and loss


def test_a_long_dialogue_loses_its_oldest_turns(template, tmp_path):
    lengths = [len(r.input_ids) for r in template.render([dialogue(3), dialogue(2)])]
    policy = LengthPolicy(lengths[0] - 1)
    dataset = prepare([dialogue(3)], template, policy, key="k", cache_root=tmp_path)
    text = template.decode(dataset[0].input_ids)
    assert text.startswith("[gMASK]<sop><|user|>\nquestion 1<|assistant|>")
    assert supervised_text(template, dataset) == "\nanswer 1<|user|>\nanswer 2<|user|>"
    assert dataset.counts.truncated == 1


def test_a_dialogue_whose_last_turn_is_too_long_is_dropped_by_name(template, tmp_path):
    policy = LengthPolicy(len(template.render([dialogue()])[0].input_ids))
    long = dialogue(2, "f:2", word="much longer answer " * 9)
    dataset = prepare([dialogue(), long], template, policy, key="k", cache_root=tmp_path)
    counts = dataset.counts
    assert (counts.rows, counts.kept) == (2, 1)
    assert counts.dropped == {"no trained reply fits": 1}
    assert counts.named[0].startswith("f:2: no trained reply fits (")


def test_long_dialogues_can_be_dropped_whole(template, tmp_path):
    policy = LengthPolicy(len(template.render([dialogue(2)])[0].input_ids), on_too_long="drop")
    talks = [dialogue(1), dialogue(2), dialogue(3, "f:3")]
    dataset = prepare(talks, template, policy, key="k", cache_root=tmp_path)
    assert len(dataset) == 2
    assert dataset.counts.dropped == {"too long": 1}
    length = len(template.render([dialogue(3)])[0].input_ids)
    assert dataset.counts.named == (f"f:3: too long ({length} tokens)",)


def test_long_dialogues_can_be_an_error_that_lists_them(template, tmp_path):
    policy = LengthPolicy(len(template.render([dialogue(2)])[0].input_ids), on_too_long="error")
    talks = [dialogue(2), *(dialogue(3, f"f:{line}") for line in range(2, 27))]
    with pytest.raises(DataError) as raised:
        prepare(talks, template, policy, key="k", cache_root=tmp_path)
    text = str(raised.value)
    length = len(template.render([dialogue(3)])[0].input_ids)
    assert text.startswith(f"25 dialogues are longer than data.max_length ({policy.max_length})")
    assert f"f:2: {length} tokens" in text
    assert "... and 5 more" in text
    assert not any((tmp_path / "examples").glob("*/"))


def test_a_dialogue_with_nothing_trained_is_dropped_by_name(template, tmp_path):
    talks = [dialogue(location="f:1", train=False), dialogue(location="f:2")]
    dataset = prepare(talks, template, LONG, key="k", cache_root=tmp_path)
    assert len(dataset) == 1
    assert dataset.counts.dropped == {"no reply that is trained": 1}
    assert dataset.counts.named == ("f:1: no reply that is trained",)


def test_shortening_never_leaves_a_dialogue_without_a_trained_reply(template, tmp_path):
    # Only the first reply is trained, and only the last turn fits.
    talk = Conversation(
        (
            Message("user", "a " * 50),
            Message("assistant", "b", train=True),
            Message("user", "c"),
            Message("assistant", "d", train=False),
        ),
        location="f:7",
    )
    talks = [talk, dialogue(location="f:8")]
    dataset = prepare(talks, template, LengthPolicy(40), key="k", cache_root=tmp_path)
    assert [example.location for example in dataset] == ["f:8"]
    assert dataset.counts.dropped == {"no trained reply fits": 1}


def test_counts_add_up(template, tmp_path):
    talks = [dialogue(1), dialogue(3), dialogue(1, train=False)]
    dataset = prepare(talks, template, LONG, key="k", cache_root=tmp_path)
    lengths = [len(r.input_ids) for r in template.render(talks[:2])]
    counts = dataset.counts
    assert (counts.rows, counts.kept, counts.bad, counts.truncated) == (3, 2, 0, 0)
    assert (counts.tokens, counts.longest) == (sum(lengths), max(lengths))
    assert counts.supervised_tokens == sum((e.labels != IGNORED).sum() for e in dataset)
    assert counts.rows == counts.kept + counts.bad + sum(counts.dropped.values())


def test_at_most_five_rows_are_named_per_reason(template, tmp_path):
    talks = [dialogue(), *(dialogue(location=f"f:{i}", train=False) for i in range(20))]
    counts = prepare(talks, template, LONG, key="k", cache_root=tmp_path).counts
    assert counts.dropped == {"no reply that is trained": 20}
    assert len(counts.named) == 5


# The file


def test_an_empty_batch_writes_nothing(tmp_path):
    with ExampleWriter(tmp_path / "f.arrow") as writer:
        writer.append([], [], [])
    file = ExampleFile(tmp_path / "f.arrow")
    assert len(file) == 0
    assert file.lengths().tolist() == []


def test_rows_read_back_as_they_were_written(tmp_path):
    rows = [([1, 2, 3], [(1, 3, 1.0)], "a:1"), ([4], [], "a:2"), ([5, 6], [(0, 1, 0.5)], "b:1")]
    with ExampleWriter(tmp_path / "f.arrow") as writer:
        for chunk in (rows[:2], rows[2:]):
            writer.append(
                [np.array(ids, np.int32) for ids, _, _ in chunk],
                [spans for _, spans, _ in chunk],
                [location for _, _, location in chunk],
            )
    file = ExampleFile(tmp_path / "f.arrow")
    for index, (ids, spans, location) in enumerate(rows):
        row = file[index]
        assert row.input_ids.tolist() == ids
        assert list(zip(row.starts, row.ends, row.weights, strict=True)) == spans
        assert file.location(index) == location
    assert file.lengths().tolist() == [3, 1, 2]


# Real data


@pytest.fixture(scope="module")
def glm4_template(glm4_assets: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(glm4_assets / "assets/glm-4-9b-chat"))


def test_every_real_dialogue_gives_an_example_or_a_reason(glm4_template, glm4_assets, tmp_path):
    max_length = 400
    files = ("advertisegen/*.jsonl", "toolcall/glaive_zh_sharegpt.json", "alpaca/alpaca_zh.json")
    sources = [SourceSpec(str(glm4_assets / "data" / file)) for file in files]
    dataset = load_examples(sources, glm4_template, LengthPolicy(max_length), cache_root=tmp_path)
    counts = dataset.counts
    assert counts.rows == 4_070 + 300 + 1_000
    assert counts.kept + sum(counts.dropped.values()) + counts.bad == counts.rows
    assert dataset.lengths.max() == counts.longest <= max_length
    supervised = 0
    for example in dataset:
        carries = example.labels != IGNORED
        assert carries.any()
        assert not carries[0]
        assert (example.labels[carries] == example.input_ids[carries]).all()
        ends = np.flatnonzero(carries & ~np.append(carries[1:], False))
        assert set(example.input_ids[ends].tolist()) <= set(STOPS)
        supervised += int(carries.sum())
    assert supervised == counts.supervised_tokens
