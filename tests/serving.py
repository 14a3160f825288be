"""The endpoint in this process, with a model, or with replies that a test wrote."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny
import uvicorn
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune.data.dialogue.conversation import Conversation, Message
from finetune.generation.batch import SharedPrefix
from finetune.generation.decoder import Decoder, DecodingRow, Request
from finetune.generation.load import OpenedModel
from finetune.serving import engine as engine_module
from finetune.serving.engine import Engine
from finetune.serving.guard import TimedProtocol
from finetune.serving.requests.chat import AskedChat
from finetune.serving.requests.rules import ReplyRequest, RequestRules
from finetune.serving.serve import ServeOptions, endpoint

HELLO: list[Any] = [{"role": "user", "content": "hello 你好 there"}]


@dataclass
class Served:
    """A running endpoint."""

    url: str
    engine: Engine
    key: str = "no key"
    scripts: dict[str, Scripted] = field(default_factory=dict)
    """The models that stand in, by name, where replies are written by a test."""
    folder: Path | None = None
    """Where its page saves."""

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)

    @cached_property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)


@contextmanager
def served(opened: Any, *, key: str | None = None, **options: Any) -> Iterator[Served]:
    """The endpoint of a model called `tiny`, or of several by name, on a free port until the block ends."""
    models = opened if isinstance(opened, dict) else {"tiny": opened}
    app, engine = endpoint(models, ServeOptions(**options), key.encode() if key else None)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app, http=TimedProtocol, log_config=None, log_level="error")
    )
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    until(lambda: server.started)
    made = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, key or "no key")
    try:
        yield made
    finally:
        if "client" in vars(made):
            made.client.close()
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        assert not engine._thread.is_alive(), "the end of the server is that of the model's thread"


def save_talkative(folder: Path, family: str = "glm", *, ends: bool = True, **shape: Any) -> Path:
    """A tiny model that says text for a while: of the control tokens it knows `<|user|>` alone.

    Without `ends` it does not know that one either, and has room for a very long reply.
    """
    shape = shape if ends else {"max_position_embeddings": 200_000, **shape}
    tiny.save_model(folder, family, **shape)
    tensors = load_file(folder / "model.safetensors")
    [head] = [name for name in tensors if name.endswith(("lm_head.weight", "output_layer.weight"))]
    known = {tiny.CONTROL_IDS["<|user|>"]} if ends else set()
    silent = [n for n in range(tiny.NUM_RANKS, len(tensors[head])) if n not in known]
    tensors[head][silent] = 0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for something that must come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


async def until_async(true: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits without stopping the loop."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.005)


def nothing(*_: Any) -> SharedPrefix:
    """What was computed of a reply that no model wrote."""
    return SharedPrefix.kept([], [])


def say(
    monkeypatch: pytest.MonkeyPatch, template: Any, *messages: Message, stop: bool = True
) -> list[Request]:
    """Puts these messages in the place of every reply; returns what was asked, as it comes."""
    ids: list[int] = []
    for message in messages:
        ids += [template.tokenizer.control_ids["<|assistant|>"]] if ids else []
        text = f"{message.metadata}\n{message.content}"
        ids += template.tokenizer.plain.encode(text, add_special_tokens=False).ids
    asked: list[Request] = []

    def add(self: Decoder, requests: Sequence[Request], _: Any = None) -> list[DecodingRow]:
        asked.extend(requests)
        rows = [DecodingRow(request) for request in requests]
        for row in rows:
            for token in [*ids, template.stop_ids[0]] if stop else ids:
                if not row.is_done:
                    row.take(token, template.stop_ids)
            row.is_done = True
        return rows

    monkeypatch.setattr(Decoder, "add", add)
    monkeypatch.setattr(Decoder, "taken", nothing)
    return asked


class Slow:
    """A model that writes a token whenever it is told to, and remembers what it was asked."""

    def __init__(self, token: int) -> None:
        self.batches: list[list[Any]] = []
        self.go = threading.Semaphore(0)
        self._token = token

    def put_in_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def add(decoder: Decoder, requests: Sequence[Request], _: Any = None) -> list[DecodingRow]:
            self.batches.append(list(requests))
            rows = [DecodingRow(request) for request in requests]
            decoder._rows += rows
            return rows

        def step(decoder: Decoder) -> None:
            assert self.go.acquire(timeout=60)
            for row in decoder.active:
                row.take(self._token, ())

        def drop_done(decoder: Decoder) -> None:
            decoder._rows = decoder.active

        for method in (add, step, drop_done):
            monkeypatch.setattr(Decoder, method.__name__, method)
        monkeypatch.setattr(Decoder, "taken", nothing)


def prompt_of(template: Any, *messages: Message, tools: Sequence[Any] = ()) -> list[int]:
    """The prompt after these messages, as training lays them out."""
    prompt: list[int] = template.prompt(Conversation(messages, tuple(tools)), len(messages))
    return prompt


def read_chat(body: Any, rules: RequestRules, folder: Path) -> ReplyRequest:
    """The one reply that a body of `/v1/chat/completions` asks for."""
    asked = AskedChat(json.dumps(body).encode(), {rules.name: rules})
    asked.keep_images(folder)
    return asked.replies()[0]


def data_url(size: tuple[int, int] = (20, 10), colour: str = "red", kind: str = "PNG") -> str:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def showing(url: Any, text: str = "what is this?") -> list[Any]:
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [{"type": "text", "text": text}, image]}]


def slowly(opened: OpenedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    """A Slow model in place of the engine's; let go of at the end, so that no thread waits for it."""
    [token] = opened.template.tokenizer.plain.encode("x", add_special_tokens=False).ids
    model = Slow(token)
    model.put_in_place(monkeypatch)
    monkeypatch.setattr(engine_module, "GATHER_SECONDS", 0.5)
    yield model
    model.go.release(10_000)


class Scripted:
    """A model whose replies a test wrote: a few tokens a step, chosen by the prompt's text."""

    def __init__(self, template: Any, answer: Callable[[str], Sequence[Message]]) -> None:
        self.pause = 0.0
        """Seconds a step."""
        self.asked: list[list[int]] = []
        """The prompts, as they came."""
        self.template = template
        self.answer = answer

    def put_in_place(self, decoder: Decoder) -> None:
        """Makes this the model of one decoder."""
        left: dict[int, list[int]] = {}

        def add(requests: Sequence[Request], _: Any = None) -> list[DecodingRow]:
            rows = [DecodingRow(request) for request in requests]
            self.asked += [list(request.prompt) for request in requests]
            left.update((id(row), self._ids(row.request)) for row in rows)
            decoder._rows += rows
            return rows

        def step() -> None:
            time.sleep(self.pause)
            for row in decoder.active:
                for _ in range(4):
                    if not row.is_done:
                        row.take(left[id(row)].pop(0), self.template.stop_ids)

        def drop_done() -> None:
            decoder._rows = decoder.active

        for method in (add, step, drop_done, nothing):
            name = "taken" if method is nothing else method.__name__
            setattr(decoder, name, method)

    def _ids(self, request: Request) -> list[int]:
        ids: list[int] = []
        for message in self.answer(self.template.decode(request.prompt)):
            ids += [self.template.tokenizer.control_ids["<|assistant|>"]] if ids else []
            text = f"{message.metadata}\n{message.content}"
            ids += self.template.tokenizer.plain.encode(text, add_special_tokens=False).ids
        return [*ids, self.template.stop_ids[-1 if message.metadata else 0]]
