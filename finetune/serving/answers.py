"""Pieces of a reply -> the JSON of OpenAI's chat completions, whole or chunk by chunk."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Iterator
from typing import Any

from finetune.generation.stream import Piece
from finetune.serving.job import FinishReason


class Answer:
    """The envelope of one answer: its id, its time, its model."""

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def completion(
        self, pieces: Iterable[Piece], finish_reason: FinishReason | None, usage: dict[str, int]
    ) -> dict[str, Any]:
        """The whole reply as one `chat.completion`."""
        text: list[str] = []
        calls: list[dict[str, Any]] = []
        for piece in pieces:
            if piece.call is None:
                text.append(piece.text)
            elif piece.name:
                calls.append(_call(piece))
            else:
                calls[piece.call]["function"]["arguments"] += piece.text
        message: dict[str, Any] = {"role": "assistant", "content": "".join(text), "refusal": None}
        if calls:
            message |= {"content": "".join(text) or None, "tool_calls": calls}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage}

    def opening(self) -> str:
        """The first event of a stream: who speaks."""
        return self._chunk({"role": "assistant", "content": ""})

    def more(self, piece: Piece) -> str:
        """The event that brings a piece."""
        if piece.call is None:
            return self._chunk({"content": piece.text})
        if piece.name:
            return self._chunk({"tool_calls": [{"index": piece.call, **_call(piece)}]})
        function = {"arguments": piece.text}
        return self._chunk({"tool_calls": [{"index": piece.call, "function": function}]})

    def closing(
        self, finish_reason: FinishReason | None, usage: dict[str, int] | None
    ) -> Iterator[str]:
        """The last events: why the reply ended, and on demand what it took."""
        yield self._chunk({}, finish_reason)
        if usage is not None:
            yield event({**self._head, "object": _CHUNK, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], finish_reason: FinishReason | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**self._head, "object": _CHUNK, "choices": [choice]})


_CHUNK = "chat.completion.chunk"


def usage_of(prompt: int, reply: int) -> dict[str, int]:
    """Tokens that a request took."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": reply,
        "total_tokens": prompt + reply,
    }


def event(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _call(piece: Piece) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": piece.name, "arguments": piece.text},
    }
