"""Parts of the endpoint one at a time: how a reply ends, who is taken in, what a model reads next."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.convert_slow_tokenizer import bytes_to_unicode

from finetune.data.chat.image import ImagePrompt
from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.generation.batch import SHORTEST_PREFIX, SharedPrefix
from finetune.generation.decoder import Decoding
from finetune.generation.load import OpenedModel
from finetune.methods.adapter_rows import AdapterRows
from finetune.serving import engine as engine_module
from finetune.serving import job as job_module
from finetune.serving.answers import _alphabet, usage_of
from finetune.serving.engine import Engine, _fits
from finetune.serving.errors import ApiError
from finetune.serving.job import Outbox, ReplyJob, StopStrings
from finetune.serving.memory import KeptPrompts
from finetune.serving.requests.rules import ReplyRequest
from finetune.serving.writer import LONG, PIECE, Lane, PendingPrompt, Writer, fail, width_of

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}


@pytest.fixture(scope="module")
def template(tiny_glm: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(tiny_glm))


def request(prompt: Sequence[int] = (1, 2, 3), length: int = 5, **how: Any) -> ReplyRequest:
    given: dict[str, Any] = {"tools": (), "stops": (), "model": "m", "many_calls": True}
    given |= {"stream": False, "include_usage": False, **how}
    return ReplyRequest(prompt=list(prompt), decoding=Decoding(length), **given)


def job(template: ChatTemplate, asked: ReplyRequest | None = None, **how: Any) -> ReplyJob:
    return ReplyJob(asked if asked is not None else request(), template, **how)


def ids_of(template: ChatTemplate, text: str) -> list[int]:
    return list(template.tokenizer.plain.encode(text, add_special_tokens=False).ids)


async def events(one: ReplyJob) -> list[Any]:
    """What has come for the client of a job."""
    await asyncio.sleep(0)
    return [one._events.get_nowait() for _ in range(one._events.qsize())]


# --- a reply -------------------------------------------------------------------------------------


def test_the_alphabet_of_tokens_spells_every_byte() -> None:
    assert _alphabet() == {character: byte for byte, character in bytes_to_unicode().items()}


CALL = 'get_weather\n{"a": 1}'
ENDS: list[tuple[str, dict[str, Any], list[str], bool, str]] = [
    ("a stop token", {}, ["\nhi"], True, "stop"),
    ("the last token", {}, ["\nhi"], False, "length"),
    ("a control token that is no stop", {}, ["\nhi", "<|system|>"], False, "stop"),
    ("of a text, too", {"is_text": True}, ["hi", "<|system|>"], False, "stop"),
    ("but not where the ids are told", {"is_text": True, "tells_ids": True}, ["hi", "<|system|>"], False, "length"),
    ("a stop string", {"stops": ("h",)}, ["\nhi"], False, "stop"),
    ("a stop string in front of a stop", {"stops": ("h",)}, ["\nhi"], True, "stop"),
    ("a call", {"tools": (TOOL,)}, [CALL], True, "tool_calls"),
    ("a call that was cut", {"tools": (TOOL,)}, [CALL], False, "length"),
    ("one of two calls", {"tools": (TOOL,), "many_calls": False}, [CALL, "<|assistant|>", CALL], False, "tool_calls"),
    ("two calls", {"tools": (TOOL,)}, [CALL, "<|assistant|>", CALL], True, "tool_calls"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("why", "how", "said", "stopped", "reason"), ENDS, ids=lambda v: str(v)[:20]
)
def test_the_reason_of_an_end_is_the_one_that_came_first(
    template: ChatTemplate, why: str, how: dict[str, Any], said: list[str], stopped: bool, reason: str
) -> None:  # fmt: skip
    async def written() -> None:
        one = job(template, request(**how))
        control = template.tokenizer.control_ids
        for token in [i for text in said for i in ([control[text]] if text in control else ids_of(template, text))]:  # fmt: skip
            if one.take(token):
                break
        one.finish(stopped)
        assert one.finish_reason == reason, why
        assert (await events(one))[-1] is None

    asyncio.run(written())


def test_a_reply_that_nobody_waits_for_ends_at_its_next_token_and_sends_nothing(
    template: ChatTemplate,
) -> None:
    async def left() -> None:
        released: list[int] = []
        one = job(template, release=lambda: released.append(1))
        assert not one.take(ids_of(template, "\nhi")[0])
        one.cancel()
        assert one.take(ids_of(template, "hi")[0])
        await events(one)
        one.finish(False)
        assert await events(one) == []
        assert released == [1]

    asyncio.run(left())


def test_pieces_go_to_those_who_wait_and_not_to_a_loop_that_is_closed(
    template: ChatTemplate,
) -> None:
    box = Outbox()

    async def gone() -> ReplyJob:
        one = job(template, outbox=box)
        one.fail(ApiError(500, "x"))
        one.cancel()
        return one

    asyncio.run(gone())

    async def waiting() -> None:
        ours = [job(template, outbox=box), job(template, outbox=box)]
        for one in ours:
            one.finish(True)
            assert await events(one) == [], "a round of the model comes first"
        box.flush()
        for one in ours:
            assert await events(one) == [None]
        box.flush()
        assert await events(ours[0]) == [], "nothing is sent twice"

    asyncio.run(waiting())


def test_what_fails_where_no_round_comes_is_told_at_once(template: ChatTemplate) -> None:
    async def failing() -> None:
        error = ApiError(503, "stopping")
        for at_once in (True, False):
            released: list[int] = []
            one = job(template, outbox=Outbox(), release=lambda box=released: box.append(1))
            one.fail(error, at_once=at_once)
            assert released == [1]
            assert await events(one) == ([error] if at_once else [])

    asyncio.run(failing())


def test_the_time_to_the_first_token_is_that_of_the_first_token(
    template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def written() -> None:
        now = itertools.count(10.0)
        monkeypatch.setattr(job_module.time, "monotonic", lambda: next(now))
        one = job(template)
        for token in ids_of(template, "\nhello you there"):
            one.take(token)
            assert one.seconds_to_first == 1.0

    asyncio.run(written())


@pytest.mark.parametrize("text", ["a END b", "aENEND", "END", "EN", "a\n\nb", "a\n", "\n\n", "ENDEND", "aEN\n\n", ""])  # fmt: skip
def test_however_a_text_is_cut_it_ends_at_the_same_stop_string(text: str) -> None:
    ends = [text.find(stop) for stop in ("END", "\n\n") if stop in text]
    expected = text[: min(ends)] if ends else text
    for cuts in itertools.product((False, True), repeat=max(0, len(text) - 1)):
        pieces, last = [], 0
        for place in [*(i for i, cut in enumerate(cuts, 1) if cut), len(text)]:
            pieces.append(text[last:place])
            last = place
        reader, shown = StopStrings(("END", "\n\n")), ""
        for piece in pieces:
            shown += reader.feed(piece)
            assert expected.startswith(shown)
            if reader.found:
                break
        assert (shown + reader.rest(), reader.found) == (expected, bool(ends)), pieces


def test_a_prompt_of_several_replies_is_counted_once_and_equal_prompts_each(
    template: ChatTemplate,
) -> None:
    async def counted() -> None:
        one, other = request(range(7)), request(range(7))
        jobs = [job(template, asked) for asked in (one, one, other)]
        jobs[0].take(ids_of(template, "x")[0])
        assert usage_of(jobs) == {"prompt_tokens": 14, "completion_tokens": 1, "total_tokens": 15}

    asyncio.run(counted())


# --- who is taken in -----------------------------------------------------------------------------


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


# --- what is read --------------------------------------------------------------------------------


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


def test_a_call_has_openais_form(template: ChatTemplate) -> None:
    from finetune.generation.stream import Piece
    from finetune.serving.answers import ChatAnswer

    answer = ChatAnswer("m", template)
    pieces = [Piece("thought", is_thought=True), Piece("so ", None), Piece("{", 0, "f"), Piece("}", 0), Piece("{}", 1, "g")]  # fmt: skip
    message = answer.choice(pieces)["message"]
    calls = message.pop("tool_calls")
    assert message == {"role": "assistant", "content": "so ", "refusal": None, "reasoning_content": "thought"}  # fmt: skip
    told = [(call["type"], call["function"]) for call in calls]
    assert told == [("function", {"name": "f", "arguments": "{}"}), ("function", {"name": "g", "arguments": "{}"})]  # fmt: skip
    assert len({call["id"] for call in calls}) == 2
    assert answer.choice(pieces[2:])["message"]["content"] is None
    deltas = [answer.more(piece)["delta"] for piece in pieces]
    assert deltas[:2] == [{"reasoning_content": "thought"}, {"content": "so "}]
    assert [delta["tool_calls"][0]["index"] for delta in deltas[2:]] == [0, 0, 1]
    assert [delta["tool_calls"][0].get("type") for delta in deltas[2:]] == ["function", None, "function"]  # fmt: skip
    assert answer.opening() == {"delta": {"role": "assistant", "content": ""}}
