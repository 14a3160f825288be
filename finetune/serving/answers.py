"""Pieces of a reply -> the JSON of OpenAI's completions, whole or chunk by chunk."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, ClassVar

from finetune.data.chat.template import ChatTemplate
from finetune.generation.decoder import ScoredToken
from finetune.generation.stream import Piece
from finetune.serving.job import FinishReason, ReplyJob


class Answer(ABC):
    """The envelope of one answer: its id, its time, its model."""

    prefix: ClassVar[str]
    whole: ClassVar[str]
    part: ClassVar[str]
    """What the id begins with, and what a whole answer and an event call themselves."""

    def __init__(self, model: str, template: ChatTemplate) -> None:
        self._template = template
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def completion(self, replies: Sequence[tuple[ReplyJob, Iterable[Piece]]]) -> dict[str, Any]:
        """The whole replies as one answer."""
        choices = [
            {
                "index": index,
                **self.choice(pieces),
                "logprobs": self.logprobs(self.scored(job), 0),
                "finish_reason": job.finish_reason,
                **self.ids(job),
            }
            for index, (job, pieces) in enumerate(replies)
        ]
        usage = usage_of([job for job, _ in replies])
        return {**self._head, "object": self.whole, "choices": choices, "usage": usage}

    def stream(self, job: ReplyJob, index: int) -> AnswerStream:
        """The events of one reply."""
        return AnswerStream(self, job, index)

    def usage(self, jobs: Sequence[ReplyJob]) -> str:
        """The event that says what all replies took."""
        return event({**self._head, "object": self.part, "choices": [], "usage": usage_of(jobs)})

    def chunk(self, choice: dict[str, Any]) -> str:
        """An event with one choice."""
        return event({**self._head, "object": self.part, "choices": [choice]})

    def scored(self, job: ReplyJob, first: int = 0) -> list[dict[str, Any]] | None:
        """A reply's tokens from number `first` on with their probabilities; None when nobody asked."""
        if job.scores is None:
            return None
        return [_told(scored, self._template) for scored in job.scores.tokens[first:]]

    def ids(self, job: ReplyJob, first: int = 0) -> dict[str, list[int]]:
        """A reply's ids from number `first` on, as vLLM tells them; nothing when nobody asked."""
        return {"token_ids": job.ids[first:]} if job.request.tells_ids else {}

    @abstractmethod
    def choice(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """A whole reply."""

    @abstractmethod
    def opening(self) -> dict[str, Any] | None:
        """What the first event says, if there is one before the first token."""

    @abstractmethod
    def more(self, piece: Piece | None) -> dict[str, Any]:
        """What the event of a piece says; None is the end."""

    @abstractmethod
    def logprobs(self, told: list[dict[str, Any]] | None, place: int) -> dict[str, Any] | None:
        """The probabilities of tokens that stand `place` characters behind the reply's beginning."""


class ChatAnswer(Answer):
    """`chat.completion`."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """The message."""
        return {"message": _message(pieces)}

    def opening(self) -> dict[str, Any] | None:
        """Who speaks."""
        return {"delta": {"role": "assistant", "content": ""}}

    def more(self, piece: Piece | None) -> dict[str, Any]:
        """More of the text or of a call."""
        if piece is None:
            return {"delta": {}}
        if piece.call is None:
            key = "reasoning_content" if piece.is_thought else "content"
            return {"delta": {key: piece.text}}
        more = _call(piece) if piece.name else {"function": {"arguments": piece.text}}
        return {"delta": {"tool_calls": [{"index": piece.call, **more}]}}

    def logprobs(self, told: list[dict[str, Any]] | None, place: int) -> dict[str, Any] | None:
        """A list of tokens."""
        return None if told is None else {"content": told, "refusal": None}


class TextAnswer(Answer):
    """`text_completion`."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def choice(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """The text."""
        return {"text": "".join(piece.text for piece in pieces)}

    def opening(self) -> dict[str, Any] | None:
        """Nothing: a text has no speaker."""
        return None

    def more(self, piece: Piece | None) -> dict[str, Any]:
        """More of the text."""
        return {"text": piece.text if piece else ""}

    def logprobs(self, told: list[dict[str, Any]] | None, place: int) -> dict[str, Any] | None:
        """Four lists side by side."""
        if told is None:
            return None
        texts = [token["token"] for token in told]
        return {
            "tokens": texts,
            "token_logprobs": [token["logprob"] for token in told],
            "top_logprobs": [
                {one["token"]: one["logprob"] for one in [*token["top_logprobs"], token]}
                for token in told
            ],
            "text_offset": list(accumulate(map(len, texts), initial=place))[:-1],
        }


class AnswerStream:
    """One reply as events."""

    def __init__(self, answer: Answer, job: ReplyJob, index: int) -> None:
        self._answer, self._job, self._index = answer, job, index
        self._told = self._place = 0
        """Tokens whose probabilities have been told, and the characters of their text."""
        self._num_ids = 0
        """Ids that have been told."""

    def opening(self) -> str:
        """The first event, if there is one before the first token."""
        said = self._answer.opening()
        return self._chunk(said) if said is not None else ""

    def more(self, piece: Piece) -> str:
        """The event that brings a piece."""
        return self._chunk(self._answer.more(piece))

    def closing(self) -> str:
        """The last event: why the reply ended."""
        return self._chunk(self._answer.more(None), self._job.finish_reason)

    def _chunk(self, said: dict[str, Any], finish_reason: FinishReason | None = None) -> str:
        told = self._answer.scored(self._job, self._told)
        logprobs = self._answer.logprobs(told, self._place)
        self._told += len(told or ())
        self._place += sum(len(token["token"]) for token in told or ())
        ids = self._answer.ids(self._job, self._num_ids)
        self._num_ids += sum(map(len, ids.values()))
        choice = {"index": self._index, **said, "logprobs": logprobs}
        return self._answer.chunk({**choice, "finish_reason": finish_reason, **ids})


DONE = "data: [DONE]\n\n"


def usage_of(jobs: Sequence[ReplyJob]) -> dict[str, int]:
    """Tokens that a request took."""
    prompts = {id(job.request.prompt): len(job.request.prompt) for job in jobs}
    prompt, reply = sum(prompts.values()), sum(job.num_tokens for job in jobs)
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
    thought: list[str] = []
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if piece.is_thought:
            thought.append(piece.text)
        elif piece.call is None:
            text.append(piece.text)
        elif piece.name:
            calls.append(_call(piece))
        else:
            calls[piece.call]["function"]["arguments"] += piece.text
    message: dict[str, Any] = {"role": "assistant", "content": "".join(text), "refusal": None}
    if thought:
        message["reasoning_content"] = "".join(thought)
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
