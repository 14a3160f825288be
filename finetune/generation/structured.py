r"""What a reply must be -> which tokens may come next, by llguidance.

A reply of GLM-4 is a line break and a text, or the name of a function, a line break and its arguments.
A `Structure` says which of these may come, and under which JSON schemas; as a grammar (Lark):

    start: text | call (<|assistant|> call)*
    text: "\n" %json {"type": "object"}
    call: "get_weather\n" %json {...} | "now\n" %json {"type": "object"}

Control tokens are no part of any text here, so a constrained reply holds none but the calls' own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.data.chat.layouts.glm45 import Glm45Layout
from finetune.data.chat.layouts.tag_grammar import tag_grammar
from finetune.data.dialogue import strict_json
from finetune.data.dialogue.conversation import RowError
from finetune.data.dialogue.tool_calls import BUILT_IN, tool_name
from finetune.errors import ConfigError, DataError, ModelError
from finetune.storage.given import read_given

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.data.chat.template import ChatTemplate

MAX_SCHEMA = 256 << 10
"""Characters of a grammar; what is larger takes more than a moment to compile."""
REHEARSED = 8
"""Tokens that a constraint is tried on before it is taken."""
_SPELLING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as GLM-4 was trained to write it; free whitespace would let a model write it without end."""


@dataclass(frozen=True, slots=True)
class Structure:
    """What a reply must be."""

    schema: Mapping[str, Any] | None = None
    """JSON schema of a reply that is no call; None: there must be a call."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions that may be called."""
    many_calls: bool = False
    """The reply may hold more than one call."""
    strict: bool = False
    """Keywords of a schema that cannot be enforced are refused, not left to the model."""
    opened: str | None = None
    """What the prompt ends in behind `<|assistant|>`; None: as the template's prompt does."""


class PromptForm(NamedTuple):
    """What a constraint must know of a prompt."""

    tools: Sequence[Mapping[str, Any]]
    opened: str | None = None
    """What it ends in behind `<|assistant|>`."""


@dataclass(frozen=True, slots=True)
class Form:
    """What all replies of `predict` or `evaluate` must be; nothing by default."""

    schema: str = ""
    """JSON schema of every reply, as text."""
    must_call: bool = False
    """A dialogue that has tools is answered with a call of them."""

    def __str__(self) -> str:
        texts = ["a call where there are tools"] if self.must_call else []
        if self.schema:
            texts.append(
                f"JSON under schema {hashlib.sha256(self.schema.encode()).hexdigest()[:8]}"
            )
        return "; else ".join(texts)

    def check(self, template: ChatTemplate) -> None:
        """Raises ConfigError when the library is missing or the schema cannot be compiled."""
        if self.schema:
            try:
                Structures(template).constraint(Structure(json.loads(self.schema)))
            except DataError as error:
                raise ConfigError(f"--json-schema: {error}") from error
        elif self.must_call:
            check_installed()

    def constraint_at(
        self, template: ChatTemplate, asked: Sequence[PromptForm]
    ) -> Callable[[int], GrammarConstraint | None] | None:
        """For each prompt, by its place in the list, what its reply must be."""
        if not self.schema and not self.must_call:
            return None
        structures = Structures(template)

        def constraint(number: int) -> GrammarConstraint | None:
            tools, opened = asked[number]
            if self.must_call and tools:
                wanted = Structure(None, tools, many_calls=True, opened=opened)
            elif self.schema:
                wanted = Structure(json.loads(self.schema), opened=opened)
            else:
                return None
            return structures.constraint(wanted)

        return constraint


ANY_FORM = Form()


def read_form(schema: Path | None, *, must_call: bool) -> Form:
    """The form that a file with a JSON schema and a flag ask for; ConfigError when it is none."""
    return Form(read_schema(schema, "--json-schema") if schema else "", must_call)


def read_schema(file: Path, option: str) -> str:
    """The JSON schema in a file, as text; ConfigError when it holds none."""
    text = read_given(file, f"{option} {file}")
    try:
        value = strict_json.parse(text)
    except RowError as error:
        raise ConfigError(f"{option} {file}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{option} {file}: is {strict_json.describe(value)}, not a schema; give a JSON Schema"
        )
    if reason := _schema_problem(value):
        raise ConfigError(f"{option} {file}: is no JSON Schema: {reason}; correct it")
    return strict_json.dump(value)


