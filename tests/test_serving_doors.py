"""Who comes in, with what body, and what those hear who do not: each part without a server."""

from __future__ import annotations

import asyncio
import json
import re
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.serving import app as app_module
from finetune.serving import engine as engine_module
from finetune.serving import guard, heap
from finetune.serving.app import Desk, Limits, make_app
from finetune.serving.errors import ApiError, not_here
from finetune.serving.guard import Access, Guard
from finetune.serving.metrics import Metrics
from finetune.serving.page.html import PageOptions
from finetune.serving.requests import body as body_module
from finetune.serving.requests.rules import RequestRules

KEY = b"a-key-of-many-characters"


@pytest.fixture(scope="module")
def template(tiny_glm: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(tiny_glm))


@pytest.fixture
def rules(template: ChatTemplate) -> RequestRules:
    return RequestRules("tiny", template, 64, 8)


def status_of(access: Access, method: str, path: str, **headers: str) -> int:
    given = {"host": "localhost"} | {key.replace("_", "-"): one for key, one in headers.items()}
    try:
        access.check(method, path, Headers(given))
    except ApiError as error:
        return error.status
    return 200


@pytest.mark.parametrize(
    ("given", "status"),
    [("Bearer {}", 200), ("bearer {}", 200), ("BEARER  {} ", 200), ("Basic {}", 401), ("{}", 401), ("Bearer", 401), ("Bearer x{}", 401), ("", 401)],
)  # fmt: skip
def test_a_key_stands_behind_bearer_in_any_case(given: str, status: int) -> None:
    access = Access({"localhost"}, KEY)
    said = given.format(KEY.decode())
    assert status_of(access, "GET", "/v1/models", authorization=said) == status
    assert status_of(Access({"localhost"}, None), "GET", "/v1/models", authorization=said) == 200


def test_every_address_but_health_and_the_page_itself_needs_the_key(
    rules: RequestRules, tmp_path: Path
) -> None:
    access = Access({"localhost"}, KEY)
    engine = engine_module.Engine({}, batch_size=1)
    app = make_app(engine, {"tiny": rules}, Limits(1, 1), access, PageOptions(tmp_path))
    engine.close()
    paths = {route.path for route in app.routes}  # type: ignore[attr-defined]
    assert {"/metrics", "/tokenize", "/v1/models", "/page/rows"} <= paths
    is_open = {path for path in paths if status_of(access, "GET", path) == 200}
    assert is_open == {"/health", "/"}


@pytest.mark.parametrize(
    ("kind", "status"),
    [("application/json", 200), ("application/json; charset=utf-8", 200), ("APPLICATION/JSON", 200), ("text/plain", 415), ("application/jsonp", 415), ("", 415)],
)  # fmt: skip
def test_only_json_is_posted(kind: str, status: int) -> None:
    access = Access({"localhost"}, None)
    assert status_of(access, "POST", "/v1/completions", content_type=kind) == status
    assert status_of(access, "GET", "/v1/models", content_type=kind) == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost.", 200), ("localhost.:80", 200), ("LOCALHOST", 200), ("[::1]", 200), ("[fe80::1]:8000", 200), ("1.2.3.4", 200), ("other", 400), ("localhost..", 400)],
)  # fmt: skip
def test_a_host_is_a_number_or_one_of_the_names(host: str, status: int) -> None:
    assert status_of(Access({"localhost"}, None), "GET", "/health", host=host) == status


@pytest.mark.parametrize(
    ("files", "most"), [(resource.RLIM_INFINITY, 1024), (65536, 1024), (1024, 960), (80, 16), (64, 8), (10, 8)]
)  # fmt: skip
def test_connections_leave_the_process_files_to_work_with(
    files: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard.resource, "getrlimit", lambda kind: (files, resource.RLIM_INFINITY))
    assert guard.max_connections() == most


