"""New tokens, one at a time -> pieces of the reply's text and calls, as soon as they are whole."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

FUNCTION_NAME = re.compile(r"[\w.-]+")


class Piece(NamedTuple):
    """More of a reply."""

    text: str
    call: int | None = None
    """Number of the call whose arguments `text` goes on; None: it goes on the reply's own text."""
    name: str = ""
    """The function's name, in the first piece of a call."""


class ReplyStream:
    """Reads a reply while it is written; characters come whole, calls with their name."""

    def __init__(self, template: Any, tools: Sequence[Mapping[str, Any]]) -> None:
        self.ids: list[int] = []
        """The reply so far, without its stop."""
        self.over = False
        """The model ended the reply, with a stop or with a control token that no reply holds."""
        self._plain = template.tokenizer.plain
        self._control = frozenset(template.tokenizer.control_ids.values()) | set(template.stop_ids)
        self._next_call = template.tokenizer.control_ids["<|assistant|>"]
        self._offers_tools = bool(tools)
        self._calls = 0
        self._characters = _Characters(self._plain)
        self._head: str | None = ""
        self._is_call = False
        self._opening = self._feed(template.layout.suffix)  # `\n<think>` of GLM-Z1

    def take(self, token: int) -> list[Piece]:
        """What the next token adds that can be shown."""
        opening, self._opening = self._opening, []
        if self.over:
            return opening
        if token == self._next_call and self._is_call:
            self.ids.append(token)
            opening += self.finish()
            self._calls += 1
            self._characters = _Characters(self._plain)
            self._head, self._is_call = "", False
            return opening
        if token in self._control:
            self.over = True
            return opening
        self.ids.append(token)
        return opening + self._feed(self._characters.step(token))

    def finish(self) -> list[Piece]:
        """What is left at the end: the start of a character that never came to its end."""
        pieces = self._opening + self._feed(self._characters.rest())
        if self._head:
            pieces.append(Piece(self._head))
        self._head, self._opening = None, []
        return pieces

    def _feed(self, text: str) -> list[Piece]:
        """A plain reply opens with a line break, a call with the function's name and a line break."""
        if self._head is None:
            return [Piece(text, self._calls if self._is_call else None)] if text else []
        self._head += text
        line, line_break, rest = self._head.partition("\n")
        name = line.strip()
        may_be_name = self._offers_tools and (not name or FUNCTION_NAME.fullmatch(name))
        if not line_break and (may_be_name or not self._head):
            return []
        self._is_call = bool(may_be_name and name)
        said = rest if line_break and not name else self._head
        self._head = None
        if self._is_call:
            return [Piece(rest, self._calls, name)]
        return [Piece(said)] if said else []


class _Characters:
    """Tokens -> text, each character when its last byte is there."""

    def __init__(self, plain: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._plain = plain
        self._stream = DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._told = 0

    def step(self, token: int) -> str:
        self._ids.append(token)
        text = self._stream.step(self._plain, token) or ""
        self._told += len(text)
        return text

    def rest(self) -> str:
        text = str(self._plain.decode(self._ids, skip_special_tokens=False))[self._told :]
        self._told += len(text)
        return text
