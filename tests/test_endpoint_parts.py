"""Replies from an endpoint or vLLM: what is asked, asked again, and made of the answer."""

from __future__ import annotations

import http.client
import io
import json
import urllib.error
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from finetune.data.chat.image import ImagePrompt
from finetune.errors import DataError, ModelError
from finetune.generation.backends import address, vllm
from finetune.generation.backends.address import Address
from finetune.generation.backends.choice import BackendChoice
from finetune.generation.backends.endpoint import EndpointGenerator
from finetune.generation.decoder import Decoding
from finetune.generation.generate import Extras, SeededSampling, Window

# --- an endpoint -------------------------------------------------------------------------------


class Line:
    """A connection that fails or answers in turn."""

    def __init__(self, *said: Any) -> None:
        self.said, self.requests, self.slept = [*said], list[Any](), list[float]()

    def open(self, request: Any, timeout: float) -> Any:
        assert timeout == address.TIMEOUT
        self.requests.append(request)
        said = self.said.pop(0)
        if isinstance(said, int):
            raise urllib.error.HTTPError("u", said, "reason", http.client.HTTPMessage(), io.BytesIO(b"why"))  # fmt: skip
        if isinstance(said, Exception):
            raise said
        return io.BytesIO(said.encode())


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Any:
    def made(*said: Any) -> Line:
        found = Line(*said)
        monkeypatch.setattr(address, "_opener", lambda: found)
        monkeypatch.setattr(address.time, "sleep", found.slept.append)
        return found

    return made


ONE = Address.of("openai:some/model@http://host:1/v1/", "--judge")


@pytest.mark.parametrize("said", [408, 409, 429, 500, 503, OSError("down"), http.client.IncompleteRead(b""), "no json"])  # fmt: skip
def test_an_endpoint_that_is_busy_or_down_is_asked_again(line: Any, said: Any) -> None:
    asked = line(said, said, said, "{}")
    assert ONE.post("completions", {"x": 1}) == {}
    assert [pause for pause in asked.slept if pause] == pytest.approx([0.2, 0.8, 3.2])
    asked = line(*[said] * 4)
    with pytest.raises(DataError, match=r"^--judge: http://host:1/v1 does not answer"):
        ONE.post("completions", {})
    assert len(asked.requests) == 4


@pytest.mark.parametrize("code", [307, 400, 401, 403, 404, 422])
def test_an_endpoint_that_refuses_is_not_asked_again(line: Any, code: int) -> None:
    asked = line(code)
    with pytest.raises(DataError, match=f"{code} reason: why"):
        ONE.post("completions", {})
    assert (len(asked.requests), sum(asked.slept)) == (1, 0)


