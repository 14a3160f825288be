"""Layouts of published data sets that hold a dialogue in a form of their own -> messages.

Each function takes a row and gives the row in the `messages` layout, from which it is read as any
other. Facts about the layouts are from the data sets' own cards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from finetune.data.dialogue import strict_json
from finetune.data.dialogue.conversation import Conversation, Purpose, RowError, text_problem
from finetune.data.dialogue.keys import changes_nothing

Row = Mapping[str, Any]

_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_GLAIVE = re.compile(r"\s*(USER|ASSISTANT|FUNCTION RESPONSE):\s*")
_GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_MOSS_TAG = re.compile(r"^<\|[^|]*\|>:?\s*|<eo[a-z]>\s*$")
_MOSS_KEYS = ("Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS")
TOOLS, TOOLS_END = "<tools>", "</tools>"
_RESPONSE, _RESPONSE_END = "<tool_response>", "</tool_response>"
_LISTED = re.compile(r"(?:functions|tools)[^\n\[]{0,200}:\s*+(?=\[\s*+\{)", re.IGNORECASE)
"""What stands before definitions that a system text lists, as ToolACE's does."""


_SENTENCE_ENDS = ".!?。！？\n"
_SENTENCE = re.compile(rf"[^{_SENTENCE_ENDS}]*(?:[{_SENTENCE_ENDS}]+\s*|\Z)")
_OF_TOOLS = re.compile(
    r"function|tools?\b|\bcall|argument|parameter|json|schema|invoke|pydantic|\buse them\b|\bapi\b|^\s*\w+:\s*\Z"
    r"|工具|函数|参数|调用|接口",
    re.IGNORECASE,
)

_WRITTEN_DIALOGUE = re.compile(
    r"^(?:###\s*(?:Instruction|Response|Human|Assistant)\b|(?:USER|ASSISTANT|Human|Assistant|问|答)\s*[:：])"
    r"|\[/?INST\]|<\|(?:user|assistant|system|im_start|eot_id)\|>|<start_of_turn>",
    re.MULTILINE,
)
DIALOGUE_IN_TEXT = (
    "plain text that spells a dialogue out: every word of it is learned, the questions too; "
    "as messages only the replies would be"
)


def is_document(row: Row) -> bool:
    """Whether a row is `{"text": …}` and nothing else that says something."""
    return isinstance(row.get("text"), str) and all(
        name == "text" or value in (None, "", [], {}) or changes_nothing(name)
        for name, value in row.items()
    )


def document(row: Row, location: str, unread: tuple[str, ...], purpose: Purpose) -> Conversation:
    """A row of plain text; RowError when it has none, or a reply is to be written to it."""
    text = row.get("text")
    if not isinstance(text, str):
        raise RowError(f"text: is {strict_json.describe(text)}, not text")
    if not text or text.isspace():
        raise RowError("text: is empty")
    if problem := text_problem(text):
        raise RowError(problem)
    if purpose == "predict":
        raise RowError("is plain text, and replies are written to dialogues")
    doubts = (DIALOGUE_IN_TEXT,) if _WRITTEN_DIALOGUE.search(text) else ()
    return Conversation((), location=location, unread=unread, doubts=doubts, text=text)


def from_chatml(row: Row) -> dict[str, Any]:
    """`{"text": "<|im_start|>user … <|im_end|> …"}`."""
    turns = [
        {"role": role, "content": text.strip("\n")} for role, text in _CHATML.findall(row["text"])
    ]
    if lost := _CHATML.sub("", row["text"]).strip():
        raise RowError(f"text: {lost[:40]!r} stands outside of its ChatML turns")
    return _with_messages(
        row, [t for t in turns if t["content"] or t["role"] != "assistant"], "text"
    )


