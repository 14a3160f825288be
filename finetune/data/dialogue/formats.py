"""Rows in the layouts that people have -> Conversation.

`messages`, OpenAI, ShareGPT and ChatGLM3 rows hold a list of messages, which one reader takes
(`messages.py`); Alpaca and prompt/response rows hold columns; forms of single data sets are turned
into lists of messages first (`foreign.py`). A field that is null counts as absent. What other
columns mean stands in `keys.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from finetune.data.dialogue import columns as columns_of
from finetune.data.dialogue import foreign, strict_json
from finetune.data.dialogue.calls_in_text import structure_in_text, with_calls_read
from finetune.data.dialogue.columns import PAIRS, Columns, Row
from finetune.data.dialogue.conversation import (
    Conversation,
    Message,
    Purpose,
    RowError,
    validate,
)
from finetune.data.dialogue.doubts import (
    CALL_THOUGHT,
    doubts_of_message,
    fewer_results,
    may_be_doubtful,
    without_thought,
)
from finetune.data.dialogue.images import ImageRule, with_images_of_row
from finetune.data.dialogue.keys import CONTEXT, SYSTEM, check_columns
from finetune.data.dialogue.messages import MessageReader
from finetune.data.dialogue.tool_calls import order_results, tool_name
from finetune.data.dialogue.turns import merged

THINK = "<think>"


@dataclass(frozen=True)
class RowRules:
    """What is done about rows that can be read in more than one way."""

    turns: Literal["strict", "merge"] = "strict"
    """`merge` joins two messages of one side and takes an assistant that opens."""
    calls_in_text: Literal["text", "read", "error"] = "text"
    """Calls that are written into a reply's text: kept and counted, read, or refused."""
    reasoning: Literal["keep", "drop", "require"] = "keep"
    """What is done with the reasoning of replies; `require` refuses replies without."""
    thinks: bool | None = None
    """Whether the checkpoint writes its reasoning; None when that is not known."""
    ignore_columns: tuple[str, ...] = ()
    """Columns that are meant to stay unread."""
    images: ImageRule | None = None
    """Which images the checkpoint takes; None when that is not known."""


PLAIN = RowRules()
"""The defaults."""


class RowLayout(NamedTuple):
    """One way to write a dialogue into a row."""

    name: str
    fits: Callable[[Row], bool]
    """Whether a row is written this way."""
    columns: frozenset[str]
    """The columns that it reads besides those of every layout."""
    as_messages: Callable[[Row], dict[str, Any]] | None = None
    """For a form of its own: the row in the `messages` layout."""


_COMMON = frozenset({"tools", "functions", "images", "image", columns_of.TEMPLATE, *SYSTEM})
_QUESTION = frozenset({"history", *CONTEXT})


def _is_text(row: Row, *names: str) -> bool:
    return all(isinstance(row.get(name), str) for name in names)


LAYOUTS: tuple[RowLayout, ...] = (
    RowLayout(
        "openai", lambda row: _looks_like_openai(row.get("messages")), frozenset({"messages"})
    ),
    RowLayout("messages", lambda row: row.get("messages") is not None, frozenset({"messages"})),
    RowLayout(
        "chatglm3", lambda row: _has_roles(row.get("conversations")), frozenset({"conversations"})
    ),
    RowLayout(
        "sharegpt", lambda row: row.get("conversations") is not None, frozenset({"conversations"})
    ),
    RowLayout(
        "conversation",
        lambda row: _is_pairs_in_list(row.get("conversation")),
        frozenset({"conversation"}),
        foreign.from_pairs_in_list,
    ),
    RowLayout(
        "glaive", lambda row: _is_text(row, "chat"), frozenset({"chat"}), foreign.from_glaive
    ),
    RowLayout(
        "moss",
        lambda row: isinstance(row.get("chat"), dict),
        frozenset({"chat", "num_turns"}),
        foreign.from_moss,
    ),
    RowLayout(
        "xlam",
        lambda row: _is_text(row, "query") and "answers" in row and "tools" in row,
        frozenset({"query", "answers"}),
        foreign.from_xlam,
    ),
    RowLayout(
        "chatml",
        lambda row: _is_text(row, "text") and "<|im_start|>" in row["text"],
        frozenset({"text"}),
        foreign.from_chatml,
    ),
    RowLayout("text", foreign.is_document, frozenset({"text"})),
    RowLayout(
        "alpaca",
        lambda row: "instruction" in row,
        _QUESTION,
    ),
    # Without a response the row is still known: rows to be answered have none.
    RowLayout("pairs", lambda row: any(prompt in row for prompt, _ in PAIRS), _QUESTION),
)
FORMATS = ("messages", *(layout.name for layout in LAYOUTS if layout.name != "messages"))
_BY_NAME = {layout.name: layout for layout in LAYOUTS}


