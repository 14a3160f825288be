"""What other servers are given: the template and the parser for vLLM, the Modelfile for Ollama."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jinja2
import pytest
import tiny

from finetune.data.chat.jinja import JinjaTemplate, describe
from finetune.data.chat.tokenizer import BUILT_IN_TEMPLATE, load_chat_tokenizer

ROOT = Path(__file__).resolve().parent.parent
MODELFILE = (ROOT / "docs" / "Modelfile").read_text(encoding="utf-8")
ROWS = [
    json.loads(line)
    for line in (ROOT / "data/support_desk/heldout.jsonl").read_text(encoding="utf-8").splitlines()
]
# What 0414 checkpoints do: `tools` is the template's own argument.
TOOLS_AS_ARGUMENT = (
    "[gMASK]<sop>{% if tools %}<|system|>\n# 可用工具{% for tool in tools %}\n\n"
    "## {{ tool['function']['name'] }}\n\n{{ tool['function'] | tojson(indent=4) }}{% endfor %}"
    "{% endif %}{% for item in messages %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n"
    "{{ item['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def load_script(name: str) -> ModuleType:
    [path] = (ROOT / "scripts").rglob(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def as_openai(message: dict[str, Any]) -> dict[str, Any]:
    if message.get("metadata"):
        function = {"name": message["metadata"], "arguments": json.loads(message["content"])}
        return {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    role = "tool" if message["role"] == "observation" else message["role"]
    return {"role": role, "content": message["content"]}


@pytest.mark.parametrize("own", [tiny.CHAT_TEMPLATE, TOOLS_AS_ARGUMENT])
def test_openai_messages_come_out_as_the_checkpoint_was_trained(own: str, tmp_path: Path) -> None:
    openai_template = load_script("openai_template").openai_template
    tiny.save_tokenizer(tmp_path, chat_template=own)
    translated = JinjaTemplate(openai_template(tmp_path), {})
    assert any("tools" in row for row in ROWS)
    for row in ROWS:
        messages, tools = row["messages"][:-1], row.get("tools")
        if tools and describe(JinjaTemplate(own, {})).tools == "message":
            messages, given = [{"role": "system", "content": "", "tools": tools}, *messages], None
        else:
            given = tools
        expected = JinjaTemplate(own, {}).render(messages, tools=given, add_generation_prompt=True)
        asked = [as_openai(message) for message in row["messages"][:-1]]
        assert translated.render(asked, tools=tools, add_generation_prompt=True) == expected


def test_an_image_stands_before_the_text_wherever_the_client_put_it(tmp_path: Path) -> None:
    openai_template = load_script("openai_template").openai_template
    tiny.save_tokenizer(tmp_path)
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image"}]
    text = JinjaTemplate(openai_template(tmp_path), {}).render([{"role": "user", "content": parts}])
    expected = "<|user|>\n<|begin_of_image|><|endoftext|><|end_of_image|>What is it?"
    assert text == f"[gMASK]<sop>{expected}"


def go_template(text: str) -> jinja2.Template:
    """A Go template of `range .Messages`, `if`, `else`, `end`, `.Role`, `.Content`, as jinja."""
    ends: list[str] = []

    def action(found: re.Match[str]) -> str:
        code = found[1]
        if code == "range .Messages":
            ends.append("{% endfor %}")
            return "{% for message in messages %}"
        if condition := re.fullmatch(r"if (?:eq )?\.(\w+)(?: (\"\w+\"))?", code):
            ends.append("{% endif %}")
            test = f"message['{condition[1]}']" + (f" == {condition[2]}" if condition[2] else "")
            return "{% if " + test + " %}"
        if code in {".Role", ".Content"}:
            return "{{ message['" + code[1:] + "'] }}"
        return "{% else %}" if code == "else" else {"end": ends.pop}[code]()

    source = re.sub(r"{{ (.*?) }}", action, text)
    return jinja2.Environment(keep_trailing_newline=True).from_string(source)


def test_ollama_lays_a_dialogue_out_as_the_checkpoint_does() -> None:
    source = re.search(r'TEMPLATE """(.*?)"""', MODELFILE, re.DOTALL)
    assert source
    ollama = go_template(source[1])
    own = JinjaTemplate(BUILT_IN_TEMPLATE.read_text(encoding="utf-8"), {})
    system = {"role": "system", "content": "请用中文回答。"}
    result = {"role": "observation", "content": '{"t": 20}'}
    rows = [row["messages"][:-1] for row in ROWS if "tools" not in row]
    for messages in [*rows, [system, *rows[0]], [*rows[0], result]]:
        roles = [{"observation": "tool"}.get(m["role"], m["role"]) for m in messages]
        sent = [{"Role": r, "Content": m["content"]} for r, m in zip(roles, messages, strict=True)]
        assert ollama.render(messages=sent) == own.render(messages, add_generation_prompt=True)


def test_ollama_stops_where_glm4_does(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    tokenizer = load_chat_tokenizer(tmp_path)
    stops = {tokenizer.control_ids[t] for t in re.findall(r'PARAMETER stop "(.*)"', MODELFILE)}
    assert stops == set(tokenizer.stop_ids)
    assert len(stops) == 3


@dataclass
class Piece:
    """Stands for vLLM's records: any fields."""

    name: str | None = None
    arguments: str | None = None
    content: str | None = None
    tool_calls: list[Any] = field(default_factory=list)
    function: Any = None
    index: int = 0
    type: str = ""
    id: str = ""
    tools_called: bool = False


