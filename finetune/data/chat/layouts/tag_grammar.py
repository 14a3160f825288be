r"""What a reply in GLM-4.5's layout must be, as a grammar (Lark) for llguidance.

    start: head (text | call_1 | call_2)
    head: "\n" <think> /(.|\n)*/ </think>
    text: "\n" %json {"type": "object"}
    call_1: "\n" <tool_call> "get_weather\n" a_1 a_2? </tool_call>
    a_1: <arg_key> "city" </arg_key> "\n" <arg_value> /(.|\n)*/ </arg_value> "\n"

Tags are tokens. A text stands between them as it is, so of a schema's words about texts only `enum` and
`const` can be held; a strict schema that says more about a text is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from finetune.data.chat.layouts import call_values
from finetune.data.chat.layouts.glm45 import INSIDE, Glm45Layout
from finetune.data.dialogue.tool_calls import BUILT_IN, tool_name
from finetune.errors import DataError

JsonRule = Callable[[Mapping[str, Any], bool], str]
"""A schema and whether it is strict -> its rule."""
_ANYTHING = r"/(.|\n)*/"
_OF_TEXTS = ("pattern", "format", "minLength", "maxLength")
"""What a schema may say of a text that nothing here can hold."""


class ReplyStructure(Protocol):
    """What a reply must be."""

    @property
    def schema(self) -> Mapping[str, Any] | None:
        """JSON schema of a reply that is no call; None: there must be a call."""

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """Functions that may be called."""

    @property
    def many_calls(self) -> bool:
        """The reply may hold more than one call."""

    @property
    def strict(self) -> bool:
        """What cannot be held is refused."""

    @property
    def opened(self) -> str | None:
        """What the prompt ends in behind `<|assistant|>`; None: as the template's prompt does."""


def tag_grammar(structure: ReplyStructure, layout: Glm45Layout, json_rule: JsonRule) -> str:
    """The structure in Lark's language."""
    form = layout.form
    rules, kinds = [], []
    opened = form.prompt if structure.opened is None else structure.opened
    if structure.schema is not None:
        kinds.append("text")
        before = form.before_reply if opened != form.prompt_off else _rest(form, opened)
        rules.append(
            f"text: {_spelled(layout, before)} {json_rule(structure.schema, structure.strict)}"
        )
    if structure.tools:
        calls = [f"call_{number}" for number in range(len(structure.tools))]
        kinds.append(f"({' | '.join(calls)})" + ("+" if structure.many_calls else ""))
        for name, tool in zip(calls, structure.tools, strict=True):
            rules += _call_rules(name, tool, layout, structure.strict, json_rule)
        if opened == INSIDE:  # the line break before a call may be there already
            rules = [re.sub(r'^(call_\d+: "\\n")', r"\1?", rule) for rule in rules]
    head = _head(layout, opened)
    start = f"{'head ' if head else ''}({' | '.join(kinds)})"
    return "\n".join([f"start: {start}", *([f"head: {head}"] if head else []), *rules])


def _head(layout: Glm45Layout, opened: str) -> str:
    """The thought in front of a reply; nothing where the prompt has closed it or the turn goes on."""
    form = layout.form
    if opened != form.prompt:
        return ""
    before, behind = form.thought
    rest = before.removeprefix(form.prompt)
    return " ".join([_spelled(layout, rest), _ANYTHING, _spelled(layout, behind)])


def _rest(form: Any, opened: str) -> str:
    """What stands between a prompt that switches thinking off and the text."""
    return str((form.no_thought + form.before_reply).removeprefix(opened))


def _spelled(layout: Glm45Layout, text: str) -> str:
    """A constant text: tags by their names, the rest in quotes."""
    known = layout.tokenizer.control_ids
    parts = layout.tokenizer.split(text)
    return " ".join(
        part if part in known else json.dumps(part, ensure_ascii=False) for part in parts
    )


def _call_rules(
    name: str, tool: Mapping[str, Any], layout: Glm45Layout, strict: bool, json_rule: JsonRule
) -> Iterator[str]:
    called, form = tool_name(tool), layout.form
    if called in BUILT_IN:
        raise DataError(f"{called!r} is called with plain text, which this checkpoint's layout has no place for; leave it out")  # fmt: skip
    function = tool["function"]
    strict = strict or function.get("strict") is True
    parameters = function.get("parameters") or {}
    required = parameters.get("required") or ()
    arguments = []
    for number, (key, schema) in enumerate((parameters.get("properties") or {}).items()):
        rule = f"{name}_{number}"
        arguments.append(rule if key in required else f"{rule}?")
        value = _value(schema, parameters, strict, json_rule, key)
        before, middle, behind = (_spelled(layout, text) for text in form.argument)
        yield f"{rule}: {before} {json.dumps(key, ensure_ascii=False)} {middle} {value} {behind}"
    before, after_name, end = form.call
    quoted = json.dumps(called, ensure_ascii=False)
    parts = [_spelled(layout, before), quoted, _spelled(layout, after_name), *arguments, _spelled(layout, end)]  # fmt: skip
    yield f"{name}: {' '.join(part for part in parts if part)}"


def _value(
    schema: Any, root: Mapping[str, Any], strict: bool, json_rule: JsonRule, key: str
) -> str:
    """What may stand between the tags of an argument."""
    schema = schema if isinstance(schema, Mapping) else {}
    types = call_values.types_of(schema, root)
    given = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(given, list):
        texts = [call_values.value_text(one) for one in given]
        return f"({' | '.join(json.dumps(text, ensure_ascii=False) for text in texts)})"
    if types and "string" not in types:
        shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
        return json_rule({**schema, **shared}, strict)
    if strict and (said := [word for word in _OF_TEXTS if word in schema]):
        raise DataError(
            f"{said[0]!r} of {key!r} cannot be held: texts stand between tags as they are; leave it out"
        )
    return _ANYTHING