def test_every_answer_is_counted_by_its_status_and_said(capfd: pytest.CaptureFixture[str]) -> None:
    counts: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/refused":
            raise ApiError(429, "full")
        if scope["path"] != "/gone":
            await send({"type": "http.response.start", "status": 201, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    async def asked(path: str, host: bytes) -> None:
        scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "headers": [(b"host", host)]}  # fmt: skip
        await Guard(app, Access({"localhost"}, None), counts.append)(scope, None, sent)  # type: ignore[arg-type]

    async def sent(message: Any) -> None:
        pass

    for path, host in (("/v1/x", b"localhost"), ("/v1/x", b"evil"), ("/refused", b"localhost"), ("/gone", b"localhost"), ("/health", b"localhost"), ("/" + "x" * 99, b"evil")):  # fmt: skip
        asyncio.run(asked(path, host))
    assert counts == ["201", "400", "429", "gone", "400"]
    lines = capfd.readouterr().out
    assert re.search(r"^GET /v1/x: 201, 0\.\d s$", lines, re.MULTILINE)
    assert f"GET /{'x' * 79}: 400" in lines, "of a long address the beginning"
    assert "/refused: 429" in lines
    assert "/health" not in lines


def read(chunks: list[bytes], limit: int, **headers: str) -> bytes:
    told = [{"type": "http.request", "body": one, "more_body": True} for one in chunks]
    told.append({"type": "http.request", "body": b"", "more_body": False})
    messages = iter(told)

    async def receive() -> Any:
        return next(messages)

    raw = [(key.replace("_", "-").encode(), one.encode()) for key, one in headers.items()]
    request = Request({"type": "http", "headers": raw}, receive)
    return asyncio.run(body_module.read_body(request, limit))


def test_a_body_may_be_as_large_as_the_limit_and_no_byte_more() -> None:
    assert read([b"12345", b"678"], 8) == b"12345678"
    assert read([b"12345678"], 8, content_length="8") == b"12345678"
    for chunks, stated in (([b"12345", b"6789"], {}), ([], {"content_length": "9"}), ([b"123456789"], {"content_length": "x"})):  # fmt: skip
        with pytest.raises(ApiError) as caught:
            read(chunks, 8, **stated)
        assert (caught.value.status, caught.value.code) == (413, "request_too_large")


def test_a_body_that_does_not_come_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "BODY_SECONDS", 0.01)

    async def receive() -> Any:
        await asyncio.sleep(10)

    request = Request({"type": "http", "headers": []}, receive)
    with pytest.raises(ApiError, match="did not come") as caught:
        asyncio.run(body_module.read_body(request, 8))
    assert caught.value.status == 408


def test_a_place_is_free_again_however_a_request_ends(rules: RequestRules) -> None:
    desk = Desk(None, {}, Limits(2, 1), None)  # type: ignore[arg-type]
    for _ in range(5):
        with pytest.raises(ValueError, match="broken"), desk.place():
            raise ValueError("broken")
    with desk.place(), desk.place():
        with pytest.raises(ApiError, match="2 requests are in work") as caught, desk.place():
            pass
        assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    with desk.place():
        pass


def asked_of(path: str, method: str = "GET") -> Request:
    return Request({"type": "http", "method": method, "path": path, "headers": [], "query_string": b"", "server": ("x", 1), "scheme": "http"})  # fmt: skip


