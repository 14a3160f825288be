"""Who waits for whom, counted in rounds: a round gives every reply one more token."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import serving
import torch
from adapters import make_adapter
from serving import HELLO

from finetune.distributed.map_batches import evaluating
from finetune.generation import batch as batch_module
from finetune.generation.decoder import Decoding
from finetune.generation.generate import generate
from finetune.generation.load import OpenedModel, open_model, open_side_by_side
from finetune.serving import engine as engine_module
from finetune.serving import writer as writer_module
from finetune.serving.job import ReplyJob
from finetune.serving.requests.rules import ReplyRequest
from finetune.serving.writer import PIECE, Writer

MOST_ROUNDS = 3
"""Until the first token of a short request."""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    folder = tmp_path_factory.mktemp("base") / "talkative"
    return open_model(serving.save_talkative(folder, ends=False))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the tokens, with padding, of every forward pass that reads prompts."""
    found: list[int] = []
    forward = batch_module._forward

    def counting(model: Any, cache: Any, ids: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if ids.shape[1] > 1:
            found.append(ids.numel())
        return forward(model, cache, ids, *rest, **named)

    monkeypatch.setattr(batch_module, "_forward", counting)
    return found


def job(opened: OpenedModel, prompt: list[int], length: int, **how: Any) -> ReplyJob:
    asked = ReplyRequest(prompt, Decoding(length, **how), (), (), "tiny", True, True, False)
    return ReplyJob(asked, opened.template)


def words(opened: OpenedModel, tokens: int, first: int = 40) -> list[int]:
    """A prompt of so many tokens."""
    return [first + place * place % 300 for place in range(tokens)]


def alone(opened: OpenedModel, one: ReplyJob) -> list[int]:
    """The reply of a greedy job by `generate`, which reads a prompt at once."""
    length = one.request.decoding.max_new_tokens
    [reply] = generate(opened.model, opened.template, [one.request.prompt], max_new_tokens=length, batch_size=1)  # fmt: skip
    return list(reply.ids)


def ids(one: ReplyJob) -> list[int]:
    return list(one._reply.ids)


@pytest.fixture
def writer(opened: OpenedModel) -> Iterator[Writer]:
    with evaluating(opened.model):
        yield Writer(opened.model, opened.template)


def test_a_short_request_beside_a_long_reply_begins_within_three_rounds(
    opened: OpenedModel, writer: Writer
) -> None:
    async def both() -> None:
        long = job(opened, words(opened, 30), 1024)
        writer.take(long)
        for _ in range(100):
            writer.go_on()
        before = long.num_tokens
        short = job(opened, words(opened, 12, first=50), 5)
        writer.take(short)
        rounds = 0
        while short.finish_reason is None:
            writer.go_on()
            rounds += 1
            assert short.num_tokens or rounds < MOST_ROUNDS
        assert rounds <= MOST_ROUNDS + 5
        assert long.num_tokens == before + rounds, "the long reply has a token every round"
        assert ids(short) == alone(opened, short)
        while long.finish_reason is None:
            writer.go_on()
        assert long.num_tokens == 1024
        assert ids(long) == alone(opened, long)

    asyncio.run(both())


def test_neither_a_reply_nor_a_short_request_waits_for_a_long_prompt(
    opened: OpenedModel, writer: Writer, read: list[int]
) -> None:
    async def all_three() -> None:
        running = job(opened, words(opened, 20), 60)
        writer.take(running)
        writer.go_on()
        long = job(opened, words(opened, 6 * PIECE + 77, first=60), 4)
        writer.take(long)
        short = job(opened, words(opened, 12, first=50), 5)
        for number in range(7):
            if number == 2:
                writer.take(short)
            read.clear()
            said = running.num_tokens
            writer.go_on()
            assert running.num_tokens == said + 1, "a token a round, while a prompt is read"
            assert sum(read) <= 2 * PIECE
            assert long.num_tokens == 0 or number == 6
            assert short.num_tokens > 0 or number < 1 + MOST_ROUNDS
        assert long.num_tokens
        while running.finish_reason is None:
            writer.go_on()
        for one in (running, long, short):
            assert ids(one) == alone(opened, one)

    asyncio.run(all_three())


def test_prompts_of_like_length_are_read_together_and_the_oldest_first(
    opened: OpenedModel, writer: Writer, read: list[int]
) -> None:
    async def many() -> None:
        lengths = [20, 170, 20, 170, 20, 170, 20, 170, 20, 170]
        jobs = [job(opened, words(opened, n, first=40 + k), 3) for k, n in enumerate(lengths)]
        for one in jobs:
            writer.take(one)
        begun: list[list[int]] = []
        while any(one.finish_reason is None for one in jobs):
            writer.go_on()
            begun.append([n for n, one in zip(lengths, jobs, strict=True) if ids(one)])
        assert begun[0] == [20] * 5
        assert sum(read) == sum(lengths), "nothing is padded"
        assert [ids(one) for one in jobs] == [alone(opened, one) for one in jobs]

    asyncio.run(many())


def test_prompts_of_which_the_same_beginning_is_known_go_through_the_model_together(
    opened: OpenedModel, writer: Writer, read: list[int]
) -> None:
    async def many() -> None:
        system = words(opened, 60)
        first = job(opened, system, 2)
        writer.take(first)
        while first.finish_reason is None:
            writer.go_on()
        read.clear()
        jobs = [job(opened, system + words(opened, 5, first=60 + k), 3) for k in range(4)]
        for one in jobs:
            writer.take(one)
        writer.go_on()
        assert read == [4 * 5]
        while any(one.finish_reason is None for one in jobs):
            writer.go_on()
        assert [ids(one) for one in jobs] == [alone(opened, one) for one in jobs]

    asyncio.run(many())


def test_replies_of_one_token_end_with_their_prompt_whatever_is_read_behind_it(
    opened: OpenedModel, writer: Writer
) -> None:
    async def short() -> None:
        system = words(opened, 60)
        first = job(opened, system, 2)
        writer.take(first)
        while first.finish_reason is None:
            writer.go_on()
        known, new = job(opened, [*system, 41, 42], 1), job(opened, words(opened, 20, first=70), 1)
        for one in (known, new):
            writer.take(one)
        writer.go_on()
        assert [one.finish_reason for one in (known, new)] == ["length", "length"]
        assert [ids(one) for one in (known, new)] == [alone(opened, one) for one in (known, new)]

    asyncio.run(short())


def test_a_long_prompt_of_several_replies_is_read_once_and_let_go_when_nobody_waits(
    opened: OpenedModel, writer: Writer, read: list[int]
) -> None:
    async def several() -> None:
        prompt = words(opened, 2 * PIECE + 10)
        jobs = [job(opened, prompt, 6, temperature=1.0, seed=seed) for seed in (1, 2, 3)]
        for one in jobs:
            writer.take(one)
        while any(one.finish_reason is None for one in jobs):
            writer.go_on()
        assert sum(read) == len(prompt)
        assert len({tuple(ids(one)) for one in jobs}) == 3
        gone = job(opened, words(opened, 5 * PIECE, first=70), 6)
        writer.take(gone)
        writer.go_on()
        read.clear()
        gone.cancel()
        writer.go_on()
        assert (read, writer.jobs) == ([], [])

    asyncio.run(several())


def test_a_long_request_leaves_room_for_short_ones_and_its_own_kind_waits(
    opened: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "LONG", 300)
    monkeypatch.setattr(engine_module, "TOKEN_BUDGET", 500)
    order: list[str] = []
    finish = ReplyJob.finish

    def noted(one: ReplyJob, stopped: bool) -> None:
        order.append(str(one.request.decoding.max_new_tokens))
        finish(one, stopped)

    monkeypatch.setattr(ReplyJob, "finish", noted)

    come = 0
    submit = engine_module.Engine.submit

    def counted(engine: Any, jobs: Sequence[ReplyJob]) -> None:
        nonlocal come
        submit(engine, jobs)
        come += 1

    monkeypatch.setattr(engine_module.Engine, "submit", counted)

    async def four(server: serving.Served) -> None:
        async with server.async_client as client:
            asked = []
            for place, length in enumerate((401, 402, 31, 32)):
                create = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=length)  # fmt: skip
                asked.append(asyncio.ensure_future(create))
                while come <= place:
                    await asyncio.sleep(0.002)
            await asyncio.gather(*asked)

    with serving.served(opened) as server:
        asyncio.run(four(server))
    assert order == ["31", "32", "401", "402"]


