"""The endpoint: /v1/chat/completions, /v1/models and /health on one model."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from finetune.serving.answers import Answer, event, usage_of
from finetune.serving.engine import Engine, stopping
from finetune.serving.errors import ApiError
from finetune.serving.guard import Access, Guard
from finetune.serving.job import Job
from finetune.serving.request import Rules, read_request

BODY_SECONDS = 30.0
"""A body must have come by then."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server takes at a time."""

    requests: int
    """Requests in work at once, those that wait among them."""
    body_bytes: int


def make_app(engine: Engine, rules: Rules, limits: Limits, access: Access) -> FastAPI:
    """The ASGI application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(openapi_url=None, lifespan=lifespan)  # no page that loads scripts from elsewhere
    app.router.routes.append(
        Route("/v1/chat/completions", Completions(engine, rules, limits), methods=["POST"])
    )
    card = {"id": rules.name, "object": "model", "created": int(time.time()), "owned_by": "local"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != rules.name:
            raise ApiError(404, f"the model {name!r} is not served here", code="model_not_found")
        return card

    @app.get("/health")
    async def health() -> dict[str, str]:
        if engine.draining:
            raise stopping()
        return {"status": "ok"}

    app.add_middleware(Guard, access=access)
    app.add_exception_handler(ApiError, _tell)
    app.add_exception_handler(HTTPException, _tell)
    app.add_exception_handler(Exception, _tell)
    return app


class Completions:
    """`POST /v1/chat/completions`."""

    def __init__(self, engine: Engine, rules: Rules, limits: Limits) -> None:
        self._engine = engine
        self._rules = rules
        self._limits = limits
        self._in_work = 0
        self._reading = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; however it ends, its place is free and its images are gone then."""
        with self._place(), tempfile.TemporaryDirectory(prefix="finetune-serve-") as folder:
            request = Request(scope, receive)
            body = await _body(request, self._limits.body_bytes)
            async with self._reading:  # one at a time: a decoded image is large
                ask = await asyncio.to_thread(read_request, body, self._rules, Path(folder))
            job = Job(ask, self._rules.template)
            watching = asyncio.create_task(_cancel_when_gone(receive, job))
            try:
                self._engine.submit(job)
                response = await self._answer(job)
                await response(scope, receive, send)
            finally:
                watching.cancel()
                job.cancel()

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

    async def _answer(self, job: Job) -> Response:
        answer = Answer(self._rules.name)
        pieces = job.pieces()
        if not job.ask.stream:
            said = [piece async for piece in pieces]
            if job.cancelled:
                return Response(status_code=499)  # for the log; nobody reads it
            return JSONResponse(answer.completion(said, job.finish_reason, _usage(job)))
        # What fails before the first token still has an HTTP status of its own.
        first = [piece async for piece in _at_most_one(pieces)]

        async def events() -> AsyncIterator[str]:
            yield answer.opening()
            try:
                for piece in first:
                    yield answer.more(piece)
                async for piece in pieces:
                    yield answer.more(piece)
            except ApiError as error:
                yield event(error.body)
                return
            for last in answer.closing(
                job.finish_reason, _usage(job) if job.ask.include_usage else None
            ):
                yield last

        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


async def _at_most_one(pieces: AsyncIterator[Any]) -> AsyncIterator[Any]:
    with suppress(StopAsyncIteration):
        yield await anext(pieces)


def _usage(job: Job) -> dict[str, int]:
    return usage_of(len(job.ask.prompt), job.num_tokens)


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


async def _cancel_when_gone(receive: Receive, job: Job) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
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
