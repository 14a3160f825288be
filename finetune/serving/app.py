"""The endpoint: chat and text completions, /v1/models, /tokenize, /metrics and /health."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from finetune.data.chat.template import ChatTemplate
from finetune.generation.stream import Piece
from finetune.serving.answers import DONE, Answer, ChatAnswer, TextAnswer, event
from finetune.serving.engine import Engine, stopping
from finetune.serving.errors import ApiError, not_here
from finetune.serving.guard import Access, Guard
from finetune.serving.heap import trimmed
from finetune.serving.job import ReplyJob
from finetune.serving.metrics import CONTENT_TYPE, Metrics
from finetune.serving.page.html import PageOptions
from finetune.serving.page.routes import add_page
from finetune.serving.requests.body import read_body
from finetune.serving.requests.chat import AskedChat, image_folder, read_tokens
from finetune.serving.requests.completion import AskedCompletion
from finetune.serving.requests.rules import Asked, RequestRules, rules_of

IGNORED = "X-Ignored-Fields"
"""The header that names what was left out of a request."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server takes at a time."""

    requests: int
    """Requests in work at once, those that wait among them."""
    body_bytes: int


def make_app(
    engine: Engine,
    models: Mapping[str, RequestRules],
    limits: Limits,
    access: Access,
    page: PageOptions | None = None,
) -> FastAPI:
    """The ASGI application on the models of an engine, by their ids; with a page to try them on, if wanted."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with trimmed():
            yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(openapi_url=None, lifespan=lifespan)  # no page that loads scripts from elsewhere
    metrics = Metrics(engine)
    desk = Desk(engine, models, limits, metrics)
    for path, kind in KINDS.items():
        app.router.routes.append(Route(path, Completions(desk, kind), methods=["POST"]))
    _add_cards(app, models)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await read_body(request, limits.body_bytes)
        tokens, rules = await asyncio.to_thread(read_tokens, body, models)
        return {"count": len(tokens), "max_model_len": rules.context, "tokens": tokens}

    @app.get("/metrics")
    async def counted() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if engine.draining:
            raise stopping()
        return {"status": "ok"}

    if page is not None:
        needs_key = access.key is not None
        add_page(app, models, page, needs_key=needs_key, body_bytes=limits.body_bytes)
    app.add_middleware(Guard, access=access, count=metrics.count_answer)
    app.add_exception_handler(ApiError, _tell)
    app.add_exception_handler(HTTPException, _tell)
    app.add_exception_handler(Exception, _tell)
    return app


def _add_cards(app: FastAPI, models: Mapping[str, RequestRules]) -> None:
    """What is served, as OpenAI's list of models."""
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "local",
            "max_model_len": models[name].context,
            "takes_images": models[name].template.image is not None,
            "max_images": models[name].most_images,
        }

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return card(rules_of(name, models).name)


@dataclass(frozen=True, slots=True)
class Kind:
    """What is asked at an address, and how it is answered."""

    asked: Callable[[bytes, Mapping[str, RequestRules]], Asked]
    answer: Callable[[str, ChatTemplate], Answer]


KINDS = {
    "/v1/chat/completions": Kind(AskedChat, ChatAnswer),
    "/v1/completions": Kind(AskedCompletion, TextAnswer),
}


