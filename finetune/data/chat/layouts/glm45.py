r"""GLM-4.5's layout and its successors': a turn of the model is one message, with a thought and calls.

    [gMASK]<sop><|user|>\nQ<|assistant|>«\n<think>Why?</think>\nLet me see.
    <tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>北京</arg_value>\n</tool_call><|observation|>»
    <tool_response>\n20\n</tool_response><|assistant|>«\n<think></think>\n20度。<|user|>»

Tags are tokens of their own, here and in what the model writes; a tag that is typed stays text. The
template keeps thoughts behind the last question only, so where an earlier reply with loss has one, an
example is a question with all that follows it up to the next. `TagForm` holds the texts between the
parts, which are observed: GLM-4.7 has no line breaks, and its prompt ends in `<think>`, or in `</think>`
for a reply without a thought.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from finetune.data.chat import thinking
from finetune.data.chat.jinja import HEADERS, ROLES, JsonMessage
from finetune.data.chat.layouts.call_values import value_texts
from finetune.data.chat.layouts.layout import (
    ExamplePart,
    Layout,
    PlannedRun,
    TemplateInput,
    Texts,
    merged,
    parts_with_images,
)
from finetune.data.chat.layouts.tag_form import TagForm
from finetune.data.chat.layouts.tag_reader import TagReader, as_messages
from finetune.data.chat.spans import TrainOn
from finetune.data.chat.tokenizer import ChatTokenizer
from finetune.data.dialogue.conversation import Conversation, Message, RowError
from finetune.errors import DataError

TAGS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>",
    "</arg_value>",
)  # fmt: skip
"""Tokens that a model of this kind writes inside of its replies."""
OFF = "/nothink"
INSIDE = "</tool_call>"
"""What a prompt ends in inside of a turn, as far as it matters: in no thought."""


class Glm45Layout(Layout):
    """The layout of a template that writes calls between tags."""

    name = "GLM-4.5"
    thinking = True
    takes_tools = True

    def __init__(self, tokenizer: ChatTokenizer, form: TagForm) -> None:
        missing = [tag for tag in TAGS if tag not in tokenizer.control_ids]
        if missing:
            raise DataError(
                f"the checkpoint's chat template writes {missing[0]}, which its tokenizer has no token "
                "for; use the tokenizer files of the checkpoint"
            )
        self.form = form
        self.prefix, self.suffix = form.prefix, form.prompt
        self.rules = " tags 1"
        self.has_switch = bool(form.user_off) or form.prompt != form.prompt_off
        self.spoken = {}
        lead = form.no_thought + form.before_reply
        begins = lead.startswith(form.prompt)
        self.lead = lead.removeprefix(form.prompt) if begins else thinking.THINK_END
        self.tokenizer = tokenizer
        self._headers = {role: ~tokenizer.control_ids[HEADERS[role]] for role in ROLES}
        self._tags = {tag: ~tokenizer.control_ids[tag] for tag in TAGS}
        constants = (
            form.no_thought, *form.thought, *form.call, *form.argument, *form.result,
            *form.result_with_images, form.user_off,
            *form.tools, form.prompt, form.prompt_off,
        )  # fmt: skip
        self._constants = {text: self._split(text) for text in constants}
        begins_call = self._constants[form.call[0]]
        has_break = isinstance(begins_call[0], str)
        self._before_next = begins_call[:has_break]
        self._begins_call = begins_call[has_break:]
        self._suffixes = {
            text: tuple(~i for i in tokenizer.trusted(text))
            for text in (form.prompt, form.prompt_off)
        }

    # --- messages -> pieces ----------------------------------------------------------------------

    def pieces(
        self, conversation: Conversation, stop: int, texts: Texts, opened: int | None = None
    ) -> list[PlannedRun]:
        """A piece for the tools and for every message; those of one turn share its header."""
        found = []
        if conversation.tools:
            ops = texts.ops(self._headers["system"], *self._tools(conversation.tools))
            found.append(PlannedRun(None, ops))
        messages = conversation.messages
        last_user = max((i for i, m in enumerate(messages[:stop]) if m.role == "user"), default=-1)
        for index, message in enumerate(messages[:stop]):
            if message.role == "system" and not message.content:
                continue
            try:
                if message.role == "assistant":
                    piece = self._said(conversation, index, texts, keeps=index > last_user)
                else:
                    piece = PlannedRun(index, texts.ops(*self._given(conversation, index)))
            except (DataError, RowError) as error:
                raise DataError(
                    f"message {index + 1} ({message.role}): {error}; correct or remove it"
                ) from error
            found.append(piece)
        return found

    def _given(self, conversation: Conversation, index: int) -> Iterator[str | int]:
        """A message that the model is shown."""
        message, form = conversation.messages[index], self.form
        if message.role == "observation":
            yield from self._result(conversation.messages, index)
            return
        yield self._headers[message.role]
        yield form.before_text
        if message.role == "user" and conversation.thinks is False and form.user_off:
            yield from parts_with_images(message, message.content.removesuffix(OFF), self.tokenizer)
            yield from self._constants[form.user_off]
        else:
            yield from parts_with_images(message, message.content, self.tokenizer)

    def _result(self, messages: Sequence[Message], index: int) -> Iterator[str | int]:
        """A tool's result; the line break before one that follows stands at its end, as one text."""
        message, following = messages[index], messages[index + 1 : index + 2]
        begins, ends = self._around(message)
        if index == 0 or messages[index - 1].role != "observation":
            yield self._headers["observation"]
            yield from begins
        else:
            yield from begins[isinstance(begins[0], str) :]
        yield from parts_with_images(message, message.content, self.tokenizer)
        yield from ends
        if following and following[0].role == "observation":
            next_begins, _ = self._around(following[0])
            yield from next_begins[: isinstance(next_begins[0], str)]

    def _around(self, result: Message) -> list[tuple[str | int, ...]]:
        form = self.form
        around = form.result_with_images if result.images else form.result
        return [self._constants[text] for text in around]

    def _said(
        self, conversation: Conversation, index: int, texts: Texts, *, keeps: bool
    ) -> PlannedRun:
        """A reply's text or one of its calls; the first of a turn has its header and its thought."""
        messages = conversation.messages
        message = messages[index]
        is_first = index == 0 or messages[index - 1].role != "assistant"
        is_last = index + 1 == len(messages) or messages[index + 1].role != "assistant"
        thought = self._thought(message) if keeps else ""
        body = list(self._body(message, is_first))
        if not is_last and messages[index + 1].metadata:  # its line break is part of this text
            body += self._before_next
        if not is_first:
            return PlannedRun(index, texts.ops(*body), 0, is_last)
        opening = self._opening(thought, conversation.thinks)
        suffix = self._suffixes[opening]
        rest = _without(self._constants[opening], [*self._spelled(thought), *body])
        ops = (self._headers["assistant"], *suffix, *texts.ops(*rest))
        return PlannedRun(index, ops, 1 + len(suffix), is_last)

    def _thought(self, message: Message) -> str:
        return thinking.split_message(message).thought.strip()

    def _spelled(self, thought: str) -> list[str | int]:
        """What stands between `<|assistant|>` and the reply."""
        if not thought:
            return list(self._constants[self.form.no_thought])
        before, behind = self.form.thought
        return [*self._constants[before], thought, *self._constants[behind]]

    def _body(self, message: Message, is_first: bool) -> Iterator[str | int]:
        form, said = self.form, thinking.split_message(message).said
        if not message.metadata:
            if not is_first:
                raise DataError("it stands behind a call of the same turn, where there is no place for text; move it in front")  # fmt: skip
            if said.strip():
                yield form.before_reply
                yield said.strip()
            return
        yield from self._constants[form.call[0]] if is_first else self._begins_call
        yield message.metadata
        yield from self._constants[form.call[1]]
        for key, text in value_texts(said):
            yield from self._constants[form.argument[0]]
            yield key
            yield from self._constants[form.argument[1]]
            yield text
            yield from self._constants[form.argument[2]]
        yield from self._constants[form.call[2]]

    def _tools(self, tools: Sequence[Mapping[str, Any]]) -> Iterator[str | int]:
        before, behind_each, behind = self.form.tools
        yield from self._constants[before]
        for tool in tools:
            yield json.dumps(tool, ensure_ascii=False)
            yield from self._constants[behind_each]
        yield from self._constants[behind]

    def _split(self, text: str) -> tuple[str | int, ...]:
        """A constant text of the template as texts and the ops of its control tokens."""
        known = self.tokenizer.control_ids
        return tuple(~known[part] if part in known else part for part in self.tokenizer.split(text))

    # --- prompts and examples --------------------------------------------------------------------

    def opening(self, conversation: Conversation, reply: int) -> tuple[int, ...]:
        """`<|assistant|>` and what the reply's own rendering goes on with; nothing inside of a turn."""
        messages = conversation.messages
        if reply and messages[reply - 1].role == "assistant":
            return ()
        return (self._headers["assistant"], *self._suffixes[self.opens(conversation, reply)])

    def opens(self, conversation: Conversation, reply: int) -> str:
        """The text behind `<|assistant|>` that `opening` ends in; or `INSIDE` of a turn."""
        messages = conversation.messages
        if reply and messages[reply - 1].role == "assistant":
            return INSIDE
        if reply == len(messages):
            return self.form.prompt_off if conversation.thinks is False else self.form.prompt
        return self._opening(self._thought(messages[reply]), conversation.thinks)

    def _opening(self, thought: str, thinks: bool | None) -> str:
        """The generation prompt behind which a reply stands, with or without a thought."""
        form = self.form
        if thinks is False and not thought:
            return form.prompt_off
        begins = form.thought[0] if thought else form.no_thought + form.before_reply
        return form.prompt if begins.startswith(form.prompt) else form.prompt_off

    def asked(self, conversation: Conversation, reply: int) -> int | None:
        """None: every reply stands as the template renders it."""
        return None

    def stop(self, conversation: Conversation) -> str:
        """A call waits for its result."""
        last = conversation.messages[-1:]
        return "observation" if last and last[0].metadata else "user"

    def parts(self, conversation: Conversation, train_on: TrainOn) -> list[ExamplePart]:
        """The dialogue at once, or a question with its replies at a time where thoughts would get lost."""
        messages = conversation.messages
        replies = [index for index, message in enumerate(messages) if message.role == "assistant"]
        if conversation.text or not replies:
            return [ExamplePart(conversation, self.stop(conversation))]
        last = thinking.turn_start(messages, replies[-1] + 1) or 0  # a turn is one reply
        trained = {i for i in replies if thinking.is_trained(messages[i], i >= last, train_on)}
        for i in trained if conversation.thinks is False else ():
            if self._thought(messages[i]):
                raise DataError(
                    f"message {i + 1} (assistant): it has reasoning, but thinking is switched off; "
                    "leave out one of them"
                )
        users = [index for index, message in enumerate(messages) if message.role == "user"]
        ends = [len(messages)]
        if any(self._thought(messages[i]) for i in trained if i < max(users, default=0)):
            ends = [*users[1:], len(messages)]
        found = []
        for start, end in zip([0, *ends], ends, strict=False):
            marked = tuple(
                replace(m, train=i >= start and i in trained) if m.role == "assistant" else m
                for i, m in enumerate(messages[:end])
            )
            part = replace(conversation, messages=marked)
            if any(m.train and m.weight for m in marked):
                found.append(ExamplePart(part, "user" if end < len(messages) else self.stop(part)))
        return found

    # --- replies ---------------------------------------------------------------------------------

    def parse(self, ids: Iterable[int], tools: Sequence[Mapping[str, Any]] = ()) -> Message:
        """The reply's text with its thought, or the first call, without one, where there is no text."""
        message = self.messages(ids, tools)[0]
        return replace(message, content=self.visible(message)) if message.metadata else message

    def messages(self, ids: Iterable[int], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
        """The reply's text with its thought, if there is any, and its calls."""
        listed = [int(i) for i in ids]
        begin, end = (~self._tags[tag] for tag in (thinking.THINK, thinking.THINK_END))
        marks = [i for i in listed if i in (begin, end)]
        reader = TagReader(self.tokenizer, tools, in_thought=marks[:1] == [end])
        return as_messages([*reader.feed(listed), *reader.finish()])

    def visible(self, message: Message) -> str:
        """The text without its thought."""
        return thinking.split_message(message).said.strip()

    def as_read(self, message: Message) -> Message:
        """With white space around its thought and its text as everywhere."""
        thought = self._thought(message)
        before = f"{thinking.THINK}\n{thought}\n{thinking.THINK_END}\n\n" if thought else ""
        return replace(message, content=before + self.visible(message))

    # --- the checkpoint's own template -----------------------------------------------------------

    def template_input(self, conversation: Conversation) -> TemplateInput:
        """A turn as one message with `reasoning_content` and `tool_calls`."""
        found: list[JsonMessage] = []
        for message in conversation.messages:
            if message.role != "assistant":
                role = "tool" if message.role == "observation" else message.role
                if message.content or role != "system":
                    found.append({"role": role, "content": message.content})
                continue
            if not found or found[-1]["role"] != "assistant":
                thought = self._thought(message)
                found.append({"role": "assistant", "content": "", "reasoning_content": thought})
            said = thinking.split_message(message).said
            if message.metadata:
                function = {"name": message.metadata, "arguments": json.loads(said)}
                calls = found[-1].setdefault("tool_calls", [])
                calls.append({"type": "function", "function": function})
            else:
                found[-1]["content"] = said
        options = {} if conversation.thinks is None else {"enable_thinking": conversation.thinks}
        return TemplateInput(found, list(conversation.tools) or None, options)

    def probes(self, probe: Conversation) -> list[Conversation]:
        """Thoughts past and present, text before several calls, and thinking switched off."""
        first, *_, last = probe.messages
        question = Message("user", " 明天呢？\n")
        texts = [replace(m, content=thinking.split(m.content).said) for m in probe.messages]
        city = '{"city": "上 海\\n", "days": [1, {"甲": null}], "wind": true}'
        calls = (
            Message("assistant", "<think>\n两次。\n</think>\n\n好。"),
            Message("assistant", city, "get_weather"),
            Message("assistant", "{}", "now"),
            Message("observation", " 晴\n"),
            Message("observation", "<b>9:00</b>"),
        )
        with_calls = replace(probe, messages=(*probe.messages, question, *calls, last))
        return [
            probe,
            replace(probe, messages=(first, question, last), tools=()),
            with_calls,
            replace(probe, messages=tuple(texts), thinks=False),
        ]


def _without(start: Sequence[str | int], parts: Sequence[str | int]) -> list[str | int]:
    """The parts behind those that a prompt ends in already."""
    rest = merged(parts)
    for given in start:
        first = rest.pop(0)
        if isinstance(given, str) and isinstance(first, str) and first.startswith(given):
            rest[:0] = [first.removeprefix(given)] if first != given else []
        else:
            assert given == first, f"a reply that does not begin with {given!r}"
    return rest
