"""What clients read: the JSON of answers and events to the letter, and what each wrong address is told."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.generation.decoder import ScoredToken
from finetune.generation.stream import Piece
from finetune.serving.answers import ChatAnswer, TextAnswer
from finetune.serving.errors import NOT_HERE, not_here


@pytest.fixture(scope="module")
def template(tiny_glm: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(tiny_glm))


def job(ids: list[int], *, tells: bool = False, scores: Any = None, reason: str = "stop") -> Any:
    request = SimpleNamespace(prompt=[1, 2, 3], tells_ids=tells)
    return SimpleNamespace(request=request, ids=ids, num_tokens=len(ids), finish_reason=reason, scores=scores)  # fmt: skip


def said(event: str) -> Any:
    assert event.startswith("data: ")
    assert event.endswith("\n\n")
    return json.loads(event.removeprefix("data: "))


HEADS: list[tuple[Any, str, str, str]] = [
    (ChatAnswer, "chatcmpl-", "chat.completion", "chat.completion.chunk"),
    (TextAnswer, "cmpl-", "text_completion", "text_completion"),
]


@pytest.mark.parametrize(("kind", "prefix", "whole", "part"), HEADS)
def test_an_answer_is_openais_to_the_letter(
    kind: Any, prefix: str, whole: str, part: str, template: ChatTemplate
) -> None:
    answer = kind("m", template)
    one, other = job([7, 8]), job([9], reason="length")
    told = answer.completion([(one, [Piece("a"), Piece("b")]), (other, [Piece("c")])])
    assert abs(told.pop("created") - time.time()) < 5
    name = told.pop("id")
    assert re.fullmatch(rf"{prefix}[0-9a-f]{{24}}", name)
    assert name != kind("m", template).completion([(one, [])])["id"]
    text: Any = lambda said: {"message": {"role": "assistant", "content": said, "refusal": None}} if kind is ChatAnswer else {"text": said}  # noqa: E731  # fmt: skip
    usage = {"prompt_tokens": 6, "completion_tokens": 3, "total_tokens": 9}
    assert told == {
        "object": whole, "model": "m", "usage": usage,
        "choices": [
            {"index": 0, **text("ab"), "logprobs": None, "finish_reason": "stop"}, {"index": 1, **text("c"), "logprobs": None, "finish_reason": "length"},
        ],
    }  # fmt: skip
    assert answer.completion([(one, [])])["choices"][0] == {"index": 0, **text(""), "logprobs": None, "finish_reason": "stop"}  # fmt: skip
    last = said(answer.usage([one, other]))
    assert last == {"id": name, "created": last["created"], "model": "m", "object": part, "choices": [], "usage": usage}  # fmt: skip
    stream = answer.stream(other, 1)
    more: Any = lambda text: {"delta": {"content": text}} if kind is ChatAnswer else {"text": text}  # noqa: E731  # fmt: skip
    chunk = said(stream.more(Piece("c")))
    assert chunk == {"id": name, "created": last["created"], "model": "m", "object": part,
                     "choices": [{"index": 1, **more("c"), "logprobs": None, "finish_reason": None}]}  # fmt: skip
    end = said(stream.closing())["choices"]
    assert end == [{"index": 1, **({"delta": {}} if kind is ChatAnswer else {"text": ""}), "logprobs": None, "finish_reason": "length"}]  # fmt: skip
    assert bool(stream.opening()) is (kind is ChatAnswer)


@pytest.mark.parametrize("kind", [ChatAnswer, TextAnswer])
def test_every_id_and_probability_is_told_once_by_the_events_of_a_reply(
    kind: Any, template: ChatTemplate
) -> None:
    ids = template.tokenizer.plain.encode("dog order", add_special_tokens=False).ids
    tokens = [ScoredToken(i, -0.5 - n, ((i, -0.5 - n), (ids[0], -3.0))) for n, i in enumerate(ids)]
    one = job([], tells=True, scores=SimpleNamespace(tokens=[]))
    answer = kind("m", template)
    stream = answer.stream(one, 0)
    chunks = []
    for n, token in enumerate(ids):
        one.ids.append(token)
        one.scores.tokens.append(tokens[n])
        chunks.append(said(stream.more(Piece("x")))["choices"][0])
    chunks.append(said(stream.closing())["choices"][0])
    assert [chunk["token_ids"] for chunk in chunks] == [*([i] for i in ids), []]
    whole = answer.completion([(one, [])])["choices"][0]
    assert whole["token_ids"] == ids
    names = ("content",) if kind is ChatAnswer else ("tokens", "token_logprobs", "top_logprobs", "text_offset")  # fmt: skip
    for name in names:
        assert [one for chunk in chunks for one in chunk["logprobs"][name]] == whole["logprobs"][name]  # fmt: skip
    if kind is ChatAnswer:
        first = whole["logprobs"]["content"][0]
        text = template.tokenizer.plain.decode(ids[:1])
        assert (first["token"], first["logprob"], bytes(first["bytes"])) == (text, -0.5, text.encode())  # fmt: skip
        assert [(top["token"], top["logprob"]) for top in first["top_logprobs"]] == [(text, -0.5), (text, -3.0)]  # fmt: skip
    else:
        assert whole["logprobs"]["text_offset"][0] == 0
        assert whole["logprobs"]["token_logprobs"][:2] == [-0.5, -1.5]


def test_a_token_that_cannot_come_is_told_as_a_number(template: ChatTemplate) -> None:
    unknown = template.tokenizer.vocab_size + 9
    scores = SimpleNamespace(tokens=[ScoredToken(unknown, float("-inf"), ())])
    [told] = ChatAnswer("m", template).scored(job([], scores=scores)) or []
    assert told == {"token": "", "logprob": -9999.0, "bytes": [], "top_logprobs": []}


# What else the clients of OpenAI and Anthropic ask for, and the words of what to do instead.
REMEDIES = {
    "responses": "ask /v1/chat/completions instead", "embeddings": "point the embedding client at another server",
    "messages": "use a client of /v1/chat/completions", "assistants": "send them whole", "threads": "send them whole",
    "conversations": "send them whole", "audio": "only text is written", "images": "only text is written",
    "videos": "only text is written", "realtime": "only text is written", "moderations": "only text is written",
    "files": "`finetune predict` answers files", "uploads": "nothing is stored here", "batches": "nothing is stored here",
    "vector_stores": "nothing is stored here", "fine_tuning": "`finetune train` tunes", "fine-tunes": "`finetune train` tunes",
    "evals": "nothing is stored here",
}  # fmt: skip


@pytest.mark.parametrize("name", REMEDIES)
def test_what_else_clients_ask_for_has_a_remedy(name: str) -> None:
    for path in (f"/v1/{name}", f"/v1/{name}/x/y", f"/{name}"):
        assert REMEDIES[name] in not_here(path)
    assert "served are" in not_here(f"/v1/x/{name}")
    assert NOT_HERE.keys() == REMEDIES.keys()


@pytest.mark.parametrize(
    ("path", "address"),
    [("/models", "/v1/models"), ("/completions", "/v1/completions"), ("/v1/v1/models/x", "/v1/models/x"), ("/v1/v1/" + "x" * 100, "/v1/" + "x" * 73)],
)  # fmt: skip
def test_an_address_of_one_v1_too_few_or_too_many_names_the_right_one(
    path: str, address: str
) -> None:
    assert not_here(path).endswith(f"the address is {address}")
