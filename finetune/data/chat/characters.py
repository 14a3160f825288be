"""Tokens -> text, each character when its last byte is there."""

from __future__ import annotations

from typing import Any


class Characters:
    """The text of tokens that come one at a time."""

    def __init__(self, plain: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._plain = plain
        self._stream = DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._told = 0

    def step(self, token: int) -> str:
        """What the next token adds."""
        self._ids.append(token)
        text = self._stream.step(self._plain, token) or ""
        self._told += len(text)
        return text

    def rest(self) -> str:
        """What is left at the end: the start of a character that never came to its end."""
        text = str(self._plain.decode(self._ids, skip_special_tokens=False))[self._told :]
        self._told += len(text)
        return text
