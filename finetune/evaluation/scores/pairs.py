"""A reply beside its reference -> the numbers that scores are made of.

BLEU-4 and ROUGE come under a definition, which says how texts are cut into words; the other numbers
are the same under all of them but for the words that they count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from finetune import console
from finetune.data.dialogue.conversation import Message
from finetune.data.dialogue.tool_calls import tool_name
from finetune.evaluation.predictions import Prediction, text
from finetune.evaluation.scores import texts
from finetune.evaluation.scores.texts import (
    content_words,
    jieba_words,
    language_words,
    script_words,
)
from finetune.evaluation.scores.timed import at_most

DefinitionName = Literal["default", "demo", "llamafactory"]
REPEATED = 4
"""Words of what counts as repeated."""
SCHEMA_SECONDS = 1.0
"""For one reply under one schema; ordinary ones take milliseconds."""
_TOO_SLOW: set[str] = set()
_NOT_JSON = object()


class Compared:
    """A reply beside its reference, cut into words once for all scores."""

    def __init__(self, prediction: Prediction, definition: Definition, schema: str = "") -> None:
        self.prediction, self.definition, self.schema = prediction, definition, schema
        self.reply, self.reference = text(prediction.reply), text(prediction.reference)

    @cached_property
    def overlap(self) -> dict[str, float]:
        """`bleu-4` and `rouge-*`."""
        return self.definition.overlap(self)

    @cached_property
    def words(self) -> tuple[list[str], list[str]]:
        """Words of reply and reference without white space, by language."""
        return self.definition.words(self.reply), self.definition.words(self.reference)

    @cached_property
    def json(self) -> dict[str, float | None]:
        """Whether a reply that is to be JSON is."""
        is_call = bool(self.prediction.reference.metadata.strip())
        return json_parts(self.reply, self.reference, "" if is_call else self.schema)

    @cached_property
    def tool_call(self) -> dict[str, float | None]:
        """Whether a call was right, part by part."""
        return tool_call_parts(self.prediction)


def repetition_rate(line: Sequence[str]) -> float | None:
    """Share of a text's runs of four words that stood in it before; None without such a run."""
    runs = [tuple(line[i : i + REPEATED]) for i in range(len(line) - REPEATED + 1)]
    return 100.0 * (1 - len(set(runs)) / len(runs)) if runs else None


@dataclass(frozen=True)
class Definition:
    """How texts are cut into words, and what follows from it."""

    overlap: Callable[[Compared], dict[str, float]]
    """`bleu-4` and `rouge-*` of a pair."""
    words: Callable[[str], list[str]]
    """Words of a text for `corpus_bleu` and `repetition_rate`."""
    said: Mapping[str, str]
    """What signatures say of it."""


_ZERO = dict.fromkeys(("bleu-4", "rouge-1", "rouge-2", "rouge-l"), 0.0)


def _default(pair: Compared) -> dict[str, float]:
    """Words by script, white space never among them; ROUGE counts no signs or Japanese particles."""
    one, other = pair.words
    if not one or not other:
        return dict(_ZERO)
    return {"bleu-4": texts.bleu(one, other), **texts.rouge(*map(content_words, (one, other)))}


def _demo(pair: Compared) -> dict[str, float]:
    """Jieba words, white space among them, of the texts without the white space around them."""
    if not pair.reply or not pair.reference:
        return dict(_ZERO)
    one, other = jieba_words(pair.reply), jieba_words(pair.reference)
    return {"bleu-4": texts.bleu(one, other), **texts.rouge(one, other)}


def _llamafactory(pair: Compared) -> dict[str, float]:
    """As LLaMA-Factory computes them before it takes the mean.

    BLEU on characters, ROUGE on jieba words, the texts as they are with the white space around them,
    and every value rounded to four digits.
    """
    reply, reference = (
        f"{one.metadata}\n{one.content}" if one.metadata else one.content
        for one in (pair.prediction.reply, pair.prediction.reference)
    )
    one, other = jieba_words(reply), jieba_words(reference)
    blank = not reply.split() or not reference.split()
    zero = dict.fromkeys(("rouge-1", "rouge-2", "rouge-l"), 0.0)
    found = zero if blank else texts.rouge(one, other)
    found["bleu-4"] = texts.bleu(list(reply), list(reference))
    return {name: round(value, 4) for name, value in found.items()}


