"""The endpoint says what evaluation says, in the form that OpenAI's own client reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pictures
import pytest
import serving
from adapters import make_adapter
from PIL import Image
from rows import CALL, TOOL
from serving import HELLO, data_url, showing

from finetune.data.dialogue.conversation import Message, ShownImage
from finetune.export.merge import merge
from finetune.generation.generate import generate
from finetune.generation.load import OpenedModel, open_model
from finetune.generation.messages import reply_messages
from finetune.generation.stream import Piece, ReplyStream
from finetune.serving.job import StopStrings

QUESTION = Message("user", "weather?")
CALLING = Message("assistant", CALL, metadata="get_weather")
OTHER_CALL = Message("assistant", '{"city": "上海"}', metadata="get_weather")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.save_talkative(tmp_path_factory.mktemp("base") / "talkative")


@pytest.fixture(scope="module")
def opened(base: Path) -> OpenedModel:
    return open_model(base)


@pytest.fixture(scope="module")
def server(opened: OpenedModel) -> Iterator[serving.Served]:
    with serving.served(opened) as running:
        yield running


def greedy(opened: OpenedModel, *messages: Message, length: int = 24) -> tuple[str, bool, int]:
    """The text of evaluation's reply, whether it stopped, and its tokens."""
    prompt = serving.prompt_of(opened.template, *messages)
    [reply] = generate(opened.model, opened.template, [prompt], max_new_tokens=length, batch_size=1)
    [message] = reply_messages(reply.ids, opened.template, ())
    return message.content, reply.stopped, len(reply.ids)


def turns(messages: list[Any]) -> list[Message]:
    return [Message(message["role"], message["content"]) for message in messages]


DIALOGUES = [
    HELLO,
    [{"role": "system", "content": "Be brief."}, *HELLO],
    [*HELLO, {"role": "assistant", "content": "fine"}, {"role": "user", "content": "the order"}],
    [{"role": "user", "content": "q" * 40}],
]


@pytest.mark.parametrize("messages", DIALOGUES, ids=["one", "system", "turns", "long"])
def test_a_reply_is_the_greedy_one_of_evaluation_whole_and_streamed(
    server: serving.Served, opened: OpenedModel, messages: list[Any]
) -> None:
    text, stopped, tokens = greedy(opened, *turns(messages))
    client = server.client
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=24)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == ("stop" if stopped else "length")
    prompt = len(serving.prompt_of(opened.template, *turns(messages)))
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == prompt
    assert whole.usage.completion_tokens == tokens
    assert whole.usage.total_tokens == prompt + whole.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=24, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(said) == text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("kind", ["lora", "merged", "ptuning_v2", "chatglm"])
def test_adapters_merged_models_prefixes_and_the_published_layout_are_served(
    tmp_path: Path, base: Path, opened: OpenedModel, kind: str
) -> None:
    if kind in ("lora", "merged"):
        folder = make_adapter(tmp_path / "adapter", base)
        if kind == "merged":
            folder = merge(folder, tmp_path / "merged", check="none").output
    elif kind == "ptuning_v2":
        folder = prefix(tmp_path, base)
    else:
        folder = serving.save_talkative(tmp_path / "published", "chatglm")
    other = open_model(folder)
    text, _, _ = greedy(other, *turns(HELLO))
    assert text != greedy(opened, *turns(HELLO))[0]
    with serving.served(other) as server:
        reply = server.client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=24, n=1, user="me", seed=3
        )
    assert reply.choices[0].message.content == text


def prefix(folder: Path, base: Path) -> Path:
    import runs

    runs.write_dialogues(folder / "rows.jsonl", 4)
    settings = runs.config(base, folder / "rows.jsonl", folder / "run", training__max_steps=1)
    settings["method"] = {"kind": "ptuning_v2", "num_virtual_tokens": 4}
    settings["training"]["learning_rate"] = 1.0
    runs.run_here(settings)
    return folder / "run" / "checkpoint-1"


# --- sampling and stops --------------------------------------------------------------------------


