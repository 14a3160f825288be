"""What the original repository's example programs ask of a model is asked here, and answered.

Its API client, its chats for text and for images, and its batches, with their settings; the stress test is
`tests/test_bench.py`. Facts about those programs, none of their code.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pictures
import pytest
import serving
import tiny
from PIL import Image
from rows import read_rows, turns, write_rows

from finetune.cli import main
from finetune.data.chat import template
from finetune.data.dialogue.conversation import Message
from finetune.generation.load import OpenedModel, open_model

GLM4 = Path(template.__file__).parent / "templates" / "glm4_chat.jinja"
"""The layout of glm-4-9b-chat, with its built-in tools."""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the current weather",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {"type": "string", "description": "The city"},
                "format": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["location", "format"],
        },
    },
}
CALLED: dict[str, Any] = {"max_tokens": 24, "temperature": 0.9, "presence_penalty": 1.2, "top_p": 0.1}  # fmt: skip
CHATTED: dict[str, Any] = {"max_tokens": 24, "temperature": 0.4, "presence_penalty": 1.2, "top_p": 0.8}  # fmt: skip
CATS: list[Any] = [
    {"role": "system", "content": "请在你输出的时候都带上“喵喵喵”三个字，放在开头。"},
    {"role": "user", "content": "你好，你是谁"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def opened(folder: Path) -> OpenedModel:
    model = serving.save_talkative(folder / "glm-4")
    tiny.save_tokenizer(model, chat_template=GLM4.read_text(encoding="utf-8"))
    return open_model(model)


@pytest.fixture(scope="module")
def eyes(folder: Path) -> Path:
    return pictures.save_model(folder / "glm-4v")


@pytest.fixture(scope="module")
def server(opened: OpenedModel) -> Iterator[serving.Served]:
    with serving.served({"glm-4": opened}) as running:
        yield running


def test_the_api_clients_chat_is_answered_whole_and_streamed(server: serving.Served) -> None:
    create = server.client.chat.completions.create
    whole = create(model="glm-4", messages=CATS, seed=3, **CHATTED)
    assert whole.choices[0].message.content
    chunks = list(create(model="glm-4", messages=CATS, seed=3, stream=True, **CHATTED))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_the_api_clients_functions_are_called(server: serving.Served) -> None:
    create = server.client.chat.completions.create
    question: list[Any] = [{"role": "user", "content": "What's the Celsius temperature in San Francisco?"}]  # fmt: skip
    asked: dict[str, Any] = {"model": "glm-4", "messages": question, "tools": [WEATHER], **CALLED}
    assert create(tool_choice="auto", **asked).choices[0].finish_reason in ("stop", "length", "tool_calls")  # fmt: skip
    named: Any = {"type": "function", "function": {"name": "get_current_weather"}}
    made = create(tool_choice=named, **(asked | {"max_tokens": 200})).choices[0]
    [call] = made.message.tool_calls
    assert call.function.name == "get_current_weather"
    if made.finish_reason == "tool_calls":
        assert set(json.loads(call.function.arguments)) >= {"location", "format"}


@pytest.mark.parametrize(
    ("kind", "question", "said"),
    [("cogview", "帮我画一张天空的画画吧", "## cogview"), ("simple_browser", "今天黄金的价格", "## simple_browser")],
)  # fmt: skip
def test_built_in_tools_are_laid_out_as_the_model_was_trained(
    server: serving.Served, opened: OpenedModel, kind: str, question: str, said: str
) -> None:
    messages: list[Any] = [{"role": "user", "content": question}]
    tools: Any = [{"type": kind}]
    made = server.client.chat.completions.create(model="glm-4", messages=messages, tools=tools, **CALLED)  # fmt: skip
    wanted = serving.prompt_of(opened.template, Message("user", question), tools=tools)
    assert made.usage is not None
    assert made.usage.prompt_tokens == len(wanted)
    assert said in opened.template.decode(wanted)


def test_the_vision_client_shows_an_image_and_streams(eyes: Path) -> None:
    with serving.served({"glm-4v-9b": open_model(eyes)}) as server:
        messages = serving.showing(serving.data_url(), "What's in this image?")
        create = server.client.chat.completions.create
        how: dict[str, Any] = {"max_tokens": 12, "temperature": 0.8, "top_p": 0.8}
        chunks = list(create(model="glm-4v-9b", messages=messages, stream=True, **how))
        messages += [
            {"role": "assistant", "content": "a dog"},
            {"role": "user", "content": "是吗？"},
        ]
        assert create(model="glm-4v-9b", messages=messages, **how).usage.completion_tokens
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def chatted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str, typed: str
) -> str:
    """What a chat in the terminal shows, with the settings of the original's chats."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    how = "--top-p 0.8 --temperature 0.6 --repetition-penalty 1.2 --max-new-tokens 20 --seed 1"
    with pytest.raises(SystemExit) as end:
        main(["chat", *words, *how.split()])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_the_chat_goes_on_with_its_history_and_repeats_itself_by_seed(
    opened: OpenedModel, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    model = str(folder / "glm-4")
    shown = chatted(monkeypatch, capsys, model, typed="hello\nand the dog?\n/quit\n")
    assert shown == chatted(monkeypatch, capsys, model, typed="hello\nand the dog?\n/quit\n")
    other = chatted(monkeypatch, capsys, model, typed="good day\nand the dog?\n/quit\n")
    assert shown.rpartition("> ")[0] != other.rpartition("> ")[0]
    assert shown.count("> ") >= 3


def test_the_vision_chat_shows_an_image_with_its_first_message(
    eyes: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (30, 20), "red").save(folder / "red.png")
    typed = f"/image {folder / 'red.png'}\nwhat is it?\nand its colour?\n/quit\n"
    shown = chatted(monkeypatch, capsys, str(eyes), typed=typed)
    assert f"image: {folder / 'red.png'}, shown with your next message" in shown
    assert "error" not in shown
    missing = chatted(monkeypatch, capsys, str(eyes), typed="/image nowhere.png\nhello\n/quit\n")
    assert "error: nowhere.png" in missing, "an image that cannot be read: the chat goes on without"


def test_batches_are_drawn_with_the_originals_settings(
    opened: OpenedModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dialogues = (
        ("我的爸爸和妈妈结婚为什么不能带我去", "因为他们结婚时你还没有出生", "我刚才的提问是"),
        ("你好，你是谁",),
    )
    source = write_rows(folder / "in.jsonl", [{"messages": turns(*said)} for said in dialogues])
    for name in ("one", "two"):
        command = f"predict {folder / 'glm-4'} --data {source} --output {folder / name}.jsonl"
        with pytest.raises(SystemExit) as end:
            main(
                [
                    *command.split(),
                    "--max-new-tokens",
                    "20",
                    "--top-p",
                    "0.8",
                    "--temperature",
                    "0.8",
                ]
            )
        assert end.value.code == 0
    rows = read_rows(folder / "one.jsonl")
    assert [len(row["messages"]) for row in rows] == [4, 2]
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
    assert rows == read_rows(folder / "two.jsonl")
