"""Predictions come in order, once each, and whole."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
from adapters import make_adapter
from command_line import ROOT
from fake_vllm import FakeVllm
from rows import CALL, TOOL, Rows, answering, read_rows, spoken, turns, write_rows

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.conversation import Message
from finetune.data.examples.dataset import LengthPolicy, load_examples
from finetune.data.reading.sources import SourceSpec
from finetune.errors import ConfigError, DataError, ModelError
from finetune.generation import generate as generation
from finetune.generation import prompts
from finetune.generation.backends import vllm
from finetune.generation.dialogues import Dialogues, RowOptions
from finetune.generation.load import open_model
from finetune.generation.messages import as_reply, reply_messages
from finetune.generation.predict import PredictOptions, predict
from finetune.storage.journal import Journal, ResumableOutput


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


def fail_at_call(number: int, monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Let generation fail once, at that batch; the prompts of every batch are noted."""
    original, questions = generation.write_replies, list[list[list[int]]]()

    def failing(model: Any, stop_ids: Any, requests: Any, **rest: Any) -> Any:
        questions.append([list(request.prompt) for request in requests])
        if len(questions) == number:
            raise RuntimeError("out of memory")
        return original(model, stop_ids, requests, **rest)

    monkeypatch.setattr(generation, "write_replies", failing)
    return questions


def test_after_a_crash_answered_dialogues_are_kept_and_not_asked_again(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.jsonl", dialogues(7))
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(prompts, "BATCHES_PER_WINDOW", 1)
    predict(str(tiny_glm), [str(source)], tmp_path / "whole.jsonl", options=OPTIONS)
    questions = fail_at_call(3, monkeypatch)
    with pytest.raises(RuntimeError):
        predict(str(tiny_glm), [str(source)], out, options=OPTIONS)
    assert not out.exists()
    part = tmp_path / "out.jsonl.part"
    assert len(read_rows(part)) == 4
    with part.open("a") as file:
        file.write('{"where": "torn')  # a line that the crash cut
    predict(str(tiny_glm), [str(source)], out, options=OPTIONS)
    assert [len(asked) for asked in questions] == [2, 2, 2, 2, 1]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.jsonl", dialogues(11))
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    monkeypatch.setattr(prompts, "BATCHES_PER_WINDOW", 1)
    predict(str(tiny_glm), [str(source)], tmp_path / "whole.jsonl", options=OPTIONS)

    def num_lines() -> int:
        return part.read_bytes().count(b"\n") if part.exists() else 0

    append = Journal.append

    def slow_append(journal: Journal, rows: Any) -> None:
        append(journal, rows)
        time.sleep(0.2)

    for lines in (2, 4, 8):
        if (child := os.fork()) == 0:
            monkeypatch.setattr(Journal, "append", slow_append)
            predict(str(tiny_glm), [str(source)], out, options=OPTIONS)
            os._exit(0)
        while num_lines() < lines:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it was killed"
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert not out.exists()
    kept, asked = num_lines(), fail_at_call(0, monkeypatch)
    predict(str(tiny_glm), [str(source)], out, options=OPTIONS)
    assert kept >= 8
    assert sum(map(len, asked)) <= 11 - kept  # a batch of the next window may have been kept, too
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_vllm_is_asked_with_ids_and_its_replies_are_written_like_ours(
    tiny_glm: Path, tmp_path: Path, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.jsonl", dialogues(7))
    predict(str(tiny_glm), [str(source)], tmp_path / "ours.jsonl", options=OPTIONS)
    adapter = make_adapter(tmp_path / "adapter", tiny_glm, r=12)
    predict(str(adapter), [str(source)], tmp_path / "adapted.jsonl", options=OPTIONS)
    options = replace(OPTIONS, backend="vllm")
    for target, expected in ((tiny_glm, "ours"), (adapter, "adapted")):
        fake = FakeVllm(open_model(target).model, template)
        fake.install(monkeypatch)
        out = tmp_path / f"vllm-{expected}.jsonl"
        predict(str(target), [str(source)], out, options=options)
        assert out.read_bytes() == (tmp_path / f"{expected}.jsonl").read_bytes()
        assert fake.opened["model"] == str(tiny_glm)
        assert fake.opened["skip_tokenizer_init"] is True
        assert fake.opened["dtype"] == "float32"
        asked = Dialogues([str(source)], options.rows.section("m")).prompts(template)
        longest = max(len(prompt.prompt_ids) for prompt in asked)
        assert fake.opened["max_model_len"] == longest + 5
    assert fake.opened["max_lora_rank"] == 16
    assert fake.requests[0] == ("adapter", 1, str(adapter))
    assert fake.ended == 1


def test_after_a_crash_of_vllm_answered_dialogues_are_kept_and_not_asked_again(
    tiny_glm: Path, tmp_path: Path, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.jsonl", dialogues(7))
    out, options = tmp_path / "out.jsonl", replace(OPTIONS, backend="vllm")
    monkeypatch.setattr(prompts, "BATCHES_PER_WINDOW", 1)
    predict(str(tiny_glm), [str(source)], tmp_path / "whole.jsonl", options=OPTIONS)
    fake = FakeVllm(open_model(tiny_glm).model, template)
    fake.install(monkeypatch)
    questions = fail_at_call(3, monkeypatch)
    with pytest.raises(RuntimeError):
        predict(str(tiny_glm), [str(source)], out, options=options)
    assert not out.exists()
    assert len(read_rows(tmp_path / "out.jsonl.part")) == 4
    predict(str(tiny_glm), [str(source)], out, options=options)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    kept = [prompt for asked in questions[:2] for prompt in asked]
    again = [prompt for asked in questions[3:] for prompt in asked]
    assert len(again) == 3
    assert not [prompt for prompt in again if prompt in kept]


@pytest.mark.parametrize(
    ("rank", "allowed"),
    [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64), (65, 128), (128, 128),
     (129, 256), (256, 256), (257, 320), (320, 320), (321, 512), (512, 512)],
)  # fmt: skip
def test_vllm_is_told_the_least_of_its_ranks_that_holds_the_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, allowed: int
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank}))
    monkeypatch.setattr(vllm, "read_lora", lambda adapter: None)
    assert vllm._rank(tmp_path) == allowed