class ParserBase:
    """Stands for vLLM's ToolParser: the state that its streaming keeps."""

    def __init__(self) -> None:
        self.current_tool_id = -1
        self.streamed_args_for_tool: list[str] = []
        self.prev_tool_call_arr: list[dict[str, Any]] = []


@pytest.fixture
def parser_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin's parser; vLLM is not installed here, scripts/evidence/serve_check.sh runs it for real."""
    names = ("DeltaFunctionCall", "DeltaMessage", "DeltaToolCall", "ExtractedToolCallInformation",
             "FunctionCall", "ToolCall")  # fmt: skip
    manager = SimpleNamespace(register_module=lambda name: lambda cls: cls)
    modules = {
        "vllm.entrypoints.generate.base.protocol": dict.fromkeys(names, Piece),
        "vllm.renderers.chat_utils": {"make_tool_call_id": lambda: "call_1"},
        "vllm.tool_parsers.abstract_tool_parser": {
            "ToolParser": ParserBase, "ToolParserManager": manager,
        },
    }  # fmt: skip
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return load_script("vllm_glm4_tools").GLM4ToolParser


REQUEST = SimpleNamespace(
    tools=[SimpleNamespace(function=SimpleNamespace(name=n)) for n in ("get_order", "get_day")]
)
# What a model may write, its text and its calls.
WRITTEN = [
    ("\nHello.\nget_order", "Hello.\nget_order", []),
    ("Hello", "Hello", []),
    ("get_order later\n{}", "get_order later\n{}", []),
    ('get_order\n{"id": "a}{"}', None, [("get_order", '{"id": "a}{"}')]),
    ('get_day\n{"d": 1}get_order\n{}', None, [("get_day", '{"d": 1}'), ("get_order", "{}")]),
]


@pytest.mark.parametrize(("text", "content", "calls"), WRITTEN)
def test_vllm_reads_the_calls_of_a_whole_reply(
    parser_class: Any, text: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    found = parser_class().extract_tool_calls(text, REQUEST)
    assert [(c.function.name, c.function.arguments) for c in found.tool_calls] == calls
    assert (found.content, found.tools_called) == (content, bool(calls))


def test_a_call_that_was_cut_stays_text(parser_class: Any) -> None:
    found = parser_class().extract_tool_calls('get_order\n{"id": "LM', REQUEST)
    assert (found.content, found.tool_calls) == ('get_order\n{"id": "LM', [])


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize(("text", "content", "calls"), WRITTEN)
def test_vllm_streams_what_it_reads_of_the_whole(
    parser_class: Any, text: str, content: str | None, calls: list[tuple[str, str]], step: int
) -> None:
    parser, said, streamed = parser_class(), "", {}
    for start in range(0, len(text), step):
        before, now = text[:start], text[: start + step]
        piece = parser.extract_tool_calls_streaming(before, now, now[start:], (), (), (), REQUEST)
        for call in piece.tool_calls if piece else []:
            name, arguments = streamed.get(call.index, ("", ""))
            streamed[call.index] = (
                name + (call.function.name or ""), arguments + (call.function.arguments or "")
            )  # fmt: skip
        said += (piece.content or "") if piece else ""
    assert list(streamed.values()) == calls
    assert said == (content or "")
