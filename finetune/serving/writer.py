"""The replies that one model writes: new prompts are read piece by piece between the tokens of others.

Of every prompt a round reads one piece at most, so that nobody's next token waits for a long prompt. A long
prompt and the reply to it stand in a batch of their own: a batch is as wide as its widest row.
"""

from __future__ import annotations

import sys
import traceback
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from finetune.data.chat.image import ImagePrompt
from finetune.data.chat.template import ChatTemplate
from finetune.generation.batch import Prompt, SharedPrefix
from finetune.generation.decoder import Decoder, DecodingRow
from finetune.methods.adapter_rows import AdapterRows, prefix_of
from finetune.serving.errors import ApiError
from finetune.serving.job import ReplyJob
from finetune.serving.memory import KeptPrompts
from finetune.serving.requests.rules import ReplyRequest

PIECE = 512
"""Tokens that a round reads of the first long prompt, and as many of short ones together."""
LONG = 8192
"""Tokens of prompt and reply from which on a row stands among long ones."""
Width: TypeAlias = Literal["short", "long"]
WIDTHS: tuple[Width, Width] = ("short", "long")


def width_of(request: ReplyRequest) -> Width:
    """Among which rows a reply is written; it does not depend on who else is there."""
    return "long" if request.num_tokens >= LONG else "short"


class PendingPrompt:
    """A prompt that is being read, for one reply or several."""

    def __init__(self, job: ReplyJob, prompt: Prompt, known: SharedPrefix) -> None:
        self.jobs = [job]
        self.prompt = prompt
        """With the tokens that a trained prefix stands for."""
        self.name = job.request.model
        self.known = known
        """What has been computed of it."""

    def is_for(self, job: ReplyJob) -> bool:
        """Whether a job is another reply to this very prompt."""
        return self.jobs[0].request.prompt is job.request.prompt

    @property
    def left(self) -> int:
        """Tokens that have not been read."""
        return len(self.prompt) - len(self.known.ids)

    @property
    def is_long(self) -> bool:
        """There is more of it than a round reads. An image is read at once, with its prompt."""
        return self.left > PIECE and not isinstance(self.prompt, ImagePrompt)

    def advance(self, model: Any) -> None:
        """Reads one piece, short of the last one."""
        begin = len(self.known.ids)
        self.known = self.known.more(model, [*map(int, self.prompt[begin : begin + PIECE])])

    def drop_cancelled(self) -> None:
        """Lets go of replies that nobody waits for."""
        for job in self.jobs:
            if job.cancelled:
                job.release()
        self.jobs = [job for job in self.jobs if not job.cancelled]


class Writer:
    """What one model reads and writes, or a base with its adapters; `take` brings work, `go_on` does a round."""

    def __init__(self, model: Any, template: ChatTemplate) -> None:
        self.memories: defaultdict[str, KeptPrompts] = defaultdict(KeptPrompts)
        """What is remembered of each model."""
        self._prefixes: dict[str, list[tuple[Tensor, Tensor]]] = {}
        """Trained keys and values of the models that are a prefix."""
        self.lanes = {width: Lane(model, template, self.memories) for width in WIDTHS}
        self.model = model
        """An `AdapterRows` where there are adapters."""
        self.stop_ids = template.stop_ids
        self._reading: list[PendingPrompt] = []

    @property
    def jobs(self) -> list[ReplyJob]:
        """All that are in work."""
        read = [job for reading in self._reading for job in reading.jobs]
        return read + [job for lane in self.lanes.values() for job, _ in lane.running]

    def take(self, job: ReplyJob) -> None:
        """A new job; the prompt of several replies is read once."""
        for reading in self._reading:
            if reading.is_for(job):
                reading.jobs.append(job)
                return
        name, prompt = job.request.model, job.request.prompt
        own = SharedPrefix.kept([], [])
        if name in self._prefixes:
            # As if the prefix were tokens that have been read; which ones does not matter.
            own = SharedPrefix.kept([prompt[0]] * self._num_virtual(name), self._prefixes[name])
            prompt = [*own.ids, *prompt]
        known = self.memories[name].beginning_of(prompt)
        self._reading.append(PendingPrompt(job, prompt, known or own))

    def put(self, name: str, adapted: Any) -> None:
        """One more adapter of the base: plain LoRA, or a prefix; from any thread."""
        if prefix := prefix_of(adapted):
            self._prefixes = {**self._prefixes, name: prefix}
            self.memories[name] = KeptPrompts(virtual=self._num_virtual(name))
        else:
            self.model.put(name, adapted)

    def drop(self, name: str) -> None:
        """Forgets an adapter of the base."""
        self.model.drop(name)
        self._prefixes.pop(name, None)
        self.memories.pop(name, None)

    def _num_virtual(self, name: str) -> int:
        return int(self._prefixes[name][0][0].shape[2])

    def go_on(self) -> None:
        """Reads pieces of new prompts, and gives every reply one more token."""
        for reading in self._reading:
            reading.drop_cancelled()
        self._reading = [reading for reading in self._reading if reading.jobs]
        whole = self._whole()
        long = next((reading for reading in self._reading if reading.is_long), None)
        if long is not None:
            self._advance(long)
        for width, lane in self.lanes.items():
            lane.go_on([one for one in whole if width_of(one.jobs[0].request) == width])

    def _whole(self) -> list[PendingPrompt]:
        """Of the prompts whose rest is short as many as one round reads; they leave the queue.

        The oldest, and those that are nearest to it in length: what is read together is as wide as the widest.
        """
        short = [one for one in self._reading if not one.is_long]
        found, widest = list[PendingPrompt](), 0
        for reading in sorted(short, key=lambda one: abs(one.left - short[0].left)):
            widest = max(widest, reading.left)
            if found and (len(found) + 1) * widest > PIECE:
                break
            found.append(reading)
        self._reading = [one for one in self._reading if one not in found]
        return found

    def _advance(self, long: PendingPrompt) -> None:
        try:
            if isinstance(self.model, AdapterRows):
                self.model.choose([long.name])
            long.advance(self.model)
        except Exception as error:
            self._reading.remove(long)
            for job in long.jobs:
                fail(job, error)


