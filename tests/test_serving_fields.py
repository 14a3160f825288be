"""Every field of a request arrives under its name, within its range."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.generation.decoder import Decoding
from finetune.serving.errors import ApiError
from finetune.serving.requests.chat import AskedChat, read_tokens
from finetune.serving.requests.completion import AskedCompletion
from finetune.serving.requests.rules import RequestRules, decoding

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def template(tiny_glm: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(tiny_glm))


@pytest.fixture
def rules(template: ChatTemplate) -> RequestRules:
    return RequestRules("tiny", template, 64, 8)


FIELDS = {
    "temperature": 0.5, "top_p": 0.6, "top_k": 7, "min_p": 0.08, "presence_penalty": -0.9,
    "frequency_penalty": 1.1, "repetition_penalty": 1.2, "seed": -3,
}  # fmt: skip


@pytest.mark.parametrize("kind", [AskedChat, AskedCompletion])
def test_every_field_arrives_under_its_name(kind: Any, rules: RequestRules) -> None:
    what = {"messages": HI} if kind is AskedChat else {"prompt": "hi"}
    body = {"model": "tiny", "n": 2, "max_tokens": 5, "stop": ["x", "y"], "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True} | FIELDS | what  # fmt: skip
    replies = kind(json.dumps(body).encode(), {"tiny": rules}).replies()
    assert [one.decoding for one in replies] == [Decoding(5, **(FIELDS | {"seed": seed})) for seed in (-3, -2)]  # type: ignore[arg-type]  # fmt: skip
    for one in replies:
        assert (one.stops, one.stream, one.include_usage, one.tells_ids) == (("x", "y"), True, True, True)  # fmt: skip
        assert one.is_text is (kind is AskedCompletion)
        assert one.model == "tiny"
    plain = kind(json.dumps({"model": "tiny", **what}).encode(), {"tiny": rules}).replies()[0]
    assert plain.decoding == Decoding(8 if kind is AskedChat else 16)
    assert (plain.stream, plain.include_usage, plain.tells_ids, plain.top_logprobs) == (False, False, False, None)  # fmt: skip
    assert plain.many_calls is (kind is AskedChat)


@pytest.mark.parametrize(
    ("field", "ends"),
    [
        ("temperature", (0, 2)), ("top_p", (0, 1)), ("min_p", (0, 1)), ("presence_penalty", (-2, 2)),
        ("frequency_penalty", (-2, 2)), ("repetition_penalty", (0.1, 10)), ("n", (1, 8)), ("top_k", (-1, 9)),
        ("seed", (-(2**63), 2**63 - 1)), ("top_logprobs", (0, 20)), ("max_tokens", (1, 99)), ("max_completion_tokens", (1, 99)),
    ],
)  # fmt: skip
def test_a_field_takes_both_ends_of_its_range_and_nothing_beyond(
    field: str, ends: tuple[float, float], rules: RequestRules
) -> None:
    def ask(value: float) -> Any:
        body = {"model": "tiny", "messages": HI, field: value}
        return AskedChat(json.dumps(body).encode(), {"tiny": rules}).replies()

    low, high = ends
    for value in ends:
        assert ask(value)
    beyond = [low - 1] if field in ("top_k", "max_tokens", "max_completion_tokens") else [low - 1, high + 1]  # fmt: skip
    for value in beyond:
        with pytest.raises(ApiError) as caught:
            ask(value)
        assert (caught.value.status, caught.value.param) == (400, field)


@pytest.mark.parametrize(
    ("prompt", "wanted", "length"),
    [(60, None, 4), (60, 3, 3), (60, 9, 4), (10, None, 8), (10, 30, 30), (63, 9, 1), (64, 1, None), (65, 1, None)],
)  # fmt: skip
def test_a_reply_is_as_long_as_asked_for_as_the_rule_says_and_as_fits(
    prompt: int, wanted: int | None, length: int | None, rules: RequestRules
) -> None:
    asked = AskedChat(json.dumps({"model": "tiny", "messages": HI}).encode(), {"tiny": rules})
    if length is None:
        with pytest.raises(ApiError, match=f"{prompt} tokens of the prompt leave no room") as caught:  # fmt: skip
            decoding(asked._request, prompt, rules, wanted=wanted)
        assert caught.value.code == "context_length_exceeded"
        return
    assert decoding(asked._request, prompt, rules, wanted=wanted).max_new_tokens == length


def test_of_both_lengths_the_newer_name_counts(rules: RequestRules) -> None:
    body = {"model": "tiny", "messages": HI, "max_tokens": 3, "max_completion_tokens": 5}
    [reply] = AskedChat(json.dumps(body).encode(), {"tiny": rules}).replies()
    assert reply.decoding.max_new_tokens == 5


def test_a_text_is_counted_in_tokens_up_to_eight_times_the_context(rules: RequestRules) -> None:
    """Whoever counts wants to know by how much it is too long; a megabyte is not worked on."""

    def count(words: int) -> int:
        body = json.dumps({"prompt": "dog " * words}).encode()
        return len(read_tokens(body, {"tiny": rules})[0])

    assert count(300) > 4 * 64
    with pytest.raises(ApiError, match="more than the 512 tokens that fit"):
        count(100_000)


def test_ids_of_a_prompt_are_below_the_vocabularys_end(rules: RequestRules) -> None:
    size = rules.template.tokenizer.vocab_size

    def ask(ids: list[int]) -> Any:
        body = {"model": "tiny", "prompt": ids}
        return AskedCompletion(json.dumps(body).encode(), {"tiny": rules}).replies()[0].prompt

    assert ask([size - 1]) == [size - 1]
    with pytest.raises(ApiError, match=f"{size} is no token"):
        ask([size])


def test_an_empty_text_keeps_its_beginning_and_64_replies_are_the_most(rules: RequestRules) -> None:
    def ask(**how: Any) -> Any:
        body = {"model": "tiny", "prompt": ""} | how
        return AskedCompletion(json.dumps(body).encode(), {"tiny": rules}).replies()

    control = rules.template.tokenizer.control_ids
    [empty] = ask()
    assert empty.prompt == [control["[gMASK]"], control["<sop>"]]
    [other] = ask(prompt="a")
    assert control["<|endoftext|>"] not in other.prompt
    assert other.prompt[:2] == empty.prompt
    assert len(ask(prompt=["a"] * 8, n=8)) == 64
    with pytest.raises(ApiError, match="more than 64 replies"):
        ask(prompt=["a"] * 13, n=5)


def test_fields_that_nobody_knows_are_refused_where_the_server_is_strict(
    template: ChatTemplate,
) -> None:
    for strict, names, refused in (
        (False, ["x"], ()), (True, [], ()), (True, ["x"], ("x: is not supported",)),
        (True, ["x", "y"], ("x: ", "y: ")), (False, ["chat_template"], ("chat_template: prompts are laid out",)),
        (False, ["x", "trust_remote_code"], ("trust_remote_code: no code",)),
    ):  # fmt: skip
        rules = RequestRules("tiny", template, 64, 8, strict_fields=strict)
        if not refused:
            rules.check_unknown(names)
            continue
        with pytest.raises(ApiError) as caught:
            rules.check_unknown(names)
        assert all(one in str(caught.value) for one in refused)