def from_glaive(row: Row) -> dict[str, Any]:
    """`{"system": "SYSTEM: … {tool} {tool}", "chat": "USER: … ASSISTANT: … <|endoftext|>"}`."""
    parts = _GLAIVE.split(row["chat"])
    if parts[0].strip():
        raise RowError("chat: does not begin with USER:")
    turns = [
        {"role": _GLAIVE_ROLES[who], "content": text.replace("<|endoftext|>", "").strip()}
        for who, text in zip(parts[1::2], parts[2::2], strict=True)
    ]
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise RowError(f"system: is {strict_json.describe(system)}, not text")
    said, tools = _json_objects(system.removeprefix("SYSTEM:").strip())
    said = _without_talk_of_tools(said) if tools else said
    if said:
        turns.insert(0, {"role": "system", "content": said})
    return _with_messages(row, turns, "chat", "system") | {"tools": tools or row.get("tools")}


def _json_objects(text: str) -> tuple[str, list[Any]]:
    """The text before the first JSON object, and the objects that follow it."""
    start = text.find("{")
    if start < 0:
        return text, []
    decoder, found, at = json.JSONDecoder(), [], start
    while at < len(text) and text[at] == "{":
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return text, []
        found.append(value)
        at += len(text[at:]) - len(text[at:].lstrip())
    return text[:start].strip(), found


def from_moss(row: Row) -> dict[str, Any]:
    """`{"meta_instruction": …, "chat": {"turn_1": {"Human": …, "Inner Thoughts": …, "MOSS": …}}}`."""
    turns: list[dict[str, Any]] = []
    for name, turn in row["chat"].items():
        for who in ("MOSS", "Human"):
            if not isinstance(turn, dict) or not isinstance(turn.get(who), str):
                raise RowError(f"chat: {name} has no text {who}")
        commands = _MOSS_TAG.sub("", str(turn.get("Commands") or "")).strip()
        if commands not in ("", "None"):
            raise RowError(
                f"chat: {name} has commands of MOSS's own tools, which GLM-4 does not have"
            )
        thoughts = _MOSS_TAG.sub("", str(turn.get("Inner Thoughts") or "")).strip()
        thought = {} if thoughts in ("", "None") else {"thought": thoughts}
        turns += [
            {"role": "user", "content": _MOSS_TAG.sub("", turn["Human"]).strip()},
            {"role": "assistant", "content": _MOSS_TAG.sub("", turn["MOSS"]).strip()}
            | thought
            | {key: turn[key] for key in turn if key not in _MOSS_KEYS},
        ]
    return _with_messages(row, turns, "chat", "num_turns")


def from_xlam(row: Row) -> dict[str, Any]:
    """`{"query": …, "tools": JSON, "answers": JSON list of calls}`: the calls are the reply."""
    calls = row["answers"]
    calls = strict_json.parse(calls) if isinstance(calls, str) else calls
    if not isinstance(calls, list) or not calls:
        raise RowError("answers: is not a list of calls")
    turns = [
        {"role": "user", "content": row["query"]},
        {"role": "assistant", "content": None, "tool_calls": calls},
    ]
    return _with_messages(row, turns, "query", "answers") | {"tools": _schemas(row.get("tools"))}


def _schemas(tools: Any) -> Any:
    """XLAM writes `parameters: {name: {type, description}}` where a JSON schema belongs."""
    tools = strict_json.parse(tools) if isinstance(tools, str) else tools
    if not isinstance(tools, list):
        return tools
    return [_schema(tool) for tool in tools]


def _schema(tool: Any) -> Any:
    parameters = tool.get("parameters") if isinstance(tool, dict) else None
    if (
        not isinstance(parameters, dict)
        or "properties" in parameters
        or parameters.get("type") == "object"
    ):
        return tool
    return {**tool, "parameters": {"type": "object", "properties": parameters}}


