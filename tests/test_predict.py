"""Predictions come in order, once each, and whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from rows import CALL, TOOL, Rows, answering, read_rows, spoken, turns, write_rows

from finetune.data.conversation import Message
from finetune.data.dataset import LengthPolicy, load_examples
from finetune.data.sources import SourceSpec
from finetune.data.template import ChatTemplate
from finetune.data.tokenizer import load_chat_tokenizer
from finetune.errors import DataError
from finetune.evaluation import generate as generation
from finetune.evaluation import predict as prediction
from finetune.evaluation.predict import PredictOptions, as_reply, predict, reply_messages


@pytest.fixture(scope="module")
def template(tiny_glm: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(tiny_glm))


def dialogues(count: int) -> Rows:
    """Some end in a question, some in a reply that is not to be read."""
    rows: Rows = []
    for n in range(count):
        texts = [f"question {'dog ' * (n % 4)}{n}", "secret reference"]
        rows.append({"messages": turns(*texts[: 1 + n % 2])})
    return rows


OPTIONS = PredictOptions(max_new_tokens=5, batch_size=2)


def test_every_dialogue_gets_its_reply_in_order_and_references_are_ignored(
    tiny_glm: Path, tmp_path: Path
) -> None:
    rows = dialogues(7)
    source = write_rows(tmp_path / "in.jsonl", rows)
    counts = predict(str(tiny_glm), [str(source)], tmp_path / "out.jsonl", options=OPTIONS)
    answered = read_rows(tmp_path / "out.jsonl")
    assert counts["replies"] == len(answered) == 7
    for row, got in zip(rows, answered, strict=True):
        assert got["messages"][:-1] == row["messages"][:1]
        assert got["messages"][-1]["role"] == "assistant"
        assert got["messages"][-1]["content"] != "secret reference"
    assert counts["cut"] == sum(not got["stopped"] for got in answered)
    # Nor do they change the answer.
    bare = write_rows(tmp_path / "bare.jsonl", [{"messages": r["messages"][:1]} for r in rows])
    predict(str(tiny_glm), [str(bare)], tmp_path / "bare-out.jsonl", options=OPTIONS)
    replies = [
        [r["messages"][-1] for r in read_rows(tmp_path / f)]
        for f in ("out.jsonl", "bare-out.jsonl")
    ]
    assert replies[0] == replies[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bare-out.jsonl", "bare.jsonl", "in.jsonl", "out.jsonl",
    ]  # fmt: skip


def test_after_a_crash_answered_dialogues_are_kept_and_not_asked_again(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.jsonl", dialogues(7))
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(prediction, "BATCHES_PER_WINDOW", 1)
    predict(str(tiny_glm), [str(source)], tmp_path / "whole.jsonl", options=OPTIONS)
    original, questions = generation.generate, []

    def failing(model: Any, template: Any, prompts: Any, **rest: Any) -> Any:
        questions.append(len(prompts))
        if len(questions) == 3:
            raise RuntimeError("out of memory")
        return original(model, template, prompts, **rest)

    monkeypatch.setattr(generation, "generate", failing)
    with pytest.raises(RuntimeError):
        predict(str(tiny_glm), [str(source)], out, options=OPTIONS)
    assert not out.exists()
    part = tmp_path / "out.jsonl.part"
    assert len(read_rows(part)) == 4
    with part.open("a") as file:
        file.write('{"where": "torn')  # a line that the crash cut
    predict(str(tiny_glm), [str(source)], out, options=OPTIONS)
    assert questions == [2, 2, 2, 2, 1]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()


def test_lines_of_another_request_are_not_kept(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.jsonl", dialogues(4))
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(prediction, "BATCHES_PER_WINDOW", 1)
    monkeypatch.setattr(prediction.Journal, "finish", lambda journal: None)
    predict(str(tiny_glm), [str(source)], out, options=OPTIONS)
    first = read_rows(tmp_path / "out.jsonl.part")
    longer = PredictOptions(max_new_tokens=9, batch_size=2)
    predict(str(tiny_glm), [str(source)], out, options=longer)
    second = read_rows(tmp_path / "out.jsonl.part")
    assert len(first) == len(second) == 4
    assert first != second
    write_rows(source, dialogues(3))
    predict(str(tiny_glm), [str(source)], out, options=longer)
    assert len(read_rows(tmp_path / "out.jsonl.part")) == 3


def test_bad_rows_and_dialogues_without_room_are_named_before_anything_is_generated(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "generate", lambda *_, **__: pytest.fail("generated"))
    bad = write_rows(tmp_path / "bad.jsonl", [*dialogues(2), {"messages": turns("")}])
    with pytest.raises(DataError, match=r"bad\.jsonl:3"):
        predict(str(tiny_glm), [str(bad)], tmp_path / "out.jsonl")
    long = write_rows(tmp_path / "long.jsonl", [*dialogues(2), {"messages": turns("x" * 2100)}])
    with pytest.raises(DataError, match=r"1 of 3 prompts(.|\n)*long\.jsonl:3"):
        predict(str(tiny_glm), [str(long)], tmp_path / "out.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "long.jsonl"]


def test_calls_are_written_in_both_forms_and_can_be_read_again(
    tiny_glm: Path, tmp_path: Path, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Message("assistant", CALL, metadata="get_weather")
    one = spoken(template, call)
    two = [*one, tiny.CONTROL_IDS["<|assistant|>"], *one]
    answering(monkeypatch, lambda i: (two if i == 1 else one, True))
    rows = [{"tools": [TOOL], "messages": turns("weather?")} for _ in range(2)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.jsonl"
    predict(str(tiny_glm), [str(source)], out)
    single, double = read_rows(out)
    assert single["messages"][1:] == [
        {"role": "assistant", "metadata": "get_weather", "content": CALL}
    ]
    assert single["tool_calls"] == [
        {
            "id": "call_0",
            "type": "function",
            "function": {"name": "get_weather", "arguments": CALL},
        }
    ]
    assert len(double["messages"]) == 3
    assert [one["id"] for one in double["tool_calls"]] == ["call_0", "call_1"]
    examples = load_examples(
        [SourceSpec(str(out))], template, LengthPolicy(512), cache_root=tmp_path / "cache"
    )
    assert len(examples) == 2


def test_a_first_line_is_a_function_only_where_functions_are_offered(
    template: ChatTemplate,
) -> None:
    odd = Message("assistant", "world", metadata="Hello")
    assert as_reply(odd, ()) == Message("assistant", "Hello\nworld")
    assert as_reply(odd, (TOOL,)) == odd
    sentence = Message("assistant", "world", metadata="Hello, dear")
    assert as_reply(sentence, (TOOL,)).content == "Hello, dear\nworld"
    ids = spoken(template, Message("assistant", "fine"))
    assert reply_messages(ids, template, ()) == [Message("assistant", "fine")]
    assert reply_messages([], template, ()) == [Message("assistant", "")]
    # Text that runs into another reply ends there.
    more = [*ids, tiny.CONTROL_IDS["<|assistant|>"], *ids]
    assert reply_messages(more, template, (TOOL,)) == [Message("assistant", "fine")]
