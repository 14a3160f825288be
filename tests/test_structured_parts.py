"""Which objects are closed, and which schemas are enforced to the letter."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune.generation import structured

# --- what a reply must be ----------------------------------------------------------------------

NAMED = {"properties": {"a": {}}}
CLOSED = NAMED | {"additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        (NAMED, CLOSED), ({"type": "object"}, {"type": "object"}), ({"properties": {}}, {"properties": {}}),
        ({"properties": {"a": NAMED}}, {"properties": {"a": CLOSED}, "additionalProperties": False}), ({"items": NAMED}, {"items": CLOSED}),
        ({"anyOf": [NAMED, True]}, {"anyOf": [CLOSED, True]}), ({"oneOf": [NAMED]}, {"oneOf": [CLOSED]}), ({"prefixItems": [NAMED]}, {"prefixItems": [CLOSED]}),
        ({"$defs": {"x": NAMED}}, {"$defs": {"x": CLOSED}}), ({"definitions": {"x": NAMED}}, {"definitions": {"x": CLOSED}}),
        (NAMED | {"allOf": [NAMED]}, NAMED | {"allOf": [NAMED]}), ({"items": NAMED, "x": {"unevaluatedProperties": 1}}, {"items": NAMED, "x": {"unevaluatedProperties": 1}}),
        *((NAMED | {key: value}, NAMED | {key: value}) for key, value in {"$ref": "#", "anyOf": [NAMED], "not": NAMED, "if": NAMED, "patternProperties": {}, "additionalProperties": True, "propertyNames": {}}.items()),
    ],
)  # fmt: skip
def test_named_properties_are_all_unless_the_schema_speaks_of_others(schema: Any, found: Any) -> None:  # fmt: skip
    before = json.dumps(schema)
    assert structured.closed(schema) == found
    assert json.dumps(schema) == before, "the caller's own is left as it is"


@pytest.mark.parametrize(
    ("asked_strict", "own_strict", "strict"), [(False, False, False), (True, False, True), (False, True, True), (False, "yes", False)]
)  # fmt: skip
def test_a_functions_own_strictness_counts(asked_strict: bool, own_strict: Any, strict: bool) -> None:  # fmt: skip
    tool = {"type": "function", "function": {"name": "f", "strict": own_strict, "parameters": NAMED}}  # fmt: skip
    rule = structured._call_rule(tool, asked_strict)
    head, _, schema = rule.partition(" %json ")
    assert head == '"f\\n"'
    found = json.loads(schema)
    assert found["x-guidance"]["lenient"] is not strict
    assert (found["type"], found["additionalProperties"]) == ("object", False)
    assert structured._call_rule({"type": "python"}, True) == r'"python\n" /(.|\n)+/'