_BY_LANGUAGE = (
    "jieba where a text holds Chinese characters, else letters and digits apart from signs"
)
_DEMO = {
    "bleu words": "jieba words",
    "rouge words": "jieba words",
    "odd": "empty replies score 0",
    "words": _BY_LANGUAGE,
}
_BY_SCRIPT = "words by script: jieba for Chinese, else {icu}"
DEFINITIONS: dict[DefinitionName, Definition] = {
    "default": Definition(
        _default,
        script_words,
        {
            "bleu words": f"{_BY_SCRIPT}, signs among them",
            "rouge words": f"{_BY_SCRIPT}, without signs and Japanese particles",
            "odd": "empty replies score 0",
            "words": _BY_SCRIPT,
        },
    ),
    "demo": Definition(_demo, language_words, _DEMO),
    "llamafactory": Definition(
        _llamafactory,
        language_words,
        _DEMO
        | {
            "bleu words": "characters",
            "odd": "empty replies score 0, texts unstripped, pairs rounded to 4 digits",
        },
    ),
}
DEFINITION: DefinitionName = "default"
"""What is used when nothing else is asked for."""


def json_parts(reply: str, reference: str, schema: str = "") -> dict[str, float | None]:
    """Whether a reply is JSON, the right one, and valid: 0 or 100, None where it is not in question.

    JSON is in question where the reference is an object or a list, a schema wherever there is one.
    """
    wanted = _json(reference) if reference[:1] in ("{", "[") else _NOT_JSON
    asked = isinstance(wanted, (dict, list))
    value = _json(reply) if asked or schema else _NOT_JSON
    is_same = asked and value is not _NOT_JSON and _value(reply) == _value(reference)
    fits = bool(schema) and value is not _NOT_JSON and is_valid(value, _parsed(schema))
    return {
        "json_validity": _percent(value is not _NOT_JSON, asked),
        "json_match": _percent(is_same, asked),
        "json_schema_validity": _percent(fits, bool(schema)),
    }


@lru_cache(maxsize=4)
def _parsed(schema: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(schema)
    return found


def tool_call_parts(prediction: Prediction) -> dict[str, float | None]:
    """Whether a call was right, part by part: 0 or 100, or None where it is not in question.

    A built-in tool takes text, so its name is enough for validity and schema. docs/metrics.md says
    what each part is over.
    """
    reply, reference, tools = prediction.reply, prediction.reference, prediction.tools
    wanted, given = reference.metadata.strip(), reply.metadata.strip()
    asked = bool(tools) or bool(wanted)
    made = bool(tools) and bool(given)
    decision = bool(wanted) == bool(given)
    name = wanted == given
    equal = bool(given) and _value(reply.content) == _value(reference.content)
    right = decision and (not wanted or (name and equal))
    call = _call(reply, tools)
    runs = call is not None and all(key in call[0] for key in _required(call[1]))
    fits = call is not None and is_valid(*call)
    return {
        "tool_call_validity": _percent(runs, bool(wanted) or made),
        "tool_call_accuracy": _percent(right, asked),
        "tool_call_decision": _percent(decision, asked),
        "tool_call_name": _percent(name, bool(wanted)),
        "tool_call_arguments": _percent(equal, bool(wanted)),
        "tool_call_schema": _percent(fits, made),
    }


def _call(
    reply: Message, tools: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], Mapping[str, Any]] | None:
    """Arguments and their JSON schema; None without a known name or a JSON object."""
    name = reply.metadata.strip()
    tool = next((tool for tool in tools if tool_name(tool) == name), None)
    if tool is None:
        return None
    if "function" not in tool:
        return {}, {}
    arguments = _json(reply.content)
    if not isinstance(arguments, dict):
        return None
    return arguments, tool["function"].get("parameters") or {}


def _required(schema: Mapping[str, Any]) -> list[str]:
    """The arguments that must be there, as far as a schema names any."""
    named = schema.get("required")
    return [key for key in named if isinstance(key, str)] if isinstance(named, list) else []


def is_valid(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value is valid under a JSON schema; True under one that is itself invalid or endless."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    written = json.dumps(schema)
    if written in _TOO_SLOW:
        return True
    validator = Draft202012Validator(schema, registry=Registry())  # fetches nothing
    try:
        with at_most(SCHEMA_SECONDS):
            Draft202012Validator.check_schema(schema)
            return bool(validator.is_valid(value))
    except TimeoutError:
        _TOO_SLOW.add(written)
        console.warn_once(
            f"a JSON schema takes more than {SCHEMA_SECONDS:g} s for one reply, so replies count as valid "
            f"under it; simplify it: {written[:200]}"
        )
        return True
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