class Desk:
    """What all addresses share: the engine, its limits, and the places for requests in work."""

    def __init__(
        self,
        engine: Engine,
        models: Mapping[str, RequestRules],
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self.engine = engine
        self.models = models
        self.limits = limits
        self.metrics = metrics
        self.decoding = asyncio.Lock()
        """Held while images are read: one request's at a time, as a decoded image is large."""
        self._in_work = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests in work; ApiError when all are taken."""
        if self._in_work >= self.limits.requests:
            raise ApiError(
                429,
                f"{self._in_work} requests are in work already; try again later",
                code="rate_limit_exceeded",
            )
        self._in_work += 1
        try:
            yield
        finally:
            self._in_work -= 1


class Completions:
    """One of the addresses that write replies."""

    def __init__(self, desk: Desk, kind: Kind) -> None:
        self._desk = desk
        self._kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; however it ends, its place is free then."""
        with self._desk.place():
            request = Request(scope, receive)
            body = await read_body(request, self._desk.limits.body_bytes)
            asked = await asyncio.to_thread(self._kind.asked, body, self._desk.models)
            jobs = await self._jobs(asked)
            watching = asyncio.create_task(_cancel_when_gone(receive, jobs))
            try:
                answer = self._kind.answer(asked.rules.name, asked.rules.template)
                response = await _response(answer, jobs)
                if asked.unknown:
                    response.headers[IGNORED] = ", ".join(
                        ascii(n)[1:-1][:40] for n in asked.unknown[:20]
                    )
                await response(scope, receive, send)
            finally:
                watching.cancel()
                self._desk.metrics.count_replies(jobs)
                for job in jobs:
                    job.cancel()

    async def _jobs(self, asked: Asked) -> list[ReplyJob]:
        """The replies in the model's queue; images are kept until the model has done with all."""
        if not asked.shows_image:
            return await self._submitted(asked, bool)
        folder = image_folder()
        try:
            async with self._desk.decoding:
                await asyncio.to_thread(asked.keep_images, Path(folder.name))
            return await self._submitted(asked, folder.cleanup)
        except BaseException:
            folder.cleanup()
            raise

    async def _submitted(self, asked: Asked, last: Callable[[], object]) -> list[ReplyJob]:
        """The replies in the model's queue; `last` is called when the model has done with all."""
        engine = self._desk.engine
        requests = await asyncio.to_thread(asked.replies)
        release = Countdown(len(requests), last)
        jobs = [ReplyJob(request, asked.rules.template, release, engine.outbox) for request in requests]  # fmt: skip
        engine.submit(jobs)
        return jobs


async def _response(answer: Answer, jobs: Sequence[ReplyJob]) -> Response:
    """The replies whole, or their first event with the others to come."""
    if not jobs[0].request.stream:
        said = [(job, [piece async for piece in job.pieces()]) for job in jobs]
        if jobs[0].cancelled:
            return Response(status_code=499)  # for the log; nobody reads it
        return JSONResponse(answer.completion(said))
    events = _events(answer, jobs)
    # What fails before the first token still has an HTTP status of its own.
    first = await anext(events)

    async def told() -> AsyncIterator[str]:
        try:
            yield first
            async for text in events:
                yield text
        except ApiError as error:
            yield event(error.body)

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(told(), media_type="text/event-stream", headers=headers)


class Countdown:
    """Does something when it has been called a number of times, by whatever threads."""

    def __init__(self, count: int, last: Callable[[], object]) -> None:
        self._left, self._last = count, last
        self._lock = threading.Lock()

    def __call__(self) -> None:
        """One less to wait for."""
        with self._lock:
            self._left -= 1
            is_last = self._left == 0
        if is_last:
            self._last()


async def _events(answer: Answer, jobs: Sequence[ReplyJob]) -> AsyncIterator[str]:
    """The replies as events; the first one comes with the first token."""
    streams = [answer.stream(job, index) for index, job in enumerate(jobs)]
    is_open = False
    async for index, piece in _side_by_side(jobs):
        if not is_open:
            for stream in streams:
                if opening := stream.opening():
                    yield opening
        is_open = True
        yield streams[index].closing() if piece is None else streams[index].more(piece)
    if jobs[0].request.include_usage:
        yield answer.usage(jobs)
    yield DONE


async def _side_by_side(jobs: Sequence[ReplyJob]) -> AsyncIterator[tuple[int, Piece | None]]:
    """The pieces of all replies as they are written, each with the number of its reply; None ends one.

    Raises:
        ApiError: a reply cannot be written, or not to its end.
    """
    if len(jobs) == 1:
        async for own in jobs[0].pieces():
            yield 0, own
        yield 0, None
        return
    coming: asyncio.Queue[tuple[int, Piece | ApiError | None]] = asyncio.Queue()

    async def pass_on(index: int) -> None:
        try:
            async for piece in jobs[index].pieces():
                coming.put_nowait((index, piece))
            coming.put_nowait((index, None))
        except ApiError as error:
            coming.put_nowait((index, error))

    tasks = [asyncio.create_task(pass_on(index)) for index in range(len(jobs))]
    left = len(jobs)
    try:
        while left:
            index, piece = await coming.get()
            if isinstance(piece, ApiError):
                raise piece
            left -= piece is None
            yield index, piece
    finally:
        for task in tasks:
            task.cancel()


async def _cancel_when_gone(receive: Receive, jobs: Sequence[ReplyJob]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    for job in jobs:
        job.cancel()


def _tell(request: Request, error: Exception) -> Response:
    """Any error in OpenAI's form."""
    if isinstance(error, HTTPException):
        what = f"{request.method} {request.url.path[:80]}"
        told = not_here(request.url.path) if error.status_code == 404 else error.detail
        error = ApiError(error.status_code, f"{what}: {told}")
    if not isinstance(error, ApiError):
        error = ApiError(500, "something went wrong here; the server's log says what")
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers=headers)
