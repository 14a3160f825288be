"""The model's thread: requests join the replies that are being written at the next token.

A round takes in whoever waits and fits, and gives every reply one more token. So a short request does
not wait for a long one, and whatever goes wrong with one row ends that row.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from finetune.distributed.map_batches import evaluating
from finetune.generation.load import OpenedModel
from finetune.methods.adapter_rows import AdapterRows, can_share
from finetune.methods.ptuning_v2 import is_attached
from finetune.models.kernels.products import packed
from finetune.serving.errors import ApiError
from finetune.serving.job import Outbox, ReplyJob
from finetune.serving.writer import WIDTHS, Writer, width_of

GATHER_SECONDS = 0.005
"""How long the first request of an idle server waits for company."""
TOKEN_BUDGET = 65_536
"""Bound on rows x longest (prompt + reply) of the short and of the long ones, for the memory of their cache."""


class Engine:
    """Answers jobs with one model or several, several jobs at once.

    Replies of a base, of plain LoRA adapters and of prefixes on it are computed together, those of other
    models in turns, a token each.
    """

    def __init__(self, models: Mapping[str, OpenedModel], *, batch_size: int, more_come: bool = False) -> None:  # fmt: skip
        self.draining = False
        """No new job is taken."""
        self.outbox = Outbox()
        """Takes what the model's thread has for the clients of jobs."""
        self._shares = more_come or len(models) > 1
        self._shared: dict[int, Writer] = {}
        """By the identity of the base."""
        self.writers = {name: self._writer(name, opened) for name, opened in models.items()}
        own = {id(one): one for opened in models.values() for one in (opened.model, opened.plain)}
        self._models = [model for model in own.values() if model is not None]
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

    def put(self, name: str, opened: OpenedModel) -> None:
        """One more model, from the next request on."""
        opened.model.eval()
        with self._change:
            self.writers = {**self.writers, name: self._writer(name, opened)}

    def drop(self, name: str) -> bool:
        """Lets go of a model; False while somebody is being answered by it."""
        with self._change:
            if any(j.request.model == name for j in (*self.writers[name].jobs, *self._waiting)):
                return False
            writer = self.writers[name]
            self.writers = {key: one for key, one in self.writers.items() if key != name}
            if isinstance(writer.model, AdapterRows):
                writer.drop(name)
        return True

    def _writer(self, name: str, opened: OpenedModel) -> Writer:
        """What writes a model's replies: where bases and adapters may share a pass, one for all of them."""
        if not self._shares or opened.plain is None:
            return Writer(opened.model, opened.template)
        is_base = opened.model is opened.plain
        is_prefix = is_attached(opened.model) and opened.template.image is None
        if not (is_base or is_prefix or can_share(opened.model)):
            return Writer(opened.model, opened.template)
        writer = self._shared.get(id(opened.plain))
        if writer is None:
            writer = Writer(AdapterRows(opened.plain), opened.template)
            self._shared[id(opened.plain)] = writer
        elif writer.stop_ids != opened.template.stop_ids:
            return Writer(opened.model, opened.template)
        if not is_base:
            writer.put(name, opened.model)
        return writer

    @property
    def _all_writers(self) -> list[Writer]:
        return list({id(writer): writer for writer in self.writers.values()}.values())

    @property
    def load(self) -> tuple[int, int]:
        """Replies that wait, and replies that are written."""
        return len(self._waiting), len(self._running())

    @property
    def remembered_tokens(self) -> int:
        """Tokens of prompts that needed no computing, so far."""
        memories = [one for writer in self._all_writers for one in [*writer.memories.values()]]
        return sum(memory.used_tokens for memory in memories)

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
            job.fail(stopping(), at_once=True)

    def _work(self) -> None:
        with ExitStack() as modes:
            for model in self._models:
                modes.enter_context(evaluating(model))
                modes.enter_context(packed(model))
            while self._has_work():
                for job in self._admitted():
                    self.writers[job.request.model].take(job)
                for writer in self._all_writers:
                    writer.go_on()
                    self.outbox.flush()

    def _has_work(self) -> bool:
        """Waits for a job when none is running; False when the server stops."""
        with self._change:
            if not self._running() and not self._waiting:
                self._change.wait_for(lambda: bool(self._waiting) or self.draining)
                self._change.wait_for(self._is_full, timeout=GATHER_SECONDS)
            return bool(self._running() or self._waiting)

    def _running(self) -> list[ReplyJob]:
        return [job for writer in self._all_writers for job in writer.jobs]

    def _admitted(self) -> list[ReplyJob]:
        """Those of the waiting who fit beside what is in work, in their order among long and short ones."""
        beside = {width: list[int]() for width in WIDTHS}
        for job in self._running():
            beside[width_of(job.request)].append(job.request.num_tokens)
        gone, admitted, left = list[ReplyJob](), list[ReplyJob](), deque[ReplyJob]()
        with self._change:
            places, closed = self._batch_size - sum(map(len, beside.values())), set[str]()
            for job in self._waiting:
                width = width_of(job.request)
                if job.cancelled:
                    gone.append(job)
                elif len(admitted) < places and width not in closed and _fits(beside[width], job):
                    beside[width].append(job.request.num_tokens)
                    admitted.append(job)
                else:
                    closed.add(width)  # nobody goes past those who came first
                    left.append(job)
            self._waiting = left
        for job in gone:
            job.release()
        return admitted

    def _is_full(self) -> bool:
        return self.draining or len(self._waiting) >= self._batch_size


def stopping() -> ApiError:
    """The answer of a server that is on its way out."""
    return ApiError(503, "the server is stopping; try again later", code="stopping")


def _fits(beside: Sequence[int], job: ReplyJob) -> bool:
    """Whether there is memory for one more among rows of so many tokens; alone, always."""
    rows = len(beside) + 1
    return rows == 1 or rows * max(*beside, job.request.num_tokens) <= TOKEN_BUDGET