SETTINGS: Sequence[dict[str, Any]] = (
    {},
    {"presence_penalty": 1.5, "n": 2},
    {"frequency_penalty": 1.0, "logprobs": True, "top_logprobs": 3},
    {"repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": 7, "top_k": 9, "presence_penalty": 0.5, "n": 3},
    {"temperature": 1.1, "seed": 8, "min_p": 0.05, "top_p": 0.9, "logprobs": True},
)


def test_replies_of_a_mixed_load_on_several_models_are_those_of_lone_requests(
    tmp_path: Path,
) -> None:
    """Penalties, several replies, log probabilities; a base and two adapters; with kept prompts and without."""
    base = serving.save_talkative(tmp_path / "base", ends=False)
    targets = {"base": base} | {name: make_adapter(tmp_path / name, base, seed=seed) for name, seed in (("a", 1), ("b", 5))}  # fmt: skip
    bodies: list[dict[str, Any]] = [
        {"model": name, "messages": [{"role": "user", "content": "the dog " * (3 * n % 7) + str(n)}], "max_tokens": 6 + 5 * n, **how}
        for name in targets
        for n, how in enumerate(SETTINGS)
    ]  # fmt: skip

    async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> list[Any]:
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return [
            (
                choice["message"]["content"],
                [token["token"] for token in (choice["logprobs"] or {"content": []})["content"]],
                choice["finish_reason"],
            )
            for choice in answer.json()["choices"]
        ]

    async def together(url: str) -> list[Any]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            return await asyncio.gather(*(ask(client, body) for body in bodies))

    async def singly(url: str) -> list[Any]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            return [await ask(client, body) for body in bodies]

    with serving.served(open_side_by_side(targets), batch_size=32) as server:
        mixed = asyncio.run(together(server.url))
        again = asyncio.run(together(server.url))  # behind kept prompts
    with serving.served(open_side_by_side(targets), batch_size=1) as server:
        lone = asyncio.run(singly(server.url))
    assert mixed == lone
    assert again == lone
