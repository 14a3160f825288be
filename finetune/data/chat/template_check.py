"""Law 1: what we lay out is what the checkpoint's own template lays out, checked on a probe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, cast

from finetune.data.chat.jinja import ROLES, JinjaTemplate, JsonMessage
from finetune.data.dialogue.conversation import Conversation, Message, Role, ShownImage
from finetune.data.dialogue.images import ImageRule
from finetune.errors import DataError

if TYPE_CHECKING:
    from finetune.data.chat.image import TakesImages
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


@dataclass(frozen=True, slots=True)
class _OnePatch:
    """Images of one patch each, which no file is needed for."""

    patch_token: str
    laid: Callable[[Message, str], list[str]]
    rules: ClassVar[str] = "probe"
    rule: ClassVar[ImageRule] = ImageRule("probe", most=2, roles=ROLES)

    def patches_of(self, image: str) -> int:
        """One."""
        return 1


def roles_with_images(template: ChatTemplate) -> tuple[str, ...]:
    """Whose messages the checkpoint's own template shows images in, among text, as we lay them out."""
    spec: Any = template.image
    one = _OnePatch(spec.patch_token, spec.laid)
    probe = type(template)(replace(template.tokenizer, image=cast("TakesImages", one)))
    return tuple(role for role in ("user", "observation") if _shows_alike(probe, role))


def _shows_alike(template: ChatTemplate, role: Role) -> bool:
    shown = (ShownImage("", 0), ShownImage("", 2))
    before = _PROBE.messages[1:3] if role == "observation" else ()
    dialogue = Conversation((*before, Message(role, "甲 乙", images=shown)), location="probe")
    try:
        ours = template.render([dialogue])[0].input_ids.tolist()
        messages, tools, options = template.layout.template_input(dialogue)
        shown_messages = with_parts(dialogue, messages)
        text = template.jinja.render(shown_messages, tools=tools, options=options)
    except DataError:
        return False
    return bool(ours == template.tokenizer.trusted(text))


def with_parts(conversation: Conversation, messages: Sequence[JsonMessage]) -> list[JsonMessage]:
    """The messages as a chat template takes them, those with images as lists of parts."""
    shown = list(messages)
    behind = len(messages) - len(conversation.messages)
    for place, message in enumerate(conversation.messages):
        if message.images:
            shown[place + behind] = {**shown[place + behind], "content": parts_of(message)}
    return shown


def parts_of(message: Message) -> list[dict[str, Any]]:
    """A message's texts and images in their order, as parts of a content."""
    ends = [0, *(image.at for image in message.images), len(message.content)]
    parts: list[dict[str, Any]] = []
    for number, (start, end) in enumerate(pairwise(ends)):
        if number:
            parts.append({"type": "image", "path": message.images[number - 1].path})
        if start < end:
            parts.append({"type": "text", "text": message.content[start:end]})
    return parts
