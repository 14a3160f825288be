"""What stands beside a request: short beside long, sound beside faulty, slow and many connections."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pictures
import pytest
import serving
from serving import HELLO

from finetune.data.dialogue.conversation import Message, RowError
from finetune.data.dialogue.tool_calls import read_tools
from finetune.generation.batch import Batch
from finetune.generation.decoder import Decoder, DecodingRow
from finetune.generation.load import OpenedModel, open_model
from finetune.serving import engine as engine_module
from finetune.serving import guard, heap


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    return open_model(serving.save_talkative(tmp_path_factory.mktemp("base") / "talkative"))


@pytest.fixture
def slow(opened: OpenedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[serving.Slow]:
    yield from serving.slowly(opened, monkeypatch)


def test_a_short_request_joins_a_long_reply_at_its_next_token(
    opened: OpenedModel, slow: serving.Slow
) -> None:
    async def beside(server: serving.Served) -> None:
        async with server.async_client as client:
            create = client.chat.completions.create
            long = asyncio.create_task(create(model="tiny", messages=HELLO, max_tokens=1000))
            await serving.until_async(lambda: len(slow.batches) == 1)
            short = asyncio.create_task(create(model="tiny", messages=HELLO, max_tokens=3))
            await serving.until_async(lambda: len(server.engine._waiting) == 1)
            slow.go.release(4)  # one round that is under way, and three
            assert (await short).choices[0].finish_reason == "length"
            assert not long.done()
            slow.go.release(1000)
            assert (await long).usage.completion_tokens == 1000

    with serving.served(opened) as server:
        asyncio.run(beside(server))


def test_what_goes_wrong_with_one_row_harms_no_other(
    opened: OpenedModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_module, "GATHER_SECONDS", 0.5)
    prompt = serving.prompt_of(opened.template, Message("user", "poison"))
    prefill, append = Batch.prefill, DecodingRow.append

    def failing_prefill(batch: Batch, prompts: Any, prefix: Any = None) -> Any:
        if any(list(one) == prompt for one in prompts):
            raise RuntimeError("the picture is gone")
        return prefill(batch, prompts, prefix)

    def failing_row(row: DecodingRow, *given: Any) -> None:
        if row.request.decoding.seed == 13 and len(row.ids) == 2:
            monkeypatch.setattr(row, "_choose", lambda *_: 1 // 0)
        append(row, *given)

    monkeypatch.setattr(Batch, "prefill", failing_prefill)
    monkeypatch.setattr(DecodingRow, "append", failing_row)

    async def mixed(server: serving.Served) -> list[Any]:
        async with server.async_client as client:

            async def ask(text: str, **how: Any) -> Any:
                made = await client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": text}], max_tokens=6, **how
                )
                return made.choices[0].message.content

            asked = [ask("one"), ask("poison"), ask("two"), ask("three", seed=13), ask("four")]
            return await asyncio.gather(*asked, return_exceptions=True)

    with serving.served(opened) as server:
        said = asyncio.run(mixed(server))
        alone = [server.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], max_tokens=6).choices[0].message.content for text in ("one", "two", "four")]  # fmt: skip
    assert [text for text in said if isinstance(text, str)] == alone
    failed = [error for error in said if not isinstance(error, str)]
    assert [type(error) for error in failed] == [openai.InternalServerError] * 2
    told = capfd.readouterr().err
    assert "the picture is gone" in told
    assert "ZeroDivisionError" in told


def test_large_requests_are_not_answered_together(
    opened: OpenedModel, slow: serving.Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "TOKEN_BUDGET", 100)
    monkeypatch.setattr(engine_module, "GATHER_SECONDS", 20)  # until all three wait
    slow.go.release(1000)

    async def three(server: serving.Served) -> None:
        async with server.async_client as client:
            tasks = []
            for number, length in enumerate((30, 30, 80)):
                create = client.chat.completions.create
                tasks.append(
                    asyncio.create_task(create(model="tiny", messages=HELLO, max_tokens=length))
                )
                if number < 2:
                    await serving.until_async(lambda: len(server.engine._waiting) == len(tasks))
            await asyncio.gather(*tasks)

    with serving.served(opened, batch_size=3) as server:
        asyncio.run(three(server))
    assert list(map(len, slow.batches)) == [2, 1]


# --- connections and keys ------------------------------------------------------------------------


def test_a_header_that_never_ends_is_not_waited_for(
    opened: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "HEADER_SECONDS", 1.0)
    with serving.served(opened) as server:
        port = int(server.url.rpartition(":")[2])
        for sent in (b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "):
            with socket.create_connection(("127.0.0.1", port)) as slow:
                slow.sendall(sent)
                slow.settimeout(60)
                with suppress(ConnectionResetError):
                    assert slow.recv(100) == b""
        with httpx.Client(timeout=60) as client:  # a connection that is kept waits for nothing
            assert client.get(f"{server.url}/health").status_code == 200
            time.sleep(1.2)
            assert client.get(f"{server.url}/health").status_code == 200


def test_of_too_many_connections_the_slowest_gives_way(
    opened: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "max_connections", lambda: 8)
    with serving.served(opened) as server, ExitStack() as stack:
        port = int(server.url.rpartition(":")[2])
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(20)
        ]
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 2}
        assert (
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).status_code
            == 200
        )
        idle[0].settimeout(60)
        with suppress(ConnectionResetError):
            assert idle[0].recv(10) == b""


def test_of_too_many_connections_an_answered_one_gives_way_first(
    opened: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "max_connections", lambda: 3)
    with serving.served(opened) as server, ExitStack() as stack:
        port = int(server.url.rpartition(":")[2])

        def connect() -> socket.socket:
            made = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            made.settimeout(60)
            return made

        asking, answered = connect(), connect()
        asking.sendall(b"GET /health HTTP/1.1\r\n")
        answered.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        while b"ok" not in answered.recv(1000):
            pass
        connect(), connect()
        with suppress(ConnectionResetError):
            assert answered.recv(10) == b""
        asking.sendall(b"Host: 127.0.0.1\r\n\r\n")
        assert asking.recv(1000).startswith(b"HTTP/1.1 200")


def test_a_connection_is_kept_for_longer_than_clients_keep_it() -> None:
    theirs = openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry or 0
    assert theirs * 2 < guard.KEEP_ALIVE_SECONDS


def test_what_is_free_goes_back_while_the_server_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr(heap, "TRIM_SECONDS", 0.01)
    monkeypatch.setattr(heap, "_function", lambda name: trims.append if "trim" in name else None)

    async def run() -> None:
        async with heap.trimmed():
            while len(trims) < 3:
                await asyncio.sleep(0.01)
        assert set(trims) == {0}, "nothing is kept back"
        count = len(trims)
        await asyncio.sleep(0.05)
        assert len(trims) <= count + 1  # one may have been on its way

    asyncio.run(asyncio.wait_for(run(), 60))
    heap.bound_pools()  # without mallopt it is left alone


def test_a_key_of_any_script_is_compared_as_its_bytes(opened: OpenedModel) -> None:
    key = "ключ-из-многих-букв-钥匙"
    with serving.served(opened, key=key) as server:
        for given, status in ((key, 200), (key[:-1], 401), (key + "匙", 401), ("x", 401)):
            headers = {b"Authorization": b"Bearer " + given.encode()}
            assert (
                httpx.get(f"{server.url}/v1/models", headers=headers, timeout=60).status_code
                == status
            )


def test_an_image_whose_client_has_left_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeing = open_model(pictures.save_model(tmp_path / "glm4v"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    messages = serving.showing(serving.data_url())
    held, add = threading.Event(), Decoder.add

    def when_all_are_there(decoder: Decoder, requests: Any, prefix: Any) -> Any:
        assert held.wait(60)
        return add(decoder, requests, prefix)

    monkeypatch.setattr(Decoder, "add", when_all_are_there)

    def num_folders() -> int:
        return len(list(tmp_path.glob("finetune-serve-*")))

    async def together(server: serving.Served) -> list[Any]:
        async with server.async_client as client:

            def ask() -> asyncio.Task[Any]:
                create = client.chat.completions.create
                return asyncio.create_task(create(model="tiny", messages=messages, max_tokens=4))

            leaving = [ask() for _ in range(3)]
            await serving.until_async(lambda: num_folders() == 3)
            staying = [ask() for _ in range(3)]
            await serving.until_async(lambda: num_folders() == 6)
            for task in leaving:
                task.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)
            held.set()
            return await asyncio.gather(*staying, return_exceptions=True)

    with serving.served(seeing) as server:
        said = asyncio.run(together(server))
        assert len({one.choices[0].message.content for one in said}) == 1
        serving.until(lambda: not list(tmp_path.glob("finetune-serve-*")))


def test_one_request_of_many_tools_is_read_in_a_moment(opened: OpenedModel) -> None:
    functions = [
        {"type": "function", "function": {"name": f"tool_{n}", "description": "does things"}}
        for n in range(2000)
    ]
    begun = time.process_time()
    serving.prompt_of(opened.template, Message("user", "hi"), tools=functions)
    assert read_tools(functions)
    with pytest.raises(RowError, match="'tool_7' is defined twice"):
        read_tools([*functions, functions[7]])
    assert time.process_time() - begun < 5  # seconds; a square of them takes minutes
