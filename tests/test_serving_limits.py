"""What the endpoint refuses: by whom, of what kind, of what size; and control strings are text."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pictures
import pytest
import serving
from dialogues import CONTROL_STRINGS
from rows import TOOL
from serving import HELLO, data_url, showing

from finetune.data.dialogue.conversation import Message
from finetune.errors import ConfigError
from finetune.generation.decoder import Decoder
from finetune.generation.load import OpenedModel, open_model
from finetune.serving.requests.rules import RequestRules
from finetune.serving.serve import ServeOptions, _bound, _key

KEY = "a-key-of-more-than-sixteen-characters"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.save_talkative(tmp_path_factory.mktemp("base") / "talkative")


@pytest.fixture(scope="module")
def opened(base: Path) -> OpenedModel:
    return open_model(base)


@pytest.fixture(scope="module")
def server(opened: OpenedModel) -> Iterator[serving.Served]:
    with serving.served(opened, max_request_mb=1, context=64, allow_hosts=("llm.example",)) as one:
        yield one


# --- errors --------------------------------------------------------------------------------------

USER = {"role": "user", "content": "hi"}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 9}, "n", "less than or equal to 8"),
    ({"top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "not supported here"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"top_p": -1}, "top_p", "greater than or equal to 0"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 2.5}, "max_tokens", "valid integer"),
    ({"stop": ["a"] * 5}, "stop", "at most 4"),
    ({"seed": 2**64}, "seed", "less than"),
    ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
    ({"extra_body": {"repetition_penalty": 1e-320}}, "repetition_penalty", "greater than or equal to 0.01"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
    ({"extra_body": {"min_p": -0.1}}, "min_p", "greater than or equal to 0"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'text'"),
    ({"tool_choice": "required"}, "tool_choice", "no such function"),
    ({"tool_choice": "always"}, "tool_choice", "'auto', 'none' or 'required'"),
    ({"extra_body": {"top_k": -2}}, "top_k", "greater than or equal to 0"),
    ({"extra_body": {"best_of": 2}}, "best_of", "not supported here, except 1"),
    ({"extra_body": {"ignore_eos": 0}}, "ignore_eos", "not supported here, except False"),
    ({"extra_body": {"prompt": "red"}}, "prompt", "not supported here"),
    ({"messages": []}, "messages", "nothing to answer"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages", "nothing to answer"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages", "'robot' is not one of"),
    ({"messages": ["hi"]}, "messages", "message 1: is text, not an object"),
    ({"messages": [USER] * 4097}, "messages", "4097 messages are more than the 4096"),
    ({"tools": [{"type": "function"}]}, "messages", "no usable name"),
    ({"tools": [TOOL] * 129}, "tools", "at most 128"),
    ({"messages": [{"role": "user", "content": "a \0 b"}]}, None, "NUL"),
    ({"messages": [{"role": "user", "content": "x" * 70}]}, "messages", "no room for a reply among the 64 that fit"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param", "reason"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_cannot_be_done_is_refused_by_name(
    server: serving.Served, change: dict[str, Any], param: str, reason: str
) -> None:
    request: dict[str, Any] = {"model": "tiny", "messages": [USER]} | change
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.chat.completions.create(**request)
    assert caught.value.param == param
    assert reason in caught.value.message
    assert caught.value.type == "invalid_request_error"
    if "that fit" in reason:
        assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "the JSON is cut off"),
        (b"{", "the JSON is cut off"),
        (b"[]", "the body"),
        (b'{"model": "tiny", "model": "tiny"}', "duplicate key"),
        (b'{"model": "tiny", "temperature": NaN}', "NaN is not JSON"),
        (b'{"model": "\xff"}', "not UTF-8"),
        (b"[" * 5000, "nested more than 100 deep"),
        (b'{"model": "\\ud800"}', "surrogate"),
    ],
)
def test_a_body_that_is_not_clean_json_is_refused(
    server: serving.Served, body: bytes, reason: str
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", content=body, headers=headers, timeout=60
    )
    assert answer.status_code == 400
    assert reason in answer.json()["error"]["message"]


def test_other_paths_models_methods_and_kinds_of_body_have_errors_of_the_same_form(
    server: serving.Served,
) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here, 'tiny' is"):
        server.client.chat.completions.create(model="gpt", messages=HELLO)
    with pytest.raises(openai.NotFoundError, match="not served here"):
        server.client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="point the embedding client"):
        server.client.embeddings.create(model="tiny", input="x")
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").object == "model"
    assert httpx.get(f"{server.url}/v1/chat/completions", timeout=60).status_code == 405
    for kind in (None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        headers = {} if kind is None else {"Content-Type": kind}
        plain = httpx.post(
            f"{server.url}/v1/chat/completions", content=b"{}", headers=headers, timeout=60
        )
        assert plain.status_code == 415, kind
    assert set(plain.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(f"{server.url}/health", timeout=60).json() == {"status": "ok"}


def test_a_fault_of_the_model_is_a_500_and_the_server_lives_on(
    server: serving.Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the secret of the machine")

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "add", broken)
        with pytest.raises(openai.InternalServerError, match="server's log") as caught:
            server.client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    assert "secret" not in str(caught.value)
    assert "the secret of the machine" in capfd.readouterr().err
    assert server.client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2).id


# --- who may come in -----------------------------------------------------------------------------


def test_without_the_key_nothing_but_health_answers(
    opened: OpenedModel, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving.served(opened, key=KEY) as server:
        assert server.client.models.list().data[0].id == "tiny"
        for given in ("wrong", KEY[:-1], KEY + "x", KEY.upper(), "ключ"):
            headers = {"Authorization": f"Bearer {given}".encode()}
            answer = httpx.get(f"{server.url}/v1/models", headers=headers, timeout=60)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            answer = httpx.post(
                f"{server.url}/v1/chat/completions", headers=headers, json={}, timeout=60
            )
            assert answer.status_code == 401
        assert httpx.get(f"{server.url}/v1/models", timeout=60).status_code == 401
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="nope", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        wrong.close()
    said = capfd.readouterr()
    assert KEY not in said.out + said.err


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("127.0.0.1:80", 200), ("[::1]:8000", 200), ("LLM.example:8000", 200),
        ("10.0.0.7", 200), ("evil.example", 400), ("evil.example:8000", 400), ("", 400),
        ("localhost.evil.example", 400), ("127.0.0.1.evil.example", 400), ("127.0.0.1@evil", 400),
    ],
)  # fmt: skip
def test_a_name_that_was_made_to_point_here_is_turned_away(
    server: serving.Served, host: str, status: int
) -> None:
    for path in ("/v1/models", "/health"):
        assert (
            httpx.get(f"{server.url}{path}", headers={"Host": host}, timeout=60).status_code
            == status
        )


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_that_others_reach_needs_a_key(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FINETUNE_API_KEY", raising=False)
    file = tmp_path / "key"
    with _bound(host, 0) as listener:
        with pytest.raises(ConfigError, match="which needs an API key: set FINETUNE_API_KEY or"):
            _key(ServeOptions(host=host), listener)
        monkeypatch.setenv("FINETUNE_API_KEY", f" {KEY}\n")
        assert _key(ServeOptions(host=host), listener) == KEY.encode()
        file.write_text("from the file, which wins\n")
        assert _key(ServeOptions(api_key_file=file), listener) == b"from the file, which wins"
        for text, reason in [("", "is empty"), ("short-secret", "shorter than 16")]:
            file.write_text(text)
            with pytest.raises(ConfigError, match=reason) as caught:
                _key(ServeOptions(host=host, api_key_file=file), listener)
            assert "short-secret" not in str(caught.value)
        with pytest.raises(ConfigError, match="cannot be read"):
            _key(ServeOptions(api_key_file=tmp_path / "none"), listener)


def test_this_machine_needs_none_but_may_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINETUNE_API_KEY", raising=False)
    with _bound("localhost", 0) as listener:
        assert _key(ServeOptions(), listener) is None
        monkeypatch.setenv("FINETUNE_API_KEY", KEY)
        assert _key(ServeOptions(), listener) == KEY.encode()
        port = listener.getsockname()[1]
        listener.listen()
        with pytest.raises(ConfigError, match=rf"cannot bind 127\.0\.0\.1:{port}"):
            _bound("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"--host no\.such\.name\.invalid"):
        _bound("no.such.name.invalid", 0)


# --- sizes ---------------------------------------------------------------------------------------


def test_a_large_body_is_refused_before_it_is_read(server: serving.Served) -> None:
    huge: Any = [{"role": "user", "content": "x" * (1 << 20)}]
    with pytest.raises(openai.APIStatusError) as caught:
        server.client.chat.completions.create(model="tiny", messages=huge)
    assert caught.value.status_code == 413
    assert caught.value.code == "request_too_large"
    port = int(server.url.rpartition(":")[2])
    chunks = (b" " * 65536 for _ in range(64))
    headers = {"Content-Type": "application/json"}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as unsized:
        try:
            unsized.request("POST", "/v1/chat/completions", chunks, headers, encode_chunked=True)
        except (BrokenPipeError, ConnectionResetError):
            return  # refused while it was still sending
        assert unsized.getresponse().status == 413


class Canary(threading.Thread):
    """A server that counts who calls it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.calls = 0

    def run(self) -> None:
        while True:
            connection, _ = self.socket.accept()
            self.calls += 1
            connection.close()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    return open_model(pictures.save_model(tmp_path_factory.mktemp("glm4v")))


