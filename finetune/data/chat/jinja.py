"""The checkpoint's own chat template, rendered as transformers renders it, and what it does.

The template is the authority on the layout: `describe` renders small dialogues with it and reads off
where tool definitions go, what happens to each role's text and how a generation prompt ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from finetune.data.chat.sandbox import RefusedError, Sandbox
from finetune.data.dialogue.tool_calls import BUILT_IN
from finetune.errors import DataError

ROLES = ("system", "user", "assistant", "observation")
HEADERS = {role: f"<|{role}|>" for role in ROLES}
THINK_END = "</think>"

JsonMessage = dict[str, Any]
"""A message as chat templates take it: `role`, `content`, perhaps `metadata` and `tools`."""


_USER: JsonMessage = {"role": "user", "content": "问"}
_PROBE = {
    "type": "function",
    "function": {"name": "probe_name", "description": "d", "parameters": {}},
}
_BEFORE: Mapping[str, Sequence[JsonMessage]] = {
    "system": (),
    "user": (),
    "assistant": (_USER,),
    "observation": (_USER, {"role": "assistant", "metadata": "m", "content": "{}"}),
}
"""What stands before a message of each role in the dialogues that a template is observed on."""


class JinjaTemplate:
    """Renders dialogues to the text that the checkpoint was trained on, control strings included."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._sandbox = _sandbox(source)
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[JsonMessage],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The dialogue as text; raises DataError when the template itself refuses it.

        `options` are what the template takes besides, such as `enable_thinking`.
        """
        values = {
            "messages": list(messages),
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
            **(options or {}),
        }
        try:
            return self._sandbox.render(values)
        except RefusedError as error:
            raise DataError(
                f"the checkpoint's chat template failed: {error}; rendering "
                f"{json.dumps(list(messages), ensure_ascii=False)[:300]}. Correct the dialogue or the chat_template"
            ) from error


@dataclass(frozen=True)
class ChatLayout:
    """How one checkpoint's template lays a dialogue out, as observed by rendering it."""

    prefix: str
    """What comes before the first message: `[gMASK]<sop>`."""
    suffix: str
    """What a generation prompt writes after `<|assistant|>`: nothing, or `\\n<think>` for GLM-Z1."""
    tools: Literal["message", "argument", "none"]
    """Where tool definitions are given: on the system message, as the template's argument, nowhere."""
    clean: Mapping[str, Callable[[str], str]]
    """Per role that the template knows, what it does to a message's content."""
    named_roles: frozenset[str]
    """Roles whose metadata is written after the header."""

    @property
    def thinking(self) -> bool:
        """Whether generation starts inside a reasoning block."""
        return self.suffix.endswith("<think>")


def describe(template: JinjaTemplate) -> ChatLayout:
    """The layout of a template in the GLM-4 family; DataError when it is another family's."""
    bare = template.render([_USER])
    body = HEADERS["user"] + "\n问"
    if not bare.endswith(body):
        raise DataError(
            "the checkpoint's chat template is not in the GLM-4 layout: a user message '问' must end "
            f"in {body!r}, got {bare!r}; use a GLM-4 checkpoint or fix its chat_template"
        )
    opened = template.render([_USER], add_generation_prompt=True)
    start = bare + HEADERS["assistant"]
    if not opened.startswith(start):
        raise DataError(
            "the checkpoint's chat template is not in the GLM-4 layout: its generation prompt must "
            f"start with {start!r}, got {opened!r}"
        )
    known = [role for role in ROLES if _knows(template, role)]
    return ChatLayout(
        prefix=bare.removesuffix(body),
        suffix=opened.removeprefix(start),
        tools=_tools_place(template),
        clean={role: _cleaning(template, role) for role in known},
        named_roles=frozenset(role for role in known if _shows_metadata(template, role)),
    )


def tools_text(
    template: JinjaTemplate, layout: ChatLayout, tools: Sequence[Mapping[str, Any]]
) -> str:
    """The text after the `<|system|>` that carries these tool definitions.

    Raises DataError when the template leaves one of them out, as it does with kinds unknown to it.
    """
    text = _tools_block(template, layout, tools)
    for place, tool in enumerate(tools):
        name = tool.get("function", tool).get("name")
        nameless = layout.tools == "argument" and not name
        if nameless or not _is_shown(template, layout, tool, text):
            raise DataError(
                f"tool {place + 1} ({name or tool.get('type')!r}) is of a kind that this checkpoint's "
                "chat template does not know; define it as a function or leave it out"
            )
    return text


def _is_shown(
    template: JinjaTemplate, layout: ChatLayout, tool: Mapping[str, Any], text: str
) -> bool:
    """Whether the text of all tools tells of this one: by its name, else by a rendering of its own."""
    name = tool.get("function", {}).get("name", "")
    if name and name not in BUILT_IN and name in text:
        return True
    return _tools_block(template, layout, [_PROBE, tool]) != _tools_block(
        template, layout, [_PROBE]
    )


def _tools_block(
    template: JinjaTemplate, layout: ChatLayout, tools: Sequence[Mapping[str, Any]]
) -> str:
    if layout.tools == "argument":
        text = template.render([_USER], tools=tools)
    else:
        text = template.render([{"role": "system", "content": "", "tools": tools}, _USER])
    head, tail = layout.prefix + HEADERS["system"], HEADERS["user"] + "\n问"
    if not (text.startswith(head) and text.endswith(tail)):
        raise DataError(
            f"the checkpoint's chat template does not write tools as one {HEADERS['system']} block: "
            f"got {text!r}; use a GLM-4 checkpoint or fix its chat_template"
        )
    return text[len(head) : -len(tail)]


def _tools_place(template: JinjaTemplate) -> Literal["message", "argument", "none"]:
    if "probe_name" in template.render([_USER], tools=[_PROBE]):
        return "argument"
    system = {"role": "system", "content": "", "tools": [_PROBE]}
    return "message" if "probe_name" in template.render([system, _USER]) else "none"


def _knows(template: JinjaTemplate, role: str) -> bool:
    try:
        return HEADERS[role] in template.render([*_BEFORE[role], {"role": role, "content": "乙"}])
    except DataError:
        return False


def _verbatim(text: str) -> str:
    return text


def _visible(text: str) -> str:
    return text.split(THINK_END)[-1].strip()


_CLEANINGS: tuple[Callable[[str], str], ...] = (_verbatim, str.strip, _visible)


def _cleaning(template: JinjaTemplate, role: str) -> Callable[[str], str]:
    probe = f" 甲{THINK_END}\n乙 "
    text = _last_body(template, {"role": role, "content": probe})
    for clean in _CLEANINGS:
        if text == "\n" + clean(probe):
            return clean
    raise DataError(
        f"the checkpoint's chat template is not in the GLM-4 layout: a {role} message {probe!r} must "
        f"become {HEADERS[role]!r} + '\\n' + its text, got {text!r}; "
        "use a GLM-4 checkpoint or fix its chat_template"
    )


def _shows_metadata(template: JinjaTemplate, role: str) -> bool:
    return _last_body(template, {"role": role, "metadata": "m", "content": "乙"}) == "m\n乙"


def _last_body(template: JinjaTemplate, message: JsonMessage) -> str:
    text = template.render([*_BEFORE[message["role"]], message])
    return text.rpartition(HEADERS[message["role"]])[2]


@lru_cache(maxsize=8)
def _sandbox(source: str) -> Sandbox:
    """One process for all that render the same template."""
    return Sandbox(source)
