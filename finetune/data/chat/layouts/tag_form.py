r"""How a template of GLM-4.5's kind spells a dialogue, read off from small dialogues.

GLM-4.5, 4.6, 4.5V, 4.6V and GLM-OCR write line breaks between the parts of a message, GLM-4.7 writes
none. They differ in how a generation prompt ends, too:

               a reply without a thought        prompt, thinking           prompt, not thinking
    GLM-4.5    <|assistant|>\n<think></think>\nA   <|assistant|>           …Q/nothink<|assistant|>\n<think></think>
    GLM-4.7    <|assistant|></think>A           <|assistant|><think>       <|assistant|></think>
    GLM-OCR    <|assistant|>\n<think></think>\nA   <|assistant|>\n         …Q/nothink<|assistant|>\n<think></think>\n
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.data.chat.jinja import HEADERS, JinjaTemplate, JsonMessage
from finetune.errors import DataError

_USER: JsonMessage = {"role": "user", "content": "问"}
_TOOL = {"type": "function", "function": {"name": "probe_name", "description": "d"}}
_TOOL_LINE = '{"type": "function", "function": {"name": "probe_name", "description": "d"}}'


@dataclass(frozen=True)
class TagForm:
    """The constant texts of a template; a role's token stands before each message."""

    prefix: str
    """Before the first message: `[gMASK]<sop>`."""
    before_text: str
    """Between `<|user|>` or `<|system|>` and the text."""
    no_thought: str
    """Behind `<|assistant|>` where the reply has no reasoning."""
    thought: tuple[str, str]
    """Around the reasoning, behind `<|assistant|>`."""
    before_reply: str
    """Between the thought and a reply's text."""
    call: tuple[str, str, str]
    """Before a call's name, behind it, and at the call's end."""
    argument: tuple[str, str, str]
    """Before a key, between key and value, behind the value."""
    result: tuple[str, str]
    """Around a tool's result; the first of several stands behind `<|observation|>`."""
    result_with_images: tuple[str, str]
    """The same where the result is a list of texts and images."""
    prompt: str
    """What a generation prompt ends in behind `<|assistant|>`."""
    prompt_off: str
    """The same where thinking is switched off."""
    user_off: str
    """What stands behind every user's text where thinking is switched off."""
    tools: tuple[str, str, str]
    """Before the definitions behind `<|system|>`, behind each, and behind all of them."""


def is_tagged(template: JinjaTemplate) -> bool:
    """Whether the template writes the arguments of a call between tags; DataError when it is none."""
    template.render([_USER])
    try:
        return "<arg_key>" in template.render([_USER, _calling({"键": "值"})])
    except DataError:
        return False


def read_form(template: JinjaTemplate) -> TagForm:
    """The form of a template; DataError when one of the dialogues does not look as it must."""
    return _Reader(template).form()


class _Reader:
    def __init__(self, template: JinjaTemplate) -> None:
        self._template = template
        self._user = template.render([_USER])
        self._prefix, self._before_text, _ = _cut(self._user, HEADERS["user"], "问")

    def form(self) -> TagForm:
        no_thought = self._reply({"content": ""})
        _, before_reply, _ = _cut(self._reply({"content": "甲"}), no_thought, "甲")
        thoughtful = self._reply({"content": "甲", "reasoning_content": "想"})
        opened, closed, _ = _cut(thoughtful, "想", before_reply + "甲")
        before_name, behind_name = _cut(self._call({}, no_thought), "名")
        after_name, call_end = _cut(behind_name, "</tool_call>")
        call_end = "</tool_call>" + call_end
        _, before_key, middle, end = _cut(self._call({"键": "值"}, no_thought), "名", "键", "值")
        asking = self._template.render([_USER], add_generation_prompt=True)
        user_off, prompt_off = self._switched_off()
        return TagForm(
            prefix=self._prefix,
            before_text=self._before_text,
            no_thought=no_thought,
            thought=(opened, closed),
            before_reply=before_reply,
            call=(before_name, after_name, call_end),
            argument=(before_key.removeprefix(after_name), middle, end.removesuffix(call_end)),
            result=self._result("果"),
            result_with_images=self._result([{"type": "text", "text": "果"}]),
            prompt=_cut(asking, self._user + HEADERS["assistant"])[1],
            prompt_off=prompt_off,
            user_off=user_off,
            tools=self._tools(),
        )

    def _reply(self, message: JsonMessage) -> str:
        """What stands behind the `<|assistant|>` of one reply."""
        text = self._template.render([_USER, {"role": "assistant"} | message])
        return _cut(text, self._user + HEADERS["assistant"])[1]

    def _call(self, arguments: dict[str, Any], no_thought: str) -> str:
        return _cut(self._reply(_calling(arguments)), no_thought)[1]

    def _result(self, content: Any) -> tuple[str, str]:
        called = [_USER, _calling({})]
        before = self._template.render(called) + HEADERS["observation"]
        text = self._template.render([*called, {"role": "tool", "content": content}])
        opened, closed = _cut(_cut(text, before)[1], "果")
        return opened, closed

    def _switched_off(self) -> tuple[str, str]:
        text = self._template.render(
            [_USER], add_generation_prompt=True, options={"enable_thinking": False}
        )
        user_off, prompt_off = _cut(_cut(text, self._user)[1], HEADERS["assistant"])
        return user_off, prompt_off

    def _tools(self) -> tuple[str, str, str]:
        head, tail = self._prefix + HEADERS["system"], self._user.removeprefix(self._prefix)
        one, two = (self._template.render([_USER], tools=[_TOOL] * count) for count in (1, 2))
        _, before, behind_one = _cut(one, head, _TOOL_LINE)
        _, _, between, _ = _cut(two, head, _TOOL_LINE, _TOOL_LINE)
        [behind, _] = _cut(behind_one.removeprefix(between), tail)
        return before, between, behind


def _calling(arguments: dict[str, Any]) -> JsonMessage:
    call = {"type": "function", "function": {"name": "名", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _cut(text: str, *marks: str) -> list[str]:
    """What stands before, between and behind texts that follow each other in `text`."""
    parts, rest = [], text
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if mark and not found:
            raise DataError(
                "the checkpoint's chat template is not in GLM-4.5's layout: "
                f"{' … '.join(marks)!r} must stand in {text!r}; use the checkpoint's published "
                "chat_template"
            )
        parts.append(before)
    return [*parts, rest]
