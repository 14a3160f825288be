"""The endpoint, `predict`, `chat` and constrained replies in the layouts of GLM-4.5, 4.7 and GLM-OCR."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import newer
import pytest
import runs
import serving
from dialogues import dialogue

from finetune.chat.terminal import Session, Speech, Terminal
from finetune.data.chat.template import ChatTemplate
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.evaluation.evaluate import evaluate
from finetune.evaluation.predictions import predicted
from finetune.evaluation.tasks.calls import calls_of
from finetune.generation.decoder import Decoder, DecodingRow, Request
from finetune.generation.generate import Reply
from finetune.generation.load import OpenedModel, open_model
from finetune.generation.messages import reply_messages, reply_row, without_thought
from finetune.generation.predict import PredictOptions, predict
from finetune.generation.prompts import PromptStream
from finetune.generation.stream import Piece, reply_stream
from finetune.generation.structured import Structure, Structures

QUESTION = [{"role": "user", "content": "q"}]
THOUGHT = "<think>\n先想。\n</think>\n\n"
CALLING = dialogue(
    ("user", "q"), ("reply", THOUGHT + "好。"), ("call", '{"a": "5", "b": 7}', "f"),
    ("call", "{}", "g"), tools=newer.TOOLS,
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def model(root: Path) -> OpenedModel:
    return open_model(newer.save_model(root / "model", "GLM-4.5"))


@pytest.fixture(scope="module", params=newer.TAGGED)
def template(root: Path, request: pytest.FixtureRequest) -> ChatTemplate:
    return newer.template_of(root, request.param)


@pytest.fixture(scope="module")
def server(model: OpenedModel, template: ChatTemplate) -> Iterator[serving.Served]:
    with serving.served(replace(model, template=template)) as running:
        yield running


def reply_ids(template: ChatTemplate, conversation: Conversation, reply: int = 1) -> list[int]:
    """What a model writes behind the prompt of a reply, with its stop."""
    ids = template.render([conversation])[0].input_ids.tolist()
    return ids[len(template.prompt(conversation, reply)) :]


def write(
    monkeypatch: pytest.MonkeyPatch, template: ChatTemplate, ids: Sequence[int]
) -> list[Request]:
    """Puts these tokens in the place of every reply; returns what was asked, as it comes."""
    asked: list[Request] = []

    def add(self: Decoder, requests: Sequence[Request], _: Any = None) -> list[DecodingRow]:
        asked.extend(requests)
        rows = [DecodingRow(request) for request in requests]
        for row in rows:
            for token in ids:
                if not row.is_done:
                    row.take(token, template.stop_ids)
            row.is_done = True
        return rows

    monkeypatch.setattr(Decoder, "add", add)
    monkeypatch.setattr(Decoder, "taken", serving.nothing)
    return asked


def test_a_reply_has_its_thought_its_text_and_its_calls(
    server: serving.Served, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(monkeypatch, template, reply_ids(template, CALLING))
    asked: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "tools": list(newer.TOOLS)}
    choice = server.client.chat.completions.create(**asked).choices[0]
    message: Any = choice.message
    assert (message.reasoning_content, message.content) == ("先想。", "好。")
    assert choice.finish_reason == "tool_calls"
    made = [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls]
    assert made == [("f", {"a": "5", "b": 7}), ("g", {})]

    thought = text = ""
    calls: dict[int, list[str]] = {}
    for chunk in server.client.chat.completions.create(**asked, stream=True):
        delta: Any = chunk.choices[0].delta
        thought += getattr(delta, "reasoning_content", None) or ""
        text += delta.content or ""
        for call in delta.tool_calls or []:
            found = calls.setdefault(call.index, ["", ""])
            found[0] += call.function.name or ""
            found[1] += call.function.arguments
    assert (thought, text) == ("先想。", "好。")
    assert calls == {0: ["f", '{"a": "5", "b": 7}'], 1: ["g", "{}"]}


def test_a_client_switches_thinking_off_and_sends_thoughts_back(
    server: serving.Served, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = replace(dialogue(("user", "q"), ("reply", "好。")), thinks=False)
    asked = write(monkeypatch, template, reply_ids(template, plain))
    switched: Any = {"chat_template_kwargs": {"enable_thinking": False}}
    made = server.client.chat.completions.create(
        model="tiny", messages=QUESTION, extra_body=switched
    )  # type: ignore[arg-type]
    assert made.choices[0].message.content == "好。"
    assert not hasattr(made.choices[0].message, "reasoning_content")
    assert asked[-1].prompt == template.prompt(plain, 1)

    call = {"id": "1", "type": "function", "function": {"name": "g", "arguments": "{}"}}
    history = [
        *QUESTION,
        {"role": "assistant", "content": None, "reasoning_content": "先想。", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "9:00"},
    ]
    asked_before = dialogue(("user", "q"), ("call", THOUGHT + "{}", "g"), ("tool", "9:00"))
    server.client.chat.completions.create(model="tiny", messages=history)  # type: ignore[arg-type]
    assert asked[-1].prompt == template.prompt(asked_before, 3)


def test_a_client_can_ask_for_a_call(
    server: serving.Served, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    asked = write(monkeypatch, template, reply_ids(template, CALLING))
    server.client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        tools=list(newer.TOOLS),
        tool_choice="required",  # type: ignore[arg-type]
    )
    assert asked[-1].constraint is not None


def allows(constraint: Any, ids: Sequence[int]) -> bool:
    for token in ids:
        if not constraint._allowed()[token]:
            return False
        constraint.accept(token)
    return True


def test_a_constraint_lets_calls_through_and_nothing_else(template: ChatTemplate) -> None:
    pytest.importorskip("llguidance")
    structures, opens = Structures(template), template.layout.opens
    tool = {"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "required": ["a", "k"], "properties": {
            "a": {"type": "string"}, "b": {"type": "integer"}, "k": {"enum": ["x", "y"]}}}}}  # fmt: skip
    for arguments, fits in (
        ({"a": "北\n</arg_value>", "b": 3, "k": "x"}, True), ({"a": "", "k": "y"}, True),
        ({"a": "x", "b": "three", "k": "x"}, False), ({"a": "x", "k": "z"}, False),
        ({"k": "x"}, False), ({"a": "x", "k": "x", "other": 1}, False),
    ):  # fmt: skip
        for thought in ("", THOUGHT):
            made = thought + json.dumps(arguments, ensure_ascii=False)
            asked = dialogue(("user", "q"), ("call", made, "f"), tools=[tool])
            ids = reply_ids(template, asked)[:-1]
            constraint = structures.constraint(Structure(None, [tool], opened=opens(asked, 1)))
            assert allows(constraint, ids) is fits
    text = dialogue(("user", "q"), ("reply", "just words"))
    constraint = structures.constraint(Structure(None, [tool], opened=opens(text, 1)))
    assert not allows(constraint, reply_ids(template, text)[:-1])
    for thinks in (None, False):
        asked = replace(dialogue(("user", "q"), ("reply", '{"n": 1}')), thinks=thinks)
        structure = Structure({"type": "object"}, opened=opens(asked, 1))
        assert allows(structures.constraint(structure), reply_ids(template, asked)[:-1])


def test_pieces_are_those_of_the_whole_reply(template: ChatTemplate) -> None:
    ids = reply_ids(template, CALLING)
    stream = reply_stream(template, newer.TOOLS)
    pieces = [piece for token in ids for piece in stream.take(token)] + stream.finish()
    assert stream.over
    assert stream.ids == ids[:-1]
    assert "".join(p.text for p in pieces if p.is_thought) == "先想。"
    assert [p.name for p in pieces if p.name] == ["f", "g"]
    assert all(isinstance(piece, Piece) for piece in pieces)
    shown: list[str] = []
    speech = Speech(template, newer.TOOLS, shown.append)
    for token in ids:
        speech.take(token)
    speech.finish()
    assert "".join(shown) == ('<think>\n先想。\n</think>\n\n好。\n→ f {"a": "5", "b": 7}\n→ g {}')


def test_chat_switches_thinking_where_the_template_can(template: ChatTemplate) -> None:
    asked: list[Conversation] = []

    def reply(conversation: Conversation, show: Any) -> list[Message]:
        asked.append(conversation)
        return [Message("assistant", "好。")]

    voice = SimpleNamespace(template=template, room=lambda _: True, reply=reply)
    sink = io.StringIO()
    Session(voice, Terminal(io.StringIO("q\n/think off\nq\n/think\n"), sink)).run()
    assert [conversation.thinks for conversation in asked] == [None, False]
    assert len(asked[1].messages) == 1
    assert "thinking off)" in sink.getvalue()
    assert "error: on or off?" in sink.getvalue()
    voice.template = SimpleNamespace(layout=SimpleNamespace(has_switch=False))
    sink = io.StringIO()
    Session(voice, Terminal(io.StringIO("/think off\n"), sink)).run()
    assert "error: this model's chat template has no switch for thinking" in sink.getvalue()


def test_without_tools_the_tags_of_a_call_are_text(template: ChatTemplate) -> None:
    ids = reply_ids(template, replace(CALLING, tools=()))
    [message] = reply_messages(ids, template, ())
    assert not message.metadata
    assert "<tool_call>f" in message.content


def test_predict_writes_rows_that_can_be_trained_on(template: ChatTemplate) -> None:
    lone = dialogue(("user", "q"), ("call", THOUGHT + '{"a": "5"}', "f"), tools=newer.TOOLS)
    for conversation in (CALLING, lone):
        asked = replace(conversation, messages=conversation.messages[:1])
        [prompt] = PromptStream([asked], template, replies="next_reply")
        reply = Reply(0, tuple(reply_ids(template, conversation)[:-1]), True)
        row = reply_row(prompt, reply)
        again = tuple(
            Message(m["role"], m["content"], m.get("metadata", "")) for m in row["messages"]
        )
        assert again == conversation.messages
        alone = without_thought(again[1])
        assert alone.content == ('{"a": "5"}' if alone.metadata else again[1].content)
        assert all(json.loads(c["function"]["arguments"]) is not None for c in row["tool_calls"])


def test_a_tiny_model_learns_thoughts_and_calls_and_is_asked_for_them(tmp_path: Path) -> None:
    model = newer.save_model(tmp_path / "model", "GLM-4.5")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "the"}'}}
    row: dict[str, Any] = {"tools": list(newer.TOOLS), "messages": [
        {"role": "user", "content": "the quick fox"},
        {"role": "assistant", "content": None, "reasoning_content": "the order", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "a dog"},
        {"role": "assistant", "content": "the dog answers", "reasoning_content": "a lazy dog"},
    ]}  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row) + "\n")
    settings = runs.config(
        model, data, tmp_path / "run", training__max_steps=40, training__batch_size=1,
        data__validation=str(data), data__max_overlap=1.0, data__max_length=1024,
        evaluation__max_new_tokens=64, training__learning_rate=1e-2,
    ) | {"method": {"kind": "full"}}  # fmt: skip
    runs.run_here(settings)
    report = evaluate(str(tmp_path / "run/checkpoint-40"), output=tmp_path / "scores")
    assert report["scores"]["tool_call_accuracy"] == 100.0, report["scores"]
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps(row | {"messages": row["messages"][:1]}) + "\n")
    predict(
        str(tmp_path / "run/checkpoint-40"),
        [str(asked)],
        tmp_path / "out.jsonl",
        options=PredictOptions(64),
    )
    [line] = (tmp_path / "out.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["tool_calls"][0]["function"] == call["function"]


def test_scores_read_calls_by_their_schema_and_without_their_thought(
    template: ChatTemplate,
) -> None:
    answered = dialogue(("user", "q"), ("call", THOUGHT + '{"a": "5"}', "f"), ("tool", "r"),
                        ("reply", "好。"), tools=newer.TOOLS)  # fmt: skip
    prompts = list(PromptStream([answered], template))
    assert [prompt.index for prompt in prompts] == [1, 3]
    ids = reply_ids(template, replace(answered, messages=answered.messages[:2]))
    found = predicted(prompts[0], tuple(ids), True)
    assert found.reply == found.reference == Message("assistant", '{"a": "5"}', "f")
    loose = dialogue(("user", "q"), ("reply", " <think> why </think> 好。 "))
    [asked] = PromptStream([loose], template)
    again = predicted(asked, tuple(reply_ids(template, loose)), True)
    assert again.reply == again.reference
    [call] = calls_of(template, ids, newer.TOOLS)
    assert call.arguments == {"a": "5"}
