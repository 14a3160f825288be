"""Law 1: what we lay out is what the checkpoint's own template lays out, checked on a probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finetune.data.chat.jinja import JinjaTemplate
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.errors import DataError

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate

_PROBE_TOOLS: tuple[Mapping[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "查询天气 <b>&'\"",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
)
_PROBE = Conversation(
    messages=(
        Message("system", "你是一个助手。\n请简短回答。"),
        Message("user", "  北京天气怎么样？\n\n"),
        Message("assistant", '{"city": "北京"}', metadata="get_weather"),
        Message("observation", '{"t": 20}'),
        Message("assistant", "<think>\n查到了。</think>\n\n北京今天20度。"),
        Message("user", "Thanks!\n再见 😀"),
        Message("assistant", " 再见！"),
    ),
    tools=_PROBE_TOOLS,
    location="probe",
)


def check_against_own_template(template: ChatTemplate, jinja: JinjaTemplate) -> None:
    """Raise DataError unless our ids of the probes are those of the checkpoint's own template."""
    for probe in template.layout.probes(_PROBE):
        asked = replace(probe, messages=probe.messages[:-1])
        cases = [
            (probe, False, template.render([probe])[0].input_ids[:-1].tolist()),
            (asked, True, template.prompt(asked, len(asked.messages))),
        ]
        for dialogue, generation, ours in cases:
            theirs = own_text(dialogue, template, jinja, add_generation_prompt=generation)
            if ours != template.tokenizer.trusted(theirs):
                raise DataError(
                    "this checkpoint's chat template lays a dialogue out differently from "
                    f"{template.layout.name}'s rules, and training on it would go wrong.\n"
                    f"its template: {theirs!r}\nour layout:   {template.decode(ours)!r}\n"
                    "Use a checkpoint of the GLM-4 family, or correct its chat_template"
                )


def own_text(
    conversation: Conversation,
    template: ChatTemplate,
    jinja: JinjaTemplate,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The dialogue as the checkpoint's own template writes it."""
    messages, tools, options = template.layout.template_input(conversation)
    return jinja.render(
        messages, tools=tools, add_generation_prompt=add_generation_prompt, options=options
    )
