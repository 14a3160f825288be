"""One reply on its way from the model's thread to the client that waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal, TypeAlias

from finetune.data.chat.template import ChatTemplate
from finetune.generation.batch import Prompt
from finetune.generation.decoder import Request, Scores
from finetune.generation.stream import Piece, TextStream, reply_stream
from finetune.serving.errors import ApiError
from finetune.serving.requests.rules import ReplyRequest

Event: TypeAlias = "list[Piece] | ApiError | None"
"""Pieces of a reply; None is its end."""
FinishReason: TypeAlias = Literal["stop", "length", "tool_calls"]


class Outbox:
    """What a round of the model has for its clients: each loop is woken once for all of them."""

    def __init__(self) -> None:
        self._held: list[tuple[ReplyJob, Event]] = []

    def put(self, job: ReplyJob, event: Event) -> None:
        """Takes an event; from the model's thread."""
        self._held.append((job, event))

    def flush(self) -> None:
        """Sends what there is; from the model's thread."""
        held, self._held = self._held, []
        for loop in dict.fromkeys(job.loop for job, _ in held):
            own = [(job, event) for job, event in held if job.loop is loop and not job.cancelled]
            if own:  # a loop of cancelled jobs may be closed
                loop.call_soon_threadsafe(_deliver, own)


def _deliver(held: Sequence[tuple[ReplyJob, Event]]) -> None:
    for job, event in held:
        job.receive(event)


class ReplyJob:
    """What a client asked for; `take` to `fail` belong to the model's thread, the rest to the client's."""

    def __init__(
        self,
        request: ReplyRequest,
        template: ChatTemplate,
        release: Callable[[], object] = bool,
        outbox: Outbox | None = None,
    ) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        """That of the client."""
        self._outbox = outbox
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
            TextStream(template, to_the_stop=request.tells_ids)
            if request.is_text
            else reply_stream(template, request.tools, thinks=request.thinks)
        )
        self._text = StopStrings(request.stops)
        self._num_calls = 0
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    @property
    def num_tokens(self) -> int:
        """Tokens of the reply so far, without its stop."""
        return len(self._reply.ids)

    @property
    def ids(self) -> list[int]:
        """They themselves."""
        return self._reply.ids

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

    def fail(self, error: ApiError, *, at_once: bool = False) -> None:
        """The reply cannot be written; `at_once` where no round of the model comes behind it."""
        self.release()
        self._outbox = None if at_once else self._outbox
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
            if piece.call is not None or piece.is_thought:
                wanted.append(piece)
            elif text := self._text.feed(piece.text):
                wanted.append(Piece(text))
        if wanted:
            self._send(wanted)

    def receive(self, event: Event) -> None:
        """Takes what the model's thread has sent."""
        self._events.put_nowait(event)

    def _send(self, event: Event) -> None:
        if self.cancelled:  # then the loop may be closed, too
            return
        if self._outbox is None:
            self.loop.call_soon_threadsafe(self.receive, event)
        else:
            self._outbox.put(self, event)


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
