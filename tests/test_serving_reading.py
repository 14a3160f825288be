"""What a model reads next, together with what, and what a failure takes with it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from serving_jobs import events, job, request
from torch import nn

from finetune.data.chat.image import ImagePrompt
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.generation.batch import SHORTEST_PREFIX, SharedPrefix
from finetune.methods.adapter_rows import AdapterRows
from finetune.serving.job import ReplyJob
from finetune.serving.memory import KeptPrompts
from finetune.serving.writer import LONG, PIECE, Lane, PendingPrompt, Writer, fail


@pytest.fixture(scope="module")
def template(tiny_glm: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(tiny_glm))


class Model(nn.Linear):
    """Weights to be held, and what an engine asks of them."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.device = torch.device("cpu")
        self.config = SimpleNamespace()


class StubDecoder:
    """Takes what it is given, and fails where a test says so."""

    def __init__(self, fails: Any = lambda requests: False, *, lost: bool = False) -> None:
        self.added: list[tuple[int, Any]] = []
        self.batch = SimpleNamespace(is_lost=False)
        self.active: list[Any] = []
        self.is_sparse = False
        self._fails, self._lost = fails, lost

    def add(self, requests: Sequence[Any], known: Any = None) -> list[Any]:
        if self._fails(requests):
            self.batch.is_lost = self._lost
            raise RuntimeError("cannot")
        self.added.append((len(requests), known))
        return [row(one) for one in requests]

    def taken(self, one: Any) -> SharedPrefix:
        return SharedPrefix.kept(list(one.request.prompt), [])


def row(asked: Any, **how: Any) -> Any:
    given = {"is_done": False, "error": None, "stopped": True} | how
    return SimpleNamespace(request=asked, **given)


def pending(one: ReplyJob, known: Sequence[int] = ()) -> PendingPrompt:
    return PendingPrompt(one, one.request.prompt, SharedPrefix.kept(list(known), []))


