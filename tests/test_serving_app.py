"""The addresses of the endpoint, each asked without a server, and what a request leaves behind."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from serving_jobs import request

from finetune.data.chat.template import ChatTemplate
from finetune.data.chat.tokenizer import load_chat_tokenizer
from finetune.data.dialogue.images import ImageRule
from finetune.generation.stream import Piece
from finetune.serving import app as app_module
from finetune.serving.answers import ChatAnswer, TextAnswer
from finetune.serving.app import Completions, Countdown, Desk, Kind, Limits, make_app
from finetune.serving.errors import ApiError
from finetune.serving.guard import Access
from finetune.serving.metrics import Metrics
from finetune.serving.page.html import PageOptions
from finetune.serving.requests.images import PREFIX
from finetune.serving.requests.rules import RequestRules

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def template(tiny_glm: Path) -> ChatTemplate:
    return ChatTemplate(load_chat_tokenizer(tiny_glm))


@pytest.fixture
def rules(template: ChatTemplate) -> RequestRules:
    return RequestRules("tiny", template, 64, 8)


class Finished:
    """An engine whose replies are over at once."""

    draining, load, remembered_tokens, outbox = False, (0, 0), 0, None

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self.closed = 0

    def submit(self, jobs: list[Any]) -> None:
        self.jobs += jobs
        for job in jobs:
            job.finish(True)

    def close(self) -> None:
        self.closed += 1


def app_of(models: dict[str, Any], page: PageOptions | None = None, key: bytes | None = None, size: int = 100_000) -> Any:  # fmt: skip
    engine: Any = Finished()
    return make_app(engine, models, Limits(9, size), Access({"localhost"}, key), page)


def ask(app: Any, method: str, path: str, **how: Any) -> httpx.Response:
    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=60
        ) as client:
            return await client.request(method, path, **how)

    return asyncio.run(asked())


def test_a_models_card_says_what_it_takes(rules: RequestRules, template: ChatTemplate) -> None:
    any_number = SimpleNamespace(image=object(), image_rule=ImageRule("it", roles=("user",)))
    eyes = RequestRules("org/eyes", any_number, None, 8)  # type: ignore[arg-type]
    app = app_of({"tiny": rules, "org/eyes": eyes, "newest": eyes})
    begun = int(time.time())
    listed = ask(app, "GET", "/v1/models").json()
    assert listed["object"] == "list"
    cards = {card["id"]: card for card in listed["data"]}
    assert list(cards) == ["tiny", "org/eyes", "newest"]
    assert begun - 5 <= cards["tiny"].pop("created") <= begun
    assert cards["tiny"] == {"id": "tiny", "object": "model", "owned_by": "local", "max_model_len": 64, "takes_images": False, "max_images": rules.most_images}  # fmt: skip
    assert (cards["org/eyes"]["takes_images"], cards["org/eyes"]["max_images"]) == (True, 32)
    assert cards["org/eyes"]["max_model_len"] is None
    assert ask(app, "GET", "/v1/models/org/eyes").json() == cards["org/eyes"]
    assert ask(app, "GET", "/v1/models/newest").json()["id"] == "org/eyes", "who it is now"
    missing = ask(app, "GET", "/v1/models/gpt")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


SERVED = {
    "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{name:path}", "/tokenize", "/metrics", "/health"
}  # fmt: skip


def test_what_is_served_is_what_the_options_say_and_no_page_of_a_framework(
    rules: RequestRules, tmp_path: Path
) -> None:
    for page, more in (
        (None, set()), (PageOptions(), {"/", "/page/tokens"}), (PageOptions(tmp_path), {"/", "/page/tokens", "/page/votes", "/page/rows"})
    ):  # fmt: skip
        assert {route.path for route in app_of({"tiny": rules}, page).routes} == SERVED | more


def test_no_address_takes_a_body_beyond_the_limit(rules: RequestRules, tmp_path: Path) -> None:
    app = app_of({"tiny": rules}, PageOptions(tmp_path), size=40)
    posted = {route.path for route in app.routes if "POST" in route.methods}
    assert posted == {"/v1/chat/completions", "/v1/completions", "/tokenize", "/page/tokens", "/page/votes", "/page/rows"}  # fmt: skip
    for path in posted:
        body = b'{"model": "gpt", "messages": [], "x": 1}'
        assert len(body) == 40
        assert ask(app, "POST", path, content=body, headers=JSON).status_code in (400, 404), path
        assert ask(app, "POST", path, content=body + b" ", headers=JSON).status_code == 413, path


def test_metrics_are_sent_as_prometheus_wants_them(rules: RequestRules) -> None:
    answer = ask(app_of({"tiny": rules}), "GET", "/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_a_fault_is_a_500_of_openais_form_and_counted_as_one(
    rules: RequestRules, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(app_module, "read_tokens", lambda *_: 1 // 0)
    app = app_of({"tiny": rules})
    answer = ask(app, "POST", "/tokenize", json={})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "division" not in answer.text
    assert 'finetune_requests_total{status="500"} 1\n' in ask(app, "GET", "/metrics").text
    assert "POST /tokenize: 500" in capfd.readouterr().out


@pytest.mark.parametrize("key", [None, b"a-key-of-many-characters"])
def test_the_page_asks_for_a_key_where_one_is_needed(
    key: bytes | None, rules: RequestRules
) -> None:
    page = ask(app_of({"tiny": rules}, PageOptions(), key), "GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert f'"needs_key": {"false" if key is None else "true"}' in page.text


def test_the_server_trims_its_memory_while_it_runs_and_closes_its_engine_at_the_end(
    rules: RequestRules, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    @asynccontextmanager
    async def trimmed() -> AsyncIterator[None]:
        done.append("trims")
        yield
        done.append("trims no more")

    monkeypatch.setattr(app_module, "trimmed", trimmed)
    engine: Any = Finished()
    app = make_app(engine, {"tiny": rules}, Limits(9, 9), Access((), None))

    async def run() -> None:
        async with app.router.lifespan_context(app):
            assert (done, engine.closed) == (["trims"], 0)

    asyncio.run(run())
    assert (done, engine.closed) == (["trims", "trims no more"], 1)


# --- one request -----------------------------------------------------------------------------------


def asked(rules: RequestRules, *requests: Any, **how: Any) -> Any:
    given = {"rules": rules, "unknown": [], "shows_image": False, "replies": lambda: list(requests)}
    return SimpleNamespace(**(given | how))


def sent(completions: Completions) -> httpx.Response:
    return ask(completions, "POST", "/", content=b"{}")


def desk_of(engine: Any) -> Desk:
    return Desk(engine, {}, Limits(9, 100), Metrics(engine))


def test_of_many_long_names_that_nobody_knows_the_header_has_twenty_beginnings(
    rules: RequestRules,
) -> None:
    unknown = [f"{n:02}" + "x" * 50 for n in range(25)]
    kind = Kind(lambda *_: asked(rules, request(), unknown=unknown), ChatAnswer)
    named = sent(Completions(desk_of(Finished()), kind)).headers["X-Ignored-Fields"].split(", ")
    assert named == [name[:40] for name in unknown[:20]]
    kind = Kind(lambda *_: asked(rules, request()), ChatAnswer)
    assert "X-Ignored-Fields" not in sent(Completions(desk_of(Finished()), kind)).headers


def test_what_is_read_is_answered_and_when_it_is_its_jobs_are_over(rules: RequestRules) -> None:
    engine = Finished()
    desk = desk_of(engine)
    given: list[Any] = []
    kind = Kind(lambda *said: given.extend(said) or asked(rules, request(), request()), TextAnswer)  # type: ignore[func-returns-value]  # fmt: skip
    answer = sent(Completions(desk, kind)).json()
    assert given == [b"{}", desk.models]
    assert (answer["object"], answer["model"], len(answer["choices"])) == ("text_completion", "tiny", 2)  # fmt: skip
    assert [job.cancelled for job in engine.jobs] == [True, True]
    assert "finetune_prompt_tokens_total 6\n" in desk.metrics.text()


def folders() -> set[Path]:
    import tempfile

    return set(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == [], "no image stays behind"


def test_images_are_decoded_one_request_at_a_time_and_kept_until_the_last_reply(
    rules: RequestRules, place: Path
) -> None:
    inside: list[int] = []
    most: list[int] = []

    def keep(folder: Path) -> None:
        inside.append(1)
        most.append(len(inside))
        (folder / "0").write_bytes(b"image")
        time.sleep(0.02)
        inside.pop()

    class Waits(Finished):
        def submit(self, jobs: list[Any]) -> None:
            self.jobs += jobs

    async def together() -> None:
        engine = Waits()
        kind = Kind(None, ChatAnswer)  # type: ignore[arg-type]
        completions = Completions(desk_of(engine), kind)
        one = asked(rules, request(), request(), shows_image=True, keep_images=keep)
        first, *_ = await asyncio.gather(*(completions._jobs(one) for _ in range(3)))
        assert len(folders()) == 3
        for job in engine.jobs[2:]:
            job.release()
        first[0].release()
        assert len(folders()) == 1, "the second reply needs its image"
        first[1].release()

    asyncio.run(together())
    assert most == [1, 1, 1]


@pytest.mark.parametrize("error", [ApiError(400, "no image"), asyncio.CancelledError(), OSError()])
@pytest.mark.parametrize("where", ["keep_images", "submit"])
def test_images_of_a_request_that_ends_early_are_removed(
    where: str, error: BaseException, rules: RequestRules, place: Path
) -> None:
    def fails(*_: Any) -> None:
        assert len(folders()) == 1
        raise error

    engine = Finished()
    how: dict[str, Any] = {"keep_images": lambda folder: None}
    if where == "submit":
        engine.submit = fails  # type: ignore[method-assign]
    else:
        how["keep_images"] = fails
    completions = Completions(desk_of(engine), Kind(None, ChatAnswer))  # type: ignore[arg-type]

    async def run() -> None:
        with pytest.raises(type(error)):
            await completions._jobs(asked(rules, request(), shows_image=True, **how))

    asyncio.run(run())


def test_the_last_of_so_many_does_it_and_nobody_before_or_behind() -> None:
    done: list[int] = []
    count = Countdown(3, lambda: done.append(1))
    assert [(count(), len(done))[1] for _ in range(5)] == [0, 0, 1, 1, 1]


# --- events ----------------------------------------------------------------------------------------


def job(*pieces: Any, reason: str = "stop", usage: bool = False) -> Any:
    """A reply that somebody else writes; an error in its pieces ends it, and at None it stands still."""

    async def coming() -> AsyncIterator[Piece]:
        for piece in pieces:
            if isinstance(piece, ApiError):
                raise piece
            if piece is None:
                await asyncio.sleep(3600)
            yield Piece(piece)

    asked_for = replace(request(), stream=True, include_usage=usage)
    return SimpleNamespace(request=asked_for, pieces=coming, finish_reason=reason, scores=None, ids=[], num_tokens=len(pieces), cancelled=False)  # fmt: skip


def events(template: ChatTemplate, *jobs: Any) -> list[Any]:
    async def read() -> tuple[Any, list[str]]:
        response: Any = await app_module._response(ChatAnswer("m", template), jobs)
        texts = [text async for text in response.body_iterator]
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1, "nobody reads on for a client that has all"
        return response, texts

    response, texts = asyncio.run(read())
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no", "nginx passes each on at once"
    assert all(text.startswith("data: ") and text.endswith("\n\n") for text in texts)
    said = [text.removeprefix("data: ").strip() for text in texts]
    return [one if one == "[DONE]" else json.loads(one) for one in said]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_reply_of_a_stream_is_opened_once_before_any_text_and_closed_once(
    number: int, template: ChatTemplate
) -> None:
    jobs = [job("a", "b", reason="length" if n else "stop", usage=True) for n in range(number)]
    *chunks, usage, done = events(template, *jobs)
    assert done == "[DONE]"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 2 * number)
    assert {chunk["object"] for chunk in [*chunks, usage]} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    opening = [one["index"] for one in choices if "role" in one["delta"]]
    assert opening == list(range(number)) == [one["index"] for one in choices[:number]]
    for index in range(number):
        own = [one for one in choices[number:] if one["index"] == index]
        assert [one["delta"].get("content") for one in own] == ["a", "b", None]
        assert [one["finish_reason"] for one in own] == [None, None, "length" if index else "stop"]


def test_one_reply_of_a_stream_that_fails_ends_it_with_its_error(template: ChatTemplate) -> None:
    error = ApiError(500, "no more", code="model_failed")
    *_, last = events(template, job("a", None), job("b", error))
    assert last == error.body
    with pytest.raises(ApiError, match="no more"):
        events(template, job(error), job(error))


def test_a_whole_reply_is_no_stream(template: ChatTemplate) -> None:
    one = job("a", "b")
    one.request = request()
    response: Any = asyncio.run(app_module._response(TextAnswer("m", template), [one]))
    assert json.loads(response.body)["choices"][0]["text"] == "ab"
    assert response.media_type == "application/json"