def test_no_address_is_fetched_no_path_is_read_and_no_bomb_is_decoded(
    seeing: OpenedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    canary = Canary()
    canary.start()
    picture = tmp_path.parent / "mine.png"
    picture.write_bytes(base64.b64decode(data_url().partition(",")[2]))
    port = canary.socket.getsockname()[1]
    text = base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode()
    urls = [
        (f"http://127.0.0.1:{port}/x.png", "data URL"),
        (f"HTTPS://127.0.0.1:{port}/x.png", "data URL"),
        (f"//127.0.0.1:{port}/x.png", "data URL"),
        (f"file://{picture}", "data URL"),
        (str(picture), "data URL"),
        ("", "data URL"),
        (None, "data URL"),
        ({"a": 1}, "data URL"),
        ("data:image/png;base64", "base64,..."),
        ("data:image/png,abc", "base64,..."),
        ("data:image/png;base64,@@@", "holds no base64"),
        ("data:image/png;base64,", "no image in one of the formats"),
        (f"data:image/svg+xml;base64,{text}", "no image in one of the formats"),
        (data_url()[:-40], "cannot be"),
        (data_url((5001, 5000)), "more than 25,000,000"),
        (data_url((200_000, 1000)), "more than 25,000,000"),
    ]
    parts: list[Any] = [
        {"role": "user", "content": "x", "image": str(picture)},
        {"role": "user", "content": [{"type": "image", "image": str(picture)}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": str(picture)}]},
        {"role": "user", "content": [{"type": "image_url", "image": str(picture)}]},
    ]
    asked = [(showing(url), reason) for url, reason in urls]
    asked += [([part], "no path is read") for part in parts]
    two = [*showing(data_url())[0]["content"], *showing(data_url())[0]["content"]]
    asked += [([{"role": "user", "content": two}], "2 images are more than the 1 taken")]
    with serving.served(seeing) as server:
        for messages, reason in asked:
            body = {"model": "tiny", "messages": messages, "max_tokens": 2}
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
            said = answer.json()["error"]["message"]
            assert answer.status_code == 400, said
            assert reason in said, said
            assert str(tmp_path) not in said
        body = {"model": "tiny", "messages": showing(data_url()), "max_tokens": 2}
        assert (
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).status_code
            == 200
        )
    assert canary.calls == 0
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_eyes_says_so_before_it_looks(
    server: serving.Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.serving.requests.images.check_image", lambda *_, **__: 1 // 0)
    with pytest.raises(openai.BadRequestError, match="takes no images; GLM-4V does"):
        server.client.chat.completions.create(model="tiny", messages=showing(data_url()))


# --- text never becomes a control token ----------------------------------------------------------


def typed_everywhere(text: str) -> dict[str, Any]:
    """A request with `text` in every field that reaches the prompt."""
    call = {"name": f"weather{text}", "arguments": json.dumps({"city": text, text: 1})}
    function = {
        "name": f"f{text}",
        "description": text,
        "parameters": {"type": "object", text: text},
    }
    return {
        "model": "tiny",
        "user": text,
        "tools": [TOOL, {"type": "function", "function": function}],
        "messages": [
            {"role": "system", "content": text},
            {"role": "user", "content": [{"type": "text", "text": text}], "name": text},
            {"role": "assistant", "content": text, "tool_calls": [
                {"id": text, "type": "function", "function": call}]},
            {"role": "tool", "tool_call_id": text, "content": text},
            {"role": "assistant", "content": f"{text} {text}"},
            {"role": "user", "content": f"{text}\n{text}"},
        ],
    }  # fmt: skip


@pytest.mark.parametrize("typed", CONTROL_STRINGS)
def test_a_control_string_from_a_client_is_text_in_every_field(
    opened: OpenedModel, tmp_path: Path, typed: str
) -> None:
    rules = RequestRules("tiny", opened.template, None, 8)
    control = set(opened.template.tokenizer.control_ids.values())

    def control_ids(text: str) -> list[int]:
        body = typed_everywhere(text)
        return [i for i in serving.read_chat(body, rules, tmp_path).prompt if i in control]

    harmless = control_ids("plain")
    assert len(harmless) == 11  # [gMASK]<sop>, two systems, and a header for each other message
    assert control_ids(typed) == harmless


@pytest.mark.parametrize("typed", CONTROL_STRINGS)
def test_a_reply_that_is_fed_back_brings_no_control_token(
    server: serving.Served, opened: OpenedModel, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    control = set(opened.template.tokenizer.control_ids.values())
    asked = serving.say(monkeypatch, opened.template, Message("assistant", f"a {typed} b"))
    first = server.client.chat.completions.create(model="tiny", messages=HELLO)
    reply = first.choices[0].message
    assert reply.content == f"a {typed} b"
    history = [*HELLO, reply, {"role": "user", "content": typed}]
    server.client.chat.completions.create(model="tiny", messages=history)
    assert len([i for i in asked[1].prompt if i in control]) == 6  # [gMASK]<sop> and four headers