def lane(template: ChatTemplate, decoder: StubDecoder, memories: Any = None) -> Lane:
    made = Lane(None, template, memories if memories is not None else {})
    made.decoder = decoder  # type: ignore[assignment]
    return made


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders of no model."""
    monkeypatch.setattr("finetune.serving.writer.Decoder", lambda *_: StubDecoder())


def test_prompts_go_through_the_model_with_those_of_their_model_and_beginning(
    template: ChatTemplate,
) -> None:
    async def reading() -> None:
        decoder = StubDecoder()
        plan = [("a", ()), ("b", ()), ("a", (1,)), ("a", (1,)), ("b", (1,)), ("a", ())]
        lane(template, decoder).go_on(
            [pending(job(template, request(model=name)), known) for name, known in plan]
        )
        sizes = [(size, tuple(known.ids) if known else ()) for size, known in decoder.added]
        assert sizes == [(2, ()), (1, ()), (2, (1,)), (1, (1,))]

    asyncio.run(reading())


def test_prompts_that_fail_together_are_read_each_alone_with_what_is_known_of_them(
    template: ChatTemplate, capfd: pytest.CaptureFixture[str]
) -> None:
    async def reading() -> None:
        bad = request((9, 9))
        jobs = [job(template, asked) for asked in (request(), bad, request())]
        decoder = StubDecoder(lambda requests: any(r.prompt == [9, 9] for r in requests))
        ours = lane(template, decoder)
        ours.go_on([pending(one, (1,)) for one in jobs])
        assert [(size, known.ids) for size, known in decoder.added] == [(1, [1]), (1, [1])]
        assert [one for one, _ in ours.running] == [jobs[0], jobs[2]]
        [error] = await events(jobs[1])
        assert (error.status, error.code) == (500, "model_failed")
        assert await events(jobs[0]) == []

    asyncio.run(reading())
    assert "cannot" in capfd.readouterr().err


def test_a_batch_that_is_lost_fails_all_in_it_and_the_next_begins_anew(
    template: ChatTemplate, capfd: pytest.CaptureFixture[str]
) -> None:
    async def reading() -> None:
        decoder = StubDecoder(lambda _: True, lost=True)
        ours = lane(template, decoder)
        before, *new = (job(template) for _ in range(3))
        ours.running = [(before, row(before.request))]
        ours.go_on([pending(one) for one in new])
        for one in (before, *new):
            [error] = await events(one)
            assert error.code == "model_failed"
        assert ours.running == []
        assert ours.decoder is not decoder

    asyncio.run(reading())
    capfd.readouterr()


def test_of_replies_that_have_ended_those_to_images_are_not_remembered(
    template: ChatTemplate,
) -> None:
    async def ended() -> None:
        memories = {"m": KeptPrompts()}
        ours = lane(template, StubDecoder(), memories)
        image = ImagePrompt([1, 2, 3], [], None)  # type: ignore[arg-type]
        jobs = [job(template) for _ in range(4)]
        rows = [row(request((1,) * 40), is_done=True), row(SimpleNamespace(prompt=image), is_done=True), row(request()), row(request(), error=ValueError("x"), is_done=True)]  # fmt: skip
        ours.running = list(zip(jobs, rows, strict=True))
        ours._settle()
        assert [one.ids for one in memories["m"]._kept] == [[1] * 40]
        assert [one for one, _ in ours.running] == [jobs[2]]
        assert [await events(one) for one in jobs[:3]] == [[None], [None], []]
        assert (await events(jobs[3]))[0].status == 500

    asyncio.run(ended())


def test_only_replies_to_the_very_prompt_share_its_reading(template: ChatTemplate) -> None:
    """An equal prompt may be for another model."""

    async def reading() -> None:
        writer = Writer(None, template)
        one, other = request(model="a"), request(model="b")
        for asked in (one, one, other):
            writer.take(job(template, asked))
        assert [len(reading.jobs) for reading in writer._reading] == [2, 1]
        assert [reading.name for reading in writer._reading] == ["a", "b"]

    asyncio.run(reading())


@pytest.mark.parametrize("images", [False, True])
def test_a_long_prompt_is_read_in_pieces_and_one_with_an_image_at_once(
    template: ChatTemplate, images: bool
) -> None:
    async def reading() -> None:
        writer = Writer(None, template)
        prompt: list[int] = list(range(PIECE + 1))
        if images:
            prompt = ImagePrompt(prompt, [], None)  # type: ignore[arg-type]
        asked = request()
        object.__setattr__(asked, "prompt", prompt)
        writer.take(job(template, asked))
        [waiting] = writer._reading
        assert waiting.is_long is not images
        assert writer._whole() == ([waiting] if images else [])

    asyncio.run(reading())


@pytest.mark.parametrize(("tokens", "known", "long"), [(PIECE, 0, False), (PIECE + 1, 0, True), (PIECE + 1, 1, False), (2 * PIECE, 0, True)])  # fmt: skip
def test_a_prompt_is_long_by_what_is_not_yet_known_of_it(
    tokens: int, known: int, long: bool, template: ChatTemplate
) -> None:
    async def reading() -> None:
        one = pending(job(template, request(range(tokens))), range(known))
        assert (one.left, one.is_long) == (tokens - known, long)

    asyncio.run(reading())


def test_short_prompts_of_a_round_are_as_many_as_a_piece_holds_beside_the_oldest(
    template: ChatTemplate,
) -> None:
    async def reading() -> None:
        writer = Writer(None, template)
        quarter = PIECE // 4
        for lengths, first, then in (
            ([quarter] * 5, [quarter] * 4, [quarter]), ([quarter, quarter + 1, quarter, quarter], [quarter] * 3, [quarter + 1]),
            ([PIECE, 3, 4], [PIECE], [3, 4]), ([3, PIECE, 4], [3, 4], [PIECE]),
        ):  # fmt: skip
            writer._reading = [pending(job(template, request(range(n)))) for n in lengths]
            assert [one.left for one in writer._whole()] == first
            assert [one.left for one in writer._reading] == then

    asyncio.run(reading())


@pytest.mark.parametrize("sparse", [True, False])
def test_a_batch_of_which_most_rows_have_ended_is_made_smaller(
    sparse: bool, template: ChatTemplate
) -> None:
    decoder = StubDecoder()
    dropped: list[int] = []
    decoder.is_sparse = sparse
    decoder.drop_done = lambda: dropped.append(1)  # type: ignore[attr-defined]
    lane(template, decoder)._settle()
    assert dropped == [1] * sparse


@pytest.mark.parametrize("active", [True, False])
def test_a_round_gives_a_token_to_those_who_want_one(active: bool, template: ChatTemplate) -> None:
    async def going() -> None:
        decoder = StubDecoder()
        steps: list[int] = []
        one = job(template)
        ours = lane(template, decoder, {"m": KeptPrompts()})
        running = row(one.request)
        ours.running = [(one, running)]
        decoder.active = [running] if active else []

        def step() -> None:
            steps.append(1)
            running.is_done = True

        decoder.step = step  # type: ignore[attr-defined]
        ours.go_on([])
        assert (steps, await events(one)) == (([1], [None]) if active else ([], []))

    asyncio.run(going())


def test_a_step_that_fails_ends_all_rows_and_the_next_batch_begins_anew(
    template: ChatTemplate, capfd: pytest.CaptureFixture[str]
) -> None:
    async def going() -> None:
        decoder = StubDecoder()
        decoder.active = [1]
        decoder.step = lambda: 1 // 0  # type: ignore[attr-defined]
        ours = lane(template, decoder)
        one = job(template)
        ours.running = [(one, row(one.request))]
        ours.go_on([])
        assert (await events(one))[0].code == "model_failed"
        assert ours.running == []
        assert ours.decoder is not decoder

    asyncio.run(going())
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_long_and_short_replies_are_written_in_lanes_of_their_own(template: ChatTemplate) -> None:
    async def going() -> None:
        writer = Writer(None, template)
        short, long = job(template), job(template, request(length=LONG))
        for one in (short, long):
            writer.take(one)
        given = {}
        for width, one_lane in writer.lanes.items():
            one_lane.go_on = lambda read, width=width: given.update({width: [one.jobs for one in read]})  # type: ignore[method-assign]  # fmt: skip
        writer.go_on()
        assert given == {"short": [[short]], "long": [[long]]}

    asyncio.run(going())


def test_of_what_is_remembered_the_longest_beginning_is_taken_and_as_much_as_fits_is_kept() -> None:
    memory = KeptPrompts(most_tokens=100)
    memory.keep(SharedPrefix.kept([1] * 30 + [2] * 30, []))
    memory.keep(SharedPrefix.kept([1] * 20 + [3] * 20, []))
    assert [len(one.ids) for one in memory._kept] == [60, 40], "a hundred fit"
    for prompt, common in (([1] * 30 + [2] * 5 + [9], 35), ([1] * 20 + [3] * 5 + [9], 25), ([1] * 25 + [9], 25)):  # fmt: skip
        found = memory.beginning_of(prompt)
        assert found is not None
        assert found.ids == prompt[:common]
    memory = KeptPrompts(most_tokens=40)
    memory.keep(SharedPrefix.kept([1] * 40, []))
    assert memory.beginning_of([1] * 41) is not None, "and one of as many"


def test_a_long_prompt_is_read_by_its_own_adapter_and_a_failure_ends_it_alone(
    template: ChatTemplate, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def reading() -> None:
        writer = Writer(AdapterRows(Model()), template)
        chosen: list[list[str]] = []
        monkeypatch.setattr(AdapterRows, "choose", lambda self, names: chosen.append(list(names)))
        monkeypatch.setattr(PendingPrompt, "advance", lambda self, model: chosen.append(["read"]))
        one, two = (job(template, request(range(PIECE + 9), model=name)) for name in "ab")
        for each in (one, two):
            writer.take(each)
        writer.go_on()
        assert chosen == [["a"], ["read"]], "the oldest, one in a round"
        monkeypatch.setattr(PendingPrompt, "advance", lambda self, model: 1 // 0)
        writer.go_on()
        assert (await events(one))[0].code == "model_failed"
        assert writer.jobs == [two]

    asyncio.run(reading())
    capfd.readouterr()


def test_what_nobody_waits_for_is_let_go_before_it_is_read(template: ChatTemplate) -> None:
    async def reading() -> None:
        writer = Writer(None, template)
        released: list[str] = []
        asked = request()
        jobs = [job(template, asked, release=lambda n=name: released.append(n)) for name in "ab"]
        for one in jobs:
            writer.take(one)
        jobs[0].cancelled = True
        writer._reading[0].drop_cancelled()
        assert (released, writer.jobs) == (["a"], [jobs[1]])

    asyncio.run(reading())


def test_an_adapter_that_goes_leaves_nothing_behind(template: ChatTemplate) -> None:
    writer = Writer(AdapterRows(Model()), template)
    writer.memories["a"].keep(SharedPrefix.kept([1] * 40, []))
    writer._prefixes["a"] = [(torch.zeros(1, 1, 4, 1),) * 2]
    writer.drop("a")
    assert writer.memories["a"].beginning_of([1] * 50) is None
    assert writer._prefixes == {}


@pytest.mark.parametrize(("tokens", "found"), [(SHORTEST_PREFIX, True), (SHORTEST_PREFIX - 1, False)])  # fmt: skip
@pytest.mark.parametrize("virtual", [0, 6])
def test_a_beginning_is_worth_remembering_by_its_own_tokens(
    tokens: int, found: bool, virtual: int
) -> None:
    memory = KeptPrompts(virtual=virtual)
    memory.keep(SharedPrefix.kept([7] * (virtual + tokens), []))
    assert (memory.beginning_of([7] * (virtual + tokens) + [8] * 9) is not None) is found
    assert memory.used_tokens == (tokens if found else 0)


def test_a_model_without_memory_for_a_reply_says_that_shorter_ones_fit(
    template: ChatTemplate, capfd: pytest.CaptureFixture[str]
) -> None:
    async def failing() -> None:
        told = [(torch.OutOfMemoryError("x"), 503, "overloaded"), (ValueError("secret"), 500, "model_failed")]  # fmt: skip
        for error, status, code in told:
            one = job(template)
            fail(one, error)
            [said] = await events(one)
            assert (said.status, said.code) == (status, code)
            assert "secret" not in str(said)

    asyncio.run(failing())
    assert "secret" in capfd.readouterr().err


def test_nothing_is_known_of_a_prompt_with_images_whose_ids_are_alike() -> None:
    memory = KeptPrompts()
    memory.keep(SharedPrefix.kept([7] * 50, []))
    image = ImagePrompt([7] * 60, [], None)  # type: ignore[arg-type]
    assert memory.beginning_of(image) is None
    assert memory.beginning_of(list(image)) is not None


def test_the_tokens_of_a_prefix_are_no_tokens_of_a_prompt(
    template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = [(torch.zeros(1, 2, 6, 3),) * 2]
    monkeypatch.setattr("finetune.serving.writer.prefix_of", lambda adapted: prefix)
    writer = Writer(AdapterRows(Model()), template)
    writer.put("p", None)
    memory = writer.memories["p"]
    memory.keep(SharedPrefix.kept([7] * (6 + SHORTEST_PREFIX), []))
    assert memory.beginning_of([7] * (5 + SHORTEST_PREFIX)) is None
    assert memory.beginning_of([7] * (7 + SHORTEST_PREFIX)) is not None
    assert memory.used_tokens == SHORTEST_PREFIX
