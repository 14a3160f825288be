"""Many clients at once, clients that leave, and how the endpoint ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import serving
from command_line import run
from serving import HELLO

from finetune.data.dialogue.conversation import Message
from finetune.errors import ConfigError
from finetune.generation.decoder import Decoder
from finetune.generation.generate import generate
from finetune.generation.load import OpenedModel, open_model
from finetune.serving.errors import ApiError
from finetune.serving.serve import serve

KEY = "a-key-of-more-than-sixteen-characters"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.save_talkative(tmp_path_factory.mktemp("base") / "talkative")


@pytest.fixture(scope="module")
def opened(base: Path) -> OpenedModel:
    return open_model(base)


@pytest.fixture(scope="module")
def server(opened: OpenedModel) -> Iterator[serving.Served]:
    with serving.served(opened, max_request_mb=1, context=64, allow_hosts=("llm.example",)) as one:
        yield one


# --- many at once --------------------------------------------------------------------------------


def test_fifty_at_once_get_what_each_gets_alone(
    opened: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [f"question {n} {'the dog ' * (n % 7)}" for n in range(50)]
    prompts = [serving.prompt_of(opened.template, *said) for said in map(_user, questions)]
    alone = [
        generate(opened.model, opened.template, [p], max_new_tokens=4 + n % 9, batch_size=1)[0]
        for n, p in enumerate(prompts)
    ]
    sizes: list[int] = []
    step = Decoder.step

    def counting(decoder: Decoder) -> None:
        sizes.append(len(decoder.active))
        step(decoder)

    monkeypatch.setattr(Decoder, "step", counting)

    async def ask(client: openai.AsyncOpenAI, n: int) -> tuple[str, str | None]:
        sampled = {"temperature": 1.2, "seed": n} if n % 5 == 4 else {}
        made: Any = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": questions[n]}],
            max_tokens=4 + n % 9, stream=bool(n % 2), **sampled,
        )  # fmt: skip
        if n % 2 == 0:
            return made.choices[0].message.content, made.choices[0].finish_reason
        chunks = [chunk.choices[0] async for chunk in made]
        return "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason

    async def together(server: serving.Served) -> list[tuple[str, str | None]]:
        async with server.async_client as client:
            return await asyncio.gather(*(ask(client, n) for n in range(50)))

    async def singly(server: serving.Served) -> list[tuple[str, str | None]]:
        async with server.async_client as client:
            return [await ask(client, n) for n in range(4, 50, 5)]

    with serving.served(opened) as server:
        said = asyncio.run(together(server))
    assert len(sizes) < sum(sizes) / 4  # most were answered together
    assert max(sizes) == 8
    for n, (text, reason) in enumerate(said):
        if n % 5 != 4:
            whole = opened.template.tokenizer.plain.decode(list(alone[n].ids))
            assert text == whole.removeprefix("\n"), n
            assert reason == ("stop" if alone[n].stopped else "length")
    with serving.served(opened, batch_size=1) as server:
        assert asyncio.run(singly(server)) == said[4::5]  # the sampled ones


def test_those_who_stay_get_what_each_gets_alone_while_every_third_of_fifty_leaves(
    opened: OpenedModel,
) -> None:
    questions = [f"question {n} {'the dog ' * (n % 7)}" for n in range(50)]
    prompts = [serving.prompt_of(opened.template, *said) for said in map(_user, questions)]
    alone = [
        generate(opened.model, opened.template, [p], max_new_tokens=12, batch_size=1)[0]
        for p in prompts
    ]

    async def ask(client: openai.AsyncOpenAI, n: int, first: asyncio.Event) -> str:
        made = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": questions[n]}], max_tokens=12,
            stream=True,
        )  # fmt: skip
        said = ""
        async for chunk in made:
            if text := chunk.choices[0].delta.content:
                first.set()
                said += text
                if n % 6 == 3:
                    await made.close()  # in the middle of its reply
                    return "left"
        return said

    async def together(server: serving.Served) -> list[Any]:
        async with server.async_client as client:
            first = asyncio.Event()
            tasks = [asyncio.create_task(ask(client, n, first)) for n in range(50)]
            await first.wait()
            for task in tasks[::6]:
                task.cancel()  # most of them wait for their first token
            return await asyncio.gather(*tasks, return_exceptions=True)

    with serving.served(opened) as server:
        said = asyncio.run(together(server))
        again = server.client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
        assert again.choices
    left = [n for n, text in enumerate(said) if isinstance(text, asyncio.CancelledError)]
    assert set(left) <= set(range(0, 50, 6))
    assert len(left) >= 7
    assert said[3::6].count("left") >= 7
    for n, text in enumerate(said):
        if n not in left and text != "left":
            whole = opened.template.tokenizer.plain.decode(list(alone[n].ids))
            assert text == whole.removeprefix("\n"), n


def _user(text: str) -> list[Any]:
    return [Message("user", text)]


@pytest.fixture
def slow(opened: OpenedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[serving.Slow]:
    yield from serving.slowly(opened, monkeypatch)


def test_a_client_that_leaves_frees_its_place_whether_it_waits_or_is_served(
    opened: OpenedModel, slow: serving.Slow
) -> None:
    async def leaving(server: serving.Served) -> None:
        async with server.async_client as client:

            def asked(stream: bool) -> asyncio.Task[Any]:
                return asyncio.create_task(
                    client.chat.completions.create(model="tiny", messages=HELLO, stream=stream)
                )

            served = [asked(False), asked(True)]
            await serving.until_async(lambda: len(slow.batches) == 1)
            waiting = [asked(False), asked(True)]
            await serving.until_async(lambda: len(server.engine._waiting) == 2)
            with pytest.raises(openai.RateLimitError, match="4 requests are in work already"):
                await asked(False)
            for task in (*served, *waiting):
                task.cancel()
            await asyncio.gather(*served, *waiting, return_exceptions=True)
            left = [one.on_token.__self__ for one in slow.batches[0]] + list(server.engine._waiting)
            await serving.until_async(lambda: all(job.cancelled for job in left))
            slow.go.release()  # the batch ends at its next token, for nobody is there
            last = asked(False)
            await serving.until_async(lambda: len(slow.batches) == 2)
            assert len(slow.batches[1]) == 1  # those who waited are not asked
            slow.go.release(5000)
            assert (await last).choices[0].finish_reason == "length"

    with serving.served(opened, batch_size=2, max_requests=4, max_new_tokens=50) as server:
        asyncio.run(leaving(server))


def test_a_full_server_says_when_to_come_again(opened: OpenedModel, slow: serving.Slow) -> None:
    with serving.served(opened, max_requests=1, max_new_tokens=5) as server:
        first = threading.Thread(
            target=lambda: server.client.chat.completions.create(model="tiny", messages=HELLO)
        )
        first.start()
        serving.until(lambda: len(slow.batches) == 1)
        body = {"model": "tiny", "messages": HELLO}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        slow.go.release(100)
        first.join()


# --- the end -------------------------------------------------------------------------------------


def test_a_stopping_server_refuses_what_waits_and_finishes_what_is_written(
    opened: OpenedModel, slow: serving.Slow
) -> None:
    async def stopping(server: serving.Served) -> None:
        async with server.async_client as client:
            create = client.chat.completions.create
            served = asyncio.create_task(create(model="tiny", messages=HELLO))
            await serving.until_async(lambda: len(slow.batches) == 1)
            waiting = [
                asyncio.create_task(create(model="tiny", messages=HELLO, stream=stream))
                for stream in (False, True)
            ]
            await serving.until_async(lambda: len(server.engine._waiting) == 2)
            server.engine.drain()
            for task in waiting:
                with pytest.raises(openai.InternalServerError, match="stopping") as caught:
                    await task
                assert caught.value.status_code == 503
            with pytest.raises(openai.InternalServerError, match="stopping"):
                await create(model="tiny", messages=HELLO)
            assert (await client._client.get(f"{server.url}/health")).status_code == 503
            slow.go.release(100)
            assert (await served).choices[0].finish_reason == "length"

    with serving.served(opened, batch_size=1, max_new_tokens=5) as server:
        asyncio.run(stopping(server))


@contextmanager
def started(base: Path, *words: str, **environment: str) -> Iterator[tuple[Any, str]]:
    """`finetune serve` as a user starts it, and its address."""
    command = [sys.executable, "-m", "finetune", "serve", str(base), "--port", "0", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, **environment},
    ) as popen:  # fmt: skip
        try:
            line = next(line for line in popen.stdout or () if " answers at " in line)
            yield popen, line.split()[3].removesuffix(";").removesuffix("/v1")
        finally:
            popen.kill()


def test_the_command_serves_until_sigterm_and_ends_with_0(base: Path) -> None:
    with started(base, "--name", "mine", FINETUNE_API_KEY=KEY) as (popen, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        assert [model.id for model in client.models.list()] == ["mine"]
        stream = client.chat.completions.create(
            model="mine", messages=HELLO, stream=True, max_tokens=300
        )
        chunks = [next(iter(stream))]
        popen.send_signal(signal.SIGTERM)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")  # it was let finish
        out, _ = popen.communicate(timeout=60)
    assert popen.returncode == 0
    assert out.endswith("stopped\n")
    assert "Traceback" not in out
    assert KEY not in out
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", timeout=60)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_server_in_the_middle_of_a_reply(
    tmp_path: Path, first: signal.Signals
) -> None:
    endless = serving.save_talkative(tmp_path / "endless", ends=False)
    body = {"model": "endless", "messages": HELLO, "max_tokens": 150_000, "stream": True}
    with started(endless) as (popen, url):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            popen.send_signal(first)
            for _ in range(400):  # the first signal lets it go on
                next(lines)
            assert popen.poll() is None
            popen.send_signal(signal.SIGINT)
            assert popen.wait(60) == 128 + signal.SIGINT
        out = popen.stdout.read()
    assert out.endswith("stopped in the middle of a reply\n")
    assert "Traceback" not in out


def test_mistakes_are_told_before_the_model_is_opened(base: Path, tmp_path: Path) -> None:
    done = run(
        "-m", "finetune", "serve", base, "--host", "0.0.0.0", cwd=tmp_path, FINETUNE_API_KEY=""
    )
    assert done.returncode == 2
    assert "needs an API key" in done.stderr
    assert "opening" not in done.stdout


def test_without_its_packages_the_command_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else 1)
    with pytest.raises(ConfigError, match=r"needs uvicorn: pip install 'glm4-finetune\[serve\]'"):
        serve({"any": "thing"})


def test_an_error_of_the_endpoint_has_openais_form() -> None:
    kinds = {400: "invalid_request_error", 429: "rate_limit_error", 503: "server_error"}
    for status, kind in kinds.items():
        assert ApiError(status, "why", code="c").body == {
            "error": {"message": "why", "type": kind, "param": None, "code": "c"}
        }
