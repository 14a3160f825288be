"""Every field of a request arrives under its name, within its range."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.errors import ConfigError, DataError
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


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": TOOLS}, "there is no such function"),
        ({"tool_choice": {"function": {"name": "f"}}}, "there is no such function"), ({"tool_choice": "required"}, "there is no such function"),
        ({"messages": [{"role": "system", "content": "x"}]}, "nothing to answer"), ({"messages": [{"role": "user", "content": "a\0"}]}, "NUL"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(
    change: dict[str, Any], reason: str, rules: RequestRules
) -> None:
    roomy = RequestRules("tiny", rules.template, None, 8)
    body = {"model": "tiny", "messages": HI} | change
    with pytest.raises(ApiError, match=reason) as caught:
        AskedChat(json.dumps(body).encode(), {"tiny": roomy}).replies()
    assert caught.value.status == 400


@pytest.mark.parametrize("thinks", [True, False, None])
def test_a_model_that_does_not_think_may_be_told_not_to(
    thinks: bool | None, rules: RequestRules
) -> None:
    body = {"model": "tiny", "messages": HI, "chat_template_kwargs": {"enable_thinking": thinks}}
    [plain] = AskedChat(json.dumps({"model": "tiny", "messages": HI}).encode(), {"tiny": rules}).replies()  # fmt: skip
    assert AskedChat(json.dumps(body).encode(), {"tiny": rules}).replies() == [plain]


@pytest.mark.parametrize("error", [ConfigError("needs llguidance"), DataError("no such schema")])
def test_a_structure_that_cannot_be_held_names_its_field(
    error: Exception, rules: RequestRules
) -> None:
    def refuse(structure: Any) -> Any:
        raise error

    rules = RequestRules("tiny", rules.template, None, 8)
    vars(rules)["structures"] = SimpleNamespace(constraint=refuse)
    for change, field in (({"response_format": {"type": "json_object"}}, "response_format"), ({"tools": TOOLS, "tool_choice": "required"}, "tools")):  # fmt: skip
        body = {"model": "tiny", "messages": HI} | change
        with pytest.raises(ApiError, match=f"{field}: {error}") as caught:
            AskedChat(json.dumps(body).encode(), {"tiny": rules}).replies()
        assert caught.value.param == field


@pytest.mark.parametrize(
    ("texts", "ids", "fits"),
    [(["x" * 400], 1000, True), (["x" * 401], 116, True), (["x" * 401], 117, False), (["x" * 60_000], 66, True), (["x" * 60_000], 67, False), (["x" * 300] * 2, 66, True), (["x" * 300] * 2, 67, False)],
)  # fmt: skip
def test_long_texts_are_counted_in_pieces_but_for_what_a_cut_adds(
    texts: list[str], ids: int, fits: bool
) -> None:
    """100 tokens fit: a text of at most four characters a token is not counted, 16 tokens of a piece never."""
    encode = lambda piece, add_special_tokens: SimpleNamespace(ids=[0] * ids)  # noqa: E731
    template: Any = SimpleNamespace(tokenizer=SimpleNamespace(plain=SimpleNamespace(encode=encode)))
    rules = RequestRules("x", template, 100, 8)
    if fits:
        rules.check_length(texts)
        RequestRules("x", template, None, 8).check_length(texts)
        return
    with pytest.raises(ApiError, match="more than the 100 tokens that fit") as caught:
        rules.check_length(texts)
    assert caught.value.code == "context_length_exceeded"
    rules.check_length(texts, times=2)
