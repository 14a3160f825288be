r"""vLLM's plugin for GLM-4's tool calls: `--tool-parser-plugin` takes this file, its name is glm4.

GLM-4 writes a call as the function's name, a line break and the arguments as JSON, and a plain reply
as a line break and text:

    get_weather\n{"city": "北京"}          \n北京20度。

Nothing of finetune is imported, so that the file alone can be copied to a server.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager


class Call(NamedTuple):
    """A call as far as it is written."""

    name: str
    arguments: str
    whole: bool


def read_calls(text: str, names: set[str]) -> tuple[list[Call], str]:
    """The calls that `text` starts with, and what follows them."""
    calls = []
    while True:
        name, line_break, rest = text.partition("\n")
        if not line_break or name.strip() not in names:
            return calls, text
        try:
            _, end = json.JSONDecoder().raw_decode(rest)
        except ValueError:
            return [*calls, Call(name.strip(), rest, whole=False)], ""
        calls.append(Call(name.strip(), rest[:end], whole=True))
        text = rest[end:]


@ToolParserManager.register_module("glm4")
class GLM4ToolParser(ToolParser):
    """Calls of the functions that the request defines; anything else stays text."""

    supports_required_and_named = False

    def _names(self, request: Any) -> set[str]:
        return {tool.function.name for tool in request.tools or []}

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        """The calls of a whole reply; its text where a call is cut or is none."""
        calls, rest = read_calls(model_output, self._names(request))
        if not calls or not all(call.whole for call in calls):
            text = model_output.removeprefix("\n")
            return ExtractedToolCallInformation(tools_called=False, tool_calls=[], content=text)
        found = [
            ToolCall(function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in calls
        ]
        return ExtractedToolCallInformation(
            tools_called=True, tool_calls=found, content=rest.strip() or None
        )

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> DeltaMessage | None:
        """What is new since the last piece: text at once, a call's name once its line is whole."""
        names = self._names(request)
        calls, rest = read_calls(current_text, names)
        if calls:
            return self._new_parts(calls)
        if any(name.startswith(rest) for name in names):
            return None  # this may become a function's name
        held = any(name.startswith(previous_text) for name in names)  # "" too
        text = (current_text if held else delta_text).removeprefix("\n" if held else "")
        return DeltaMessage(content=text) if text else None

    def _new_parts(self, calls: list[Call]) -> DeltaMessage | None:
        parts = []
        for index, call in enumerate(calls):
            if index > self.current_tool_id:
                self.current_tool_id = index
                self.streamed_args_for_tool.append("")
                self.prev_tool_call_arr.append({})
                function = DeltaFunctionCall(name=call.name, arguments="")
                parts.append(
                    DeltaToolCall(
                        index=index, type="function", id=make_tool_call_id(), function=function
                    )
                )
            sent = self.streamed_args_for_tool[index]
            if new := call.arguments[len(sent) :]:
                function = DeltaFunctionCall(arguments=new)
                parts.append(DeltaToolCall(index=index, function=function))
            self.streamed_args_for_tool[index] = call.arguments
            self.prev_tool_call_arr[index] = {"name": call.name, "arguments": call.arguments}
        return DeltaMessage(tool_calls=parts) if parts else None
