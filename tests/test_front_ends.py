"""Requests as Open WebUI, LobeChat, Dify and Cherry Studio build them are answered as these expect.

Fields and shapes are those of their request builders: Open WebUI's openai router, LobeChat's OpenAI-compatible
runtime, Dify's OpenAI-API-compatible provider and Cherry Studio's OpenAI client.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pages
import pytest
import serving

from finetune.generation.load import open_model

TOOL = pages.WEATHER
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
ASKED: dict[str, dict[str, Any]] = {
    "Open WebUI, a chat": {
        "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.7, "top_p": 0.9, "seed": 3, "stop": [],
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}],
    },
    "Open WebUI, a title": {"stream": False, "max_completion_tokens": 1000, "messages": [{"role": "user", "content": "### Task:\nname this chat"}]},
    "Open WebUI, native tools": {
        "stream": True, "tools": [TOOL],
        "messages": [
            {"role": "user", "content": "weather"},
            {"role": "assistant", "content": "", "tool_calls": [{"index": 0, **CALL}]},
            {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "clear"}'},
        ],
    },
    "LobeChat, a chat": {
        "stream": True, "stream_options": {"include_usage": True}, "temperature": 1, "top_p": 1, "presence_penalty": 0,
        "frequency_penalty": 0, "user": "u-1", "tools": [{"type": "function", "function": {**TOOL["function"], "name": "weather____now"}}],
        "messages": [{"role": "system", "content": ""}, {"role": "user", "content": "hello"}],
    },
    "LobeChat, a topic as JSON": {
        "messages": [{"role": "user", "content": "name it"}], "user": "u-1",
        "response_format": {"type": "json_schema", "json_schema": {"name": "topic", "strict": True, "schema": {"type": "object", "properties": {"title": {"type": "string", "maxLength": 3}}, "required": ["title"], "additionalProperties": False}}},
    },
    "Dify, the check of a key": {"max_tokens": 5, "messages": [{"role": "user", "content": "ping"}]},
    "Dify, a chat": {
        "stream": True, "temperature": 0.1, "top_p": 1, "max_tokens": 12, "presence_penalty": 0, "frequency_penalty": 0,
        "tool_choice": "auto", "tools": [TOOL], "stop": ["Observation"], "user": "abc", "response_format": {"type": "text"},
        "messages": [{"role": "user", "content": "hello", "name": "someone"}],
    },
    "Cherry Studio, a chat": {
        "stream": True, "stream_options": {"include_usage": True}, "temperature": 1, "top_p": 1, "max_tokens": 20, "verbosity": "medium",
        "thinking": {"type": "disabled"}, "enable_thinking": False,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "你好"}]}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Served]:
    opened = open_model(serving.save_talkative(tmp_path_factory.mktemp("model") / "base"))
    with serving.served(opened, max_new_tokens=24, key="a key of 16 or more") as running:
        yield running


def asked(server: serving.Served, body: dict[str, Any], path: str = "chat/completions") -> httpx.Response:  # fmt: skip
    headers = {"Authorization": f"Bearer {server.key}", "HTTP-Referer": "https://front.example", "X-Title": "Front"}  # fmt: skip
    return httpx.post(f"{server.url}/v1/{path}", json={"model": "tiny", **body}, headers=headers, timeout=60)  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_a_front_ends_request_is_answered(server: serving.Served, name: str) -> None:
    body = ASKED[name]
    answer = asked(server, body)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        message = answer.json()["choices"][0]["message"]
        assert answer.json()["object"] == "chat.completion"
        assert isinstance(message["content"], str)
        if "response_format" in body:
            assert set(json.loads(message["content"])) == {"title"}
        return
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    ended = [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]]
    assert ended[-1] in ("stop", "length", "tool_calls")
    assert set(ended[:-1]) == {None}
    usage = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert len(usage) == ("stream_options" in body), "Cherry Studio and LobeChat show it"


def test_what_a_front_end_adds_of_its_own_is_left_out_and_named(server: serving.Served) -> None:
    answer = asked(server, ASKED["Cherry Studio, a chat"])
    assert answer.headers["x-ignored-fields"] == "thinking, enable_thinking"
    assert "x-ignored-fields" not in asked(server, ASKED["LobeChat, a chat"]).headers


def test_models_are_found_and_a_wrong_key_and_old_functions_are_said(
    server: serving.Served,
) -> None:
    found = httpx.get(
        f"{server.url}/v1/models", headers={"Authorization": f"Bearer {server.key}"}, timeout=60
    )
    assert [model["id"] for model in found.json()["data"]] == ["tiny"]
    refused = httpx.get(
        f"{server.url}/v1/models", headers={"Authorization": "Bearer wrong"}, timeout=60
    )
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    old = asked(server, {"messages": serving.HELLO, "functions": [TOOL["function"]]})
    assert old.status_code == 400
    assert "functions" in old.json()["error"]["message"]


def test_difys_completion_mode_is_answered(server: serving.Served) -> None:
    answer = asked(server, {"prompt": "Once upon", "stream": True, "max_tokens": 6, "temperature": 0.5}, "completions")  # fmt: skip
    chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line[6:7] == "{"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks)