def test_the_model_and_the_key_go_to_the_named_address_alone(
    line: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    asked = line('{"a": 1}')
    assert ONE.post("chat/completions", {"x": 1}) == {"a": 1}
    [request] = asked.requests
    assert request.full_url == "http://host:1/v1/chat/completions"
    assert json.loads(request.data) == {"model": "some/model", "x": 1}
    assert request.headers["Authorization"] == "Bearer secret"
    monkeypatch.undo()
    handlers = address._opener.__wrapped__().handlers
    assert any(isinstance(one, address._NoRedirects) for one in handlers)


def endpoint(answer: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[EndpointGenerator, list[Any]]:
    asked: list[Any] = []
    monkeypatch.setattr(Address, "post", lambda _, path, body: asked.append((path, body)) or answer)
    backend = SimpleNamespace(encode=lambda text, **_: SimpleNamespace(ids=[ord(one) for one in text]))  # fmt: skip
    template: Any = SimpleNamespace(stop_ids=(9, 10), tokenizer=SimpleNamespace(backend=backend))
    return EndpointGenerator(ONE, template, max_new_tokens=5, at_once=1), asked


@pytest.mark.parametrize(
    ("choice", "ids", "stopped"),
    [
        ({"text": "ab", "finish_reason": "stop", "token_ids": [1, 2, 9]}, (1, 2), True),
        ({"text": "ab", "finish_reason": "length", "token_ids": [1, 2]}, (1, 2), False),
        ({"text": "ab", "finish_reason": "stop"}, (97, 98), True),
        ({"text": "ab", "finish_reason": "stop", "token_ids": None}, (97, 98), True),
        ({"text": "", "finish_reason": "stop", "token_ids": [10]}, (), True),
        ({"text": "", "finish_reason": "stop", "token_ids": []}, (), True),
    ],
)  # fmt: skip
def test_an_endpoints_answer_becomes_the_replys_ids(
    monkeypatch: pytest.MonkeyPatch, choice: dict[str, Any], ids: tuple[int, ...], stopped: bool
) -> None:
    made, asked = endpoint({"choices": [choice]}, monkeypatch)
    [[reply]] = made.replies([Window([np.array([4, 5])])])
    assert (reply.index, reply.ids, reply.stopped) == (0, ids, stopped)
    path, body = asked[0]
    assert path == "completions"
    assert body == {"prompt": [4, 5], "max_tokens": 5, "temperature": 0.0, "return_token_ids": True}
    list(made.replies([Window([[4]], Extras(SeededSampling.at(0.5, 0)))]))
    assert (asked[1][1]["temperature"], asked[1][1]["seed"]) == (0.5, 0), "a seed of 0 is one"


@pytest.mark.parametrize("answer", [{}, [], {"choices": []}, {"choices": [{"text": "a"}]}, {"choices": [{}, {}]}])  # fmt: skip
def test_an_answer_that_is_no_completion_is_named(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:  # fmt: skip
    made, _ = endpoint(answer, monkeypatch)
    with pytest.raises(DataError, match="answers with no completion"):
        list(made.replies([Window([[4]])]))


def test_an_endpoint_is_shown_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = endpoint({}, monkeypatch)
    shown: Any = ImagePrompt.__new__(ImagePrompt)
    with pytest.raises(DataError, match="--judge takes no images"):
        made._reply(0, shown, Decoding(1))
    assert asked == []


# --- vLLM --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "allowed"),
    [(1, 8), (8, 8), (9, 16), (64, 64), (65, 128), (257, 320), (512, 512), (513, None), (None, None)],
)  # fmt: skip
def test_vllm_is_told_the_least_rank_that_holds_an_adapter(
    monkeypatch: pytest.MonkeyPatch, rank: int | None, allowed: int | None
) -> None:
    monkeypatch.setattr(vllm, "adapter_config", lambda _: {"peft_type": "LORA", "r": rank})
    monkeypatch.setattr(vllm, "read_lora", lambda _: None)
    if allowed is None:
        with pytest.raises(ModelError, match=f"of rank {rank}, which vLLM does not open"):
            vllm._rank(Path("a"))
        return
    assert vllm._rank(Path("a")) == allowed


def test_vllms_ids_lose_their_stop_and_only_that() -> None:
    stop, cut = (SimpleNamespace(finish_reason=reason, token_ids=[4, 5, 9]) for reason in ("stop", "length"))  # fmt: skip
    assert vllm._reply(3, stop).ids == (4, 5)
    assert vllm._reply(3, cut).ids == (4, 5, 9)
    assert (vllm._reply(3, stop).stopped, vllm._reply(3, cut).stopped) == (True, False)


@pytest.mark.parametrize(
    ("saved", "native", "found"),
    [("auto", True, "bfloat16"), ("auto", False, "float32"), ("float16", True, "float16"), ("float32", False, "float32")],
)  # fmt: skip
def test_vllm_computes_in_the_number_format_that_we_would_take(
    monkeypatch: pytest.MonkeyPatch, saved: str, native: bool, found: str
) -> None:
    from finetune.distributed import device

    monkeypatch.setattr(device, "has_native_bf16", lambda: native)
    monkeypatch.setattr(vllm, "settings_of", lambda _: SimpleNamespace(dtype=saved))
    assert vllm.number_format("m") == found


def test_by_whom_replies_are_made_is_said_where_it_is_not_us() -> None:
    assert BackendChoice().words == ""
    assert BackendChoice("vllm").words == "by vllm"
    assert BackendChoice("vllm", "openai:m@http://x").words == "by openai:m@http://x"