def test_who_may_come_again_is_told_when() -> None:
    told = {}
    for status in (400, 401, 404, 408, 413, 415, 429, 500, 503):
        answer = app_module._tell(asked_of("/v1/x"), ApiError(status, "why"))
        assert answer.status_code == status
        assert json.loads(bytes(answer.body))["error"]["message"] == "why"
        told[status] = answer.headers.get("retry-after")
    assert {status for status, said in told.items() if said == "1"} == {429, 503}
    assert app_module._tell(asked_of("/v1/x"), RuntimeError("secret")).status_code == 500
    assert b"secret" not in app_module._tell(asked_of("/v1/x"), RuntimeError("secret")).body


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/chat/completions", "the address is /v1/chat/completions"), ("/completions", "/v1/completions"),
        ("/models", "the address is /v1/models"), ("/v1/v1/models", "the address is /v1/models"),
        ("/v1/embeddings", "give no embeddings"), ("/v1/responses", "Responses API"),
        ("/v1/nothing", "served are /v1/chat/completions"),
    ],
)  # fmt: skip
def test_an_address_that_is_not_served_names_the_one_that_is(path: str, says: str) -> None:
    assert says in not_here(path)
    missing = app_module._tell(asked_of(path, "POST"), HTTPException(404))
    error = json.loads(bytes(missing.body))["error"]
    assert error["message"].startswith(f"POST {path}: ")
    assert says in error["message"]
    other = app_module._tell(asked_of(path), HTTPException(405, "Method Not Allowed"))
    assert json.loads(bytes(other.body))["error"]["message"] == f"GET {path}: Method Not Allowed"
    assert other.status_code == 405


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (499, "invalid_request_error"), (429, "rate_limit_error"), (500, "server_error"), (503, "server_error")],
)  # fmt: skip
def test_an_error_is_of_openais_kind(status: int, kind: str) -> None:
    assert ApiError(status, "why").body["error"]["type"] == kind


def test_a_client_that_is_gone_leaves_none_of_its_replies_behind() -> None:
    cancelled: list[int] = []
    jobs = [SimpleNamespace(cancel=lambda n=n: cancelled.append(n)) for n in range(3)]
    messages = iter(["http.request", "http.disconnect"])

    async def receive() -> Any:
        return {"type": next(messages)}

    asyncio.run(app_module._cancel_when_gone(receive, jobs))  # type: ignore[arg-type]
    assert cancelled == [0, 1, 2]


def test_the_numbers_of_metrics_are_those_of_the_replies() -> None:
    engine = SimpleNamespace(load=(3, 4), remembered_tokens=5)
    metrics = Metrics(engine)  # type: ignore[arg-type]
    prompt = list(range(7))
    jobs = [SimpleNamespace(request=SimpleNamespace(prompt=prompt), num_tokens=n, seconds_to_first=first) for n, first in ((2, 0.5), (3, None))]  # fmt: skip
    metrics.count_replies(jobs)  # type: ignore[arg-type]
    for status in ("200", "429", "200"):
        metrics.count_answer(status)
    lines = dict(line.rsplit(" ", 1) for line in metrics.text().splitlines() if line[0] != "#")
    assert lines == {
        'finetune_requests_total{status="200"}': "2", 'finetune_requests_total{status="429"}': "1",
        "finetune_replies_running": "4", "finetune_replies_waiting": "3",
        "finetune_prompt_tokens_total": "7", "finetune_remembered_prompt_tokens_total": "5",
        "finetune_reply_tokens_total": "5", "finetune_first_tokens_total": "1",
        "finetune_first_token_seconds_total": "0.500000",
    }  # fmt: skip
    kinds = [line.split()[2:] for line in metrics.text().splitlines() if line.startswith("# TYPE")]
    assert {name.removeprefix("finetune_"): kind for name, kind in kinds if kind == "gauge"} == {"replies_running": "gauge", "replies_waiting": "gauge"}  # fmt: skip


def test_what_fails_in_the_middle_of_a_stream_is_its_last_event() -> None:
    async def events(answer: Any, jobs: Any) -> Any:
        yield "data: one\n\n"
        raise ApiError(500, "no more", code="model_failed")

    async def streamed() -> list[Any]:
        jobs: Any = [SimpleNamespace(request=SimpleNamespace(stream=True))]
        response: Any = await app_module._response(None, jobs)  # type: ignore[arg-type]
        assert response.headers["cache-control"] == "no-cache"
        return [text async for text in response.body_iterator]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app_module, "_events", events)
        first, last = asyncio.run(streamed())
    assert first == "data: one\n\n"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "model_failed"


