r"""Structure of tool use that is written as text: calls in the dialects that people have them in.

    get_weather\n{"city": "北京"}                       GLM-4's own spelling, in `content`
    get_weather\n```python\ntool_call(city="北京")\n``` ChatGLM3
    <tool_call>{"name": …, "arguments": …}</tool_call>   Hermes, Qwen; <functioncall> of glaive
    <tool_call>get_weather\n<arg_key>city</arg_key>…     GLM-4.5
    <function=get_weather>{"city": …}</function>        Llama; Qwen3-Coder with <parameter=city>
    <invoke name="get_weather"><parameter name="city">…  Claude
    ✿FUNCTION✿: get_weather\n✿ARGS✿: {"city": …}         Qwen-Agent
    Action: get_weather\nAction Input: {"city": …}      ReAct
    [get_weather(city="北京"), get_time()]               ToolACE; one call without brackets too
    ```json\n{"name": …, "arguments": …}\n```           fenced, or behind [TOOL_CALLS] or <|python_tag|>
    <｜tool▁call▁begin｜>…, <|tool_call_begin|>…          DeepSeek, Kimi; to=functions.… of gpt-oss

Trained as text, such a reply teaches words where the model should call. `data.calls_in_text` says
whether it is kept and counted, read as the call that it means, or refused. A mark of a call that
nothing here can read is counted in any case.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from finetune.data.dialogue import strict_json
from finetune.data.dialogue.conversation import Message, RowError
from finetune.data.dialogue.foreign import TOOLS, listed_tools
from finetune.data.dialogue.tool_calls import Call, arguments_text

CALL_IN_TEXT = "a call written as text (data.calls_in_text: read takes it as the call)"
UNREADABLE_CALL = (
    "the mark of a call in a reply's text that cannot be read as one; write the call as tool_calls"
)
RESULT_IN_TEXT = (
    "a tool's result written into a user's text (data.calls_in_text: read takes it behind a call)"
)
TOOLS_IN_TEXT = "tools defined in a system text (data.calls_in_text: read takes them as tools)"

_TAGGED = re.compile(
    r"<(tool_call|functioncall|function_call)>(.*?)(?:</\1>|<\|endoftext\|>|\Z)", re.DOTALL
)
_REACT = re.compile(
    r"^Action:[ \t]*(?P<name>[^\n]+)\nAction Input:[ \t]*(?P<arguments>\{.*?\})\s*(?:\nObservation:\s*)?\Z",
    re.DOTALL | re.MULTILINE,
)
_GLM = re.compile(r"(?P<name>[^\s{}\[\]()]{1,128})\s*\n(?P<arguments>\{.*\})\s*", re.DOTALL)
_CHATGLM3 = re.compile(
    r"\s*(?P<name>[^\s{}\[\]()]{1,128})\s*\n```(?:python)?\s*tool_call\((?P<keywords>.*)\)\s*```\s*",
    re.DOTALL,
)
_PYTHON_CALL = re.compile(r"\s*(?P<name>[^\s()\[\],][^()\[\],=]{0,127})\(")
_FENCE = "```"
_LANGUAGES = ("json", "tool_calls", "tool_call", "tool_code", "python")
_MARKS = ("[TOOL_CALLS]", "<|python_tag|>", "<|tool_call|>", "<|action_start|>", "<|plugin|>")
_END_MARKS = ("<|/tool_call|>", "<|action_end|>", "<|endoftext|>", "<|eom_id|>", "</s>")
_FUNCTION = re.compile(
    r"<function=(?P<name>[^<>\s]+)>(?P<arguments>(?:(?!</?function\b).)*+)</function>"
    r"|<invoke name=\"(?P<invoked>[^\"<]+)\">(?P<given>(?:(?!</?invoke\b).)*+)</invoke>",
    re.DOTALL,
)
_NAMED = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"✿FUNCTION✿\s*[:：]\s*(?P<name>[^\n✿]+?)\s*✿ARGS✿\s*[:：]\s*(?P<arguments>\{.*?\})\s*(?=✿|\Z)",
        r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^<\n]+)(?:<｜tool▁sep｜>|\n```json\s)"
        r"\s*(?P<arguments>\{.*?\})\s*(?:```)?\s*<｜tool▁call▁end｜>",
        r"<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[\w.-]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>"
        r"\s*(?P<arguments>\{.*?\})\s*<\|tool_call_end\|>",
        r"\[TOOL_CALLS\]\s*(?P<name>[\w.-]+)(?:\[ARGS\])?\s*(?P<arguments>\{.*?\})\s*(?=\[TOOL_CALLS\]|</s>|\Z)",
        r"(?:<\|start\|>assistant)?<\|channel\|>commentary to=functions\.(?P<name>[\w.-]+)[^{}]*<\|message\|>"
        r"(?P<arguments>\{.*?\})\s*<\|call\|>",
    )
)
_ARGUMENT = re.compile(
    r"<arg_key>([^<]{1,256})</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL
)
_PARAMETER = re.compile(
    r"<parameter(?:=| name=\")([^>\"]{1,256})\"?>\n?(.*?)\n?</parameter>", re.DOTALL
)
_SIGN = re.compile(
    r"</?(?:tool_calls?|functioncall|function_calls?|invoke)\b[^>\n]*>|<function=|✿(?:FUNCTION|ARGS)✿|\[TOOL_CALLS\]"
    r"|<\|(?:python_tag|action_start|plugin)\|>|<[|｜]/?tool[▁_]calls?|<\|call\|>"
)
"""What says that a call stands here, whatever its spelling is."""
_REACT_SIGN = "Action Input:"
_AROUND = re.compile(
    r"</?(?:tool_calls|function_calls)>|<[|｜]tool[▁_]calls?(?:_section)?[▁_](?:begin|end)[|｜]>|<\|(?:endoftext|im_end|eom_id|eot_id)\|>"
    r"|</s>|✿(?:RESULT|RETURN)✿\s*[:：]?|</?tool_call>|\s+"
)
"""What may stand between calls and behind them without saying anything."""
_AROUND_AT_END = re.compile(rf"(?:{_AROUND.pattern})+\Z")
_RESULT = re.compile(r"<(tool_response|tool_results?|function_results?)>")
_NEXT_RESULT = re.compile(rf"\s*+{_RESULT.pattern}")
_RESULT_LINE = re.compile(r"\s*(?:Observation|✿RESULT✿|FUNCTION RESPONSE)\s*[:：]\s*")


class WrittenCalls(NamedTuple):
    """What a reply says in words and the calls that it writes behind them."""

    text: str
    calls: tuple[Call, ...]


def structure_in_text(message: Message, tools: Collection[str]) -> str:
    """What of tool use a message that is no call writes into its text; empty for nothing."""
    text = message.content
    if message.role == "assistant":
        if written_calls(text, tools) is not None:
            return CALL_IN_TEXT
        return UNREADABLE_CALL if _has_sign(text) else ""
    if message.role == "user":
        return RESULT_IN_TEXT if _results(text) else ""
    is_list = message.role == "system" and "{" in text
    return TOOLS_IN_TEXT if is_list and (TOOLS in text or listed_tools(text)) else ""


def _has_sign(text: str) -> bool:
    # Every reply comes by here: a sign is looked for only where a part of one stands.
    if _REACT_SIGN in text and (f"\n{_REACT_SIGN}" in text or text.startswith(_REACT_SIGN)):
        return True
    is_possible = "<" in text or "✿" in text or "[TOOL_" in text
    return is_possible and _SIGN.search(text) is not None


def written_calls(content: str, tools: Collection[str]) -> WrittenCalls | None:
    """The calls that a reply writes into its text, or None when it writes none.

    Args:
        content: The reply's text.
        tools: Names of the tools that the dialogue defines; a spelling without a mark of its own
            counts only for one of these.
    """
    if _has_sign(content):
        found = _marked(content)
        if found is not None:
            return found
    if not tools:
        return None
    end = content.rstrip()[-1:]
    if end == "}" and (match := _GLM.fullmatch(content.lstrip())):
        return _call_of(match, tools)
    if end in "}]`" and (calls := _json_calls(inner := _without_marks(content))):
        return WrittenCalls("", tuple(calls)) if all(c.name in tools for c in calls) else None
    if end == "`":
        if (match := _CHATGLM3.fullmatch(content)) and match["name"] in tools:
            return _python_calls(f"{match['name']}({match['keywords']})", tools)
        return _python_calls(inner, tools)
    if end == "]" and content.startswith("["):
        return _python_calls(content.strip()[1:-1], tools)
    if end == ")":
        return _python_calls(content.strip(), tools)
    return None


def _marked(content: str) -> WrittenCalls | None:
    """Calls in a spelling that marks them, whatever tools are defined."""
    if matches := list(_TAGGED.finditer(content)):
        texts = [match[2].strip() for match in matches]
        found = [_json_calls(text) or _keyed(text) or _functions(text) for text in texts]
        if all(found):
            return _around(content, matches, [call for calls in found for call in calls])
    if matches := list(_FUNCTION.finditer(content)):
        found = [_functions(match[0]) for match in matches]
        if all(found):
            return _around(content, matches, [call for calls in found for call in calls])
    for pattern in _NAMED:
        if matches := list(pattern.finditer(content)):
            calls = [_call_of(match, ()) for match in matches]
            if all(calls):
                return _around(content, matches, [c for one in calls if one for c in one.calls])
    if listed := _json_calls(_without_marks(content)):
        return WrittenCalls("", tuple(listed))
    return _react(content)


def _around(
    content: str, matches: Sequence[re.Match[str]], calls: Sequence[Call]
) -> WrittenCalls | None:
    """The calls and the text in front of them; None when text behind them would be lost."""
    places = [*(m.start() for m in matches[1:]), len(content)]
    between = (content[m.end() : end] for m, end in zip(matches, places, strict=True))
    if any(_AROUND.sub("", text) for text in between):
        return None
    return WrittenCalls(_AROUND_AT_END.sub("", content[: matches[0].start()]).strip(), tuple(calls))


def with_calls_read(
    messages: list[Message], tools: Collection[str], *, thinks: bool = False
) -> list[Message]:
    """The messages with written calls as calls, each answered by the tool results behind it.

    Args:
        messages: A dialogue.
        tools: Names of the tools that it defines.
        thinks: Whether the thought in front of a call stays with it, for a checkpoint that thinks.
    """
    read: list[Message] = []
    for message in messages:
        if message.role == "user" and read and read[-1].metadata:
            results = _results(message.content)
            read += [Message("observation", text) for text in results] or [message]
            continue
        found = (
            written_calls(message.content, tools)
            if message.role == "assistant" and not message.metadata
            else None
        )
        if found is None:
            read.append(message)
            continue
        calls = [replace(message, content=c.arguments, metadata=c.name) for c in found.calls]
        if thinks and found.text.endswith("</think>"):
            calls[0] = replace(calls[0], content=f"{found.text}\n\n{calls[0].content}")
        elif found.text:
            read.append(replace(message, content=found.text))
        read += calls
    return read


def _results(text: str) -> list[str]:
    """Tool results that a user's text consists of; none when it says anything else."""
    opened = _RESULT.search(text)
    if opened and text.find(f"</{opened[1]}>", opened.end()) >= 0:
        return _tagged_results(text)
    match = _RESULT_LINE.match(text)
    return [text[match.end() :].strip()] if match and text[match.end() :].strip() else []