def from_pairs_in_list(row: Row) -> dict[str, Any]:
    """`{"conversation": [{"human": …, "assistant": …}, …]}`, the same with input and output, or messages."""
    turns: list[dict[str, Any]] = []
    for number, turn in enumerate(row["conversation"], 1):
        names = next(
            (n for n in (("human", "assistant"), ("input", "output")) if n[1] in turn), None
        )
        if names is None and ("role" in turn or "from" in turn):
            turns.append(turn)
            continue
        if names is None:
            raise RowError(
                f"conversation: turn {number} has neither human/assistant nor input/output"
            )
        if turn.get("system"):
            turns.append({"role": "system", "content": turn["system"]})
        # What else a turn says, such as a mask, is said of its reply.
        rest = {key: turn[key] for key in turn if key not in (*names, "system")}
        if turn.get(names[0]):
            turns.append({"role": "user", "content": turn[names[0]]})
        if turn.get(names[1]):
            turns.append({"role": "assistant", "content": turn[names[1]]} | rest)
    return _with_messages(row, turns, "conversation")


def tools_of_system(items: Sequence[Any]) -> tuple[list[Any], list[Any] | None]:
    """The messages, and the tools that a system message lists in its text (Hermes, ToolACE).

    The listing goes out of the text with the sentences that speak of functions, as GLM-4 lays tools
    out itself; what else the text says stays. Tool results lose their tags.
    """
    if not items or not isinstance(items[0], dict):
        return list(items), None
    first = items[0]
    key = "content" if "content" in first else "value"
    text = first.get(key)
    is_system = first.get("role", first.get("from")) == "system" and isinstance(text, str)
    listing = _listing_in(text) if is_system and text else None
    try:
        tools = _tools_in(listing.text) if listing else None
    except RowError:
        tools = None
    if not tools:
        return list(items), None
    assert listing is not None
    assert text is not None
    said = _without_talk_of_tools(text[: listing.begin] + "\n" + text[listing.end :])
    told = [{**first, key: said}] if said else []
    return [*told, *map(_without_tag, items[1:])], tools


class ToolListing(NamedTuple):
    """Where a text lists tools, and the list."""

    begin: int
    end: int
    text: str


def _listing_in(text: str) -> ToolListing | None:
    """What stands between tags, or as a list of objects behind a word for it.

    By searches of fixed texts: one pattern for all of it takes minutes for a few thousand blanks.
    """
    begin = text.find(TOOLS)
    end = text.find(TOOLS_END, begin)
    if 0 <= begin < end:
        return ToolListing(begin, end + len(TOOLS_END), text[begin + len(TOOLS) : end].strip())
    return listed_tools(text)


def listed_tools(text: str) -> ToolListing | None:
    """A list of objects behind a word for tools, with the sentence that leads to it; None without."""
    opened = _LISTED.search(text)
    if opened is None:
        return None
    end = text.rfind("]", opened.end())
    while end > 0:
        last = end - 1
        while text[last].isspace():
            last -= 1
        if text[last] == "}":
            begin = max(text.rfind(sign, 0, opened.start()) for sign in _SENTENCE_ENDS) + 1
            return ToolListing(begin, end + 1, text[opened.end() : end + 1])
        end = text.rfind("]", opened.end(), end)
    return None


def _without_talk_of_tools(text: str) -> str:
    """The sentences of a system text that do not speak of functions."""
    kept = [sentence for sentence in _SENTENCE.findall(text) if not _OF_TOOLS.search(sentence)]
    return "".join(kept).strip() if any(re.search(r"\w", sentence) for sentence in kept) else ""


def _tools_in(text: str) -> list[Any]:
    """A JSON list, or one JSON object a line."""
    if text.startswith("["):
        value = strict_json.parse(text)
        return value if isinstance(value, list) else []
    return [strict_json.parse(line) for line in text.splitlines() if line.strip()]


def _without_tag(item: Any) -> Any:
    if not isinstance(item, dict) or item.get("role", item.get("from")) not in (
        "tool",
        "observation",
    ):
        return item
    key = "content" if "content" in item else "value"
    text = item[key].strip() if isinstance(item.get(key), str) else ""
    if not (text.startswith(_RESPONSE) and text.endswith(_RESPONSE_END)):
        return item
    return {**item, key: text[len(_RESPONSE) : -len(_RESPONSE_END)].strip()}


def _with_messages(row: Row, turns: Sequence[Any], *read: str) -> dict[str, Any]:
    return {**{key: row[key] for key in row if key not in read}, "messages": turns}
