"""The model's thread: requests join the replies that are being written at the next token.

A round takes in whoever waits and fits, and gives every reply one more token. So a short request does
not wait for a long one, and whatever goes wrong with one row ends that row.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from finetune.data.chat.image import ImagePrompt
from finetune.data.chat.template import ChatTemplate
from finetune.distributed.map_batches import evaluating
from finetune.generation.batch import SharedPrefix
from finetune.generation.decoder import Decoder, DecodingRow
from finetune.serving.errors import ApiError
from finetune.serving.job import ReplyJob
from finetune.serving.memory import KeptPrompts

GATHER_SECONDS = 0.005
"""How long the first request of an idle server waits for company."""
TOKEN_BUDGET = 65_536
"""Bound on rows x longest (prompt + reply) of those that are written, for the memory of their cache."""


class Writer:
    """The replies that one model is writing."""

    def __init__(self, model: Any, template: ChatTemplate) -> None:
        self.running: list[tuple[ReplyJob, DecodingRow]] = []
        self.decoder = Decoder(model, template.stop_ids)
        self.memory = KeptPrompts()
        self._model = model
        self._template = template

    def add(self, jobs: Sequence[ReplyJob]) -> None:
        """Computes prompts: those of a remembered beginning each behind it, the others together."""
        new = []
        for job in jobs:
            beginning = self.memory.beginning_of(job.request.prompt)
            if beginning is None:
                new.append(job)
            else:
                self._add([job], beginning)
        self._add(new)

    def _add(self, jobs: Sequence[ReplyJob], beginning: SharedPrefix | None = None) -> None:
        """Computes prompts together; where that fails each alone, so that one harms no other."""
        if not jobs:
            return
        requests = [job.as_request() for job in jobs]
        try:
            rows = self.decoder.add(requests, beginning)
        except Exception as error:
            if self.decoder.batch.is_lost:
                for job in jobs:
                    _fail(job, error)
                raise
            if len(jobs) == 1:
                _fail(jobs[0], error)
            else:
                for job in jobs:
                    self._add([job])
            return
        self.running += zip(jobs, rows, strict=True)
        self.settle()

    def go_on(self, jobs: Sequence[ReplyJob]) -> None:
        """Takes new jobs in, and gives every reply one more token."""
        try:
            self.add(jobs)
            if self.decoder.active:
                self.decoder.step()
            self.settle()
        except Exception as error:  # whatever it is, it must not end the server
            self._fail_all(error)

    def settle(self) -> None:
        """Tells the clients whose replies have ended, and makes room where half of them have."""
        for job, row in self.running:
            if row.error is not None:
                _fail(job, row.error)
            elif row.is_done:
                job.finish(row.stopped)
                if not isinstance(row.request.prompt, ImagePrompt):
                    self.memory.keep(self.decoder.taken(row))
        self.running = [(job, row) for job, row in self.running if not row.is_done]
        if self.decoder.is_sparse:
            self.decoder.drop_done()

    def _fail_all(self, error: Exception) -> None:
        for job, _ in self.running:
            _fail(job, error)
        self.running = []
        self.decoder = Decoder(self._model, self._template.stop_ids)


class Engine:
    """Answers jobs with one model or several, several jobs at once.

    Replies of one model are computed together, those of several models in turns, a token each.
    """

    def __init__(self, models: Mapping[str, tuple[Any, ChatTemplate]], *, batch_size: int) -> None:
        self.draining = False
        """No new job is taken."""
        self.writers = {name: Writer(*model) for name, model in models.items()}
        self._models = [model for model, _ in models.values()]
        self._batch_size = batch_size
        self._waiting: deque[ReplyJob] = deque()
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[ReplyJob]) -> None:
        """Puts jobs in the queue; their pieces come as the model writes them. They will be released."""
        with self._change:
            if self.draining:
                raise stopping()
            if any(job.request.model not in self.writers for job in jobs):
                raise ApiError(404, "this checkpoint is not served any more", code="model_not_found")  # fmt: skip
            self._waiting.extend(jobs)
            self._change.notify()

    def put(self, name: str, model: Any, template: ChatTemplate) -> None:
        """One more model, from the next request on."""
        model.eval()
        with self._change:
            self.writers = {**self.writers, name: Writer(model, template)}

    def drop(self, name: str) -> bool:
        """Lets go of a model; False while somebody is being answered by it."""
        with self._change:
            if self.writers[name].running or any(j.request.model == name for j in self._waiting):
                return False
            self.writers = {key: one for key, one in self.writers.items() if key != name}
        return True

    @property
    def load(self) -> tuple[int, int]:
        """Replies that wait, and replies that are written."""
        return len(self._waiting), len(self._running())

    @property
    def remembered_tokens(self) -> int:
        """Tokens of prompts that needed no computing, so far."""
        return sum(writer.memory.used_tokens for writer in self.writers.values())

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
        with ExitStack() as modes:
            for model in self._models:
                modes.enter_context(evaluating(model))
            while self._has_work():
                admitted = self._admitted()
                for name, writer in self.writers.items():
                    writer.go_on([job for job in admitted if job.request.model == name])

    def _has_work(self) -> bool:
        """Waits for a job when none is running; False when the server stops."""
        with self._change:
            if not self._running() and not self._waiting:
                self._change.wait_for(lambda: bool(self._waiting) or self.draining)
                self._change.wait_for(self._is_full, timeout=GATHER_SECONDS)
            return bool(self._running() or self._waiting)

    def _running(self) -> list[ReplyJob]:
        return [job for writer in self.writers.values() for job, _ in writer.running]

    def _admitted(self) -> list[ReplyJob]:
        """The first of those who wait, as many as fit beside those that are written."""
        running = [job.request.num_tokens for job in self._running()]
        width, admitted = max(running, default=0), list[ReplyJob]()
        with self._change:
            gone = [job for job in self._waiting if job.cancelled]
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
            while self._waiting and len(running) + len(admitted) < self._batch_size:
                first = self._waiting[0].request
                width = max(width, first.num_tokens)
                rows = len(running) + len(admitted) + 1
                if rows > 1 and rows * width > TOKEN_BUDGET:
                    break
                beside = [job.request for job in admitted if job.request.model == first.model]
                prompts = [request.prompt for request in (*beside, first)]
                batch = self.writers[first.model].decoder.batch
                if batch.num_at_once(prompts) < len(prompts):
                    break
                admitted.append(self._waiting.popleft())
        for job in gone:
            job.release()
        return admitted

    def _is_full(self) -> bool:
        return self.draining or len(self._waiting) >= self._batch_size


def stopping() -> ApiError:
    """The answer of a server that is on its way out."""
    return ApiError(503, "the server is stopping; try again later", code="stopping")


def _fail(job: ReplyJob, error: Exception) -> None:
    traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, torch.OutOfMemoryError):
        text = "out of memory; shorten the messages or the reply"
        job.fail(ApiError(503, text, code="overloaded"))
    else:
        text = "the model failed; the server's log says why"
        job.fail(ApiError(500, text, code="model_failed"))
