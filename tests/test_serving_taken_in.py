"""Who is taken in beside whom, and which models share a pass."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from serving_jobs import events, job, request
from torch import nn

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.generation.load import OpenedModel
from finetune.serving import engine as engine_module
from finetune.serving.engine import Engine, _fits
from finetune.serving.errors import ApiError
from finetune.serving.job import ReplyJob
from finetune.serving.writer import LONG, width_of


@pytest.fixture(scope="module")
def template(tiny_glm: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(tiny_glm))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(engine_module, "TOKEN_BUDGET", 100)
    made = Engine({}, batch_size=3)
    yield made
    made.close()
    assert not made._thread.is_alive()


@pytest.mark.parametrize(
    ("beside", "tokens", "fits"),
    [([], 1000, True), ([10], 50, True), ([10], 51, False), ([50], 10, True), ([51], 10, False), ([20, 33], 33, True), ([20, 34], 33, False)],
)  # fmt: skip
def test_as_many_rows_are_written_as_the_cache_has_room_for(
    engine: Engine, template: ChatTemplate, beside: list[int], tokens: int, fits: bool
) -> None:
    async def asked() -> None:
        assert _fits(beside, job(template, request(range(tokens - 5), 5))) is fits

    asyncio.run(asked())


def test_those_who_wait_are_taken_in_their_order_as_far_as_there_is_room(
    engine: Engine, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def waiting() -> None:
        released: list[str] = []

        def one(name: str, tokens: int) -> ReplyJob:
            asked = request(range(tokens - 5), 5, model=name)
            return job(template, asked, release=lambda: released.append(name))

        def admitted(*jobs: ReplyJob) -> tuple[str, str]:
            engine._waiting.extend(jobs)
            names = "".join(found.request.model for found in engine._admitted())
            left = "".join(found.request.model for found in engine._waiting)
            assert engine.load == (len(left), len(engine._running()))
            engine._waiting.clear()
            return names, left

        assert admitted(*(one(name, 10) for name in "abcd")) == ("abc", "d")
        assert admitted(one("a", 40), one("b", 60), one("c", 10)) == ("a", "bc"), "in their order"
        assert admitted(one("a", 1000), one("b", 10)) == ("a", "b"), "alone it may be longer"
        gone = one("x", 10)
        gone.cancelled = True
        assert admitted(one("a", 10), gone, one("b", 10)) == ("ab", "")
        assert released == ["x"]
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_running", lambda: [one("r", 10), one("s", 10)])
            assert admitted(one("a", 10), one("b", 10)) == ("a", "b"), "beside those in work"

    asyncio.run(waiting())


def test_long_and_short_replies_do_not_wait_for_each_other(
    engine: Engine, template: ChatTemplate
) -> None:
    async def waiting() -> None:
        long = [job(template, request(range(6), LONG, model=name)) for name in "AB"]
        engine._waiting.extend([*long, job(template, request(model="c"))])
        assert [found.request.model for found in engine._admitted()] == ["A", "c"]
        engine._waiting.clear()

    asyncio.run(waiting())


@pytest.mark.parametrize(
    ("prompt", "reply", "width"),
    [(1, LONG - 2, "short"), (1, LONG - 1, "long"), (LONG - 1, 1, "long"), (LONG - 2, 1, "short")],
)
def test_a_row_is_long_by_its_prompt_and_reply_together(
    prompt: int, reply: int, width: str
) -> None:
    assert width_of(request(range(prompt), reply)) == width


class Model(nn.Linear):
    """Weights to be held, and what an engine asks of them."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.device = torch.device("cpu")
        self.config = SimpleNamespace()


def opened(template: Any, model: Any, plain: Any = None) -> OpenedModel:
    return OpenedModel(model, template, "model", "base", plain)


def test_models_that_stop_otherwise_than_their_base_are_written_apart(
    template: ChatTemplate,
) -> None:
    base, other = Model(), SimpleNamespace(stop_ids=(3,), image=None)
    models = {"a": opened(template, base, base), "b": opened(template, base, base), "c": opened(other, base, base)}  # fmt: skip
    engine = Engine(models, batch_size=1)
    try:
        assert engine.writers["a"] is engine.writers["b"]
        assert engine.writers["c"] is not engine.writers["a"]
        assert engine.writers["c"].stop_ids == (3,)
        assert not base.training, "and in evaluation mode"
        for number, name in enumerate("ac"):
            engine.writers[name].memories[name].used_tokens = 5 + number
        assert engine.remembered_tokens == 11
    finally:
        engine.close()


def test_a_model_that_comes_later_is_asked_without_dropout_and_goes_when_nobody_asks_it(
    engine: Engine, template: ChatTemplate
) -> None:
    async def coming() -> None:
        late = Model().train()
        one = job(template, request(model="late"))
        with pytest.raises(ApiError, match="not served any more") as caught:
            engine.submit([one])
        assert (caught.value.status, caught.value.code) == (404, "model_not_found")
        engine.put("late", opened(template, late))
        assert not late.training
        with engine._change:  # the thread does not look
            engine._waiting.append(one)
            assert not engine.drop("late"), "somebody waits for it"
            engine._waiting.clear()
        assert engine.drop("late")
        assert "late" not in engine.writers

    asyncio.run(coming())


def test_what_comes_to_a_stopping_engine_is_refused_and_what_waits_hears_so(
    engine: Engine, template: ChatTemplate
) -> None:
    async def stopping() -> None:
        one = job(template, outbox=engine.outbox)
        with engine._change:
            engine._waiting.append(one)
        engine._refuse_waiting()
        [error] = await events(one)
        assert (error.status, error.code) == (503, "stopping")
        engine.drain()
        with pytest.raises(ApiError, match="stopping"):
            engine.submit([job(template)])

    asyncio.run(stopping())
