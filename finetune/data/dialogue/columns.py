"""Rows that hold their texts in columns: instruction and output, prompt and response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from finetune.data.dialogue import strict_json
from finetune.data.dialogue.conversation import Message, Purpose, RowError
from finetune.data.dialogue.keys import CONTEXT, SYSTEM
from finetune.data.dialogue.messages import MessageReader
from finetune.data.dialogue.tool_calls import read_tools

Columns = tuple[str, str]
Row = Mapping[str, Any]

PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("content", "summary"),
    ("question", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("question", "response"),
    ("source", "target"),
    ("input", "output"),
    ("input", "target"),
    ("user", "assistant"),
)
"""Column names of prompt/response rows that need not be named."""
TEMPLATE = "chat_template_kwargs"
"""The column of what a chat template takes besides, as TRL and vLLM name it."""
CATEGORIES = ("category", "task_type", "task_name", "task", "domain", "topic", "subject")
"""Columns that say what a row is an example of."""
_CATEGORY = 64
"""Characters of the longest text that is one."""
ALPACA_REPLIES = ("output", "response", "answer", "completion", "target")


def start(row: Row) -> MessageReader:
    """The tools and the system column of a row."""
    turns = MessageReader()
    if len(row) == 1:
        return turns
    if row.get("tools") and row.get("functions") and row["tools"] != row["functions"]:
        raise RowError("tools and functions: both define tools; keep one")
    turns.tools = read_tools(row.get("tools") or row.get("functions"))
    given = [name for name in SYSTEM if row.get(name)]
    if len(given) > 1:
        raise RowError(f"{' and '.join(given)}: both are a system message; keep one")
    if given:
        turns.add(Message("system", _column(row, given[0])), 0)
    return turns


def thinks(row: Row) -> tuple[bool | None, tuple[str, ...]]:
    """What a row says about thinking, and what else it tells the template, which is not read."""
    given = row.get(TEMPLATE)
    if given is not None and not isinstance(given, dict):
        raise RowError(f"{TEMPLATE}: is {strict_json.describe(given)}, not an object")
    said = {key: value for key, value in (given or {}).items() if value is not None}
    thinking = said.pop("enable_thinking", None)
    if thinking is not None and not isinstance(thinking, bool):
        raise RowError(f"{TEMPLATE}: enable_thinking is {strict_json.describe(thinking)}, not true or false")  # fmt: skip
    return thinking, tuple(f"{TEMPLATE}.{key}" for key in said)


def category(row: Row) -> str:
    """What a row says it is an example of, in the first of its columns that says so in a short line.

    >>> category({"category": "", "task": "open qa", "topic": "history"}), category({"domain": 3})
    ('open qa', '')
    """
    if row.keys().isdisjoint(CATEGORIES):  # nearly all rows
        return ""
    said = (value.strip() for name in CATEGORIES if isinstance(value := row.get(name), str))
    return next((one for one in said if one and len(one) <= _CATEGORY and one.isprintable()), "")


def _column(row: Row, name: str) -> str:
    """The text of a column; "" when it is absent or null."""
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{name}: is {strict_json.describe(value)}, not text")
    return value


def alpaca(row: Row, purpose: Purpose) -> MessageReader:
    """instruction, input, output, history, system; the input stands under the instruction."""
    prompt = _question(row, "instruction", "input")
    return _turns_of_pair(row, prompt, alpaca_reply(row), purpose)


def alpaca_reply(row: Row) -> str:
    """The column that holds the reply to an instruction."""
    return next((name for name in ALPACA_REPLIES if row.get(name)), "output")


def _question(row: Row, name: str, *below: str) -> str:
    """The user's text: the column, and under it the input or context that it is about."""
    texts = [_column(row, column) for column in (name, *below, *CONTEXT)]
    prompt = "\n".join(text for text in texts if text)
    if not prompt or prompt.isspace():
        raise RowError(f"{name}: is empty")
    return prompt


def pair(row: Row, columns: Columns | None, purpose: Purpose) -> MessageReader:
    """Two columns, those named or the first known pair."""
    known = [columns] if columns else PAIRS
    chosen = pair_of(row, columns, purpose)
    if chosen is None:
        names = " or ".join(f"{prompt}/{response}" for prompt, response in known)
        have = ", ".join(map(repr, row))
        raise RowError(f"the row has no pair of columns {names}; its columns are {have}")
    if isinstance(row[chosen[0]], list) or isinstance(row.get(chosen[1]), list):
        return _pair_of_lists(row, chosen)
    return _turns_of_pair(row, _question(row, chosen[0]), chosen[1], purpose)


def pair_of(row: Row, columns: Columns | None, purpose: Purpose) -> Columns | None:
    """The columns of prompt and reply; None when the row has no pair of them."""
    known = [columns] if columns else PAIRS
    found = (p for p in known if p[0] in row and (p[1] in row or purpose == "predict"))
    return next((p for p in known if p[0] in row and p[1] in row), None) or next(found, None)


def _pair_of_lists(row: Row, pair: Columns) -> MessageReader:
    """Two lists of messages; only replies of the second carry loss."""
    turns = start(row)
    if beside := [name for name in ("history", *CONTEXT) if row.get(name)]:
        raise RowError(f"{beside[0]}: stands beside a list of messages; write it into one of them")
    for name, role in zip(pair, ("user", "assistant"), strict=True):
        items = row.get(name) or []
        listed = [{"role": role, "content": items}] if isinstance(items, str) else items
        if not isinstance(listed, list):
            raise RowError(f"{name}: is {strict_json.describe(listed)}, not text or messages")
        first = len(turns.messages)
        turns.read(listed)
        if role == "user":
            turns.messages[first:] = [
                replace(message, train=False) if message.role == "assistant" else message
                for message in turns.messages[first:]
            ]
    return turns


def _turns_of_pair(row: Row, prompt: str, column: str, purpose: Purpose) -> MessageReader:
    turns = start(row)
    turns.read(_history(row))
    turns.add(Message("user", prompt), len(turns.messages) + 1)
    reply = _column(row, column)
    if reply and not reply.isspace():
        turns.add(Message("assistant", reply), len(turns.messages) + 1)
    elif purpose == "train":
        raise RowError(f"{column}: is {'empty' if column in row else 'missing'}; no reply to train")
    return turns


def _history(row: Row) -> list[dict[str, Any]]:
    """Earlier turns as messages: (user, assistant) pairs, or messages themselves."""
    turns = row.get("history")
    if isinstance(turns, str) and turns:  # a CSV cell
        turns = strict_json.parse(turns)
    if not turns:
        return []
    if not isinstance(turns, list):
        raise RowError(f"history: is {strict_json.describe(turns)}, not a list of pairs")
    if all(isinstance(turn, dict) for turn in turns):
        return turns
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, list) or [type(text) for text in turn] != [str, str]:
            raise RowError(f"history: turn {number} is not a pair of texts")
        if not all(turn):
            raise RowError(f"history: turn {number} has an empty text")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(roles, turn, strict=True)
    ]
