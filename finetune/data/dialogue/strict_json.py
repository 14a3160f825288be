"""JSON text -> a value, or the reason why it is not clean JSON.

Stricter than `json.loads`: duplicate keys, NaN and Infinity, absurd nesting, NUL characters and
halves of surrogate pairs are refused, because each of them would train something else than what
the author of the row meant.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from finetune.data.dialogue.conversation import RowError, text_problem

MAX_DEPTH = 100
"""Deepest nesting of a row; tool definitions in the wild stay under 20."""

_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise RowError(f"duplicate key {key!r} in one object")
            seen.add(key)
    return value


def _no_constant(name: str) -> NoReturn:
    raise RowError(f"{name} is not JSON; write a number or null")


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
LENIENT = json.JSONDecoder()


def parse(text: str) -> Any:
    """The value of a text that is one JSON value; RowError with the reason otherwise."""
    start = 0 if text[:1] in ("{", "[") else len(text) - len(text.lstrip(" \t\r\n"))
    try:
        value, end = DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise RowError(syntax_reason(error)) from None
    except RecursionError:
        raise RowError(f"nested more than {MAX_DEPTH} deep") from None
    except RowError:
        raise
    except ValueError as error:  # an integer of more than 4,300 digits
        raise RowError(f"not JSON that can be read: {error}") from None
    if end != len(text) and text[end:].strip(" \t\r\n"):
        raise RowError(f"more text after the end of the JSON value, at column {end + 1}")
    check_value(text, value)
    return value


def check_value(text: str, value: Any) -> None:
    """Raise RowError for nesting or characters that parse but must not go on.

    Works on counts and substrings of the source text first, so that clean rows cost nothing.
    """
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise RowError(f"nested more than {MAX_DEPTH} deep")
    if "\\ud" in text or "\\uD" in text or "\\u0000" in text:
        _check_strings(value)


def dump(value: Any) -> str:
    """JSON as it goes into a dialogue: not ASCII-escaped, separators `", "` and `": "`."""
    try:
        return _ENCODER.encode(value)
    except ValueError:
        raise RowError("a number is not finite, which JSON cannot say") from None
    except TypeError as error:  # a table holds dates, decimals, bytes
        kind = str(error).removeprefix("Object of type ").partition(" ")[0]
        raise RowError(f"a value of type {kind!r} cannot be written as JSON; make it text or a number") from None  # fmt: skip


def describe(value: Any) -> str:
    """In words what kind of JSON value this is, such as `null` or `a list`."""
    if value is None:
        return "null"
    return _KINDS.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def syntax_reason(error: json.JSONDecodeError) -> str:
    """A syntax error in words, told apart into cut-off text and wrong text."""
    what = error.msg.removesuffix(" at")
    if is_cut_off(error):
        return f"the JSON is cut off at column {error.colno}: {what}"
    if error.doc[error.pos : error.pos + 1] == "'":
        what = "text stands in double quotes in JSON, here are single ones"
    return f"not JSON at column {error.colno}: {what}"


def is_cut_off(error: json.JSONDecodeError) -> bool:
    """Whether more text could still make it JSON."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc.rstrip())


def _depth(text: str) -> int:
    depth = deepest = 0
    for match in _STRUCTURE.finditer(text):
        first = text[match.start()]
        if first in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first != '"':
            depth -= 1
    return deepest


def _check_strings(value: Any) -> None:
    if isinstance(value, str):
        problem = text_problem(value)
        if problem:
            raise RowError(problem)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_strings(key)
            _check_strings(item)
    elif isinstance(value, list):
        for item in value:
            _check_strings(item)
