"""`/v1/completions`: a text is gone on with as evaluation would go on with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import serving
import tiny
import torch
from dialogues import CONTROL_STRINGS

from finetune.generation.backends.address import Address
from finetune.generation.backends.endpoint import EndpointGenerator
from finetune.generation.generate import Extras, SeededSampling, Window, generate
from finetune.generation.load import OpenedModel, open_model
from finetune.serving.requests.completion import AskedCompletion
from finetune.serving.requests.fields import UNCHANGED, CompletionRequest
from finetune.serving.requests.rules import ReplyRequest, RequestRules

START = "the dog 你好 and"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    return open_model(serving.save_talkative(tmp_path_factory.mktemp("base") / "talkative"))


@pytest.fixture(scope="module")
def server(opened: OpenedModel) -> Iterator[serving.Served]:
    with serving.served(opened) as running:
        yield running


def create(server: serving.Served, prompt: Any = START, **how: Any) -> Any:
    return server.client.completions.create(**{"model": "tiny", "prompt": prompt} | how)


def ids_of(opened: OpenedModel, text: str) -> list[int]:
    """What training puts before a document, and its text."""
    tokenizer = opened.template.tokenizer
    start = [tokenizer.control_ids["[gMASK]"], tokenizer.control_ids["<sop>"]]
    return [*start, *tokenizer.plain.encode(text, add_special_tokens=False).ids]


def greedy(opened: OpenedModel, text: str, length: int) -> tuple[str, int]:
    [reply] = generate(
        opened.model, opened.template, [ids_of(opened, text)], max_new_tokens=length, batch_size=1
    )
    return opened.template.tokenizer.plain.decode(reply.ids), len(reply.ids)


@pytest.mark.parametrize("text", [START, "x", "\n 1"])
def test_a_text_goes_on_greedily_whole_and_streamed(
    server: serving.Served, opened: OpenedModel, text: str
) -> None:
    said, tokens = greedy(opened, text, 20)
    whole = create(server, text, max_tokens=20)
    assert (whole.object, whole.choices[0].text) == ("text_completion", said)
    assert whole.usage.completion_tokens == tokens
    assert whole.usage.prompt_tokens == len(ids_of(opened, text))
    chunks = list(
        create(server, text, max_tokens=20, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == said
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_a_text_of_no_stated_length_has_sixteen_tokens(
    server: serving.Served, opened: OpenedModel
) -> None:
    assert create(server).choices[0].text == greedy(opened, START, 16)[0]


def test_several_prompts_have_their_replies_one_after_another(server: serving.Served) -> None:
    asked = {"temperature": 1.2, "seed": 4, "n": 2}
    both = create(server, [START, "a cat"], **asked)
    apart = [create(server, prompt, **asked) for prompt in (START, "a cat")]
    assert [c.text for c in both.choices] == [c.text for one in apart for c in one.choices]
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(both.usage, count) == sum(getattr(one.usage, count) for one in apart)


def test_ids_are_taken_as_they_are(server: serving.Served, opened: OpenedModel) -> None:
    ids = ids_of(opened, START)
    assert create(server, ids).choices[0].text == create(server).choices[0].text
    assert create(server, [ids, ids[:3]]).choices[0].text == create(server).choices[0].text


def test_probabilities_are_four_lists_that_spell_the_text(
    server: serving.Served, opened: OpenedModel
) -> None:
    whole = create(server, logprobs=2)
    told = whole.choices[0].logprobs
    assert "".join(told.tokens) == whole.choices[0].text
    assert [whole.choices[0].text[place:].startswith(token) for place, token in zip(told.text_offset, told.tokens, strict=True)] == [True] * len(told.tokens)  # fmt: skip
    logits = opened.model(input_ids=torch.tensor([ids_of(opened, START)])).logits[0, -1]
    assert told.token_logprobs[0] == pytest.approx(
        logits.float().log_softmax(-1).max().item(), abs=1e-4
    )
    # Halves of a character are spelled alike, so that two of them share a place.
    assert {len(one) for one in told.top_logprobs} <= {1, 2}
    assert [max(one.values()) for one in told.top_logprobs] == told.token_logprobs
    parts = [c.choices[0].logprobs for c in create(server, logprobs=2, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for part in parts for item in getattr(part, name)] == getattr(told, name)
    assert create(server).choices[0].logprobs is None


def test_a_stop_string_ends_a_text(server: serving.Served) -> None:
    text = create(server, max_tokens=30).choices[0].text
    stop = text[5:8]
    stopped = create(server, max_tokens=30, stop=stop).choices[0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


REFUSED = [
    ({"prompt": [10**6]}, "is no token"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [["a"]]}, "prompt"),
    ({"prompt": "a\ud800"}, "JSON"),
    ({"echo": True}, "echo: is not supported here"),
    ({"suffix": "end"}, "suffix: is not supported here"),
    ({"prompt": ["a"] * 9, "n": 8}, "more than 64 replies"),
    ({"messages": []}, "messages: is not supported here"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"model": "other"}, "is not served here"),
]


@pytest.mark.parametrize(("fields", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_cannot_be_gone_on_with_is_refused(
    server: serving.Served, fields: Any, reason: str
) -> None:
    body = json.dumps({"model": "tiny", "prompt": START} | fields).encode()
    answer = httpx.post(
        f"{server.url}/v1/completions",
        content=body,
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    assert answer.status_code in (400, 404)
    assert reason in answer.json()["error"]["message"]


@pytest.mark.parametrize("typed", CONTROL_STRINGS)
def test_a_control_string_in_a_text_stays_text(
    opened: OpenedModel, server: serving.Served, typed: str
) -> None:
    used = create(server, f"a{typed}b", max_tokens=1).usage
    assert used.prompt_tokens == len(ids_of(opened, f"a{typed}b"))
    assert used.prompt_tokens > len(ids_of(opened, "ab")) + 1


def test_a_length_beyond_the_context_is_lowered(opened: OpenedModel) -> None:
    with serving.served(opened, context=20) as small:
        made = create(small, "abc", max_tokens=500)
        assert made.usage.total_tokens <= 20
        chatted = small.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=500)  # fmt: skip
        assert chatted.usage.total_tokens <= 20
        with pytest.raises(openai.BadRequestError, match="no room for a reply"):
            create(small, "abc " * 20)


NULLABLE = sorted({*CompletionRequest.model_fields, *UNCHANGED, "some_field_of_the_future"})


def test_null_is_absence_in_any_field(opened: OpenedModel) -> None:
    rules = {"tiny": RequestRules("tiny", opened.template, None, 8)}

    def read(**more: Any) -> list[ReplyRequest]:
        body = json.dumps({"model": "tiny", "prompt": START} | more).encode()
        return AskedCompletion(body, rules).replies()

    for field in set(NULLABLE) - {"model", "prompt"}:
        assert read(**{field: None}) == read(), field


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("/v1/responses", "set_default_openai_api('chat_completions')"),
        ("/v1/responses/resp_1/cancel", "use_responses_api=False"),
        ("/v1/messages", "Anthropic"),
        ("/v1/fine_tuning/jobs", "finetune train"),
        ("/v1/audio/speech", "only text"),
        ("/v1/threads", "send them whole"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "the address is /v1/chat/completions"),
        ("/nothing", "served are /v1/chat/completions"),
    ],
)
def test_an_address_that_is_not_served_says_what_to_ask_instead(
    server: serving.Served, path: str, remedy: str
) -> None:
    answer = httpx.post(f"{server.url}{path}", json={}, timeout=60)
    assert answer.status_code == 404
    assert remedy in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    """A model that says control tokens in the middle of a text, as untrained ones do."""
    return open_model(str(tiny.save_model(tmp_path_factory.mktemp("loose") / "model", "glm")))


def test_a_reply_with_its_ids_is_the_one_in_process(loose: OpenedModel) -> None:
    """Each of 24 sampled replies: the same ids and the same reason to end, whatever tokens come."""
    prompts = [ids_of(loose, f"{'dog ' * n}and") for n in range(24)]
    extras = Extras(SeededSampling.at(1.5, seed=3))
    asked = {"max_new_tokens": 12, "batch_size": 4}
    ours = generate(loose.model, loose.template, prompts, extras=extras, **asked)
    with serving.served(loose) as server:
        address = Address.of(f"openai:tiny@{server.url}/v1", "--endpoint")
        there = EndpointGenerator(address, loose.template, max_new_tokens=12, at_once=8)
        [theirs] = there.replies([Window(prompts, extras)])
        streamed = list(
            create(server, prompts[0], stream=True, extra_body={"return_token_ids": True})
        )
        text = create(server, prompts[0]).choices[0]
    assert theirs == ours
    control = {*loose.template.tokenizer.control_ids.values()} - {*loose.template.stop_ids}
    assert any(control & {*reply.ids} for reply in ours)
    assert {reply.stopped for reply in ours} == {True, False}
    told = [token for chunk in streamed for token in chunk.choices[0].model_extra["token_ids"]]
    [whole] = generate(loose.model, loose.template, prompts[:1], max_new_tokens=16, batch_size=1)
    assert told == list(whole.ids)
    assert "token_ids" not in text.model_extra
