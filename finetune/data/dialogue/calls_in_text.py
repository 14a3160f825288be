r"""Structure that a reply writes as text: a call in the dialects that people have it in.

    get_weather\n{"city": "北京"}                       GLM-4's own spelling, in `content`
    <tool_call>{"name": …, "arguments": …}</tool_call>   Hermes, Qwen; <functioncall> of glaive
    Action: get_weather\nAction Input: {"city": …}      ReAct
    [get_weather(city="北京"), get_time()]               ToolACE; one call without brackets too
    ```json\n{"name": …, "arguments": …}\n```           fenced, or behind [TOOL_CALLS] or <|python_tag|>
    <function=get_weather>{"city": …}</function>        Llama
    <tool_call>get_weather\n<arg_key>city</arg_key>…     GLM-4.5

Trained as text, such a reply teaches words where the model should call. `data.calls_in_text` says
whether it is kept and counted, read as the call that it means, or refused.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

from finetune.data.dialogue import strict_json
from finetune.data.dialogue.conversation import Message, RowError
from finetune.data.dialogue.tool_calls import Call, arguments_text

_TAGGED = re.compile(r"<(tool_call|functioncall|function_call)>\s*(.*?)\s*(?:</\1>|\Z)", re.DOTALL)
_REACT = re.compile(
    r"^Action:[ \t]*(?P<name>[^\n]+)\nAction Input:[ \t]*(?P<arguments>\{.*?\})\s*(?:\nObservation:\s*)?\Z",
    re.DOTALL | re.MULTILINE,
)
_GLM = re.compile(r"(?P<name>[^\s{}\[\]()]{1,128})\s*\n(?P<arguments>\{.*\})\s*", re.DOTALL)
_PYTHON_CALL = re.compile(r"\s*(?P<name>[^\s()\[\],][^()\[\],=]{0,127})\(")
_FENCE = "```"
_LANGUAGES = ("json", "tool_calls", "tool_call", "tool_code", "python")
_FUNCTION = re.compile(
    r"<function=(?P<name>[^>\s]+)>\s*(?P<arguments>\{.*?\})\s*</function>", re.DOTALL
)
_ARGUMENT = re.compile(
    r"<arg_key>([^<]{1,256})</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL
)
_INPUT = "Action Input:"
_SIGNS = ("<tool_call>", "<functioncall>", "<function_call>", _INPUT)


class WrittenCalls(NamedTuple):
    """What a reply says in words and the calls that it writes behind them."""

    text: str
    calls: tuple[Call, ...]


def written_calls(content: str, tools: Collection[str]) -> WrittenCalls | None:
    """The calls that a reply writes into its text, or None when it writes none.

    Args:
        content: The reply's text.
        tools: Names of the tools that the dialogue defines; a spelling without a mark of its own
            counts only for one of these.
    """
    # Every reply comes by here: a sign is looked for only where a part of one stands.
    if ("call>" in content or _INPUT in content) and any(sign in content for sign in _SIGNS):
        return _tagged(content) or _react(content)
    if not tools:
        return None
    end = content.rstrip()[-1:]
    if end == "}" and (match := _GLM.fullmatch(content.lstrip())):
        return _call_of(match, tools)
    if end in "}]`" and (calls := _json_calls(inner := _without_marks(content))):
        return WrittenCalls("", tuple(calls)) if all(c.name in tools for c in calls) else None
    if end == "`":
        return _python_calls(inner, tools)
    if end == "]" and content.startswith("["):
        return _python_calls(content.strip()[1:-1], tools)
    if end == ")":
        return _python_calls(content.strip(), tools)
    if end == ">" and (matches := list(_FUNCTION.finditer(content))):
        found = [_call_of(match, tools) for match in matches]
        calls = [call for one in found if one for call in one.calls]
        whole = len(calls) == len(matches)
        return WrittenCalls(content[: matches[0].start()].strip(), tuple(calls)) if whole else None
    return None


def with_calls_read(messages: list[Message], tools: Collection[str]) -> list[Message]:
    """The messages with written calls as calls, each answered by the tool results behind it."""
    read: list[Message] = []
    for message in messages:
        found = (
            written_calls(message.content, tools)
            if message.role == "assistant" and not message.metadata
            else None
        )
        if found is None:
            read.append(message)
            continue
        if found.text:
            read.append(replace(message, content=found.text))
        read += [replace(message, content=c.arguments, metadata=c.name) for c in found.calls]
    return read


def _tagged(content: str) -> WrittenCalls | None:
    matches = list(_TAGGED.finditer(content))
    if not matches:
        return None
    calls = tuple(call for match in matches for call in _json_calls(match[2]) or _keyed(match[2]))
    return WrittenCalls(content[: matches[0].start()].strip(), calls) if calls else None


def _json_calls(text: str) -> list[Call]:
    """Calls of `{"name": …, "arguments": …}`, also with glaive's single quotes around arguments."""
    text = re.sub(r"'(\{.*\})'", r"\1", text.removesuffix("<|endoftext|>"), flags=re.DOTALL)
    try:
        value = strict_json.parse(text)
        items = value if isinstance(value, list) else [value]
        return [
            Call(item["name"], arguments_text(item["name"], _arguments(item), 1)) for item in items
        ]
    except (RowError, KeyError, TypeError):
        return []


