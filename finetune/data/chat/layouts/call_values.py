"""Arguments of a call as JSON text <-> the texts between tags that GLM-4.5 and later write.

A value that is text stands as it is, anything else as JSON. Back again the tool's schema says which of
the two was meant:

    the schema takes     the text `20` is     the text `true or so` is
    text alone           "20"                 "true or so"
    numbers              20                   "true or so"
    nothing is said      20                   "true or so"

So a text that looks like a number, as in `{"zip": "10115"}`, comes back as text where the schema says
`string`, and as a number where no schema says anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune.data.dialogue import strict_json
from finetune.data.dialogue.conversation import RowError
from finetune.data.dialogue.tool_calls import tool_name

_TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
_NO_TYPES: frozenset[str] = frozenset()


def value_texts(arguments: str) -> list[tuple[str, str]]:
    """(key, text) of each argument; RowError when the arguments are no JSON object."""
    value = strict_json.parse(arguments)
    if not isinstance(value, dict):
        raise RowError(f"the arguments are {strict_json.describe(value)}, not a JSON object")
    return [(key, value_text(one)) for key, one in value.items()]


def value_text(value: Any) -> str:
    """What stands between the tags of a value."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_value(text: str, schema: Any, root: Mapping[str, Any]) -> Any:
    """The value that a text means under the schema of its argument."""
    try:
        strict_json.dump(value := strict_json.parse(text))
    except RowError:
        return text
    if isinstance(value, str):  # a text stands without quotes, so these belong to it
        return text
    types = types_of(schema, root)
    return value if not types or types & set(_names(value)) else text


def parameters_of(tools: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The JSON schema of a tool's arguments; empty when no tool has the name."""
    for tool in tools:
        if tool_name(tool) == name:
            parameters = tool.get("function", {}).get("parameters")
            return parameters if isinstance(parameters, Mapping) else {}
    return {}


def schema_of(parameters: Mapping[str, Any], key: str) -> Any:
    """The schema of one argument, or None."""
    properties = parameters.get("properties")
    return properties.get(key) if isinstance(properties, Mapping) else None


def _names(value: Any) -> Iterator[str]:
    """The names that JSON schema has for the kind of a value that is no text."""
    if value is None or isinstance(value, bool):
        yield "null" if value is None else "boolean"
    elif isinstance(value, int | float):
        yield "number"
        if float(value).is_integer():
            yield "integer"
    else:
        yield "object" if isinstance(value, dict) else "array"


def types_of(schema: Any, root: Mapping[str, Any], depth: int = 0) -> frozenset[str]:
    """The kinds of value that a schema takes; empty when it does not say."""
    if not isinstance(schema, Mapping) or depth > 8:
        return _NO_TYPES
    if isinstance(reference := schema.get("$ref"), str):
        return types_of(_followed(reference, root), root, depth + 1)
    if "type" in schema:
        named = schema["type"]
        return _TYPES & frozenset([named] if isinstance(named, str) else map(str, named))
    given = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(given, list):
        return frozenset(n for one in given for n in (["string"] if isinstance(one, str) else _names(one)))  # fmt: skip
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list):
            inner = [types_of(one, root, depth + 1) for one in schema[key]]
            if key == "allOf":
                return next((types for types in inner if types), _NO_TYPES)
            return frozenset().union(*inner) if all(inner) else _NO_TYPES
    return _NO_TYPES


def _followed(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference inside of the same schema points at."""
    found: Any = root
    for step in reference.removeprefix("#").strip("/").split("/"):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found
