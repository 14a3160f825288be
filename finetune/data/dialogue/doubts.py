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
CALL_THOUGHT = "the reasoning of a call, which only a checkpoint that thinks has a place for (data.reasoning: drop)"
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
    r"|<img\s[^>]{0,200}src\s*=|!\[[^\]\n]{0,200}\]\([^)\s]|\[(?:IMG|image|图片)\]",
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
    r"<\|[/\w.: -]{1,40}\|>|<｜[^<>｜\n]{1,40}｜>|</?(?:start|end)_of_turn>|<(?:bos|eos|sop|eop|eot)>|</s>\s*\Z"
    r"|\[/?INST\]|<</?SYS>>|\[gMASK\]"
)
_MODEL_NAMES = ("ssistant", "SSISTANT", "AI", "GPT", "Bot", "Response:", "答", "助手")
_LINE = r"(?:^\W{0,4}|#{2,}\s*)"
_TURN_OF_USER = re.compile(
    _LINE + r"(?:Human|User|Instruction|问|用户)\W{0,2}[:：]|\[Round \d+\]",
    re.MULTILINE | re.IGNORECASE,
)
_TURN_OF_MODEL = re.compile(
    _LINE + r"(?:Assistant|AI|GPT|Bot|Response|答|助手)\W{0,2}[:：]", re.MULTILINE | re.IGNORECASE
)
_PARTS = re.compile(r"""\s*\[\s*\{\s*["']type["']\s*:\s*["'](?:text|image)""")
_SIGNS = ("<", "[", "◁", "data:image")  # of what a message is looked through for
_LIST_SIGNS = ("![", "[I", "[i", "[/", "[g", "[图", "[T")
_LINE_SIGNS = ("Observation", "FUNCTION RESPONSE", "data:image", *_MODEL_NAMES)
"""With a bracket or a colon, without which nothing is doubtful but what begins or ends as code does."""
_BEGINS_OF_CODE = "[ \n"
_ENDS_OF_CODE = "}]`) \n"
_CALLS_AND_RESULTS = re.compile("(c+)(o+)")


def may_be_doubtful(messages: Sequence[Message], *, has_tools: bool) -> bool:
    """Whether any message has to be looked at; false for nearly all dialogues, at little cost."""
    texts: dict[str, list[str]] = {"user": [], "assistant": [], "observation": [], "system": []}
    for message in messages:
        if message.metadata:
            continue
        text = message.content
        texts[message.role].append(text)
        is_code = text[:1] in _BEGINS_OF_CODE or (has_tools and text[-1:] in _ENDS_OF_CODE)
        if is_code and message.role != "observation":
            return True
    asked, said = "\n".join(texts["user"]), "".join(texts["assistant"])
    if any(sign in asked or sign in said for sign in ("<", "✿", "◁")):
        return True
    if any("<" in text for text in texts["observation"]):
        return True
    if any(sign in text for text in texts["system"] for sign in "{<["):
        return True
    if ("[" in said or "[" in asked) and any(sign in said or sign in asked for sign in _LIST_SIGNS):
        return True
    is_line = ":" in asked or "：" in asked
    return "Action Input:" in said or (is_line and any(sign in asked for sign in _LINE_SIGNS))


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
    elif PLACEHOLDER in text or (role == "user" and (_IMAGE.search(text) or "data:image/" in text)):
        yield IMAGE_IN_TEXT
        return
    if _PARTS.match(text):
        yield PARTS_IN_TEXT
    if _MARKER.search(text) or text.lstrip().startswith("<s>"):
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
