"""Which objects are closed, and which schemas are enforced to the letter."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.data.dialogue import strict_json
from finetune.errors import ConfigError, DataError, ModelError
from finetune.generation import structured
from finetune.generation.structured import (
    ANY_FORM,
    Form,
    GrammarConstraint,
    PromptForm,
    Structure,
    Structures,
)

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
        *((NAMED | {key: value}, NAMED | {key: value}) for key, value in {"$ref": "#", "anyOf": [NAMED], "oneOf": [NAMED], "dependentSchemas": {"a": NAMED}, "not": NAMED, "if": NAMED, "patternProperties": {}, "additionalProperties": True, "propertyNames": {}}.items()),
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


@pytest.mark.parametrize(
    ("schema", "number"),
    [
        *(({key: 2**63}, 2**63) for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")), *(({key: -(2**63)}, -(2**63)) for key in ("minimum", "maximum")),
        ({"minimum": 2**63 - 1, "maximum": -(2**63) + 1}, 0), ({"maxLength": 2**70, "const": 2**70}, 0), ({"minimum": "x"}, 0),
        ({"multipleOf": 20_000}, 0), ({"multipleOf": 20_001}, 20_001), ({"multipleOf": 0.25}, 0), ({"multipleOf": 2.0001}, 2.0001), ({"multipleOf": 300.0}, 0), ({"multipleOf": -20_001}, -20_001),
        ({"properties": {"a": [{"items": {"maximum": 2**64}}]}}, 2**64), ({"properties": {"a": {}, "b": {"multipleOf": 0.123457}}}, 0.123457), ({"enum": [2**64]}, 0), ({}, 0), (True, 0),
    ],
    ids=lambda one: str(one)[:60],
)  # fmt: skip
def test_numbers_that_cannot_be_enforced_are_found_wherever_they_stand(schema: Any, number: float) -> None:  # fmt: skip
    assert structured._too_large(schema) == number
    if number:
        with pytest.raises(DataError, match=re.escape(f"{number} is too large to be enforced")):
            structured._json_rule(schema, False)


@pytest.mark.parametrize(("value", "units"), [(0.25, 25), (300.0, 300), (7, 7), (-0.5, 5), (1e-7, 1), (1.5e3, 1500), (20.01, 2001)])  # fmt: skip
def test_a_divisor_is_counted_in_units_of_its_last_digit(value: float, units: int) -> None:
    assert structured._numerator(value) == units


def test_json_is_spelled_as_training_spells_it() -> None:
    rule = json.loads(structured._json_rule({"type": "object"}, True).removeprefix("%json "))
    assert rule == {"type": "object", "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}}  # fmt: skip
    options = rule["x-guidance"]
    assert json.dumps({"a": [1, 2], "b": 3}, separators=(options["item_separator"], options["key_separator"])) == strict_json.dump({"a": [1, 2], "b": 3})  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        ({"$ref": "#/a"}, ["#/a"]), ({"properties": {"a": {"$ref": "#/b"}, "c": [{"$ref": "#/d"}]}}, ["#/b", "#/d"]), ({"$ref": 5}, []), ({"$id": "x", "a": {"$ref": "#/b"}}, []),
        *(({key: [{"$ref": "#/a"}]}, []) for key in ("const", "default", "enum", "examples")), ({"a": "$ref"}, []),
    ],
)  # fmt: skip
def test_references_are_followed_where_they_are_some(schema: Any, found: list[str]) -> None:
    assert [*structured._references(schema)] == found


F = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
G = {"type": "function", "function": {"name": "g"}}


@pytest.mark.parametrize(
    ("structure", "thinking", "lines"),
    [
        (Structure({}), False, ["start: text", 'text: "\\n" J']), (Structure(None, [F, G]), False, ["start: call", 'call: "f\\n" J | "g\\n" J']),
        (Structure(None, [F], many_calls=True), False, ["start: call (<|assistant|> call)*", 'call: "f\\n" J']), (Structure({}, [F]), False, ["start: text | call", 'text: "\\n" J', 'call: "f\\n" J']),
        (Structure({}, [F]), True, ["start: thought /\\n*/ (text | call)", "text: J", 'call: "f\\n" J', 'thought[stop="</think>"]: /(.|\\n)*/']),
    ],
    ids=lambda one: str(one)[:50],
)  # fmt: skip
def test_a_grammar_says_what_may_come(structure: Structure, thinking: bool, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(structured, "_json_rule", lambda schema, strict: "J")
    made = Structures.__new__(Structures)
    made._template = SimpleNamespace(layout=SimpleNamespace(thinking=thinking))  # type: ignore[assignment]
    assert made.grammar(structure).splitlines() == lines


@pytest.mark.parametrize(
    ("form", "words"),
    [(Form(), ""), (Form("{}"), "JSON under schema 44136fa3"), (Form(must_call=True), "a call where there are tools"), (Form("{}", True), "a call where there are tools; else JSON under schema 44136fa3")],
)  # fmt: skip
def test_a_form_is_told_in_words(form: Form, words: str) -> None:
    assert str(form) == words
    assert (form == ANY_FORM) is not bool(words)


def test_each_prompt_has_the_form_that_its_tools_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Structures, "__init__", lambda self, template: None)
    monkeypatch.setattr(Structures, "constraint", lambda self, structure: structure)
    template: Any = None
    asked = [PromptForm((), "a"), PromptForm([F], "b")]
    calls, json_alone = Structure(None, [F], many_calls=True, opened="b"), Structure({"x": 1}, opened="b")  # fmt: skip
    for form, wanted in (
        (Form(must_call=True), [None, calls]), (Form('{"x": 1}', True), [Structure({"x": 1}, opened="a"), calls]),
        (Form('{"x": 1}'), [Structure({"x": 1}, opened="a"), json_alone]),
    ):  # fmt: skip
        at: Any = form.constraint_at(template, asked)
        assert [at(number) for number in range(2)] == wanted
    assert ANY_FORM.constraint_at(template, asked) is None


def test_a_form_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    template: Any = None
    ANY_FORM.check(template)
    with pytest.raises(
        ConfigError, match=r"needs llguidance: pip install 'glm4-finetune\[structured\]'"
    ):
        Form(must_call=True).check(template)


class Matcher:
    """What a constraint asks of llguidance."""

    def __init__(self, error: str = "") -> None:
        self.error, self.taken = error, list[int]()

    def is_error(self) -> bool:
        return bool(self.error)

    def get_error(self) -> str:
        return self.error

    def consume_token(self, token: int) -> None:
        self.taken.append(token)


@pytest.mark.parametrize(
    ("error", "said"),
    [("NoExtensionBias: x", "no reply can satisfy it"), ("too  many\nitems<state>secret", "too many items"), ("<state>x", "it is too complex"), ("y" * 400, "y" * 300)],
)  # fmt: skip
def test_why_a_structure_fails_is_said_in_one_line(error: str, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        GrammarConstraint(Matcher(error), 4).accept(1)
    assert str(caught.value) == said
    fine = Matcher()
    GrammarConstraint(fine, 4).accept(3)
    assert fine.taken == [3]


def test_tokens_beyond_the_tokenizers_are_never_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import torch

    constraint = GrammarConstraint(Matcher(), 3)
    for allowed, logits, kept in (([True, False, True], 5, [0, 2]), ([True, True, True, True], 3, [0, 1, 2])):  # fmt: skip
        monkeypatch.setattr(GrammarConstraint, "_allowed", lambda self, allowed=allowed: np.array(allowed))  # fmt: skip
        found = constraint.restrict(torch.zeros(logits))
        assert [place for place, value in enumerate(found.tolist()) if value == 0] == kept


def test_what_is_wrong_deep_in_a_schema_is_told(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    for inner in ({"type": "text"}, {"items": {"minimum": "x"}}, {"$ref": "#/$defs/none"}):
        file.write_text(json.dumps({"type": "object", "properties": {"a": inner}}))
        with pytest.raises(ConfigError, match="is no JSON Schema"):
            structured.read_schema(file, "--json-schema")
    file.write_text(json.dumps({"type": "object", "properties": {"type": {"const": 1}}}))
    assert "const" in structured.read_schema(file, "--json-schema")