def detect(rows: Sequence[Row], columns: Columns | None = None) -> str:
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


def _layout(row: Row) -> str | None:
    known = next((layout.name for layout in LAYOUTS if layout.fits(row)), None)
    return known or ("messages" if "messages" in row else None)


def _looks_like_openai(messages: Any) -> bool:
    return isinstance(messages, list) and any(
        isinstance(m, dict)
        and (m.get("role") == "tool" or m.get("tool_calls") or isinstance(m.get("content"), list))
        for m in messages
    )


def _has_roles(turns: Any) -> bool:
    first = turns[0] if isinstance(turns, list) and turns else turns
    return isinstance(first, dict | str) and "role" in first


def _is_pairs_in_list(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and all(isinstance(turn, dict) for turn in turns)


def to_conversation(
    row: Row,
    fmt: str = "auto",
    *,
    location: str = "",
    columns: Columns | None = None,
    purpose: Purpose = "train",
    rules: RowRules = PLAIN,
) -> Conversation:
    """The row as a dialogue that is valid for the purpose; RowError with the reason otherwise.

    Args:
        row: One row of a file.
        fmt: One of FORMATS, or `auto`.
        location: `file:line`, kept for reports.
        columns: Names of the prompt and response columns for `pairs`.
        purpose: For `predict` the reply may be missing.
        rules: What is done about rows that can be read in more than one way.
    """
    if rules.ignore_columns:
        row = _without(row, rules.ignore_columns)
    if fmt == "auto":
        fmt = detect([row], columns)
    layout = _BY_NAME[fmt]
    chosen = _chosen(fmt, row, columns, purpose)
    unread = check_columns(row, _read_by(fmt, chosen)) if len(row) > 1 else ()
    thinks, left = columns_of.thinks(row)
    category = columns_of.category(row)
    unread = (*unread, *left)
    if fmt == "text":
        return foreign.document(row, location, unread, purpose)
    if layout.as_messages is not None:
        if not layout.fits(row):
            have = ", ".join(map(repr, row))
            raise RowError(f"the row is not of the layout {fmt}; its columns are {have}")
        row, fmt = layout.as_messages(row), "messages"
    if fmt == "alpaca":
        reader = columns_of.alpaca(row, purpose)
    elif fmt == "pairs":
        reader = columns_of.pair(row, columns, purpose)
    else:
        reader = _listed(row, next(iter(_BY_NAME[fmt].columns)), rules)
    messages = _with_images(reader, row, rules.images)
    if reader.call_ids:
        messages = order_results(messages, reader.call_ids, reader.positions)
    unread = (*unread, *(f"{key} of messages" for key in sorted(reader.unread)))
    messages, positions, doubts = _settled(messages, reader, rules)
    conversation = Conversation(
        tuple(messages), reader.tools, location, unread, doubts, thinks=thinks, category=category
    )
    return validate(conversation, purpose, positions, lenient=rules.turns == "merge")


def _with_images(reader: MessageReader, row: Row, rule: ImageRule | None) -> list[Message]:
    """The messages with what a column of the row shows; RowError for what the checkpoint does not take."""
    if not (reader.shows_images or row.get("images") or row.get("image")):
        return reader.messages
    messages = with_images_of_row(reader.messages, reader.positions, row)
    if rule is not None:
        rule.check(messages, reader.positions)
    return messages


def _chosen(fmt: str, row: Row, columns: Columns | None, purpose: Purpose) -> tuple[str, ...]:
    """The columns of prompt and reply that a row is read from, of those that its layout knows."""
    if fmt == "alpaca":
        return ("instruction", "input", columns_of.alpaca_reply(row))
    return (columns_of.pair_of(row, columns, purpose) or ()) if fmt == "pairs" else ()


@lru_cache(maxsize=256)
def _read_by(layout: str, chosen: tuple[str, ...]) -> frozenset[str]:
    """The columns that a row's layout reads, those of a pair among them."""
    return _BY_NAME[layout].columns.union(_COMMON, chosen)


def _without(row: Row, ignored: Sequence[str]) -> Row:
    """The row without columns, and without keys of its messages, that are meant to stay unread."""

    def kept(item: Any) -> Any:
        return {k: item[k] for k in item if k not in ignored} if isinstance(item, dict) else item

    return {
        name: [kept(item) for item in value]
        if isinstance(value, list) and name not in ("tools", "functions")
        else value
        for name, value in row.items()
        if name not in ignored
    }


def _settled(
    messages: list[Message], reader: MessageReader, rules: RowRules
) -> tuple[list[Message], Sequence[int] | None, tuple[str, ...]]:
    """Messages under the rules, their numbers in the row if these still hold, and what is doubtful."""
    positions: Sequence[int] | None = reader.positions
    lost: list[str] = []
    for index, text in reader.reasoning.items():
        if rules.reasoning != "drop":
            message = messages[index]
            if rules.thinks is False:
                raise RowError(
                    f"message {positions[index] if positions else index + 1}: has reasoning in a key of "
                    "its own, and this checkpoint does not think; data.reasoning: drop leaves it out"
                )
            if message.metadata and rules.thinks is None:
                lost.append(CALL_THOUGHT)  # it would stand among the call's arguments
                continue
            thought = f"{THINK}\n{text.strip()}\n</think>\n\n{message.content}"
            messages[index] = replace(message, content=thought)
    if rules.reasoning == "drop":
        messages = [_without_thought(message) for message in messages]
    names = {tool_name(tool) for tool in reader.tools} if reader.tools else set()
    if rules.calls_in_text == "read":
        read = with_calls_read(messages, names, thinks=rules.thinks is True)
        positions = positions if len(read) == len(messages) else None
        messages = read
    if rules.turns == "merge":
        messages = merged(messages)
        positions = positions if positions and len(positions) == len(messages) else None
    return messages, positions, (*lost, *_doubts(messages, names, rules))


def _without_thought(message: Message) -> Message:
    if message.role != "assistant" or message.metadata:
        return message
    said = without_thought(message.content)
    return message if said is message.content else replace(message, content=said)


def _doubts(messages: Sequence[Message], names: set[str], rules: RowRules) -> tuple[str, ...]:
    """What can be trained but is hardly meant, for `data check` and the start of training to count."""
    found: list[str] = []
    calls = any(message.metadata for message in messages)
    if rules.reasoning != "require" and not may_be_doubtful(messages, has_tools=bool(names)):
        return tuple(fewer_results(messages)) if calls else ()
    for number, message in enumerate(messages, 1):
        if message.metadata:
            continue
        if rules.reasoning == "require" and _lacks_reasoning(message):
            raise RowError(
                f"message {number}: the reply has no reasoning (data.reasoning: require)"
            )
        structure = structure_in_text(message, names)
        if not structure:
            found += doubts_of_message(message, thinks=rules.thinks)
            continue
        if rules.calls_in_text == "error":
            raise RowError(f"message {number}: {structure}")
        found.append(structure)  # what stands around it is part of its spelling
    return (*found, *fewer_results(messages)) if calls else tuple(found)


def _lacks_reasoning(message: Message) -> bool:
    is_trained = message.role == "assistant" and message.train is not False
    return is_trained and "</think>" not in message.content


def _listed(row: Row, key: str, rules: RowRules) -> MessageReader:
    """A row with a list of messages under `key`, and perhaps `tools` and `system` beside it."""
    items = row.get(key)
    if isinstance(items, str):  # a CSV cell
        items = strict_json.parse(items)
    if not isinstance(items, list):
        if key not in row:
            raise RowError(f"the row has no {key!r}; its columns are {', '.join(map(repr, row))}")
        raise RowError(f"{key}: is {strict_json.describe(items)}, not a list of messages")
    tools = None
    if rules.calls_in_text == "read" and not row.get("tools"):
        items, tools = foreign.tools_of_system(items)
    turns = columns_of.start({**row, "tools": tools} if tools else row)
    turns.read(items)
    return turns
