"""Ids of a reply in GLM-4.5's layout -> what it says, as soon as it is whole.

Tags are told by their tokens: `</arg_value>` in letters is part of a value. White space around a thought
and around the text is no part of them, as the template takes it away.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from finetune.data.chat.characters import Characters
from finetune.data.chat.layouts.call_values import parameters_of, read_value, schema_of
from finetune.data.chat.thinking import SPOKEN, THINK, THINK_END
from finetune.data.chat.tokenizer import ChatTokenizer
from finetune.data.dialogue.conversation import Message

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_KEY, _KEY_END, _VALUE, _VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
_TAGS = (THINK, THINK_END, _CALL, _CALL_END, _KEY, _KEY_END, _VALUE, _VALUE_END)

State = Literal["thought", "text", "name", "key", "value", "between"]


class Said(NamedTuple):
    """More of a reply."""

    kind: Literal["thought", "text", "call", "arguments"]
    """A `call` brings the function's name; `arguments` more of its JSON text."""
    text: str


class TagReader:
    """Reads a reply token by token."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        tools: Sequence[Mapping[str, Any]],
        *,
        in_thought: bool = False,
        takes_calls: bool = True,
    ) -> None:
        """A reader of one reply.

        Args:
            tokenizer: The checkpoint's.
            tools: Definitions, whose schemas say which arguments are text.
            in_thought: The prompt ends inside of a thought.
            takes_calls: Tags of calls are calls, not text.
        """
        known = tokenizer.control_ids
        self._tags = {known[tag]: tag for tag in (*_TAGS, *SPOKEN) if tag in known}
        self._control = frozenset(known.values())
        self._plain, self._tools, self._takes_calls = tokenizer.plain, tools, takes_calls
        self._characters = Characters(self._plain)
        self._state: State = "thought" if in_thought else "text"
        self._begun = False  # something of the thought or text was said
        self._blank = ""  # white space that is said when more follows
        self._held = ""  # a name, a key or a value that is not whole yet
        self._key = self._name = ""
        self._arguments = 0
        self.over = False
        """The model ended the reply, with a stop or with a control token that no reply holds."""

    def take(self, token: int) -> list[Said]:
        """What the next token says."""
        if self.over:
            return []
        tag = self._tags.get(token)
        if tag is None and token in self._control:
            self.over = True
            return []
        if tag is None:
            return self._more(self._characters.step(token))
        said = self._more(self._characters.rest())
        self._characters = Characters(self._plain)
        is_tag = tag in (THINK, THINK_END) or (self._takes_calls and tag in _TAGS)
        return said + (self._at(tag) if is_tag else self._more(tag))

    def feed(self, ids: Iterable[int]) -> list[Said]:
        """What many tokens say."""
        return [said for token in ids for said in self.take(int(token))]

    def finish(self) -> list[Said]:
        """What is left at the end, as of a call that was cut off."""
        said = self._more(self._characters.rest())
        if self._state == "name" and self._held.strip():
            said += self._named()
        return said

    def _more(self, text: str) -> list[Said]:
        if self._state == "thought":
            return self._say("thought", text)
        if self._state == "text":
            return self._say("text", text)
        if self._state != "between":
            self._held += text
        return []

    def _say(self, kind: Literal["thought", "text"], text: str) -> list[Said]:
        """Text without the white space around all of it."""
        text = self._blank + text if self._begun else text.lstrip()
        told = text.rstrip()
        self._blank = text[len(told) :]
        self._begun = self._begun or bool(told)
        return [Said(kind, told)] if told else []

    def _at(self, tag: str) -> list[Said]:
        """What a tag says, in a reply that need not be well-formed."""
        if tag in (THINK, THINK_END):
            if self._state in ("thought", "text"):
                self._go("thought" if tag == THINK else "text")
            return []
        if tag == _CALL:
            said = self._end_of_call() if self._state not in ("thought", "text") else []
            self._go("name")
            return said
        if self._state in ("thought", "text"):
            return []
        if tag == _CALL_END:
            said = self._end_of_call()
            self._go("text")
            return said
        return self._at_argument(tag)

    def _at_argument(self, tag: str) -> list[Said]:
        said = self._named() if self._state == "name" else []
        if tag in (_KEY, _VALUE_END) and self._state == "value":
            said += self._argument()
        if tag in (_KEY_END, _VALUE) and self._state == "key":
            self._key = self._held
        state: State = "key" if tag == _KEY else "value" if tag == _VALUE else "between"
        self._go(state)
        return said

    def _go(self, state: State) -> None:
        self._state, self._held, self._blank, self._begun = state, "", "", False

    def _named(self) -> list[Said]:
        self._name, self._arguments = self._held.strip(), 0
        return [Said("call", self._name), Said("arguments", "{")]

    def _argument(self) -> list[Said]:
        parameters = parameters_of(self._tools, self._name)
        value = read_value(self._held, schema_of(parameters, self._key), parameters)
        pair = json.dumps({self._key: value}, ensure_ascii=False)[1:-1]
        self._arguments += 1
        return [Said("arguments", f", {pair}" if self._arguments > 1 else pair)]

    def _end_of_call(self) -> list[Said]:
        said = self._named() if self._state == "name" else []
        if self._state == "value":
            said += self._argument()
        return [*said, Said("arguments", "}")]


def as_messages(said: Iterable[Said]) -> list[Message]:
    """The text with its thought, if there is any, and the calls; a lone call keeps its thought."""
    thought = text = ""
    calls: list[tuple[str, str]] = []
    for kind, more in said:
        if kind == "thought":
            thought += more
        elif kind == "text":
            text += more
        elif kind == "call":
            calls.append((more, ""))
        else:
            calls[-1] = (calls[-1][0], calls[-1][1] + more)
    before = f"{THINK}\n{thought}\n{THINK_END}\n\n" if thought else ""
    messages = [Message("assistant", arguments, name) for name, arguments in calls]
    if text or not calls:
        return [Message("assistant", before + text), *messages]
    first = Message("assistant", before + calls[0][1], calls[0][0])
    return [first, *messages[1:]]
