"""Jobs of the endpoint without a server: what was asked, and what has come for the client."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from finetune.data.chat.template import ChatTemplate
from finetune.generation.decoder import Decoding
from finetune.serving.job import ReplyJob
from finetune.serving.requests.rules import ReplyRequest


def request(prompt: Sequence[int] = (1, 2, 3), length: int = 5, **how: Any) -> ReplyRequest:
    given: dict[str, Any] = {"tools": (), "stops": (), "model": "m", "many_calls": True}
    given |= {"stream": False, "include_usage": False, **how}
    return ReplyRequest(prompt=list(prompt), decoding=Decoding(length), **given)


def job(template: ChatTemplate, asked: ReplyRequest | None = None, **how: Any) -> ReplyJob:
    return ReplyJob(asked if asked is not None else request(), template, **how)


def ids_of(template: ChatTemplate, text: str) -> list[int]:
    return list(template.tokenizer.plain.encode(text, add_special_tokens=False).ids)


async def events(one: ReplyJob) -> list[Any]:
    """What has come for the client of a job."""
    await asyncio.sleep(0)
    return [one._events.get_nowait() for _ in range(one._events.qsize())]
