"""A reply beside its reference -> was the call right, part by part? Each 0 or 100, or not in question."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.dialogue.conversation import Message
from finetune.data.dialogue.tool_calls import tool_name

PARTS = (
    "tool_call_accuracy",
    "tool_call_decision",
    "tool_call_name",
    "tool_call_arguments",
    "tool_call_schema",
)
Tools = Sequence[Mapping[str, Any]]
_NOT_JSON = object()


def parts(reply: Message, reference: Message, tools: Tools) -> dict[str, float | None]:
    """The scores in `PARTS`; docs/metrics.md says what each is over."""
    wanted, given = reference.metadata.strip(), reply.metadata.strip()
    asked = bool(tools) or bool(wanted)
    decision = bool(wanted) == bool(given)
    name = wanted == given
    equal = bool(given) and _value(reply.content) == _value(reference.content)
    right = decision and (not wanted or (name and equal))
    return {
        "tool_call_accuracy": _percent(right, asked),
        "tool_call_decision": _percent(decision, asked),
        "tool_call_name": _percent(name, bool(wanted)),
        "tool_call_arguments": _percent(equal, bool(wanted)),
        "tool_call_schema": _percent(fits_schema(reply, tools), bool(tools) and bool(given)),
    }


def fits_schema(reply: Message, tools: Tools) -> bool:
    """Whether a call's function is offered and its arguments are valid under its JSON schema.

    Of a built-in tool, which takes text, its name is enough.
    """
    name = reply.metadata.strip()
    tool = next((tool for tool in tools if tool_name(tool) == name), None)
    if tool is None:
        return False
    if "function" not in tool:
        return True
    arguments = _json(reply.content)
    if not isinstance(arguments, dict):
        return False
    return _is_valid(arguments, tool["function"].get("parameters") or {})


def _is_valid(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    validator = Draft202012Validator(schema, registry=Registry())  # fetches nothing
    try:
        Draft202012Validator.check_schema(schema)
        return bool(validator.is_valid(arguments))
    except (SchemaError, Unresolvable, RecursionError):
        # A tool that is described wrongly cannot be called wrongly; its name and JSON were right.
        return True


def _value(text: str) -> Any:
    """What is compared: JSON as its value, so that spaces and the order of keys do not count."""
    try:
        value = _json(text)
        return text.strip() if value is _NOT_JSON else _exact(value)
    except RecursionError:
        return text.strip()


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _exact(value: Any) -> Any:
    """The value with `true` told from `1`, which Python takes for equal; `1` and `1.0` stay equal."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, dict):
        return {key: _exact(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_exact(one) for one in value]
    return value


def _percent(right: bool, asked: bool) -> float | None:
    return 100.0 * right if asked else None