def test_what_vllm_cannot_do_is_said_before_it_starts(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.jsonl", dialogues(2))
    options = replace(OPTIONS, backend="vllm")

    def refused(kind: type[Exception], reason: str, target: Path = tiny_glm) -> None:
        with pytest.raises(kind, match=reason):
            predict(str(target), [str(source)], tmp_path / "out.jsonl", options=options)

    monkeypatch.setitem(sys.modules, "vllm", None)
    refused(ConfigError, r"which .*python.* does not have(.|\n)*docs/serving\.md")
    assert "Batch inference with vLLM" in (ROOT / "docs" / "serving.md").read_text("utf-8")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(ConfigError, "leave torchrun out")
    monkeypatch.delenv("WORLD_SIZE")
    for name in ("vllm", "vllm.lora", "vllm.lora.request"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    adapter = make_adapter(tmp_path / "adapter", tiny_glm)
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    for changes, reason in (
        ({"peft_type": "PREFIX_TUNING", "r": None}, "PREFIX_TUNING adapter .*backend transformers"),
        ({"r": 1024}, "rank 1024, which vLLM does not open"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | changes), "utf-8")
        refused(ModelError, reason, adapter)
    long = write_rows(tmp_path / "in.jsonl", [{"messages": turns("x" * 2100)}])
    refused(DataError, rf"{long.name}:1")


def test_lines_of_another_request_are_not_kept(
    tiny_glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.jsonl", dialogues(4))
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(prompts, "BATCHES_PER_WINDOW", 1)
    monkeypatch.setattr(ResumableOutput, "finish", lambda journal: None)
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
    monkeypatch.setattr(generation, "write_replies", lambda *_, **__: pytest.fail("generated"))
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


@pytest.mark.parametrize("said_by", ["the command", "the run"])
def test_columns_that_only_the_user_knows_are_read(
    tmp_path: Path, said_by: str, template: ChatTemplate
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"ask": "Q", "tell": "A"}\n')
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    options = RowOptions(columns=("ask", "tell"))
    if said_by == "the run":
        options = RowOptions()
        (checkpoint / "finetune.json").write_text("{}")
        (checkpoint / "config.yaml").write_text(
            "model: {path: m}\nmethod: {kind: lora}\ntraining: {output_dir: o}\n"
            "data: {train: x.jsonl, columns: {prompt: ask, response: tell}}\n"
        )
    (prompt,) = Dialogues([str(file)], options.section(str(checkpoint))).prompts(template)
    assert [m.content for m in prompt.conversation.messages] == ["Q", "A"]
    assert prompt.index == 1
    with pytest.raises(DataError, match="not known by its columns"):
        list(Dialogues([str(file)], RowOptions().section("m")).prompts(template))
