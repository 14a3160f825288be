"""Several replies to one request, and how likely their tokens were."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import serving
import torch
from rows import TOOL
from serving import HELLO

from finetune.data.dialogue.conversation import Message
from finetune.distributed.map_batches import evaluating
from finetune.generation.decoder import Decoder, Decoding, Request, write_replies
from finetune.generation.load import OpenedModel, open_model
from finetune.serving.answers import _bytes_of
from finetune.serving.requests.chat import AskedChat
from finetune.serving.requests.completion import AskedCompletion
from finetune.serving.requests.rules import RequestRules


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    return open_model(serving.save_talkative(tmp_path_factory.mktemp("base") / "talkative"))


@pytest.fixture(scope="module")
def server(opened: OpenedModel) -> Iterator[serving.Served]:
    with serving.served(opened) as running:
        yield running


def create(server: serving.Served, **how: Any) -> Any:
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 12} | how
    return server.client.chat.completions.create(**options)


def test_several_replies_are_those_of_seeds_that_follow_each_other(server: serving.Served) -> None:
    several = create(server, n=3, temperature=1.2, seed=5)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    said = [choice.message.content for choice in several.choices]
    alone = [create(server, temperature=1.2, seed=5 + n).choices[0] for n in range(3)]
    assert said == [choice.message.content for choice in alone]
    assert len(set(said)) > 1
    counted = [create(server, temperature=1.2, seed=5 + n).usage for n in range(3)]
    assert several.usage.completion_tokens == sum(one.completion_tokens for one in counted)
    assert several.usage.prompt_tokens == counted[0].prompt_tokens


def test_several_replies_are_streamed_side_by_side(server: serving.Served) -> None:
    whole = create(server, n=3, temperature=1.2, seed=5)
    chunks = list(
        create(server, n=3, temperature=1.2, seed=5, stream=True, stream_options={"include_usage": True})
    )  # fmt: skip
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [one.finish_reason for one in own if one.finish_reason] == [choice.finish_reason]


def test_one_of_several_that_fails_fails_the_request(
    server: serving.Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(decoder: Decoder) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr(Decoder, "step", broken)
    with pytest.raises(openai.InternalServerError, match="server's log"):
        create(server, n=2)


def test_probabilities_are_the_models_own(server: serving.Served, opened: OpenedModel) -> None:
    made = create(server, logprobs=True, top_logprobs=3)
    told = made.choices[0].logprobs.content
    prompt = serving.prompt_of(opened.template, Message("user", HELLO[0]["content"]))
    ids: list[int] = []
    with evaluating(opened.model):
        for token in told:
            logits = opened.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1]
            logprobs = logits.float().log_softmax(-1)
            best = logprobs.topk(3)
            assert [one.logprob for one in token.top_logprobs] == pytest.approx(
                best.values.tolist(), abs=1e-4
            )
            assert token.logprob == pytest.approx(best.values[0].item(), abs=1e-4)
            assert token.bytes == token.top_logprobs[0].bytes
            ids.append(int(best.indices[0]))
    text = opened.template.tokenizer.plain.decode(ids)
    assert text.removeprefix("\n") == made.choices[0].message.content
    chunks = list(create(server, logprobs=True, top_logprobs=3, stream=True))
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == told
    assert create(server).choices[0].logprobs is None
    assert create(server, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_probabilities_come_beside_a_structure_too(server: serving.Served) -> None:
    pytest.importorskip("llguidance")
    made = create(server, logprobs=True, tools=[TOOL], tool_choice="required", max_tokens=30)
    assert made.choices[0].logprobs.content


@pytest.mark.parametrize("text", ["hello", " wörld", "你好", "\n\t", "😀"])
def test_the_bytes_of_tokens_are_those_of_their_text(opened: OpenedModel, text: str) -> None:
    backend = opened.template.tokenizer.backend
    ids = opened.template.tokenizer.plain.encode(text, add_special_tokens=False).ids
    assert b"".join(_bytes_of(backend.id_to_token(i)) for i in ids) == text.encode()
    assert _bytes_of("<|user|>") == b"<|user|>"


FIELDS: tuple[dict[str, Any], ...] = (
    {}, {"presence_penalty": 1.7}, {"frequency_penalty": 1.5}, {"repetition_penalty": 1.6}, {"temperature": 1.3, "seed": 3},
    {"temperature": 1.3, "seed": 3, "top_p": 0.4}, {"temperature": 1.3, "seed": 3, "top_k": 3}, {"temperature": 1.3, "seed": 3, "min_p": 0.3},
)  # fmt: skip


@pytest.mark.parametrize("address", ["chat/completions", "completions"])
def test_every_field_of_sampling_means_what_it_means_to_the_decoder(
    server: serving.Served, opened: OpenedModel, address: str
) -> None:
    said, rules = [], RequestRules("tiny", opened.template, 2048, 1024)
    for fields in FIELDS:
        asked = {"messages": HELLO} if "chat" in address else {"prompt": "hello 你好 there"}
        body = {"model": "tiny", "max_tokens": 20, "logprobs": 1 if "prompt" in asked else True, **asked, **fields}  # fmt: skip
        choice = httpx.post(f"{server.url}/v1/{address}", json=body, timeout=60).json()["choices"][
            0
        ]
        found = choice["logprobs"]
        said.append(
            found["tokens"] if "prompt" in asked else [t["token"] for t in found["content"]]
        )
        read = AskedChat if "messages" in asked else AskedCompletion
        [asked_for] = read(json.dumps(body).encode(), {"tiny": rules}).replies()
        prompt = asked_for.prompt
        request = Request(prompt, Decoding(20, **fields))
        with evaluating(opened.model):
            [row] = write_replies(opened.model, opened.template.stop_ids, [request], slots=1)
        spell = opened.template.tokenizer.backend.id_to_token
        wanted = [_bytes_of(spell(token) or "").decode(errors="replace") for token in row.ids]
        assert said[-1] == wanted, fields
    assert all(one != said[0] for one in said[1:]), "every field changes a greedy reply"
    assert said[4] not in said[5:], "and every cut a drawn one"


def test_what_was_done_is_counted(opened: OpenedModel) -> None:
    with serving.served(opened, key="k" * 20) as server:
        used = [create(server, n=2).usage for _ in range(2)]
        with pytest.raises(openai.BadRequestError):
            create(server, n=9)
        url = f"{server.url}/metrics"
        assert httpx.get(url, timeout=60).status_code == 401
        text = httpx.get(url, headers={"Authorization": f"Bearer {server.key}"}, timeout=60).text
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert found['finetune_requests_total{status="200"}'] == "2"
    assert found['finetune_requests_total{status="400"}'] == "1"
    assert found['finetune_requests_total{status="401"}'] == "1"
    assert found["finetune_prompt_tokens_total"] == str(sum(one.prompt_tokens for one in used))
    assert found["finetune_reply_tokens_total"] == str(sum(one.completion_tokens for one in used))
    assert found["finetune_first_tokens_total"] == "4"
    assert float(found["finetune_first_token_seconds_total"]) > 0
    assert (found["finetune_replies_running"], found["finetune_replies_waiting"]) == ("0", "0")


def test_tokens_are_those_of_the_prompt(server: serving.Served, opened: OpenedModel) -> None:
    def tokens(**body: Any) -> Any:
        return httpx.post(f"{server.url}/tokenize", json=body, timeout=60).json()

    said = tokens(model="tiny", messages=HELLO, tools=[TOOL])
    prompt = serving.prompt_of(opened.template, Message("user", HELLO[0]["content"]), tools=[TOOL])
    assert said["tokens"] == prompt
    assert (said["count"], said["max_model_len"]) == (len(prompt), 2048)
    plain = opened.template.tokenizer.plain.encode("a <|user|> b", add_special_tokens=False).ids
    assert tokens(prompt="a <|user|> b")["tokens"] == plain
    assert "should be a text" in tokens(prompt=5)["error"]["message"]
    assert "'gpt' is not served here" in tokens(model="gpt", messages=HELLO)["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_field_that_nobody_knows_is_named_in_a_header_or_refused(
    server: serving.Served, opened: OpenedModel, stream: bool
) -> None:
    odd = {"colour": "red", "a\r\nSet-Cookie: x": 1, "你好": [], "nothing": None}
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 2, "stream": stream} | odd

    def post(url: str) -> httpx.Response:
        return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)

    answer = post(server.url)
    assert answer.status_code == 200
    assert answer.headers["X-Ignored-Fields"] == "colour, a\\r\\nSet-Cookie: x, \\u4f60\\u597d"
    assert "Set-Cookie" not in answer.headers
    with serving.served(opened, strict=True) as strict:
        refused = post(strict.url)
    assert refused.status_code == 400
    assert "colour: is not supported here" in refused.json()["error"]["message"]