def _schema_problem(schema: dict[str, Any]) -> str | None:
    """What is wrong with a schema; a reference that leads out of it is, for nothing is fetched."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    try:
        Draft202012Validator.check_schema(schema)
        place = Registry().resolver_with_root(DRAFT202012.create_resource(schema))
        for reference in _references(schema):
            place.lookup(reference)
    except SchemaError as error:
        return f"{error.json_path}: {error.message}"[:300]
    except (Unresolvable, RecursionError) as error:
        return f"{error}"[:300]
    return None


def _references(schema: Any) -> Iterator[str]:
    """What `$ref` says, wherever it stands but in values and in parts with an address of their own."""
    if isinstance(schema, dict) and "$id" not in schema:
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for key, value in schema.items():
            if key not in ("const", "default", "enum", "examples"):
                yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


class GrammarConstraint:
    """The structure of one reply while it is written."""

    def __init__(self, matcher: Any, num_tokens: int) -> None:
        self._matcher = matcher
        self._num_tokens = num_tokens

    def rehearse(self) -> None:
        """Writes the first tokens of a reply to nobody: some schemas are found too large only then."""
        self._check()
        copy = GrammarConstraint(self._matcher.deep_copy(), self._num_tokens)
        for _ in range(REHEARSED):
            tokens = copy._allowed().nonzero()[0]
            if not len(tokens) or copy._matcher.is_stopped():
                return
            copy.accept(int(tokens[0]))

    def restrict(self, logits: Tensor) -> Tensor:
        """The logits [V] with -inf at every token that may not come."""
        import torch

        allowed = self._allowed()[: logits.shape[0]]
        mask = torch.zeros(logits.shape[0], dtype=torch.bool)
        mask[: len(allowed)] = torch.from_numpy(allowed)
        return logits.masked_fill(~mask.to(logits.device), float("-inf"))

    def accept(self, token: int) -> None:
        """Takes note of the token that came."""
        self._matcher.consume_token(token)
        self._check()

    def _allowed(self) -> Any:
        """Bool [V]: the tokens that may come."""
        import numpy as np
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        bits = allocate_token_bitmask(1, self._num_tokens)
        fill_next_token_bitmask(self._matcher, bits, 0)
        self._check()
        return np.unpackbits(bits.view(np.uint8), bitorder="little")[: self._num_tokens].astype(
            bool
        )

    def _check(self) -> None:
        if self._matcher.is_error():
            reason, _, _ = self._matcher.get_error().partition("<state>")
            if reason.startswith("NoExtension"):
                reason = "no reply can satisfy it"
            raise ModelError(" ".join(reason.split())[:300] or "it is too complex")


class Structures:
    """Structures of the replies of one checkpoint, compiled."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._tokenizer = _tokenizer_of(_tags_as_tokens(template), tuple(template.stop_ids))

    def constraint(self, structure: Structure) -> GrammarConstraint:
        """A fresh constraint for one reply; DataError when the structure cannot be compiled."""
        from llguidance import LLMatcher

        grammar = self.grammar(structure)
        if len(grammar) > MAX_SCHEMA:
            raise DataError(f"the schema has more than {MAX_SCHEMA:,} characters; make it shorter")
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        constraint = GrammarConstraint(matcher, int(self._tokenizer.vocab_size))
        try:
            constraint.rehearse()
        except ModelError as error:
            raise DataError(
                f"the schema cannot be compiled: {error}; correct or simplify it"
            ) from error
        return constraint

    def grammar(self, structure: Structure) -> str:
        """The structure in Lark's language."""
        if isinstance(self._template.layout, Glm45Layout):
            return tag_grammar(structure, self._template.layout, _json_rule)
        thinking = self._template.layout.thinking
        kinds, rules = [], []
        if structure.schema is not None:
            kinds.append("text")
            opening = "" if thinking else r'"\n" '
            rules.append(f"text: {opening}{_json_rule(structure.schema, structure.strict)}")
        if structure.tools:
            kinds.append("call (<|assistant|> call)*" if structure.many_calls else "call")
            calls = [_call_rule(tool, structure.strict) for tool in structure.tools]
            rules.append(f"call: {' | '.join(calls)}")
        start = " | ".join(kinds)
        if thinking:  # the prompt ends inside of a thought
            start = rf"thought /\n*/ ({start})"
            rules.append(r'thought[stop="</think>"]: /(.|\n)*/')
        return "\n".join([f"start: {start}", *rules])