def _without_marks(content: str) -> str:
    """What stands in a fence, or behind the mark of another model's calls."""
    text = content.strip()
    if text.startswith(_FENCE) and text.endswith(_FENCE):
        text = text[3:-3].strip()
        for language in _LANGUAGES:
            text = text.removeprefix(language)
    return text.removeprefix("[TOOL_CALLS]").removeprefix("<|python_tag|>").strip()


def _keyed(text: str) -> list[Call]:
    """GLM-4.5's call: a name and its arguments one by one, each JSON or plain text."""
    name, found = text.partition("<arg_key>")[0].strip(), _ARGUMENT.findall(text)
    if not name or "\n" in name or "{" in name:
        return []
    values = {}
    for key, value in found:
        try:
            values[key] = strict_json.parse(value)
        except RowError:
            values[key] = value
    return [Call(name, strict_json.dump(values))]


def _arguments(item: Any) -> Any:
    return item.get("arguments", item.get("parameters"))


def _react(content: str) -> WrittenCalls | None:
    match = _REACT.search(content)
    found = _call_of(match, ()) if match else None
    if match is None or found is None:
        return None
    thought = content[: match.start()].strip().removeprefix("Thought:").strip()
    return WrittenCalls(thought, found.calls)


def _call_of(match: re.Match[str], tools: Collection[str]) -> WrittenCalls | None:
    name = match["name"].strip()
    if tools and name not in tools:
        return None
    try:
        return WrittenCalls("", (Call(name, arguments_text(name, match["arguments"], 1)),))
    except RowError:
        return None


def _python_calls(rest: str, tools: Collection[str]) -> WrittenCalls | None:
    """`f(a=1), My Tool(b="x")`: names may hold blanks, values are Python or JSON literals."""
    calls = []
    while match := _PYTHON_CALL.match(rest):
        name = match["name"].strip()
        end = _closing(rest, match.end())
        if name not in tools or end is None:
            return None
        try:
            call = ast.parse(f"f({rest[match.end() : end]})", mode="eval").body
            assert isinstance(call, ast.Call)
            values = {
                str(k.arg): ast.literal_eval(_with_json_words(k.value)) for k in call.keywords
            }
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
        if call.args:
            return None
        calls.append(Call(name, strict_json.dump(values)))
        rest = rest[end + 1 :].lstrip().removeprefix(",")
    return WrittenCalls("", tuple(calls)) if calls and not rest.strip() else None


def _closing(text: str, start: int) -> int | None:
    """Where the bracket that was open before `start` closes, text in quotes left out."""
    depth, quote = 1, ""
    for index in range(start, len(text)):
        char = text[index]
        if quote:
            quote = "" if char == quote and text[index - 1] != "\\" else quote
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
            if not depth:
                return index
    return None


class _JsonWords(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.AST:
        words = {"true": True, "false": False, "null": None}
        return ast.Constant(words[node.id]) if node.id in words else node


def _with_json_words(node: ast.expr) -> ast.expr:
    changed: ast.expr = _JsonWords().visit(node)
    return changed
