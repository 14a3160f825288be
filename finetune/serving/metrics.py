"""What the endpoint has done so far, as Prometheus reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from finetune.serving.answers import usage_of
from finetune.serving.engine import Engine
from finetune.serving.job import ReplyJob

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts of one server; used by the event loop's thread alone."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._statuses = Counter[str]()
        self._prompt_tokens = 0
        self._reply_tokens = 0
        self._first_tokens = 0
        self._seconds_to_first = 0.0

    def count_answer(self, status: str) -> None:
        """A request was answered with an HTTP status, or its client is gone."""
        self._statuses[status] += 1

    def count_replies(self, jobs: Sequence[ReplyJob]) -> None:
        """Replies to one request have ended, or nobody waits for them any more."""
        used = usage_of(jobs)
        self._prompt_tokens += used["prompt_tokens"]
        self._reply_tokens += used["completion_tokens"]
        waited = [job.seconds_to_first for job in jobs if job.seconds_to_first is not None]
        self._first_tokens += len(waited)
        self._seconds_to_first += sum(waited)

    def text(self) -> str:
        """All of it."""
        waiting, running = self._engine.load
        requests = [f'{{status="{status}"}} {n}' for status, n in sorted(self._statuses.items())]
        return "".join(
            [
                *_metric("requests_total", "counter", "Requests by HTTP status.", requests),
                *_metric("replies_running", "gauge", "Replies that are written.", [f" {running}"]),
                *_metric("replies_waiting", "gauge", "Replies in the queue.", [f" {waiting}"]),
                *_metric("prompt_tokens_total", "counter", "Tokens of prompts.", [f" {self._prompt_tokens}"]),
                *_metric("remembered_prompt_tokens_total", "counter", "Tokens of prompts that needed no computing.", [f" {self._engine.remembered_tokens}"]),
                *_metric("reply_tokens_total", "counter", "Tokens of replies.", [f" {self._reply_tokens}"]),
                *_metric("first_tokens_total", "counter", "Replies that began.", [f" {self._first_tokens}"]),
                *_metric("first_token_seconds_total", "counter", "Seconds until they began, in all.", [f" {self._seconds_to_first:.6f}"]),
            ]
        )  # fmt: skip


def _metric(name: str, kind: str, words: str, values: Sequence[str]) -> list[str]:
    head = [f"# HELP finetune_{name} {words}\n", f"# TYPE finetune_{name} {kind}\n"]
    return [*head, *(f"finetune_{name}{value}\n" for value in values)]
