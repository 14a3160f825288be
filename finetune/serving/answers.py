"""Pieces of a reply -> the JSON of OpenAI's chat completions, whole or chunk by chunk."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from finetune.data.chat.template import ChatTemplate
from finetune.generation.decoder import ScoredToken
from finetune.generation.stream import Piece
from finetune.serving.job import FinishReason, ReplyJob


class Answer:
    """The envelope of one answer: its id, its time, its model."""

    def __init__(self, model: str, template: ChatTemplate) -> None:
        self._template = template
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def completion(self, replies: Sequence[tuple[ReplyJob, Iterable[Piece]]]) -> dict[str, Any]:
        """The whole replies as one `chat.completion`."""
        choices = [
            {
                "index": index,
                "message": _message(pieces),
                "logprobs": self._logprobs(job, 0),
                "finish_reason": job.finish_reason,
            }
            for index, (job, pieces) in enumerate(replies)
        ]
        usage = usage_of([job for job, _ in replies])
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def stream(self, job: ReplyJob, index: int) -> AnswerStream:
        """The events of one reply."""
        return AnswerStream(self, job, index)

    def usage(self, jobs: Sequence[ReplyJob]) -> str:
        """The event that says what all replies took."""
        return event({**self._head, "object": _CHUNK, "choices": [], "usage": usage_of(jobs)})

    def chunk(self, choice: dict[str, Any]) -> str:
        """An event with one choice."""
        return event({**self._head, "object": _CHUNK, "choices": [choice]})

    def _logprobs(self, job: ReplyJob, first: int) -> dict[str, Any] | None:
        """The probabilities of a reply's tokens from number `first` on; None when nobody asked."""
        if job.scores is None:
            return None
        content = [_told(scored, self._template) for scored in job.scores.tokens[first:]]
        return {"content": content, "refusal": None}


class AnswerStream:
    """One reply as events."""

    def __init__(self, answer: Answer, job: ReplyJob, index: int) -> None:
        self._answer, self._job, self._index = answer, job, index
        self._told = 0
        """Tokens whose probabilities have been told."""

    def opening(self) -> str:
        """The first event: who speaks."""
        return self._chunk({"role": "assistant", "content": ""})

    def more(self, piece: Piece) -> str:
        """The event that brings a piece."""
        if piece.call is None:
            return self._chunk({"content": piece.text})
        if piece.name:
            return self._chunk({"tool_calls": [{"index": piece.call, **_call(piece)}]})
        function = {"arguments": piece.text}
        return self._chunk({"tool_calls": [{"index": piece.call, "function": function}]})

    def closing(self) -> str:
        """The last event: why the reply ended."""
        return self._chunk({}, self._job.finish_reason)

    def _chunk(self, delta: dict[str, Any], finish_reason: FinishReason | None = None) -> str:
        logprobs = self._answer._logprobs(self._job, self._told)
        self._told += len(logprobs["content"]) if logprobs else 0
        choice = {"index": self._index, "delta": delta, "logprobs": logprobs}
        return self._answer.chunk({**choice, "finish_reason": finish_reason})


DONE = "data: [DONE]\n\n"
_CHUNK = "chat.completion.chunk"


def usage_of(jobs: Sequence[ReplyJob]) -> dict[str, int]:
    """Tokens that a request took."""
    prompt, reply = len(jobs[0].request.prompt), sum(job.num_tokens for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": reply,
        "total_tokens": prompt + reply,
    }


def event(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _message(pieces: Iterable[Piece]) -> dict[str, Any]:
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
    return message


def _call(piece: Piece) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": piece.name, "arguments": piece.text},
    }


def _told(scored: ScoredToken, template: ChatTemplate) -> dict[str, Any]:
    """A token with its probability, in OpenAI's form."""
    return _token(scored.token, scored.logprob, template) | {
        "top_logprobs": [_token(token, logprob, template) for token, logprob in scored.likeliest]
    }


def _token(token: int, logprob: float, template: ChatTemplate) -> dict[str, Any]:
    spelled = _bytes_of(template.tokenizer.backend.id_to_token(token) or "")
    text = spelled.decode(errors="replace")
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(spelled)}


def _bytes_of(token: str) -> bytes:
    """The bytes of a token of a byte-level tokenizer, which spells each as one character."""
    alphabet = _alphabet()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()  # a control token


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: what is printed stands for itself, the others from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    spelled = [*shown, *(0x100 + number for number in range(len(others)))]
    return {chr(code): byte for code, byte in zip(spelled, [*shown, *others], strict=True)}
