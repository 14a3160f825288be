"""Tool definitions and tool calls in all their spellings -> the one that GLM-4 is trained with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from finetune.data.dialogue import strict_json
from finetune.data.dialogue.conversation import Message, RowError, text_problem

BUILT_IN = frozenset({"python", "simple_browser", "cogview"})
"""Tools that GLM-4 knows without a definition; what they are called with is plain text."""

Tools = tuple[dict[str, Any], ...]


_LONG = 16_384
"""Characters of the longest list of tools that is remembered."""


class Call(NamedTuple):
    """A call: the function's name and its arguments as JSON text."""

    name: str
    arguments: str


def read_tools(value: Any) -> Tools:
    """Tool definitions, each as `{"type": "function", "function": {…}}` or `{"type": "python"}`.

    Takes a list or JSON text of one, of wrapped or bare functions; null and "" are no tools.
    """
    if not value:
        return ()
    try:
        text = value if isinstance(value, str) else strict_json.dump(value)
    except RowError as error:  # a table's date, say
        raise RowError(f"tools: {error}") from None
    return _remembered(text) if len(text) <= _LONG else _tools_of_text(text)


def _tools_of_text(text: str) -> Tools:
    if not text.strip():
        return ()
    try:
        value = strict_json.parse(text)
    except RowError as error:
        raise RowError(f"tools: {error}") from None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"tools: is {strict_json.describe(value)}, not a list of definitions")
    tools = tuple(_tool(item, number) for number, item in enumerate(value, 1))
    names = [tool_name(tool) for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise RowError(f"tools: {twice!r} is defined twice")
    problem = text_problem(strict_json.dump(tools))
    if problem:
        raise RowError(f"tools: {problem}")
    return tools


_remembered = lru_cache(maxsize=1024)(_tools_of_text)
"""Because whole data sets share a few tool lists; nobody changes the result."""


def _tool(item: Any, number: int) -> dict[str, Any]:
    if isinstance(item, str):
        item = strict_json.parse(item)
    if not isinstance(item, dict):
        raise RowError(f"tools: definition {number} is {strict_json.describe(item)}, not an object")
    kind = item.get("type") or "function"
    if isinstance(kind, str) and kind in BUILT_IN and "function" not in item:
        return item
    if kind != "function":
        raise RowError(f"tools: definition {number} has type {kind!r}, not 'function'")
    function = _without_nulls(item.get("function", item))
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name or name != name.strip() or "\n" in name:
        raise RowError(f"tools: definition {number} has no usable name")
    if not isinstance(function.get("parameters", {}), dict | None):
        raise RowError(f"tools: parameters of {name!r} are not an object (a JSON schema)")
    if "function" not in item:  # flat, perhaps in OpenAI's newer way with its type among the rest
        function = {key: value for key, value in function.items() if key != "type"}
    elif item.get("type"):
        return item if function == item["function"] else {**item, "function": function}
    return {"type": "function", "function": function}


def _without_nulls(value: Any) -> Any:
    """A definition without the nulls that a table writes for what other rows have.

    `default: null` and `const: null` say something in a JSON schema, so they stay.
    """
    if isinstance(value, dict):
        return {
            key: _without_nulls(inner)
            for key, inner in value.items()
            if inner is not None or key in ("default", "const")
        }
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def tool_name(tool: Any) -> str:
    """The name that a call of this tool carries as metadata."""
    function = tool.get("function")
    return str(function["name"] if function else tool["type"])


def read_call(value: Any, position: int, tools: Tools = ()) -> Call:
    """A call from `{"name": …, "arguments": …}` or OpenAI's `{"function": {…}}` around it."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        raise RowError(f"message {position}: the call is {strict_json.describe(value)}")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise RowError(f"message {position}: the call has no function name")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, dict) and None in arguments.values():
        arguments = _without_absent(name, arguments, tools)
    return Call(name, arguments_text(name, arguments, position))


def _without_absent(name: str, arguments: dict[str, Any], tools: Tools) -> dict[str, Any]:
    """Arguments without the nulls that a table writes for what only other rows' tools take."""
    for tool in tools:
        parameters = tool.get("function", {}).get("parameters")
        known = parameters.get("properties") if isinstance(parameters, dict) else None
        if isinstance(known, dict) and tool_name(tool) == name:
            return {key: v for key, v in arguments.items() if v is not None or key in known}
    return arguments


def arguments_text(name: str, arguments: Any, position: int) -> str:
    """Arguments as JSON text in one spelling, whether they came as an object or as JSON text."""
    location = f"message {position}: the arguments of {name!r}"
    try:
        if isinstance(arguments, str):
            if name in BUILT_IN:
                return arguments
            arguments = strict_json.parse(arguments) if arguments.strip() else {}
        if arguments is None:  # a tool without parameters
            arguments = {}
        if not isinstance(arguments, dict):
            raise RowError(f"are {strict_json.describe(arguments)}, not a JSON object")
        return strict_json.dump(arguments)
    except RowError as error:
        raise RowError(f"{location}: {error}") from None


def call_in_text(text: str) -> Any:
    """Objects with `name` and `arguments` that a text consists of, or None when it says more."""
    if (
        not text.startswith(("{", "["))
        or '"name"' not in text
        or not text.rstrip().endswith(("}", "]"))
    ):
        return None
    try:
        value = strict_json.parse(text)
    except RowError:
        return None  # a reply that happens to look like JSON: it stays text
    calls = value if isinstance(value, list) else [value]
    if calls and all(map(_is_call, calls)):
        return calls
    return None


def _is_call(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"name", "arguments"}
        and isinstance(value["name"], str)
    )


def order_results(
    messages: Sequence[Message], call_ids: Mapping[int, str], positions: Sequence[int]
) -> list[Message]:
    """The messages with tool results in the order of their calls, as GLM-4 has no call ids.

    Args:
        messages: A dialogue in which runs of results follow runs of calls.
        call_ids: Index of a message -> the id of the call that it makes or answers.
        positions: For each message its number in the row.
    """
    ordered = list(messages)
    for start, end in _result_runs(messages):
        first_call = start
        while first_call and messages[first_call - 1].metadata:
            first_call -= 1
        calls = [call_ids.get(i) for i in range(first_call, start)]
        answers = [call_ids.get(i) for i in range(start, end)]
        if not calls or None in calls or None in answers:
            continue
        place = {call: number for number, call in reversed(list(enumerate(calls)))}
        for index in range(start, end):
            if call_ids[index] not in place:
                raise RowError(
                    f"message {positions[index]} answers call {call_ids[index]!r}, "
                    f"but the calls before it are {', '.join(map(repr, calls))}"
                )
        answered = set(answers)
        missing = [call for call in calls if call not in answered]
        if missing:
            raise RowError(
                f"the call {missing[0]!r} before message {positions[start]} has no result; "
                "add it or leave the call out"
            )
        order = sorted(range(start, end), key=lambda index: place[call_ids[index]])
        ordered[start:end] = [messages[index] for index in order]
    return ordered


def _result_runs(messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Half-open ranges of consecutive tool results."""
    runs = []
    start = None
    for index, message in enumerate(messages):
        if message.role == "observation":
            start = index if start is None else start
        elif start is not None:
            runs.append((start, index))
            start = None
    return runs if start is None else [*runs, (start, len(messages))]
