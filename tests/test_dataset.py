"""Dialogues to examples on disk: what is kept, what is dropped, and when it is made again."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from finetune.data import cache
from finetune.data.conversation import Conversation, Message
from finetune.data.dataset import (
    IGNORED,
    LengthPolicy,
    PreparedDataset,
    Reading,
    load_examples,
    prepare,
)
from finetune.data.sources import SourceSpec
from finetune.data.store import ExampleFile, ExampleWriter
from finetune.data.template import ChatTemplate
from finetune.data.tokenizer import load_chat_tokenizer
from finetune.errors import DataError

STOPS = (151336, 151337, 151338)  # <|user|>, <|assistant|> between two calls, <|observation|>
LONG = LengthPolicy(max_length=10_000)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return tiny_template(tmp_path_factory.mktemp("tokenizer"))


def tiny_template(folder: Path) -> ChatTemplate:
    tiny.save_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "glm"}')
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {tiny.EOS_IDS}}}')
    return ChatTemplate(load_chat_tokenizer(folder))


def dialogue(turns: int = 1, where: str = "f:1", word: str = "answer", **reply) -> Conversation:
    messages = []
    for turn in range(turns):
        messages += [
            Message("user", f"question {turn}"),
            Message("assistant", f"{word} {turn}", **reply),
        ]
    return Conversation(tuple(messages), where=where)


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
    assert (example.index, example.where) == (0, "f:1")


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
    talks = [dialogue(where=f"f:{line}", word=f"word{line}") for line in range(2_500)]
    dataset = prepare(iter(talks), template, LONG, key="k", cache_root=tmp_path)
    assert len(dataset) == 2_500
    assert dataset.lengths.tolist() == [len(dataset[i].input_ids) for i in range(2_500)]
    for index in (0, 999, 1000, 1999, 2000, 2499):
        assert supervised_text(template, dataset, index) == f"\nword{index} 0<|user|>"
        assert dataset[index].where == dataset.where(index) == f"f:{index}"
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
    talks = [dialogue(where="f:1", train=False), dialogue(where="f:2")]
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
        where="f:7",
    )
    talks = [talk, dialogue(where="f:8")]
    dataset = prepare(talks, template, LengthPolicy(40), key="k", cache_root=tmp_path)
    assert [example.where for example in dataset] == ["f:8"]
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
    talks = [dialogue(), *(dialogue(where=f"f:{i}", train=False) for i in range(20))]
    counts = prepare(talks, template, LONG, key="k", cache_root=tmp_path).counts
    assert counts.dropped == {"no reply that is trained": 20}
    assert len(counts.named) == 5


# Files


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
    assert dataset.where(1) == f"{tmp_path}/a.jsonl:2"


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
    assert two.where(0) == f"{second}:1"


@pytest.mark.parametrize("changes", [{"weight": 2.0}, {"format": "pairs"}])
def test_another_way_to_read_has_another_fingerprint(template, tmp_path, changes):
    source = SourceSpec(str(write_rows(tmp_path / "a.jsonl", 2)))
    first = load(source, template=template, root=tmp_path)
    second = load(replace(source, **changes), template=template, root=tmp_path)
    assert second.fingerprint != first.fingerprint


def test_a_file_that_changes_while_it_is_read_is_not_kept(template, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", 2)
    original = template.render

    def render(conversations):
        with path.open("a") as file:
            file.write('{"prompt": "a", "response": "b"}\n')
        return original(conversations)

    monkeypatch.setattr(template, "render", render)
    with pytest.raises(DataError, match="changed while they were read"):
        load(SourceSpec(str(path)), template=template, root=tmp_path / "cache")
    assert not any((tmp_path / "cache" / "examples").glob("*/"))


def test_files_without_a_dialogue_to_learn_from_are_an_error(template, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", 3)
    with pytest.raises(DataError, match=r"none of 3 dialogues is left to learn from:\n.*a.jsonl:1"):
        load_examples([SourceSpec(str(path))], template, LengthPolicy(4), cache_root=tmp_path)


# The cache


class Watched:
    """Dialogues that count how often they are read."""

    def __init__(self, *talks: Conversation) -> None:
        self.talks = talks
        self.reads = 0

    def __iter__(self):
        self.reads += 1
        return iter(self.talks)


def test_the_same_content_is_prepared_once(template, tmp_path):
    talks = Watched(dialogue(2))
    first = prepare(talks, template, LONG, key="k", cache_root=tmp_path)
    again = prepare(talks, template, LONG, key="k", cache_root=tmp_path)
    assert talks.reads == 1
    assert again[0].input_ids.tolist() == first[0].input_ids.tolist()
    assert again.counts == first.counts
    assert again.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("key", "policy"),
    [
        ("other content", LONG),
        ("k", LengthPolicy(9_999)),
        ("k", LengthPolicy(10_000, train_on="last_reply")),
        ("k", LengthPolicy(10_000, on_too_long="drop")),
    ],
)
def test_another_content_or_policy_never_reads_the_entry(template, tmp_path, key, policy):
    talks = Watched(dialogue(2))
    first = prepare(talks, template, LONG, key="k", cache_root=tmp_path)
    other = prepare(talks, template, policy, key=key, cache_root=tmp_path)
    assert talks.reads == 2
    assert other.fingerprint != first.fingerprint


def test_another_template_never_reads_the_entry(template, tmp_path):
    from copy import copy

    talks = Watched(dialogue(2))
    prepare(talks, template, LONG, key="k", cache_root=tmp_path)
    other = copy(template)
    other.fingerprint = "another"
    prepare(talks, other, LONG, key="k", cache_root=tmp_path)
    assert talks.reads == 2


def damage_size(entry: Path) -> None:
    os.truncate(entry / "examples.arrow", 100)


def damage_bytes(entry: Path) -> None:
    file = entry / "examples.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damage_missing(entry: Path) -> None:
    (entry / "examples.arrow").unlink()


def damage_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text("{", encoding="utf-8")


def damage_no_manifest(entry: Path) -> None:
    (entry / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (damage_size, "has 100 bytes"),
        (damage_bytes, "the content of examples.arrow has changed"),
        (damage_missing, "examples.arrow is missing"),
        (damage_manifest, "manifest.json is not readable"),
        (damage_no_manifest, "manifest.json is missing"),
    ],
)
def test_a_damaged_entry_is_prepared_again_with_a_word(template, tmp_path, capsys, damage, word):
    talks = Watched(dialogue(2))
    expected = prepare(talks, template, LONG, key="k", cache_root=tmp_path)[0].input_ids.tolist()
    (entry,) = (tmp_path / "examples").glob("*/")
    damage(entry)
    dataset = prepare(talks, template, LONG, key="k", cache_root=tmp_path)
    assert talks.reads == 2
    assert dataset[0].input_ids.tolist() == expected
    warning = capsys.readouterr().err
    assert word in warning
    assert "preparing it again" in warning


def test_a_failure_half_way_leaves_no_entry(template, tmp_path):
    def failing():
        yield from (dialogue() for _ in range(1_500))
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        prepare(failing(), template, LONG, key="k", cache_root=tmp_path)
    root = tmp_path / "examples"
    assert [path.name for path in root.iterdir() if path.suffix != ".lock"] == []
    assert len(prepare([dialogue()], template, LONG, key="k", cache_root=tmp_path)) == 1


BUILDER = """
import sys, time
from pathlib import Path
from finetune.data import cache