def test_a_seed_decides_a_sampled_reply_and_another_seed_another(server: serving.Served) -> None:
    def said(**how: Any) -> str | None:
        reply = server.client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=16, **how
        )
        return reply.choices[0].message.content

    assert said(temperature=1.0, seed=1) == said(temperature=1.0, seed=1)
    assert len({said(temperature=1.5, seed=seed) for seed in range(4)}) > 1
    assert said(temperature=1.5, top_p=1e-6, seed=5) == said(temperature=0) == said()
    assert said(temperature=1e-9, seed=5) == said(temperature=0)


def test_without_a_seed_another_reply_is_drawn_each_time(server: serving.Served) -> None:
    said = {
        server.client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=24, temperature=2
        ).choices[0].message.content
        for _ in range(4)
    }  # fmt: skip
    assert len(said) > 1


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_ends_with_done_once(server: serving.Served, usage: bool) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 3, "stream": True}
    body["stream_options"] = {"include_usage": usage}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    lines = [line for line in answer.text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert lines.count("data: [DONE]") == 1
    assert ("usage" in json.loads(lines[-2].removeprefix("data: "))) == usage


@pytest.mark.parametrize("stops", [["bb", "a"], ["a", "bb"]])
def test_of_two_stop_strings_in_one_piece_the_first_in_the_text_ends_it(stops: list[str]) -> None:
    text = StopStrings(stops)
    assert text.feed("xaybb") == "x"
    assert text.found


def test_a_stop_string_ends_the_reply_before_itself(
    server: serving.Served, opened: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving.say(monkeypatch, opened.template, Message("assistant", "one two END three"))

    def said(stop: Any, stream: bool = False) -> tuple[str, str | None]:
        made = server.client.chat.completions.create(
            model="tiny", messages=HELLO, stop=stop, stream=stream
        )
        if not stream:
            return made.choices[0].message.content or "", made.choices[0].finish_reason
        chunks = [chunk.choices[0] for chunk in made]
        return "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason

    for stream in (False, True):
        assert said("END", stream) == ("one two ", "stop")
        assert said(["xyz", " three", "two"], stream) == ("one ", "stop")
        assert said(["END of it", "three!"], stream) == ("one two END three", "stop")


def test_what_may_begin_a_stop_string_is_kept_back_and_given_when_it_does_not() -> None:
    text = StopStrings(["END"])
    assert [text.feed(piece) for piece in ("a E", "N", "T E", "N")] == ["a ", "", "ENT ", ""]
    assert text.rest() == "EN"
    assert not text.found
    assert [text.feed(piece) for piece in ("x", "EEN", "D y")] == ["x", "E", ""]
    assert text.found


def test_a_reply_that_is_cut_says_so(
    server: serving.Served, opened: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving.say(monkeypatch, opened.template, Message("assistant", "cut of"), stop=False)
    reply = server.client.chat.completions.create(model="tiny", messages=HELLO)
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].message.content == "cut of"


# --- tools ---------------------------------------------------------------------------------------


def asking(server: serving.Served, **how: Any) -> Any:
    question = [{"role": "user", "content": QUESTION.content}]
    options = {"model": "tiny", "messages": question, "tools": [TOOL]} | how
    return server.client.chat.completions.create(**options)


def test_calls_come_as_tool_calls_and_their_results_go_back_in_the_training_layout(
    server: serving.Served, opened: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = opened.template
    asked = serving.say(monkeypatch, template, CALLING, OTHER_CALL)
    reply = asking(server)
    assert asked[0].prompt == serving.prompt_of(template, QUESTION, tools=[TOOL])
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    functions = [call.function for call in choice.message.tool_calls]
    assert [(f.name, f.arguments) for f in functions] == [
        ("get_weather", CALL), ("get_weather", OTHER_CALL.content),
    ]  # fmt: skip
    ids = [call.id for call in choice.message.tool_calls]
    assert len(set(ids)) == 2
    results = [
        {"role": "tool", "tool_call_id": ids[1], "content": '{"t": 30}'},
        {"role": "tool", "tool_call_id": ids[0], "content": '{"t": 20}'},
    ]
    question = {"role": "user", "content": QUESTION.content}
    asking(server, messages=[question, choice.message, *results])
    first, second = Message("observation", '{"t": 20}'), Message("observation", '{"t": 30}')
    history = (QUESTION, CALLING, OTHER_CALL, first, second)
    assert asked[1].prompt == serving.prompt_of(template, *history, tools=[TOOL])


def test_calls_are_streamed_with_their_number(
    server: serving.Served, opened: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving.say(monkeypatch, opened.template, CALLING, OTHER_CALL)
    with server.client.chat.completions.stream(
        model="tiny", messages=[{"role": "user", "content": "weather?"}], tools=[TOOL]
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["北京", "上海"]
    assert final.choices[0].finish_reason == "tool_calls"


def test_one_call_at_a_time_and_no_tools_at_all_can_be_asked_for(
    server: serving.Served, opened: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = opened.template
    asked = serving.say(monkeypatch, template, CALLING, OTHER_CALL)
    message = asking(server, parallel_tool_calls=False).choices[0].message
    assert [call.function.arguments for call in message.tool_calls] == [CALL]
    reply = asking(server, tool_choice="none").choices[0]
    assert asked[1].prompt == serving.prompt_of(template, QUESTION)
    assert reply.message.content == f"get_weather\n{CALL}"
    assert reply.finish_reason == "stop"


def test_a_first_line_that_is_no_name_is_text(
    server: serving.Served, opened: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving.say(monkeypatch, opened.template, Message("assistant", "hello", metadata="Well, then"))
    reply = asking(server).choices[0]
    assert (reply.message.content, reply.finish_reason) == ("Well, then\nhello", "stop")
    assert reply.message.tool_calls is None


@pytest.mark.parametrize(
    "messages",
    [
        [Message("assistant", "你好，😀")],
        [Message("assistant", "two\nlines\n")],
        [CALLING],
        [CALLING, OTHER_CALL],
        [CALLING, Message("assistant", "and text")],
        [Message("assistant", "no\ncall", metadata="Hello, dear")],
    ],
)
def test_a_stream_reads_what_is_read_of_the_whole(
    opened: OpenedModel, messages: list[Message]
) -> None:
    template = opened.template
    ids: list[int] = []
    for message in messages:
        ids += [template.tokenizer.control_ids["<|assistant|>"]] if ids else []
        text = f"{message.metadata}\n{message.content}"
        ids += template.tokenizer.plain.encode(text, add_special_tokens=False).ids
    stream = ReplyStream(template, [TOOL])
    pieces = [piece for token in ids for piece in stream.take(token)] + stream.finish()
    read: list[Message] = []
    for piece in pieces:
        if piece.name or not read or (piece.call is None and read[-1].metadata):
            read.append(Message("assistant", piece.text, metadata=piece.name))
        else:
            read[-1] = Message("assistant", read[-1].content + piece.text, read[-1].metadata)
    assert read == reply_messages(ids, template, [TOOL])
    assert stream.finish() == []
    assert all(isinstance(piece, Piece) for piece in pieces)


# --- images --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["base", "lora", "ptuning_v2"])
def seeing(tmp_path_factory: pytest.TempPathFactory, request: Any) -> OpenedModel:
    base = pictures.save_model(tmp_path_factory.mktemp("glm4v"))
    if request.param == "base":
        return open_model(base)
    work = tmp_path_factory.mktemp("tuned")
    tuned = open_model(
        prefix(work, base) if request.param == "ptuning_v2" else make_adapter(work, base)
    )
    said = [greedy(opened, *turns(HELLO)) for opened in (tuned, open_model(base))]
    assert said[0] != said[1]
    return tuned


def test_an_image_is_a_data_url_and_gives_the_reply_of_its_file(
    seeing: OpenedModel, tmp_path: Path
) -> None:
    said = {}
    with serving.served(seeing) as server:
        for colour in ("red", "blue"):
            reply = server.client.chat.completions.create(
                model="tiny", messages=showing(data_url(colour=colour)), max_tokens=12
            )
            said[colour] = reply.choices[0].message.content
            path = tmp_path / f"{colour}.png"
            Image.new("RGB", (20, 10), colour).save(path)
            question = Message("user", "what is this?", images=(ShownImage(str(path)),))
            text, _, _ = greedy(seeing, question, length=12)
            assert said[colour] == text
    assert said["red"] != said["blue"]