def check_installed() -> None:
    """Raises ConfigError when the library for it is missing."""
    try:
        import llguidance  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            "structured output needs llguidance: pip install 'glm4-finetune[structured]'"
        ) from error


def _tags_as_tokens(template: ChatTemplate) -> str:
    """The tokenizer as text, in which tags of a reply are control tokens: a grammar names them so."""
    text = template.tokenizer.backend.to_str()
    if not isinstance(template.layout, Glm45Layout):
        return text
    described = json.loads(text)
    for token in described["added_tokens"]:
        token["special"] = True
    return json.dumps(described)


@lru_cache(maxsize=4)
def _tokenizer_of(tokenizer_json: str, stop_ids: tuple[int, ...]) -> Any:
    """Two seconds for GLM-4's vocabulary, so each is made once."""
    check_installed()
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer_json, eos_token=list(stop_ids))


def _call_rule(tool: Mapping[str, Any], strict: bool) -> str:
    name = tool_name(tool)
    opening = json.dumps(f"{name}\n", ensure_ascii=False)
    if name in BUILT_IN:
        return rf"{opening} /(.|\n)+/"
    function = tool["function"]
    schema = {**(function.get("parameters") or {}), "type": "object"}
    return f"{opening} {_json_rule(schema, strict or function.get('strict') is True)}"


def _json_rule(schema: Mapping[str, Any], strict: bool) -> str:
    options = {**_SPELLING, "lenient": not strict}
    if number := _too_large(schema):
        raise DataError(
            f"{number} is too large to be enforced; use bounds below 2^63 and smaller divisors"
        )
    return "%json " + json.dumps({**closed(schema), "x-guidance": options}, ensure_ascii=False)


LARGEST_DIVISOR = 20_000
"""Of `multipleOf`, in units of its last digit: compiling takes a second for 100,000."""
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def _too_large(schema: Any) -> float:
    """A number of a schema that cannot be enforced; 0 where there is none.

    llguidance cuts bounds down to 64 bits, and so would write other numbers, and counts through a divisor.
    """
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            if not isinstance(value, (int, float)) or key not in _BOUNDS:
                continue
            if abs(value) >= 2**63 or (key == "multipleOf" and _numerator(value) > LARGEST_DIVISOR):
                return value
    parts = schema.values() if isinstance(schema, Mapping) else schema
    if not isinstance(schema, (Mapping, list)):
        return 0
    return next((found for part in parts if (found := _too_large(part))), 0)


def _numerator(value: float) -> int:
    """25 of 0.25, 300 of 300.0: a divisor in units of its last digit."""
    number = abs(Decimal(repr(value)))
    whole = number == number.to_integral_value()
    return int(number if whole else number.scaleb(-int(number.as_tuple().exponent)))


_COMBINING = {"$ref", "anyOf", "oneOf", "not", "if", "dependentSchemas", "patternProperties", "propertyNames", "additionalProperties"}  # fmt: skip
"""Beside one of these, what an object may hold is said in more than one place."""


def closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema under which objects with named properties hold no others, unless it speaks of others.

    JSON schema allows any others, which a client hardly means when it names the ones that it reads.
    """
    text = json.dumps(schema)
    if '"allOf"' in text or '"unevaluatedProperties"' in text:
        return schema
    made: Mapping[str, Any] = _closed(schema)
    return made


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    made = dict(schema)
    for key in ("properties", "$defs", "definitions"):
        if isinstance(made.get(key), Mapping):
            made[key] = {name: _closed(value) for name, value in made[key].items()}
    if "properties" not in made:
        for key in ("anyOf", "oneOf", "prefixItems"):
            if isinstance(made.get(key), list):
                made[key] = [_closed(value) for value in made[key]]
    if "items" in made:
        made["items"] = _closed(made["items"])
    if made.get("properties") and not _COMBINING & made.keys():
        made["additionalProperties"] = False
    return made