def build(folder):
    (folder / "content").write_text("whole")
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    time.sleep(float(sys.argv[3]))
    return {"by": sys.argv[4]}

print(cache.open_or_build(Path(sys.argv[1]), "key", build).facts["by"])
"""


def start_builder(root: Path, seconds: float, name: str = "one", **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(root), str(root / "log"), str(seconds), name],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **env},
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_two_processes_prepare_once_and_the_second_says_that_it_waits(tmp_path):
    first = start_builder(tmp_path, 2.0, "one")
    wait_for(tmp_path / "log")
    second = start_builder(tmp_path, 0.0, "two")
    assert first.communicate(timeout=30)[0].strip() == "one"
    said, by = second.communicate(timeout=30)[0].strip().splitlines()
    assert said.startswith("waiting for another process that is preparing")
    assert by == "one"
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_killed_builder_leaves_nothing_that_is_read_and_nothing_that_blocks(tmp_path):
    killed = start_builder(tmp_path, 60.0, "killed")
    wait_for(tmp_path / "log")
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=10)
    assert any(path.name.startswith(".key.") for path in tmp_path.iterdir())
    second = start_builder(tmp_path, 0.0, "second")
    assert second.communicate(timeout=30)[0].strip() == "second"
    assert not any(path.name.startswith(".key.") for path in tmp_path.iterdir())


@pytest.mark.parametrize("damaged", [False, True])
def test_the_first_process_of_a_machine_prepares_even_when_it_comes_last(tmp_path, damaged):
    if damaged:
        (tmp_path / "key").mkdir()
    other = start_builder(tmp_path, 0.0, "rank 1", RANK="1", LOCAL_RANK="1")
    time.sleep(1.0)
    assert not (tmp_path / "log").exists()
    first = start_builder(tmp_path, 0.0, "rank 0", RANK="0", LOCAL_RANK="0")
    assert first.communicate(timeout=30)[0].strip() == "rank 0"
    assert other.communicate(timeout=30)[0].strip() == "rank 0"
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_process_prepares_by_itself_when_the_first_never_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_RANK_0_HEAD_START_SECONDS", 0.2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    entry = cache.open_or_build(tmp_path, "key", lambda folder: {"by": "rank 1"})
    assert entry.facts == {"by": "rank 1"}


def test_a_cache_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"set data\.cache_dir or FINETUNE_CACHE"):
        cache.open_or_build(tmp_path / "file" / "cache", "key", lambda folder: {})


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    assert cache.default_root() == tmp_path
    monkeypatch.delenv("FINETUNE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_root() == tmp_path / ".cache" / "glm4-finetune"


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
                [where for _, _, where in chunk],
            )
    file = ExampleFile(tmp_path / "f.arrow")
    for index, (ids, spans, where) in enumerate(rows):
        row = file[index]
        assert row.input_ids.tolist() == ids
        assert list(zip(row.starts, row.ends, row.weights, strict=True)) == spans
        assert file.where(index) == where
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
