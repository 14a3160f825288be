"""What a dialogue writes as text although it is structure: images, thoughts, control tokens, turns.

All of it can be trained, and is hardly meant. `data check` and the start of training count it; calls
in text are a matter of their own (`calls_in_text.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from finetune.data.dialogue.conversation import PLACEHOLDER, Message

IMAGE_IN_TEXT = "an image's placeholder or path in a text, where it is text"
THOUGHT_IN_TEXT = "<think> in a reply, and this checkpoint does not think (data.reasoning: drop)"
OTHER_THOUGHT = (
    "a thought in tags that no GLM checkpoint writes, such as <thinking> (data.reasoning: drop leaves it "
    "out; the tag of those that think is <think>)"
)
MARKER_IN_TEXT = (
    "a control token in a message's text, where it is text (<|user|>, <|im_end|>, </s>)"
)
DIALOGUE_IN_MESSAGE = "a message that spells a dialogue out (Human: … Assistant: …); as messages its replies could be trained"
PARTS_IN_TEXT = 'content parts written as text ([{"type": "text", …}]); write them as a list'
FEWER_RESULTS = "tool calls of one turn with fewer results than calls"

# Names of media in tags of any kind: <image>, <image_1>, <|vision_start|>, <img src="…">, [IMG].
_IMAGE = re.compile(
    r"</?\|?(?:begin_of_|start_of_|end_of_)?(?:image|img|video|audio|picture|vision)s?"
    r"(?:[_ -]?(?:\d+|start|end|pad|token|soft_token|placeholder|here|bos|eos))?\|?>"
    r"|<img\s[^>]{0,200}src\s*=|!\[[^\]\n]{0,200}\]\([^)\s]|\[(?:IMG|image|图片)\]|data:image/\w+;base64,",
    re.IGNORECASE,
)
_PAIRED = "thinking|thoughts?|reasoning|reflection|scratchpad|inner_monologue|cot|antthinking|analysis|seed:think"
_OTHER_THOUGHT = re.compile(
    rf"<(?P<tag>{_PAIRED})>.*?</(?P=tag)>|<\|begin_of_thought\|>.*?<\|end_of_thought\|>"
    r"|◁think▷.*?◁/think▷|\[THINK\].*?\[/THINK\]",
    re.DOTALL | re.IGNORECASE,
)
_OTHER_THOUGHT_TAG = re.compile(
    rf"</?(?:{_PAIRED})>|<\|(?:begin|end)_of_thought\|>|◁/?think▷|\[/?THINK\]", re.IGNORECASE
)
_MARKER = re.compile(
    r"<\|[/\w.: -]{1,40}\|>|<｜[^<>｜\n]{1,40}｜>|</?(?:start|end)_of_turn>|<(?:bos|eos|sop|eop|eot)>|</s>\s*\Z|\A\s*<s>"
    r"|\[/?INST\]|<</?SYS>>|\[gMASK\]"
)
_MODEL_NAMES = ("ssistant", "SSISTANT", "AI:", "AI：", "GPT", "Bot", "答", "助手", "### Response")
_LINE = r"(?:^\W{0,4}|#{2,}\s*)"
_TURN_OF_USER = re.compile(
    _LINE + r"(?:Human|User|Instruction|问|用户)\W{0,2}[:：]|\[Round \d+\]",
    re.MULTILINE | re.IGNORECASE,
)
_TURN_OF_MODEL = re.compile(
    _LINE + r"(?:Assistant|AI|GPT|Bot|Response|答|助手)\W{0,2}[:：]", re.MULTILINE | re.IGNORECASE
)
_PARTS = re.compile(r"""\s*\[\s*\{\s*["']type["']\s*:\s*["'](?:text|image)""")
_SIGNS = ("<", "[", "◁", "data:image")
_CALLS_AND_RESULTS = re.compile("(c+)(o+)")


def doubts_of_message(message: Message, *, thinks: bool | None) -> Iterator[str]:
    """What one message writes as text; a call has been looked at elsewhere.

    Args:
        message: Any but a call.
        thinks: Whether the checkpoint writes its reasoning; None when that is not known.
    """
    text, role = message.content, message.role
    if role == "user" and _spells_turns(text):
        yield DIALOGUE_IN_MESSAGE
    if not any(sign in text for sign in _SIGNS):  # nearly all texts
        return
    if role == "assistant":
        if found := thought_in_text(text, thinks=thinks):
            yield found
            return
    elif PLACEHOLDER in text or (role == "user" and _IMAGE.search(text)):
        yield IMAGE_IN_TEXT
        return
    if _PARTS.match(text):
        yield PARTS_IN_TEXT
    if _MARKER.search(text):
        yield MARKER_IN_TEXT


def _spells_turns(text: str) -> bool:
    is_possible = any(name in text for name in _MODEL_NAMES)
    return is_possible and bool(_TURN_OF_MODEL.search(text) and _TURN_OF_USER.search(text))


def thought_in_text(text: str, *, thinks: bool | None) -> str:
    """What is doubtful about the reasoning in a reply's text; empty without any."""
    if thinks is False and "<think>" in text:
        return THOUGHT_IN_TEXT
    return OTHER_THOUGHT if _OTHER_THOUGHT_TAG.search(text) else ""


def fewer_results(messages: Sequence[Message]) -> Iterator[str]:
    """Once for each run of calls that has some results, but fewer than calls."""
    kinds = "".join("c" if m.metadata else m.role[0] for m in messages)  # call, s, u, o, a
    for calls, results in _CALLS_AND_RESULTS.findall(kinds):
        if len(results) < len(calls):
            yield FEWER_RESULTS


def without_thought(content: str) -> str:
    """A reply without what it was thought out with, in whatever tags it opens."""
    said = content.rpartition("</think>")[2] if "</think>" in content else content
    opened = said.lstrip()
    if found := _OTHER_THOUGHT.match(opened):
        said = opened[found.end() :]
    return said.lstrip() if said is not content else content