def test_a_header_that_is_whole_needs_no_time_while_its_body_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import h11

    done: list[str] = []
    for state, trailing, deadline, expected in (
        (h11.SEND_BODY, b"", True, ["nothing"]), (h11.DONE, b"", True, ["nothing"]), (h11.IDLE, b"GE", False, ["header"]),
        (h11.IDLE, b"GE", True, []), (h11.IDLE, b"", False, []),
    ):  # fmt: skip
        done.clear()
        protocol: Any = SimpleNamespace(
            conn=SimpleNamespace(their_state=state, trailing_data=(trailing, False)), _deadline=object() if deadline else None,
            _expect_nothing=lambda: done.append("nothing"), _expect_header=lambda: done.append("header"),
        )  # fmt: skip
        monkeypatch.setattr(guard.H11Protocol, "data_received", lambda self, data: None)
        monkeypatch.setattr(guard, "super", lambda: SimpleNamespace(data_received=lambda data: None), raising=False)  # fmt: skip
        guard.TimedProtocol.data_received(protocol, b"x")
        assert done == expected


def test_a_connection_that_is_lost_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[int] = []
    lost: list[Any] = []
    monkeypatch.setattr(guard.H11Protocol, "connection_lost", lambda self, error: lost.append(error))  # fmt: skip
    protocol = guard.TimedProtocol.__new__(guard.TimedProtocol)
    protocol._deadline = SimpleNamespace(cancel=lambda: cancelled.append(1))  # type: ignore[assignment]
    for error in (None, OSError("reset")):
        protocol.connection_lost(error)
        assert lost.pop() is error
    assert cancelled == [1]
    assert protocol._deadline is None


def test_a_header_has_ten_seconds_and_a_connection_that_takes_longer_is_cut() -> None:
    waits: list[tuple[float, Any]] = []
    cut: list[int] = []
    protocol = guard.TimedProtocol.__new__(guard.TimedProtocol)
    protocol.loop = SimpleNamespace(call_later=lambda *given: waits.append(given) or "timer")  # type: ignore[assignment, func-returns-value]  # fmt: skip
    protocol.transport = SimpleNamespace(abort=lambda: cut.append(1))  # type: ignore[assignment]
    protocol._expect_header()
    assert protocol._deadline == "timer"
    [(seconds, late)] = waits
    assert seconds == 10.0
    late()
    assert cut == [1]
    assert protocol._deadline is None


def test_a_wrong_key_is_told_in_openais_first_words() -> None:
    """litellm tells it from other errors by them."""
    with pytest.raises(ApiError, match=r"^Incorrect API key provided: ") as caught:
        Access({"localhost"}, KEY).check("GET", "/metrics", Headers({"host": "localhost"}))
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    with pytest.raises(ApiError, match="--allow-host NAME admits it"):
        Access({"localhost"}, KEY).check("GET", "/health", Headers({"host": "other"}))


def test_a_request_whose_client_is_gone_has_a_status_of_its_own_in_the_log() -> None:
    async def pieces() -> Any:
        for piece in ():
            yield piece

    jobs: Any = [SimpleNamespace(request=SimpleNamespace(stream=False), cancelled=True, pieces=pieces)]  # fmt: skip
    assert asyncio.run(app_module._response(None, jobs)).status_code == 499  # type: ignore[arg-type]


def test_threads_share_pools_by_glibcs_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(heap, "_function", lambda name: lambda *said: given.append(said))
    heap.bound_pools()
    assert given == [(-8, 2)], "M_ARENA_MAX of malloc.h"


@pytest.mark.parametrize("error", [OSError("x"), TypeError("x")])
def test_a_c_library_is_left_alone_where_it_has_no_such_function(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = heap._function("strlen")
    assert length is not None
    assert length(b"four") == 4
    assert heap._function("no_such_function") is None

    def none(name: None) -> Any:
        raise error

    monkeypatch.setattr(heap.ctypes, "CDLL", none)
    assert heap._function("strlen") is None
    asyncio.run(asyncio.wait_for(heap._trim_again_and_again(), 60))
