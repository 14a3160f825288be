"""One reply on its way to a client: how it ends, what is sent, what is counted."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
from serving_jobs import events, ids_of, job, request
from transformers.convert_slow_tokenizer import bytes_to_unicode

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.serving import job as job_module
from finetune.serving.answers import _alphabet, _bytes_of, usage_of
from finetune.serving.errors import ApiError
from finetune.serving.job import Outbox, ReplyJob, StopStrings

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}


@pytest.fixture(scope="module")
def template(tiny_glm: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(tiny_glm))


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


def test_a_token_outside_of_the_alphabet_is_spelled_as_it_is() -> None:
    assert _bytes_of("<a 中>") == "<a 中>".encode()
    assert _bytes_of("<|user|>") == b"<|user|>"


def test_the_longest_beginning_of_a_stop_string_is_kept_back() -> None:
    reader = StopStrings(("aab", "ax"))
    assert [reader.feed(piece) for piece in ("xaa", "a", "b")] == ["x", "a", ""]
    assert reader.found
    reader = StopStrings(("aab", "ax"))
    assert [reader.feed(piece) for piece in ("aa", "c")] == ["", "aac"]
