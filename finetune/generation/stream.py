"""New tokens, one at a time -> pieces of the reply's text and calls, as soon as they are whole."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finetune.data.chat.characters import Characters
from finetune.data.chat.layouts.glm45 import Glm45Layout
from finetune.data.chat.layouts.tag_reader import Said, TagReader
from finetune.data.chat.thinking import THINK, THINK_END

FUNCTION_NAME = re.compile(r"[\w.-]+")


class Piece(NamedTuple):
    """More of a reply."""

    text: str
    call: int | None = None
    """Number of the call whose arguments `text` goes on; None: it goes on the reply's own text."""
    name: str = ""
    """The function's name, in the first piece of a call."""
    is_thought: bool = False
    """`text` is reasoning, which a layout with tokens for it keeps apart from the reply's text."""


def reply_stream(
    template: Any, tools: Sequence[Mapping[str, Any]], *, thinks: bool | None = None
) -> ReplyStream | TagStream:
    """What reads a reply in the checkpoint's layout.

    Args:
        template: The checkpoint's ChatTemplate.
        tools: What the dialogue offers.
        thinks: What the dialogue says about thinking, as its prompt ended so.
    """
    if isinstance(template.layout, Glm45Layout):
        return TagStream(template, tools, thinks=thinks)
    return ReplyStream(template, tools)


class ReplyStream:
    """Reads a reply while it is written; characters come whole, calls with their name."""

    def __init__(self, template: Any, tools: Sequence[Mapping[str, Any]]) -> None:
        self.ids: list[int] = []
        """The reply so far, without its stop."""
        self.over = False
        """The model ended the reply, with a stop or with a control token that no reply holds."""
        self._plain = template.tokenizer.plain
        self._control = frozenset(template.tokenizer.control_ids.values()) | set(template.stop_ids)
        self._spoken = template.layout.spoken
        self._next_call = template.tokenizer.control_ids["<|assistant|>"]
        self._offers_tools = bool(tools)
        self._calls = 0
        self._characters = Characters(self._plain)
        self._head: str | None = ""
        self._is_call = False
        self._thought = _Thought(bool(tools)) if template.layout.thinking else None
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
            self._characters = Characters(self._plain)
            self._head, self._is_call, self._thought = "", False, None
            return opening
        if token in self._spoken:
            self.ids.append(token)
            text = self._characters.rest() + self._spoken[token]
            self._characters = Characters(self._plain)
            return opening + self._feed(text)
        if token in self._control:
            self.over = True
            return opening
        self.ids.append(token)
        return opening + self._feed(self._characters.step(token))

    def finish(self) -> list[Piece]:
        """What is left at the end: the start of a character that never came to its end."""
        pieces = self._opening + self._feed(self._characters.rest())
        if self._thought is not None and self._head is None and not self._is_call:
            pieces += [Piece(text) for text in [self._thought.rest()] if text]
        if self._head:
            pieces.append(Piece(self._head))
        self._head, self._opening = None, []
        return pieces

    def _feed(self, text: str) -> list[Piece]:
        """A plain reply opens with a line break, a call with the function's name and a line break."""
        if self._head is None:
            return self._go_on(text)
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
        return self._go_on(said)

    def _go_on(self, text: str) -> list[Piece]:
        """More of a call's arguments or of the text, which may hold a call behind a thought."""
        if self._is_call or self._thought is None:
            return [Piece(text, self._calls if self._is_call else None)] if text else []
        said, call = self._thought.take(text)
        pieces = [Piece(said)] if said else []
        if call is not None:
            self._is_call = True
            pieces.append(Piece(call[1], self._calls, call[0]))
        return pieces


