"""Files to examples: order, weights, fingerprints, and what stops the run."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from examples import LONG, tiny_template

from finetune.config.schema import RunConfig
from finetune.data.chat.template import ChatTemplate
from finetune.data.examples.dataset import (
    IGNORED,
    LengthPolicy,
    PreparedDataset,
    load_examples,
)
from finetune.data.reading.sources import Reading, SourceSpec
from finetune.errors import DataError
from finetune.training.loading import prepare_data


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return tiny_template(tmp_path_factory.mktemp("tokenizer"))


def write_rows(path: Path, count: int, word: str = "answer") -> Path:
    rows = [{"prompt": f"question {i}", "response": f"{word} {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(*sources: SourceSpec, template: ChatTemplate, root: Path, **more) -> PreparedDataset:
    return load_examples(sources, template, LONG, cache_root=root, **more)


def replies(template: ChatTemplate, dataset: PreparedDataset) -> list[str]:
    return [
        template.parse(example.labels[example.labels != IGNORED]).content for example in dataset
    ]


def test_files_become_examples_in_their_order(template, tmp_path):
    write_rows(tmp_path / "a.jsonl", 2, "first")
    write_rows(tmp_path / "b.jsonl", 1, "second")
    sources = SourceSpec(str(tmp_path / "*.jsonl")), SourceSpec(str(tmp_path / "a.jsonl"))
    dataset = load(*sources, template=template, root=tmp_path)
    assert replies(template, dataset) == ["first 0", "first 1", "second 0", "first 0", "first 1"]
    assert dataset.location(1) == f"{tmp_path}/a.jsonl:2"


def test_a_source_of_weight_two_is_seen_twice_and_of_half_by_half(template, tmp_path):
    twice = SourceSpec(str(write_rows(tmp_path / "a.jsonl", 3, "twice")), weight=2.0)
    half = SourceSpec(str(write_rows(tmp_path / "b.jsonl", 10, "half")), weight=0.5)
    more = SourceSpec(str(write_rows(tmp_path / "c.jsonl", 4, "more")), weight=1.5)
    seen = replies(template, load(twice, half, more, template=template, root=tmp_path))
    assert sorted(seen[:6]) == [f"twice {i}" for i in (0, 0, 1, 1, 2, 2)]
    assert len(seen[6:11]) == len(set(seen[6:11])) == 5
    assert {word.split()[0] for word in seen[6:11]} == {"half"}
    assert len(seen[11:]) == 6
    assert set(seen[11:]) == {f"more {i}" for i in range(4)}


def test_weights_repeat_rows_without_storing_them_again(template, tmp_path):
    path = str(write_rows(tmp_path / "a.jsonl", 40))
    root = tmp_path / "cache"
    plain = load(SourceSpec(path), template=template, root=root)
    weighted = load(SourceSpec(path, weight=2.5), template=template, root=root)
    assert (len(plain), len(weighted)) == (40, 100)
    assert len(list((root / "examples").glob("*/"))) == 1
    assert [weighted[i].index for i in (0, 99)] == [0, 99]
    assert weighted.lengths.tolist() == [len(example.input_ids) for example in weighted]
    assert weighted.counts.kept == 40


def test_the_seed_chooses_the_half(template, tmp_path):
    half = SourceSpec(str(write_rows(tmp_path / "a.jsonl", 40)), weight=0.5)
    first, again, other = (
        replies(template, load(half, template=template, root=tmp_path, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_weights_that_leave_nothing_are_an_error(template, tmp_path):
    few = SourceSpec(str(write_rows(tmp_path / "a.jsonl", 3)), weight=0.1)
    with pytest.raises(DataError, match="no example is left"):
        load(few, template=template, root=tmp_path)


def test_a_source_that_gives_nothing_leaves_the_others_in_place(template, tmp_path):
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    talk["messages"][1]["content"] = "word " * 300
    (tmp_path / "long.jsonl").write_text(json.dumps(talk))
    sources = [
        SourceSpec(str(tmp_path / "long.jsonl"), weight=3.0),
        SourceSpec(str(write_rows(tmp_path / "a.jsonl", 2)), weight=2.0),
    ]
    dataset = load_examples(sources, template, LengthPolicy(100), cache_root=tmp_path)
    assert sorted(replies(template, dataset)) == ["answer 0", "answer 0", "answer 1", "answer 1"]


def test_bad_rows_are_counted_and_named_when_they_are_skipped(template, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", 9)
    path.write_text(path.read_text() + '{"prompt": "no reply"}\n')
    skip = Reading(on_bad_row="skip", max_bad_rows=0.2)
    source = SourceSpec(str(path))
    for _ in range(2):  # prepared, and from the cache
        counts = load(source, template=template, root=tmp_path, reading=skip).counts
        assert (counts.rows, counts.bad, counts.kept) == (10, 1, 9)
        assert counts.named[0].startswith(f"{path}:10: ")
    with pytest.raises(DataError, match="1 of 10 rows cannot be used"):
        load(source, template=template, root=tmp_path)


def test_changed_bytes_are_prepared_again(template, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", 2)
    first = load(SourceSpec(str(path)), template=template, root=tmp_path)
    stat = path.stat()
    path.write_text(path.read_text().replace("answer 1", "ANSWER 1"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = load(SourceSpec(str(path)), template=template, root=tmp_path)
    assert replies(template, second) == ["answer 0", "ANSWER 1"]
    assert second.fingerprint != first.fingerprint


def test_a_copy_elsewhere_has_the_same_fingerprint_and_its_own_places(template, tmp_path):
    first = write_rows(tmp_path / "a.jsonl", 2)
    second = write_rows(tmp_path / "b.jsonl", 2)
    one, two = (
        load(SourceSpec(str(path)), template=template, root=tmp_path) for path in (first, second)
    )
    assert one.fingerprint == two.fingerprint
    assert two.location(0) == f"{second}:1"


@pytest.mark.parametrize("changes", [{"weight": 2.0}, {"format": "pairs"}])
def test_another_way_to_read_has_another_fingerprint(template, tmp_path, changes):
    source = SourceSpec(str(write_rows(tmp_path / "a.jsonl", 2)))
    first = load(source, template=template, root=tmp_path)
    second = load(replace(source, **changes), template=template, root=tmp_path)
    assert second.fingerprint != first.fingerprint


def test_a_file_that_changes_while_it_is_read_is_not_kept(template, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", 2)
    original = template.examples

    def examples(conversations, train_on):
        with path.open("a") as file:
            file.write('{"prompt": "a", "response": "b"}\n')
        return original(conversations, train_on)

    monkeypatch.setattr(template, "examples", examples)
    with pytest.raises(DataError, match="changed while they were read"):
        load(SourceSpec(str(path)), template=template, root=tmp_path / "cache")
    assert not any((tmp_path / "cache" / "examples").glob("*/"))


def test_a_change_that_keeps_size_and_time_is_noticed_too(template, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", 2)
    original, before = template.examples, path.stat()

    def examples(conversations, train_on):
        path.write_bytes(path.read_bytes().swapcase())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return original(conversations, train_on)

    monkeypatch.setattr(template, "examples", examples)
    with pytest.raises(DataError, match="changed while they were read"):
        load(SourceSpec(str(path)), template=template, root=tmp_path / "cache")


def test_files_without_a_dialogue_to_learn_from_are_an_error(template, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", 3)
    with pytest.raises(
        DataError,
        match=r"none of 3 dialogues is left to learn from; change the rows or data.max_length:\n.*a.jsonl:1",
    ):
        load_examples([SourceSpec(str(path))], template, LengthPolicy(4), cache_root=tmp_path)


def test_held_out_examples_that_are_trained_on_are_found(template, tmp_path):
    train = load(
        SourceSpec(str(write_rows(tmp_path / "a.jsonl", 30))), template=template, root=tmp_path
    )
    mixed = write_rows(tmp_path / "b.jsonl", 3, word="other")
    mixed.write_text(
        mixed.read_text() + "".join((tmp_path / "a.jsonl").read_text().splitlines(True)[4:6])
    )
    validation = load(SourceSpec(str(mixed)), template=template, root=tmp_path)
    assert validation.shared_with(train) == [f"{mixed}:4", f"{mixed}:5"]
    assert len(train.shared_with(train)) == 30


@pytest.mark.parametrize("allowed", [None, 0.5, 0.4])
def test_a_run_says_or_refuses_held_out_dialogues_in_its_training_data(
    template, tmp_path, allowed, capsys, monkeypatch
):
    write_rows(tmp_path / "train.jsonl", 12)
    lines = (tmp_path / "train.jsonl").read_text().splitlines(True)
    other = write_rows(tmp_path / "other.jsonl", 2, word="other").read_text()
    (tmp_path / "dev.jsonl").write_text("".join(lines[:2]) + other)
    config = RunConfig.model_validate(
        {
            "model": {"path": "x"},
            "data": {
                "train": str(tmp_path / "train.jsonl"),
                "validation": str(tmp_path / "dev.jsonl"),
                "max_overlap": allowed,
                "cache_dir": str(tmp_path / "cache"),
            },
            "method": {"kind": "lora"},
            "training": {"output_dir": str(tmp_path / "run")},
        }
    )
    monkeypatch.setattr(prepare_data, "load_chat_tokenizer", lambda *_: template.tokenizer)
    said = "2 of 4 held-out dialogues (50%) are in the training data too, first"
    if allowed == 0.4:
        with pytest.raises(DataError, match=r"data\.max_overlap allows 40%"):
            prepare_data.load_run_data(config.data, config.training, config.model)
    else:
        prepare_data.load_run_data(config.data, config.training, config.model)
        assert said in capsys.readouterr().err.replace("\n", " ")
