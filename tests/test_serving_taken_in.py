"""Who is taken in beside whom, and which models share a pass."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from serving import until
from serving_jobs import events, job, request
from torch import nn

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.generation.load import OpenedModel
from finetune.methods.adapter_rows import AdapterRows
from finetune.serving import engine as engine_module
from finetune.serving.engine import Engine, _fits
from finetune.serving.errors import ApiError
from finetune.serving.job import ReplyJob
from finetune.serving.writer import LONG, Writer, width_of


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


@pytest.mark.parametrize(("number", "more", "shares"), [(1, False, False), (1, True, True), (2, False, True)])  # fmt: skip
def test_a_model_alone_needs_no_rows_of_adapters_unless_more_are_to_come(
    number: int, more: bool, shares: bool, template: ChatTemplate
) -> None:
    base = Model()
    models = {name: opened(template, base, base) for name in "ab"[:number]}
    engine = Engine(models, batch_size=1, more_come=more)
    engine.close()
    assert isinstance(engine.writers["a"].model, AdapterRows) is shares


@pytest.mark.parametrize(
    ("sees", "prefix", "plain", "shares"),
    [(False, True, True, True), (True, True, True, False), (False, False, True, True), (True, False, True, True), (False, False, False, False)],
)  # fmt: skip
def test_which_models_are_written_in_one_pass(
    sees: bool, prefix: bool, plain: bool, shares: bool, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A prefix of a model that sees is laid out with its image, so that it stands alone."""
    base, tuned = Model(), Model()
    put: list[tuple[str, Any]] = []
    monkeypatch.setattr(engine_module, "is_attached", lambda model: prefix and model is tuned)
    monkeypatch.setattr(engine_module, "can_share", lambda model: plain and not prefix)
    monkeypatch.setattr(Writer, "put", lambda self, name, model: put.append((name, model)))
    shown = SimpleNamespace(stop_ids=template.stop_ids, image=object() if sees else None)
    engine = Engine({"base": opened(shown, base, base), "t": opened(shown, tuned, base)}, batch_size=1)  # fmt: skip
    engine.close()
    assert (engine.writers["t"] is engine.writers["base"]) is shares
    assert put == ([("t", tuned)] if shares else [])
    assert engine.writers["base"].model is not base, "an AdapterRows over it"
    assert shares or engine.writers["t"].model is tuned


def test_an_adapter_that_is_being_answered_stays_and_one_that_goes_leaves_its_base(
    template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def going() -> None:
        base = Model()
        dropped: list[str] = []
        monkeypatch.setattr(Writer, "put", lambda *_: None)
        monkeypatch.setattr(Writer, "drop", lambda self, name: dropped.append(name))
        monkeypatch.setattr(Writer, "go_on", lambda self: None)
        monkeypatch.setattr(engine_module, "can_share", lambda model: True)
        models = {name: opened(template, base if name == "base" else Model(), base) for name in ("base", "a")}  # fmt: skip
        engine = Engine(models | {"own": opened(template, Model())}, batch_size=1)
        engine.close()
        engine.writers["a"].take(job(template, request(model="a")))
        assert not engine.drop("a")
        assert set(engine.writers) == {"base", "a", "own"}
        engine.writers["a"]._reading.clear()
        assert engine.drop("a")
        assert engine.drop("own")
        assert set(engine.writers) == {"base"}
        assert dropped == ["a"], "a model of its own shares nothing"

    asyncio.run(going())


def test_models_compute_without_dropout_and_with_packed_weights_while_the_engine_runs(
    template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[str, Any]] = []

    @contextmanager
    def noted(what: str, model: Any) -> Iterator[None]:
        held.append((what, model))
        yield
        held.remove((what, model))

    monkeypatch.setattr(engine_module, "evaluating", lambda model: noted("evaluating", model))
    monkeypatch.setattr(engine_module, "packed", lambda model: noted("packed", model))
    one, other, base = Model(), Model(), Model()
    engine = Engine({"one": opened(template, one), "other": opened(template, other, base)}, batch_size=1)  # fmt: skip
    until(lambda: len(held) == 6)
    assert {(what, id(model)) for what, model in held} == {(what, id(model)) for what in ("evaluating", "packed") for model in (one, other, base)}  # fmt: skip
    engine.close()
    assert held == []


def test_a_lone_request_waits_for_company_so_shortly_that_nobody_notices() -> None:
    assert 0 < engine_module.GATHER_SECONDS <= 0.02


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
