"""Plain text: documents in blocks behind the prefix, all of it learned, beside dialogues."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import runs
from dialogues import any_text
from examples import tiny_template
from hypothesis import given, settings
from hypothesis import strategies as st
from row_parts import REPLY, USER

from finetune.data.chat.spans import blocks
from finetune.data.chat.template import ChatTemplate
from finetune.data.dialogue.conversation import Conversation, RowError
from finetune.data.dialogue.foreign import DIALOGUE_IN_TEXT
from finetune.data.dialogue.formats import to_conversation
from finetune.data.examples import preparation
from finetune.data.examples.collate import Collator
from finetune.data.examples.dataset import LengthPolicy, PreparedDataset, load_examples
from finetune.data.examples.packing import PackedDataset, pack
from finetune.data.preview.report import check, show
from finetune.data.reading import texts
from finetune.data.reading.files import expand, read_rows
from finetune.data.reading.sources import SourceSpec, read_conversations
from finetune.errors import DataError


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return tiny_template(tmp_path_factory.mktemp("tokenizer"))


def rows(path: Path, *items: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return str(path)


def load(template: ChatTemplate, tmp_path: Path, max_length: int, *paths: str) -> PreparedDataset:
    sources = [SourceSpec(path) for path in paths]
    return load_examples(sources, template, LengthPolicy(max_length), cache_root=tmp_path / "cache")


@settings(max_examples=60, deadline=None)
@given(text=any_text.filter(lambda text: not text.isspace()), max_length=st.integers(4, 30))
def test_blocks_hold_every_token_once_and_all_but_the_prefix_is_learned(
    template: ChatTemplate, text: str, max_length: int
) -> None:
    document = Conversation((), text=text)
    (rendered,) = template.render([document])
    ids = template.tokenizer.control_ids
    joined = []
    for block in blocks(rendered, max_length):
        assert len(block.input_ids) <= max_length
        assert block.input_ids[:2].tolist() == [ids["[gMASK]"], ids["<sop>"]]
        spans = template.trained_spans(block, document, "every_reply")
        assert spans == [(2, len(block.input_ids), 1.0)]
        joined += block.input_ids[2:].tolist()
    plain = template.tokenizer.plain.encode(text, add_special_tokens=False).ids
    assert joined == [*plain, ids["<|endoftext|>"]]


def test_the_blocks_of_a_document_are_examples(template: ChatTemplate, tmp_path: Path) -> None:
    data = load(template, tmp_path, 20, rows(tmp_path / "a.jsonl", {"text": "word " * 30}))
    assert data.counts.text_blocks == data.counts.kept == len(data) > 1
    assert {data.location(n).rpartition(":")[2] for n in range(len(data))} == {"1"}
    for n in range(len(data)):
        example = data[n]
        assert example.labels.tolist() == [-100, -100, *example.input_ids[2:].tolist()]


def test_long_documents_are_held_a_few_at_a_time(
    template: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = rows(tmp_path / "a.jsonl", *({"text": f"{n} " * 50} for n in range(9)))
    held = []

    def examples(self: ChatTemplate, conversations: Any, train_on: Any) -> Any:
        held.append(len(conversations))
        return given(self, conversations, train_on)

    given = ChatTemplate.examples
    monkeypatch.setattr(ChatTemplate, "examples", examples)
    monkeypatch.setattr(preparation, "_TEXT_AT_ONCE", 200)
    assert load(template, tmp_path, 500, file).counts.rows == 9
    assert held == [2, 2, 2, 2, 1]


def test_documents_of_a_packed_row_are_blind_to_each_other(
    template: ChatTemplate, tmp_path: Path
) -> None:
    file = rows(tmp_path / "a.jsonl", *({"text": f"document {n}"} for n in range(3)))
    data = load(template, tmp_path, 100, file)
    packed = PackedDataset(data, pack(data.lengths, 100, 0))
    batch = Collator(template.pad_id)([packed[0]])
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) == 3
    assert all(batch["labels"][0, start : start + 2].eq(-100).all() for start in starts)


def test_text_is_mixed_with_dialogues(template: ChatTemplate, tmp_path: Path) -> None:
    text = rows(tmp_path / "text.jsonl", {"text": "A long story.", "id": 1})
    chats = rows(tmp_path / "chats.jsonl", {"messages": [USER, REPLY]})
    data = load(template, tmp_path, 100, text, chats)
    assert [data.counts.text_blocks, data.counts.kept, len(data)] == [1, 2, 2]
    report = check([text, chats])
    assert [source.texts for source in report.sources] == [1, 0]
    assert report.sources[0].formats == {text: "text"}


def test_files_of_text_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffEins\r\nzwei\n".encode())
    (tmp_path / "b.md").write_text("# Title\n\nText.\n")
    (tmp_path / "c.txt").write_bytes("第一章\n天亮了。\n".encode("gbk"))
    with gzip.open(tmp_path / "d.txt.gz", "wt") as file:
        file.write("packed")
    found = [c.text for c in read_conversations([SourceSpec(str(tmp_path))])]
    assert found == ["Eins\nzwei", "# Title\n\nText.", "第一章\n天亮了。", "packed"]
    monkeypatch.setattr(texts, "_PIECE", 10)
    (tmp_path / "a.txt").write_text(
        "one two three\n\nfour\nfive six seven\neight nine ten eleven\nx"
    )
    pieces = list(read_rows(tmp_path / "a.txt"))
    assert "\n".join(row.value["text"] for row in pieces).split() == (
        (tmp_path / "a.txt").read_text().split()
    )
    assert [row.location.rpartition(":")[2] for row in pieces] == ["1", "3", "5", "6"]


def test_json_under_the_name_of_a_text_is_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(json.dumps({"messages": [USER, REPLY]}) + "\n")
    (tmp_path / "b.txt").write_text("[Chapter 1]\nIt was {dark}.")
    first, second = read_conversations([SourceSpec(str(tmp_path / n)) for n in ("a.txt", "b.txt")])
    assert len(first.messages) == 2
    assert second.text == "[Chapter 1]\nIt was {dark}."


def test_notes_beside_data_files_are_no_data(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", {"text": "x"})
    (tmp_path / "README.md").write_text("About.")
    assert expand(str(tmp_path)) == [tmp_path / "a.jsonl"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"fine\nbro\xffken\n", "line 2: byte 0xff is not UTF-8"),
        (b"abc\0d", "line 1: the text contains a NUL character"),
        (b"\n \n", "text: is empty"),
        (b"", "the file is empty"),
        (b"\xff\xfea\0", "the file is UTF-16"),
    ],
)
def test_a_file_that_is_no_text_has_its_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    (bad,) = check(str(tmp_path / "a.txt")).bad_rows
    assert reason in bad.reason


def test_a_row_with_more_than_text_is_taken_only_when_it_is_said(tmp_path: Path) -> None:
    file = rows(tmp_path / "a.jsonl", {"text": "Good film.", "sentiment": "positive"})
    assert "the layout is not known" in check(file).bad_rows[0].reason
    (source,) = check(file, format="text").sources
    assert (source.texts, dict(source.unread)) == (1, {"sentiment": 1})


@pytest.mark.parametrize(
    "text",
    [
        "### Instruction:\nSay hi\n\n### Response:\nhi",
        "<s>[INST] Say hi [/INST] hi</s>",
        "Human: Say hi\n\nAssistant: hi",
        "<|user|>\nSay hi<|assistant|>\nhi",
    ],
)
def test_a_dialogue_that_is_spelled_out_is_counted(text: str) -> None:
    assert to_conversation({"text": text}).doubts == (DIALOGUE_IN_TEXT,)
    assert to_conversation({"text": "A story about humans."}).doubts == ()


def test_replies_are_not_written_to_text() -> None:
    with pytest.raises(RowError, match="is plain text, and replies are written to dialogues"):
        to_conversation({"text": "Once"}, purpose="predict")


def test_text_is_shown_as_it_is_trained(tiny_chatglm: Path, tmp_path: Path) -> None:
    shown = show(rows(tmp_path / "a.jsonl", {"text": "Once"}), model=tiny_chatglm)
    assert (shown.plain(), shown.prompt) == (
        "[gMASK]<sop>«Once<|endoftext|>»",
        "[gMASK]<sop>",
    )


def test_a_document_is_on_one_side_of_a_split(tmp_path: Path) -> None:
    from finetune.data.reading.parts import Part

    sides = [
        Part(0.5, held_out=True).takes({}, Conversation((), text=f"document {n}"))
        for n in range(40)
    ]
    assert set(sides) == {True, False}


def test_a_checkpoint_goes_on_training_on_text_and_is_measured_on_more_of_it(
    tiny_chatglm: Path, tmp_path: Path
) -> None:
    from finetune import cli

    texts_folder = tmp_path / "text"
    texts_folder.mkdir()
    for n in range(6):
        (texts_folder / f"{n}.txt").write_text(f"the quick fox jumps over {n} " * 30)
    held_out = tmp_path / "held.txt"
    held_out.write_text("the quick fox jumps over a lazy dog " * 20)
    settings = runs.config(
        tiny_chatglm, texts_folder, tmp_path / "run",
        data__validation=str(held_out), data__max_length=64, data__packing=True,
        training__max_steps=8, evaluation__at_start=True, method__kind="full", method__rank=None,
    )  # fmt: skip
    del settings["method"]["rank"]
    runs.run_here(settings)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[-1] < losses[0]
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert data["train"]["text_blocks"] == data["train"]["examples"] > 6
    output = tmp_path / "scores"
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", str(tmp_path / "run"), "--output", str(output)])
    assert ended.value.code in (0, None)
    report = json.loads((output / "evaluation.json").read_text())
    scores = report["targets"][-1]["scores"]
    assert scores["loss"]["value"] == pytest.approx(losses[-1], rel=1e-4)
    assert scores["perplexity"]["value"] == pytest.approx(math.exp(losses[-1]), rel=1e-3)


def test_a_folder_without_any_text_says_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(DataError, match=r"and no .txt or .md"):
        expand(str(tmp_path))
