"""The endpoint: /v1/chat/completions, /v1/models, /tokenize, /metrics and /health on one model."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from finetune.generation.stream import Piece
from finetune.serving.answers import DONE, Answer, event
from finetune.serving.engine import Engine, stopping
from finetune.serving.errors import ApiError
from finetune.serving.guard import Access, Guard
from finetune.serving.job import ReplyJob
from finetune.serving.metrics import CONTENT_TYPE, Metrics
from finetune.serving.request import (
    RequestRules,
    read_fields,
    read_tokens,
    reply_requests,
    shows_image,
    with_images,
)

BODY_SECONDS = 30.0
"""A body must have come by then."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server takes at a time."""

    requests: int
    """Requests in work at once, those that wait among them."""
    body_bytes: int


def make_app(engine: Engine, rules: RequestRules, limits: Limits, access: Access) -> FastAPI:
    """The ASGI application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(openapi_url=None, lifespan=lifespan)  # no page that loads scripts from elsewhere
    metrics = Metrics(engine)
    completions = Completions(engine, rules, limits, metrics)
    app.router.routes.append(Route("/v1/chat/completions", completions, methods=["POST"]))
    card = {"id": rules.name, "object": "model", "created": int(time.time()), "owned_by": "local"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != rules.name:
            raise ApiError(404, f"the model {name!r} is not served here", code="model_not_found")
        return card

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await _body(request, limits.body_bytes)
        tokens = await asyncio.to_thread(read_tokens, body, rules)
        return {"count": len(tokens), "max_model_len": rules.context, "tokens": tokens}

    @app.get("/metrics")
    async def counted() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if engine.draining:
            raise stopping()
        return {"status": "ok"}

    app.add_middleware(Guard, access=access, count=metrics.count_answer)
    app.add_exception_handler(ApiError, _tell)
    app.add_exception_handler(HTTPException, _tell)
    app.add_exception_handler(Exception, _tell)
    return app


class Completions:
    """`POST /v1/chat/completions`."""

    def __init__(
        self, engine: Engine, rules: RequestRules, limits: Limits, metrics: Metrics
    ) -> None:
        self._metrics = metrics
        self._engine = engine
        self._rules = rules
        self._limits = limits
        self._in_work = 0
        self._decoding = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; however it ends, its place is free then."""
        with self._place():
            request = Request(scope, receive)
            body = await _body(request, self._limits.body_bytes)
            jobs = await self._jobs(body)
            watching = asyncio.create_task(_cancel_when_gone(receive, jobs))
            try:
                response = await self._answer(jobs)
                await response(scope, receive, send)
            finally:
                watching.cancel()
                self._metrics.count_replies(jobs)
                for job in jobs:
                    job.cancel()

    async def _jobs(self, body: bytes) -> list[ReplyJob]:
        """The replies in the model's queue; images are kept until the model has done with all."""
        folder = tempfile.TemporaryDirectory(prefix="finetune-serve-", ignore_cleanup_errors=True)
        try:
            fields = await asyncio.to_thread(read_fields, body, self._rules)
            # One at a time, and only those: a decoded image is large.
            async with self._decoding if shows_image(fields) else nullcontext():
                fields = await asyncio.to_thread(with_images, fields, Path(folder.name))
            requests = await asyncio.to_thread(reply_requests, fields, self._rules)
            release = Countdown(len(requests), folder.cleanup)
            jobs = [ReplyJob(request, self._rules.template, release) for request in requests]
            self._engine.submit(jobs)
        except BaseException:
            folder.cleanup()
            raise
        return jobs

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._in_work >= self._limits.requests:
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

    async def _answer(self, jobs: Sequence[ReplyJob]) -> Response:
        answer = Answer(self._rules.name, self._rules.template)
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
                yield stream.opening()
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


async def _body(request: Request, limit: int) -> bytes:
    """The body; ApiError when it is too large, which its header tells first, or too slow."""
    too_large = ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} s") from None
    return bytes(body)


async def _cancel_when_gone(receive: Receive, jobs: Sequence[ReplyJob]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    for job in jobs:
        job.cancel()


def _tell(request: Request, error: Exception) -> Response:
    """Any error in OpenAI's form."""
    if isinstance(error, HTTPException):
        what = f"{request.method} {request.url.path[:80]}"
        error = ApiError(error.status_code, f"{what}: {error.detail}")
    if not isinstance(error, ApiError):
        error = ApiError(500, "something went wrong here; the server's log says what")
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body, error.status, headers=headers)
