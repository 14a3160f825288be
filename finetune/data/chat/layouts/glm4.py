r"""GLM-4's layout: a role token, a name or nothing, a line break and the text.

    [gMASK]<sop><|user|>\nQ<|assistant|>get_weather\n{"city": "北京"}<|observation|>\n{"t": 20}<|assistant|>\n20度。

GLM-4-9B-Chat, GLM-4V, GLM-4-0414, GLM-Z1, GLM-Edge and GLM-4.1V. They differ in where tool definitions
go, in what becomes of white space, and in how a generation prompt ends; a `ChatLayout` says so, which is
observed. Under GLM-Z1, which thinks, an example is a turn: see `finetune.data.chat.thinking`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import Any

from finetune.data.chat import thinking
from finetune.data.chat.jinja import (
    HEADERS,
    ROLES,
    ChatLayout,
    JinjaTemplate,
    JsonMessage,
    tools_text,
)
from finetune.data.chat.layouts.layout import (
    ExamplePart,
    Layout,
    PlannedRun,
    TemplateInput,
    Texts,
    parts_with_images,
)
from finetune.data.chat.spans import TrainOn
from finetune.data.chat.tokenizer import ChatTokenizer
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.errors import DataError

Tools = tuple[Mapping[str, Any], ...]
_KEPT = 1024
"""Lists of tools whose text is remembered."""
_LONG = 16_384
"""Characters of the longest list that is."""


class Glm4Layout(Layout):
    """The layout of a template that was observed to be GLM-4's."""

    name = "GLM-4"

    def __init__(self, tokenizer: ChatTokenizer, jinja: JinjaTemplate, seen: ChatLayout) -> None:
        self.prefix, self.suffix, self.thinking = seen.prefix, seen.suffix, seen.thinking
        self.has_switch = False
        self.lead = "" if seen.suffix else "\n"
        self.takes_tools = seen.tools != "none"
        self.rules = " turns" if seen.thinking else " opened" if seen.suffix else ""
        self._tokenizer, self._seen = tokenizer, seen
        self._headers = {role: ~tokenizer.control_ids[HEADERS[role]] for role in ROLES}
        self._control = frozenset(tokenizer.control_ids.values())
        self._suffix = tuple(~i for i in tokenizer.trusted(seen.suffix))
        self._keeps_suffix = bool(self._suffix) and not seen.thinking
        ids = tokenizer.control_ids
        writes_tags = "<answer>" in ids  # GLM-4.1V
        self.spoken = {ids[t]: t for t in thinking.SPOKEN if t in ids} if writes_tags else {}
        self.rules += " spoken" if writes_tags else ""

        def rendered_tools(tools_json: str) -> str:
            # As JSON: a key by value, and plain values for the template to work on.
            return tools_text(jinja, seen, json.loads(tools_json))

        self._tools_text, self._kept_text = rendered_tools, lru_cache(_KEPT)(rendered_tools)
        self._same_tools: dict[int, tuple[Tools, str]] = {}  # a list in here keeps its id

    def pieces(
        self, conversation: Conversation, stop: int, texts: Texts, opened: int | None = None
    ) -> list[PlannedRun]:
        """A piece for the tools and for every message that has text."""
        pieces = []
        if conversation.tools:
            text = self._tools(conversation.tools)
            pieces.append(PlannedRun(None, (self._headers["system"], texts.number(text))))
        for index, message in enumerate(conversation.messages[:stop]):
            if message.role == "system" and not message.content:
                continue
            name, body = self._written(message, index)
            if index == opened:
                written = thinking.behind_prompt(message, name, body)
                ops = (self._headers["assistant"], *self._suffix, texts.number(written))
                pieces.append(PlannedRun(index, ops, 1 + len(self._suffix)))
            else:
                pieces.append(self._piece(index, message, name, body, texts))
        return pieces

    def _piece(
        self, index: int, message: Message, name: str, body: str, texts: Texts
    ) -> PlannedRun:
        header, text = self._headers[message.role], f"{name}\n{body}"
        if message.role != "assistant":
            if not message.images:
                return PlannedRun(index, (header, texts.number(text)))
            shown = parts_with_images(message, body, self._tokenizer)
            return PlannedRun(index, texts.ops(header, f"{name}\n", *shown))
        if self._keeps_suffix and text.startswith(self.suffix):
            # These very ids stand at the end of the prompt too.
            said = self._said(text.removeprefix(self.suffix), texts)
            return PlannedRun(index, (header, *self._suffix, *said), 1 + len(self._suffix))
        return PlannedRun(index, (header, *self._said(text, texts)))

    def _said(self, text: str, texts: Texts) -> list[int]:
        """A reply, its thought between tokens where the tokenizer has some (GLM-4.1V)."""
        if not self.spoken:
            return [texts.number(text)]
        ids = self._tokenizer.control_ids
        return [
            ~ids[part] if is_tag and part in ids else texts.number(part)
            for part, is_tag in thinking.spoken_parts(text)
        ]

    def _written(self, message: Message, index: int) -> tuple[str, str]:
        """Name and content of a message as the checkpoint's template writes them."""
        role, name, problem = message.role, "", ""
        if message.metadata:
            if role in self._seen.named_roles:
                name = message.metadata
            elif role == "assistant":
                problem = "this checkpoint's chat template has no place for tool calls"
            if "\n" in name:
                problem = f"its name has a line break: {name!r}"
        if not message.content and not message.images:
            problem = "it has no text, and the published template leaves such a message out"
        elif role not in self._seen.clean:
            problem = "this checkpoint's chat template does not know the role"
        if problem:
            raise DataError(f"message {index + 1} ({role}): {problem}; correct or remove it")
        return name, self._seen.clean[role](message.content)

    def _tools(self, tools: Tools) -> str:
        """What stands behind `<|system|>`; of lists that are not long it is remembered."""
        if known := self._same_tools.get(id(tools)):
            return known[1]
        if not self.takes_tools:
            raise DataError(
                "the dialogue has tools, but this checkpoint's chat template "
                "has no place for them; use a chat checkpoint or leave the tools out"
            )
        spelled = json.dumps(tools, ensure_ascii=False)
        if len(spelled) > _LONG:
            return self._tools_text(spelled)
        text = self._kept_text(spelled)
        if len(self._same_tools) == _KEPT:
            self._same_tools.clear()
        self._same_tools[id(tools)] = tools, text
        return text

    def opening(self, conversation: Conversation, reply: int) -> tuple[int, ...]:
        """`<|assistant|>` and the suffix, but for a call that goes on behind another's thought."""
        suffix = self._suffix if self.asked(conversation, reply) is None else ()
        return (self._headers["assistant"], *suffix)

    def asked(self, conversation: Conversation, reply: int) -> int | None:
        """A turn of several calls goes on by itself, behind its first one's thought."""
        return thinking.turn_start(conversation.messages, reply) if self.thinking else None

    def parts(self, conversation: Conversation, train_on: TrainOn) -> list[ExamplePart]:
        """The dialogue, or under a thinking checkpoint its turns with loss."""
        if not self.thinking:
            return [ExamplePart(conversation, "user")]
        messages = conversation.messages
        return [
            ExamplePart(
                part,
                messages[length].role if (length := len(part.messages)) < len(messages) else "user",
                thinking.turn_start(part.messages, length),
            )
            for part in thinking.turns_with_loss(conversation, train_on)
        ]

    def parse(self, ids: Iterable[int], tools: Sequence[Mapping[str, Any]] = ()) -> Message:
        """The first line is a function's name, or empty for a plain reply.

        Text without a line break is a plain reply. Under a thinking checkpoint, ids that continue the
        generation prompt get its `<think>` back; an empty thought goes, and so does that of a call.
        """
        text = self._text(ids)
        suffix = self.suffix
        if (
            suffix
            and not text.startswith(suffix)
            and (not self.thinking or thinking.THINK_END in text)
        ):
            text = suffix + text
        name, line_break, content = text.partition("\n")
        if not line_break:
            return Message("assistant", text)
        if self.thinking and not name:
            return thinking.as_message(content)
        return Message("assistant", content, metadata=name.strip())

    def messages(self, ids: Iterable[int], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
        """Several of one turn follow each other behind `<|assistant|>`."""
        runs: list[list[int]] = [[]]
        for token in map(int, ids):
            if token == ~self._headers["assistant"]:
                runs.append([])
            else:
                runs[-1].append(token)
        return [self.parse(run) for place, run in enumerate(runs) if run or not place]

    def _text(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first control token."""
        listed = [int(i) for i in ids]
        ends = self._control - self.spoken.keys()
        said = listed[: next((place for place, i in enumerate(listed) if i in ends), len(listed))]
        runs = groupby(said, key=lambda i: i if i in self.spoken else None)
        decode = self._tokenizer.plain.decode
        return "".join(
            decode(list(run), skip_special_tokens=False)
            if tag is None
            else self.spoken[tag] * len(list(run))
            for tag, run in runs
        )

    def visible(self, message: Message) -> str:
        """No reasoning under GLM-Z1."""
        return self._seen.clean["assistant"](message.content)

    def template_input(self, conversation: Conversation) -> TemplateInput:
        """Names as `metadata`; tools as the template's argument or on the first system message."""
        messages: list[JsonMessage] = [
            {"role": m.role, "content": m.content}
            | ({"metadata": m.metadata} if m.metadata else {})
            for m in conversation.messages
            if m.content or m.role != "system"
        ]
        if not conversation.tools or self._seen.tools == "argument":
            return TemplateInput(messages, list(conversation.tools) or None)
        if not messages or messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": ""})
        messages[0]["tools"] = list(conversation.tools)
        return TemplateInput(messages, None)

    def probes(self, probe: Conversation) -> list[Conversation]:
        """The probe without roles, calls and tools that the template does not know."""
        known = self._seen.clean
        calls = "observation" in known and "assistant" in self._seen.named_roles
        # Where <think> is a token that no reply is written with, typed tags are not the template's.
        tags = {thinking.THINK, thinking.THINK_END} & self._tokenizer.control_ids.keys()
        plain = bool(tags) and not self.spoken
        kept = [
            replace(m, content=m.content.split(thinking.THINK_END)[-1]) if plain else m
            for m in probe.messages
            if m.role in known and (calls or not (m.metadata or m.role == "observation"))
        ]
        tools = probe.tools if self.takes_tools else ()
        return [replace(probe, messages=tuple(kept), tools=tools)]
