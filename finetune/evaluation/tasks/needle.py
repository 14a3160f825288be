"""A sentence hidden in a long text -> whether a model finds it, by length of the text and depth of the place.

The text is made here, sentence by sentence, in Chinese and English, so that it is nobody's and as long as
is asked for; no sentence of it says what the hidden one says. A reply is right when it holds the number.

    needle:4k..32k       4,096, 8,192, 16,384 and 32,768 tokens
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from finetune import console
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.errors import ConfigError
from finetune.evaluation.tasks.table import TaskScore

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate

PREFIX = "needle"
DEPTHS = (0, 25, 50, 75, 100)
"""Where the sentence stands, in per cent of the text."""
LANGUAGES = ("en", "zh")
NEW_TOKENS = 32
_RANGE = re.compile(r"(\d+)([km]?)(?:\.\.(\d+)([km]?))?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1024, "m": 1024**2}
_NEEDLE = {"en": "The number of the blue locker is {}.", "zh": "蓝色储物柜的号码是 {}。"}
_QUESTION = {
    "en": "\n\nWhat is the number of the blue locker? Answer with the number.",
    "zh": "\n\n蓝色储物柜的号码是多少？请回答号码。",
}
_PARTS = {
    "en": (
        ("In the morning", "After the rain", "Near the harbour", "On the way to the mill", "Before the market closed", "During the long winter"),
        ("the baker", "an old sailor", "the teacher", "a young gardener", "the clockmaker", "her neighbour"),
        ("looked for", "spoke of", "carried home", "wrote about", "repaired", "sold"),
        ("a wooden chair", "the stone bridge", "a basket of apples", "the broken lamp", "an old map", "the small boat"),
    ),
    "zh": (
        ("清晨", "雨后", "在港口附近", "去磨坊的路上", "集市散场之前", "漫长的冬天里"),
        ("面包师", "老水手", "老师", "年轻的园丁", "钟表匠", "她的邻居"),
        ("寻找", "谈起", "带回", "写到", "修理", "卖掉"),
        ("一把木椅", "那座石桥", "一篮苹果", "坏了的灯", "一张旧地图", "那条小船"),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Hidden:
    """One text with its sentence."""

    id: str
    """`en:4096:25`: language, tokens, depth."""
    tokens: int
    prompt: list[int]
    number: str


def lengths_of(text: str) -> list[int]:
    """The lengths of `4k..32k`, doubling; ConfigError for what is no range."""
    found = _RANGE.fullmatch(text)
    if not found:
        raise ConfigError(
            f"--tasks needle:{text}: write a length or a range, such as 4k or 4k..128k"
        )
    first = int(found[1]) * _UNITS[found[2].lower()]
    last = int(found[3]) * _UNITS[found[4].lower()] if found[3] else first
    if not 256 <= first <= last:
        raise ConfigError(f"--tasks needle:{text}: lengths rise, and are 256 tokens or more")
    lengths = [first]
    while lengths[-1] * 2 <= last:
        lengths.append(lengths[-1] * 2)
    return lengths


def texts(template: ChatTemplate, length: int) -> Iterator[Hidden]:
    """Every language and depth for one length in tokens, prompt and reply within it."""
    for language, depth in product(LANGUAGES, DEPTHS):
        draw = random.Random(f"{language} {length} {depth}")
        number = str(draw.randint(10_000, 99_999))
        needle = _NEEDLE[language].format(number)
        sentences = [_sentence(language, draw) for _ in range(64)]
        each = len(_prompt(template, "".join(sentences))) / 64
        room = length - NEW_TOKENS - len(_prompt(template, needle + _QUESTION[language]))
        sentences += [_sentence(language, draw) for _ in range(int(room / each * 1.2))]
        while True:
            place = len(sentences) * depth // 100
            whole = "".join([*sentences[:place], needle, *sentences[place:]])
            ids = _prompt(template, whole + _QUESTION[language])
            over = len(ids) + NEW_TOKENS - length
            if over <= 0:
                break
            del sentences[-max(1, int(over / each)) :]
        yield Hidden(f"{language}:{length}:{depth}", length, ids, number)


def ask(model: Any, template: ChatTemplate, lengths: Sequence[int]) -> dict[str, TaskScore]:
    """What a model finds at every length its context has room for, one text at a time."""
    from finetune.generation.generate import context_length, generate

    room = context_length(model)
    found: dict[str, TaskScore] = {}
    for length in lengths:
        if room is not None and length > room:
            console.warn(
                f"needle: {length} tokens are beyond the model's {room} positions; left out"
            )
            continue
        asked = list(texts(template, length))
        prompts = [one.prompt for one in asked]
        replies = generate(model, template, prompts, max_new_tokens=NEW_TOKENS, batch_size=1)
        right = tuple(
            100.0 * (one.number in template.parse(reply.ids).content)
            for one, reply in zip(asked, replies, strict=True)
        )
        said = f"share of hidden numbers found in texts of {length} tokens, depths {DEPTHS} in per cent, Chinese and English, greedy"
        found[f"{PREFIX}/{length}"] = TaskScore(said, tuple(one.id for one in asked), right)
    return found


def _sentence(language: str, draw: random.Random) -> str:
    words = [draw.choice(part) for part in _PARTS[language]]
    return f"{' '.join(words)}. " if language == "en" else f"{words[0]}，{''.join(words[1:])}。"


def _prompt(template: ChatTemplate, text: str) -> list[int]:
    return list(template.prompt(Conversation((Message("user", text),), location=PREFIX), 1))