def _tagged_results(text: str) -> list[str]:
    """What stands in the tags of which a text consists; none when anything stands between them."""
    found, place = [], 0
    while opened := _NEXT_RESULT.match(text, place):
        closing = f"</{opened[1]}>"
        end = text.find(closing, opened.end())
        if end < 0:
            return []
        found.append(text[opened.end() : end].strip())
        place = end + len(closing)
    return [] if text[place:].strip() else found


def _json_calls(text: str) -> list[Call]:
    """Calls of `{"name": …, "arguments": …}`, also with glaive's single quotes around arguments."""
    text = re.sub(r"'(\{.*\})'", r"\1", text.removesuffix("<|endoftext|>"), flags=re.DOTALL)
    try:
        value = strict_json.parse(text)
        items = value if isinstance(value, list) else [value]
        names = [item["name"] for item in items]
        if not all(isinstance(name, str) and name for name in names):
            return []
        return [
            Call(name, arguments_text(name, _arguments(item), 1))
            for name, item in zip(names, items, strict=True)
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
    for mark in _MARKS:
        text = text.strip().removeprefix(mark)
    for mark in _END_MARKS:
        text = text.strip().removesuffix(mark)
    return text.strip()


def _keyed(text: str) -> list[Call]:
    """GLM-4.5's call: a name and its arguments one by one, each JSON or plain text."""
    name, found = text.partition("<arg_key>")[0].strip(), _ARGUMENT.findall(text)
    if not name or re.search(r"[\s{\[<(]", name) or _ARGUMENT.sub("", text).strip() != name:
        return []
    return [Call(name, strict_json.dump(_values(found)))]


def _values(found: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Arguments that stand one by one, each as JSON or as plain text."""
    values = {}
    for key, value in found:
        try:
            values[key] = strict_json.parse(value)
        except RowError:
            values[key] = value
    return values


def _functions(text: str) -> list[Call]:
    """`<function=f>` and `<invoke name="f">`, with JSON or with one parameter a tag."""
    calls = []
    for match in _FUNCTION.finditer(text):
        name = match["name"] or match["invoked"]
        given = (match["arguments"] or match["given"] or "").strip()
        parameters = _PARAMETER.findall(given)
        if not _PARAMETER.sub("", given).strip():
            calls.append(Call(name, strict_json.dump(_values(parameters))))
            continue
        try:
            calls.append(Call(name, arguments_text(name, given, 1)))
        except RowError:
            return []
    return calls


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
            named = {word.arg for word in call.keywords if word.arg}
            if call.args or len(named) < len(call.keywords):  # `**more`, or one name twice
                return None
            values = {
                str(k.arg): ast.literal_eval(_with_json_words(k.value)) for k in call.keywords
            }
            calls.append(Call(name, strict_json.dump(values)))
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return None
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