class Lane:
    """Rows that are written together."""

    def __init__(
        self, model: Any, template: ChatTemplate, memories: Mapping[str, KeptPrompts]
    ) -> None:
        self.running: list[tuple[ReplyJob, DecodingRow]] = []
        self.decoder = Decoder(model, template.stop_ids)
        self._model = model
        self._template = template
        self._memories = memories

    def go_on(self, read: Sequence[PendingPrompt]) -> None:
        """Takes in prompts whose last piece is to be read, and gives every reply one more token.

        Those of one model of which the same beginning is known go through it together.
        """
        try:
            alike = defaultdict[tuple[str, tuple[int, ...]], list[PendingPrompt]](list)
            for one in read:
                alike[one.name, tuple(one.known.ids)].append(one)
            for (_, known), group in alike.items():
                self._add(group, group[0].known if known else None)
            if self.decoder.active:
                self.decoder.step()
            self._settle()
        except Exception as error:  # whatever it is, it must not end the server
            self._fail_all(error)

    def _add(self, read: Sequence[PendingPrompt], known: SharedPrefix | None = None) -> None:
        """Computes prompts together; where that fails each alone, so that one harms no other."""
        asked = [(job, one.prompt) for one in read for job in one.jobs]
        jobs = [job for job, _ in asked]
        requests = [job.as_request(prompt) for job, prompt in asked]
        try:
            rows = self.decoder.add(requests, known)
        except Exception as error:
            if self.decoder.batch.is_lost:
                for job in jobs:
                    fail(job, error)
                raise
            if len(read) == 1:
                for job in jobs:
                    fail(job, error)
            else:
                for one in read:
                    self._add([one], known)
            return
        self.running += zip(jobs, rows, strict=True)
        self._settle()

    def _settle(self) -> None:
        """Tells the clients whose replies have ended, and makes room where half of them have."""
        for job, row in self.running:
            if row.error is not None:
                fail(job, row.error)
            elif row.is_done:
                job.finish(row.stopped)
                if not isinstance(row.request.prompt, ImagePrompt):
                    self._memories[job.request.model].keep(self.decoder.taken(row))
        self.running = [(job, row) for job, row in self.running if not row.is_done]
        if self.decoder.is_sparse:
            self.decoder.drop_done()

    def _fail_all(self, error: Exception) -> None:
        for job, _ in self.running:
            fail(job, error)
        self.running = []
        self.decoder = Decoder(self._model, self._template.stop_ids)


def fail(job: ReplyJob, error: Exception) -> None:
    """Tells a client that its reply cannot be written, and the log why."""
    traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, torch.OutOfMemoryError):
        text = "out of memory; shorten the messages or the reply"
        job.fail(ApiError(503, text, code="overloaded"))
    else:
        text = "the model failed; the server's log says why"
        job.fail(ApiError(500, text, code="model_failed"))
