"""Fields of OpenAI's, vLLM's and litellm's clients: taken, taken where they ask for nothing, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.serving.errors import ApiError
from finetune.serving.requests.chat import BOUNDS, AskedChat, read_tokens
from finetune.serving.requests.completion import AskedCompletion
from finetune.serving.requests.fields import CompletionRequest, parse
from finetune.serving.requests.rules import RequestRules

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.fixture(scope="module")
def template(tiny_glm: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(tiny_glm))


@pytest.fixture
def rules(template: ChatTemplate) -> RequestRules:
    return RequestRules("tiny", template, 500, 8)


def chat(rules: RequestRules, **fields: Any) -> AskedChat:
    body = {"model": "tiny", "messages": HI} | fields
    return AskedChat(json.dumps(body).encode(), {"tiny": rules})


def refusal(rules: RequestRules, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat(rules, **fields).replies()
    assert caught.value.status == 400
    return caught.value


# What asks for nothing that is not done here, and what would ask for something.
NOT_DONE: list[tuple[str, list[Any], list[Any]]] = [
    ("best_of", [1], [2]), ("logit_bias", [{}], [{"5": 1}]), ("modalities", [["text"]], [["text", "audio"]]),
    ("function_call", ["none", "auto"], [{"name": "f"}]), ("functions", [[]], [[{"name": "f"}]]),
    ("ignore_eos", [False], [True, 0]), ("skip_special_tokens", [True], [False, 1]), ("echo", [False], [True]),
    ("suffix", [""], ["x"]), ("use_beam_search", [False], [True]), ("length_penalty", [1, 1.0], [1.5, True]),
    ("min_tokens", [0], [1]), ("stop_token_ids", [[]], [[1]]), ("include_stop_str_in_output", [False], [True]),
    ("add_generation_prompt", [True], [False]), ("continue_final_message", [False], [True]),
    ("prediction", [], [{"type": "content", "content": "x"}]), ("audio", [], [{"voice": "x"}]),
    ("reasoning_effort", [], ["low"]), ("verbosity", ["medium"], ["low"]), ("web_search_options", [], [{}]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "nothing", "something"), NOT_DONE, ids=[one[0] for one in NOT_DONE])  # fmt: skip
def test_a_known_field_is_refused_by_name_unless_it_asks_for_nothing(
    field: str, nothing: list[Any], something: list[Any], rules: RequestRules
) -> None:
    plain = chat(rules).replies()
    for value in nothing:
        same = chat(rules, **{field: value})
        assert (same.replies(), same.unknown) == (plain, [])
    for value in something:
        told = refusal(rules, **{field: value})
        assert told.param == field
        assert str(told).startswith(f"{field}: is not supported here")
        assert ("except" in str(told)) is bool(nothing)


def test_what_is_said_to_the_service_is_no_unknown_field(rules: RequestRules) -> None:
    said = {
        "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "x",
        "prompt_cache_key": "k", "prompt_cache_retention": "24h", "stream_options": {"include_obfuscation": True},
    }  # fmt: skip
    asked = chat(rules, **said)
    assert (asked.unknown, asked.replies()) == ([], chat(rules).replies())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"x": 1}}, "stream_options.x"), ({"temperature": "1"}, "temperature"), ({"stream": 1}, "stream"),
        ({"n": True}, "n"), ({"prompt": "x"}, "prompt"), ({"stop": ["a" * 201]}, "stop.0"), ({"stop": 5}, "stop"),
        ({"stop": ["a"] * 5}, "stop"), ({"tools": [TOOL] * 129}, "tools"), ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x"),
        ({"response_format": {"type": "json_schema", "json_schema": {"x": 1}}}, "response_format.json_schema.x"),
        ({"tool_choice": {"type": "tool", "function": {"name": "f"}}}, "tool_choice"),
    ],
    ids=lambda one: str(one)[:40],
)  # fmt: skip
def test_values_of_another_kind_or_size_are_refused_where_they_stand(
    fields: dict[str, Any], param: str, rules: RequestRules
) -> None:
    assert refusal(rules, **fields).param == param


def test_what_is_as_long_as_may_be_is_taken(rules: RequestRules) -> None:
    roomy = RequestRules("tiny", rules.template, None, 8)
    [reply] = chat(roomy, stop=["a" * 200, "b", "", "c", "d"]).replies()
    assert reply.stops == ("a" * 200, "b", "c", "d")
    tools = [{"type": "function", "function": {"name": f"f{n}"}} for n in range(128)]
    assert len(chat(roomy, tools=tools).replies()[0].tools) == 128
    reasons = str(refusal(roomy, temperature={}, top_p={}, min_p={}, n={}, seed={}, stop={}))
    assert len(reasons.split("; ")) == 5, "the first few are enough"


@pytest.mark.parametrize("what", BOUNDS)
def test_as_many_parts_are_taken_as_a_model_answers_well(what: str, rules: RequestRules) -> None:
    def of(count: int) -> list[Any]:
        if what == "messages":
            return HI * count
        if what == "calls":
            calls = [{"id": "c", "function": {"name": "f"}}] * (count - 1)
            return [{"role": "assistant", "tool_calls": calls}, {"role": "assistant", "tool_calls": calls[:1]}]  # fmt: skip
        halves = [{"type": "text", "text": "x"}] * (count - 5)
        return [{"role": "user", "content": halves}, {"role": "user", "content": halves[:5]}]

    assert {"messages": 4096, "content parts": 8192, "calls": 1024}[what] == BOUNDS[what]
    chat(rules, messages=of(BOUNDS[what]))
    with pytest.raises(ApiError, match=f"{BOUNDS[what] + 1} {what} are more than the") as caught:
        chat(rules, messages=of(BOUNDS[what] + 1))
    assert caught.value.param == "messages"


def test_null_is_absence_inside_of_a_schema_and_of_a_choice(rules: RequestRules) -> None:
    pytest.importorskip("llguidance")
    schema = {"name": None, "description": None, "schema": {"type": "boolean"}, "strict": None}
    form = {"type": "json_schema", "json_schema": schema}
    assert chat(rules, response_format=form).replies()[0].constraint is not None
    form["json_schema"] = {"name": "x", "description": "of what", "schema": {}}
    assert chat(rules, response_format=form).replies()[0].constraint is not None
    choice = {"type": None, "function": {"name": "f"}}
    assert chat(rules, tools=[TOOL], tool_choice=choice).replies()[0].constraint is not None


def test_a_mark_before_the_json_is_passed_over(rules: RequestRules) -> None:
    body = json.dumps({"model": "tiny", "messages": HI})
    assert AskedChat(f"\ufeff{body}".encode(), {"tiny": rules}).replies() == chat(rules).replies()
    with pytest.raises(ApiError, match="the body is not UTF-8: invalid start byte at byte 2"):
        AskedChat(b'{"\xff', {})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""]),
     ([], None), ([[]], None), ([-1], None), ([1, "a"], None), ([1.5], None), (["a"] * 65, None), (None, None), ({}, None)],
    ids=lambda one: str(one)[:20],
)  # fmt: skip
def test_a_prompt_is_a_text_ids_or_a_list_of_either(prompt: Any, prompts: Any) -> None:
    body = json.dumps({"model": "tiny", "prompt": prompt}).encode()
    if prompts is not None:
        assert parse(body, CompletionRequest)[0].prompt == prompts
        return
    with pytest.raises(ApiError) as caught:
        parse(body, CompletionRequest)
    assert str(caught.value.param).startswith("prompt")


def test_a_reply_is_written_by_the_model_that_a_name_stands_for_now(rules: RequestRules) -> None:
    """`run` is the newest checkpoint of a run, `run@2` what the engine knows it by."""
    models = {"run": RequestRules("run@2", rules.template, 500, 8), "run@2": rules}
    for kind, what in ((AskedChat, {"messages": HI}), (AskedCompletion, {"prompt": "hi"})):
        asked: Any = kind(json.dumps({"model": "run", **what}).encode(), models)  # type: ignore[operator]
        assert asked.rules is models["run"]
        assert asked.replies()[0].model == "run@2"
    other = {"one": RequestRules("one", rules.template, 500, 8), "run": models["run"]}
    for body, name in (({"prompt": "hi"}, "one"), ({"prompt": "hi", "model": "run"}, "run@2"), ({"messages": HI, "model": "run"}, "run@2")):  # fmt: skip
        assert read_tokens(json.dumps(body).encode(), other)[1].name == name
    with pytest.raises(ApiError, match="'gpt' is not served here"):
        read_tokens(b'{"prompt": "hi", "model": "gpt"}', other)


def test_what_is_far_too_long_is_refused_before_it_is_laid_out(rules: RequestRules) -> None:
    long, small = "dog " * 5000, RequestRules("tiny", rules.template, 64, 8)
    described = {"type": "function", "function": {"name": "f", "description": long}}
    for body in ({"messages": [{"role": "user", "content": long}]}, {"messages": HI, "tools": [described]}, {"prompt": long}, {"prompt": ["a", long]}):  # fmt: skip
        kind = AskedCompletion if "prompt" in body else AskedChat
        asked: Any = kind(json.dumps({"model": "tiny", **body}).encode(), {"tiny": small})  # type: ignore[operator]
        with pytest.raises(ApiError, match="more than the 64 tokens that fit"):
            asked.replies()


def test_a_text_that_cannot_be_laid_out_names_its_field(rules: RequestRules, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from finetune.errors import DataError

    def refuse(*_: Any) -> Any:
        raise DataError("cannot be")

    monkeypatch.setattr(ChatTemplate, "render", refuse)
    monkeypatch.setattr(ChatTemplate, "prompt", refuse)
    for kind, body, field in ((AskedChat, {"messages": HI}, "messages"), (AskedCompletion, {"prompt": "a"}, "prompt")):  # fmt: skip
        asked: Any = kind(json.dumps({"model": "tiny", **body}).encode(), {"tiny": rules})  # type: ignore[operator]
        with pytest.raises(ApiError, match="cannot be") as caught:
            asked.replies()
        assert (caught.value.status, caught.value.param) == (400, field)


def test_a_model_that_always_thinks_cannot_be_told_not_to(
    rules: RequestRules, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = rules.template.layout
    monkeypatch.setitem(vars(layout), "thinking", True)
    off = {"enable_thinking": False}
    told = refusal(rules, chat_template_kwargs=off)
    assert "this model's template has no switch for it" in str(told)
    assert told.param == "chat_template_kwargs"
    for thinks in (True, None):
        chat(rules, chat_template_kwargs={"enable_thinking": thinks}).replies()
