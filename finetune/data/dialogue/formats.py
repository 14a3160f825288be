"""Rows in the layouts that people have -> Conversation.

`messages`, OpenAI, ShareGPT and ChatGLM3 rows hold a list of messages, which one reader takes
(`turns.py`); Alpaca and prompt/response rows hold columns. A field that is null counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from finetune.data.dialogue import strict_json
from finetune.data.dialogue.conversation import (
    PLACEHOLDER,
    Conversation,
    Message,
    Purpose,
    RowError,
    validate,
)
from finetune.data.dialogue.messages import Turns, check_image_path
from finetune.data.dialogue.tool_calls import order_results, read_tools

FORMATS = ("messages", "openai", "sharegpt", "alpaca", "pairs", "chatglm3")
_LISTS = {"messages": "messages", "openai": "messages"}  # the others: "conversations"

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
)
"""Column names of prompt/response rows that need not be named."""

Columns = tuple[str, str]


def detect(rows: Sequence[Mapping[str, Any]], columns: Columns | None = None) -> str:
    """The layout of a file by its first rows; RowError when none of them is known."""
    if columns:
        return "pairs"
    found = [layout for layout in map(_layout, rows) if layout]
    if found:
        return "openai" if found[0] == "messages" and "openai" in found else found[0]
    keys = ", ".join(map(repr, rows[0])) if rows else "none"
    raise RowError(
        f"the layout is not known by its columns ({keys}); expected 'messages', 'conversations', "
        "'instruction' with 'output', or a pair such as 'prompt' with 'response' "
        "(data.columns names another pair)"
    )


def _layout(row: Mapping[str, Any]) -> str | None:
    if row.get("messages") is not None:
        return "openai" if _looks_like_openai(row["messages"]) else "messages"
    if row.get("conversations") is not None:
        return "chatglm3" if _has_roles(row["conversations"]) else "sharegpt"
    if "instruction" in row:
        return "alpaca"
    # Without a response the row is still known: rows to be answered have none.
    if any(prompt in row for prompt, _ in PAIRS):
        return "pairs"
    return "messages" if "messages" in row else None


def _looks_like_openai(messages: Any) -> bool:
    return isinstance(messages, list) and any(
        isinstance(m, dict)
        and (m.get("role") == "tool" or m.get("tool_calls") or isinstance(m.get("content"), list))
        for m in messages
    )


def _has_roles(turns: Any) -> bool:
    first = turns[0] if isinstance(turns, list) and turns else turns
    return isinstance(first, dict | str) and "role" in first


def to_conversation(
    row: Mapping[str, Any],
    fmt: str = "auto",
    *,
    where: str = "",
    columns: Columns | None = None,
    purpose: Purpose = "train",
) -> Conversation:
    """The row as a dialogue that is valid for the purpose; RowError with the reason otherwise.

    Args:
        row: One row of a file.
        fmt: One of FORMATS, or `auto`.
        where: `file:line`, kept for reports.
        columns: Names of the prompt and response columns for `pairs`.
        purpose: For `predict` the reply may be missing.
    """
    if fmt == "auto":
        fmt = detect([row], columns)
    if fmt == "alpaca":
        turns = _alpaca(row, purpose)
    elif fmt == "pairs":
        turns = _pair(row, columns, purpose)
    else:
        turns = _listed(row, _LISTS.get(fmt, "conversations"))
    messages = _with_image(turns.messages, row)
    if turns.call_ids:
        messages = order_results(messages, turns.call_ids, turns.positions)
    conversation = Conversation(tuple(messages), turns.tools, where)
    return validate(conversation, purpose, turns.positions)


def _listed(row: Mapping[str, Any], key: str) -> Turns:
    """A row with a list of messages under `key`, and perhaps `tools` and `system` beside it."""
    items = row.get(key)
    if isinstance(items, str):  # a CSV cell
        items = strict_json.parse(items)
    if not isinstance(items, list):
        if key not in row:
            raise RowError(f"the row has no {key!r}; its columns are {', '.join(map(repr, row))}")
        raise RowError(f"{key}: is {strict_json.describe(items)}, not a list of messages")
    turns = _start(row)
    turns.read(items)
    return turns


def _start(row: Mapping[str, Any]) -> Turns:
    """The tools and the system column of a row."""
    turns = Turns()
    if len(row) == 1:
        return turns
    turns.tools = read_tools(row.get("tools") or row.get("functions"))
    for key in ("videos", "audios"):
        if row.get(key):
            raise RowError(f"{key}: GLM-4 takes text, and GLM-4V one image")
    system = row.get("system")
    if system:
        turns.add(Message("system", _column(row, "system")), 0)
    return turns


def _with_image(messages: list[Message], row: Mapping[str, Any]) -> list[Message]:
    """The messages with the image that a column of the row names.

    LLaMA-Factory writes a list `images`, LLaVA `image`, and both a placeholder in the text. GLM-4V
    shows its image before the first question, so that is the only place where one may stand.
    """
    column = next((key for key in ("images", "image") if row.get(key)), None)
    if column is None:
        return messages
    value = row[column]
    path = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(path, str):
        raise RowError(f"{column}: GLM-4V takes one image, named by its path")
    check_image_path(path, column)
    first = next((n for n, m in enumerate(messages) if m.role == "user"), None)
    if first is None:
        raise RowError(f"{column}: there is no user message to show it with")
    message = messages[first]
    if message.image is not None:
        raise RowError(f"{column}: the first user message names an image too; keep one of them")
    text = message.content.lstrip()
    if text.startswith(PLACEHOLDER):
        text = text.removeprefix(PLACEHOLDER).removeprefix("\n")
        message = replace(message, content=text)
    return [*messages[:first], replace(message, image=path), *messages[first + 1 :]]


def _column(row: Mapping[str, Any], name: str) -> str:
    """The text of a column; "" when it is absent or null."""
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{name}: is {strict_json.describe(value)}, not text")
    return value


def _alpaca(row: Mapping[str, Any], purpose: Purpose) -> Turns:
    """instruction, input, output, history, system; the input stands under the instruction."""
    question = [_column(row, "instruction"), _column(row, "input")]
    prompt = "\n".join(text for text in question if text)
    if not prompt:
        raise RowError("instruction: is empty")
    return _turns_of_pair(row, prompt, "output", purpose)


def _pair(row: Mapping[str, Any], columns: Columns | None, purpose: Purpose) -> Turns:
    known = [columns] if columns else PAIRS
    pair = next((p for p in known if p[0] in row and p[1] in row), None)
    if pair is None:
        pair = next((p for p in known if p[0] in row), None) if purpose == "predict" else None
    if pair is None:
        names = " or ".join(f"{prompt}/{response}" for prompt, response in known)
        have = ", ".join(map(repr, row))
        raise RowError(f"the row has no pair of columns {names}; its columns are {have}")
    prompt = _column(row, pair[0])
    if not prompt or prompt.isspace():
        raise RowError(f"{pair[0]}: is empty")
    return _turns_of_pair(row, prompt, pair[1], purpose)


def _turns_of_pair(row: Mapping[str, Any], prompt: str, column: str, purpose: Purpose) -> Turns:
    turns = _start(row)
    for question, answer in _history(row):
        turns.add(Message("user", question), len(turns.messages) + 1)
        turns.add(Message("assistant", answer), len(turns.messages) + 1)
    turns.add(Message("user", prompt), len(turns.messages) + 1)
    reply = _column(row, column)
    if reply and not reply.isspace():
        turns.add(Message("assistant", reply), len(turns.messages) + 1)
    elif purpose == "train":
        raise RowError(f"{column}: is {'empty' if column in row else 'missing'}; no reply to train")
    return turns


def _history(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Earlier turns as (user, assistant) pairs."""
    turns = row.get("history")
    if isinstance(turns, str) and turns:  # a CSV cell
        turns = strict_json.parse(turns)
    if not turns:
        return []
    if not isinstance(turns, list):
        raise RowError(f"history: is {strict_json.describe(turns)}, not a list of pairs")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, list) or [type(text) for text in turn] != [str, str]:
            raise RowError(f"history: turn {number} is not a pair of texts")
        if not all(turn):
            raise RowError(f"history: turn {number} has an empty text")
    return [(question, answer) for question, answer in turns]
