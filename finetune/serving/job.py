"""One reply on its way from the model's thread to the client that waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal, TypeAlias

from finetune.data.chat.template import ChatTemplate
from finetune.generation.batch import Prompt
from finetune.generation.decoder import Request, Scores
from finetune.generation.stream import Piece, ReplyStream, TextStream
from finetune.serving.errors import ApiError
from finetune.serving.requests.rules import ReplyRequest

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls"]


class ReplyJob:
    """What a client asked for; `take` to `fail` belong to the model's thread, the rest to the client's."""

    def __init__(
        self, request: ReplyRequest, template: ChatTemplate, release: Callable[[], object] = bool
    ) -> None:
        self.request = request
        self.release = release
        """Called when the model's thread needs nothing of the request any more, such as its images."""
        self.cancelled = False
        """Nobody waits for the reply any more."""
        self.finish_reason: FinishReason | None = None
        """Why the reply ended, once it has."""
        top = request.top_logprobs
        self.scores = None if top is None else Scores(top)
        self.seconds_to_first: float | None = None
        """From the queue to the first token, once it has come."""
        self._begun = time.monotonic()
        self._reply = (
            TextStream(template) if request.is_text else ReplyStream(template, request.tools)
        )
        self._text = StopStrings(request.stops)
        self._num_calls = 0
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[Piece] | ApiError | None] = asyncio.Queue()

    @property
    def num_tokens(self) -> int:
        """Tokens of the reply so far, without its stop."""
        return len(self._reply.ids)

    def as_request(self, prompt: Prompt) -> Request:
        """What the decoder is asked for, with the prompt as the model reads it."""
        asked = self.request
        return Request(
            prompt, asked.decoding, self.take, asked.constraint, self.scores, asked.model
        )

    def take(self, token: int) -> bool:
        """Reads one more token, which is no stop; True when no more is wanted."""
        if self.cancelled:
            return True
        if self.seconds_to_first is None:
            self.seconds_to_first = time.monotonic() - self._begun
        self._tell(self._reply.take(token))
        return self._reply.over or self._enough

    def finish(self, stopped: bool) -> None:
        """There will be no more tokens; a stop came, or there were enough."""
        self.release()
        self._tell(self._reply.finish())
        if rest := self._text.rest():
            self._send([Piece(rest)])
        if self._text.found:
            self.finish_reason = "stop"
        elif stopped or self._reply.over or self._enough:
            self.finish_reason = "tool_calls" if self._num_calls else "stop"
        else:
            self.finish_reason = "length"
        self._send(None)

    def fail(self, error: ApiError) -> None:
        """The reply cannot be written."""
        self.release()
        self._send(error)

    def cancel(self) -> None:
        """The client is gone, or served: its place is free."""
        self.cancelled = True
        self._events.put_nowait(None)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The reply while it is written; ends early when cancelled.

        Raises:
            ApiError: the reply cannot be written, or not to its end.
        """
        while (event := await self._events.get()) is not None:
            if isinstance(event, ApiError):
                raise event
            for piece in event:
                yield piece

    @property
    def _enough(self) -> bool:
        """What the client does not want has begun: a stop string, or a second call."""
        return self._text.found or (self._num_calls > 1 and not self.request.many_calls)

    def _tell(self, pieces: Sequence[Piece]) -> None:
        wanted = []
        for piece in pieces:
            self._num_calls += bool(piece.name)
            if self._enough:
                break
            if piece.call is not None:
                wanted.append(piece)
            elif text := self._text.feed(piece.text):
                wanted.append(Piece(text))
        if wanted:
            self._send(wanted)

    def _send(self, event: list[Piece] | ApiError | None) -> None:
        if not self.cancelled:  # then the loop may be closed, too
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class StopStrings:
    """Text up to the first stop string; keeps back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> str:
        """What can be shown once `text` has come."""
        text = self._held + text
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        begun = [
            size
            for stop in self._stops
            for size in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:size])
        ]
        kept = len(text) - max(begun, default=0)
        self._held = text[kept:]
        return text[:kept]

    def rest(self) -> str:
        """What was kept back, as no stop string came of it."""
        held, self._held = self._held, ""
        return held
