"""The model's thread: whatever waits is answered together, batch by batch.

A batch is made of what waits when the one before it ends, in the order of arrival. Every row has
settings and an end of its own, so that requests need not be alike; a row whose client has left ends
at its next token.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from typing import Any

import torch

from finetune.data.chat.template import ChatTemplate
from finetune.generation.decoding import Ask, decode
from finetune.serving.errors import ApiError
from finetune.serving.job import Job

GATHER_SECONDS = 0.005
"""How long the first request of an idle server waits for company."""
TOKEN_BUDGET = 65_536
"""Bound on rows x longest (prompt + reply) of a batch, for the memory of its cache."""


class Engine:
    """Answers jobs with one model, several at once."""

    def __init__(self, model: Any, template: ChatTemplate, *, batch_size: int) -> None:
        self.draining = False
        """No new job is taken."""
        self._model = model
        self._template = template
        self._batch_size = batch_size
        self._waiting: deque[Job] = deque()
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Puts a job in the queue; its pieces come as the model writes them."""
        with self._change:
            if self.draining:
                raise stopping()
            self._waiting.append(job)
            self._change.notify()

    def drain(self) -> None:
        """Refuses what waits and what may come; what is being written goes on. Safe in a handler."""
        self.draining = True
        threading.Thread(target=self._refuse_waiting, daemon=True).start()

    def close(self, seconds: float = 10.0) -> None:
        """Ends the thread; called when no job is wanted any more."""
        self.draining = True
        self._refuse_waiting()
        self._thread.join(seconds)

    def _refuse_waiting(self) -> None:
        with self._change:
            refused, self._waiting = self._waiting, deque()
            self._change.notify()
        for job in refused:
            job.fail(stopping())

    def _work(self) -> None:
        while batch := self._next_batch():
            asks = [Ask(job.ask.prompt, job.ask.decoding, job.take) for job in batch]
            try:
                decode(self._model, self._template, asks)
            except Exception as error:  # whatever it is, it must not end the server
                traceback.print_exc(file=sys.stderr)
                for job in batch:
                    job.fail(_failure(error))
            else:
                for job in batch:
                    job.finish()

    def _next_batch(self) -> list[Job]:
        """Jobs to answer together, waiting for the first of them; none when the server stops."""
        batch: list[Job] = []
        with self._change:
            while not batch and not self.draining:
                if not self._waiting:
                    self._change.wait_for(lambda: bool(self._waiting) or self.draining)
                    self._change.wait_for(self._is_full, timeout=GATHER_SECONDS)
                batch = self._taken()
        return batch

    def _taken(self) -> list[Job]:
        """The first of those who wait, as many as go together."""
        batch: list[Job] = []
        width = 0
        while self._waiting and len(batch) < self._batch_size:
            ask = self._waiting[0].ask
            width = max(width, len(ask.prompt) + ask.decoding.max_new_tokens)
            if batch and (len(batch) + 1) * width > TOKEN_BUDGET:
                break
            job = self._waiting.popleft()
            if not job.cancelled:
                batch.append(job)
        return batch

    def _is_full(self) -> bool:
        return self.draining or len(self._waiting) >= self._batch_size


def stopping() -> ApiError:
    """The answer of a server that is on its way out."""
    return ApiError(503, "the server is stopping; try again later", code="stopping")


def _failure(error: Exception) -> ApiError:
    if isinstance(error, torch.OutOfMemoryError):
        return ApiError(503, "out of memory; shorten the messages or the reply", code="overloaded")
    return ApiError(500, "the model failed; the server's log says why", code="model_failed")