class TagStream:
    """Reads a reply in GLM-4.5's layout; an argument comes when it is whole."""

    def __init__(
        self, template: Any, tools: Sequence[Mapping[str, Any]], *, thinks: bool | None
    ) -> None:
        self.ids: list[int] = []
        """The reply so far, without its stop."""
        in_thought = thinks is not False and template.layout.form.prompt.endswith(THINK)
        self._reader = TagReader(
            template.tokenizer, tools, in_thought=in_thought, takes_calls=bool(tools)
        )
        self._stops = frozenset(template.stop_ids)
        self._calls = -1

    @property
    def over(self) -> bool:
        """The model ended the reply, with a stop or with a control token that no reply holds."""
        return self._reader.over

    def take(self, token: int) -> list[Piece]:
        """What the next token adds that can be shown."""
        if token in self._stops:
            self._reader.over = True
        pieces = self._pieces(self._reader.take(token))
        if not self.over:
            self.ids.append(token)
        return pieces

    def finish(self) -> list[Piece]:
        """What is left at the end, as of a call that was cut off."""
        return self._pieces(self._reader.finish())

    def _pieces(self, said: Sequence[Said]) -> list[Piece]:
        pieces: list[Piece] = []
        name = ""
        for kind, text in said:
            if kind == "call":
                self._calls, name = self._calls + 1, text
            elif kind == "arguments":
                pieces.append(Piece(text, self._calls, name))
                name = ""
            else:
                pieces.append(Piece(text, is_thought=kind == "thought"))
        return pieces


class TextStream:
    """Reads a text while it is written; every character comes whole, and nothing else is made of it."""

    def __init__(self, template: Any, *, to_the_stop: bool = False) -> None:
        """`to_the_stop`: as in `generate` no control token but a stop ends it; the text has none of them."""
        self.ids: list[int] = []
        """The text so far, without its stop."""
        self.over = False
        """The model ended the text with a control token."""
        self._control = frozenset(template.tokenizer.control_ids.values()) | set(template.stop_ids)
        self._ends = frozenset(template.stop_ids) if to_the_stop else self._control
        self._plain = template.tokenizer.plain
        self._characters = Characters(self._plain)

    def take(self, token: int) -> list[Piece]:
        """What the next token adds that can be shown."""
        if token in self._ends:
            self.over = True
            return []
        self.ids.append(token)
        if token in self._control:
            rest, self._characters = self.finish(), Characters(self._plain)
            return rest
        text = self._characters.step(token)
        return [Piece(text)] if text else []

    def finish(self) -> list[Piece]:
        """What is left at the end: the start of a character that never came to its end."""
        text = self._characters.rest()
        return [Piece(text)] if text else []


class _Thought:
    """The text of a thinking checkpoint's reply: an empty thought goes, a call behind one is found."""

    def __init__(self, offers_tools: bool) -> None:
        self._offers_tools = offers_tools
        self._text = ""
        self._shown = 0
        self._is_over = False  # what comes now is plain text

    def take(self, text: str) -> tuple[str, tuple[str, str] | None]:
        """More of the text that can be shown; name and first arguments of a call once it begins."""
        self._text += text
        if self._is_over:
            return self._show(len(self._text)), None
        end = self._text.find(THINK_END)
        if end < 0:
            inner = self._text.removeprefix(THINK).lstrip()
            if THINK_END.startswith(inner):  # it may be an empty thought
                return "", None
            cut = max(n for n in range(len(THINK_END)) if self._text.endswith(THINK_END[:n]))
            return self._show(len(self._text) - cut), None
        said = self._text[end + len(THINK_END) :].lstrip()
        if not self._text[:end].removeprefix(THINK).strip():
            self._shown = len(self._text) - len(said)
        name, _, arguments = said.partition("\n")
        may_be_call = self._offers_tools and (not name or FUNCTION_NAME.fullmatch(name))
        if not said or (may_be_call and not arguments):
            return self._show(end + len(THINK_END)), None
        if may_be_call and arguments.startswith("{"):
            return self._show(end + len(THINK_END)), (name, arguments)
        self._is_over = True
        return self._show(len(self._text)), None

    def rest(self) -> str:
        """What was held at the end."""
        return self._show(len(self._text))

    def _show(self, end: int) -> str:
        text = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return text
