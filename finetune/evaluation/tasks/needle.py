"""A sentence hidden in a long text -> whether a model finds it, by length of the text and depth of the place.

The text is made here, sentence by sentence, in Chinese and English, so that it is nobody's and as long as
is asked for; no sentence of it says what the hidden one says. A reply is right when it holds the number.

    needle:4k..32k       4,096, 8,192, 16,384 and 32,768 tokens
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
COPIES = 3
"""Keys and values of a text in memory: while it is read, once more when a buffer grows, and what is kept for other depths."""
NEEDLES = {"en": "The number of the blue locker is {}.", "zh": "蓝色储物柜的号码是 {}。"}
QUESTIONS = {
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
    text: str
    """What the user says."""
    prompt: list[int]
    number: str

    @property
    def is_deepest(self) -> bool:
        """All of the text stands before the sentence."""
        return self.id.endswith(f":{DEPTHS[-1]}")


def texts(template: ChatTemplate, length: int) -> Iterator[Hidden]:
    """Every language and depth for one length in tokens, prompt and reply within it.

    Depths of one language share a text, the deepest one first, so that what comes before the
    sentence is computed once.
    """
    for language in LANGUAGES:
        draw = random.Random(f"{language} {length}")
        sentences = [sentence(language, draw) for _ in range(64)]
        each = len(_prompt(template, "".join(sentences))) / 64
        frame = len(_prompt(template, NEEDLES[language].format(10_000) + QUESTIONS[language]))
        room = length - NEW_TOKENS - frame
        sentences += [sentence(language, draw) for _ in range(int(room / each * 1.2))]
        for depth in reversed(DEPTHS):
            number = str(draw.randint(10_000, 99_999))
            text, prompt = _hidden(template, sentences, (language, depth, number), length)
            yield Hidden(f"{language}:{length}:{depth}", length, text, prompt, number)


def _hidden(
    template: ChatTemplate, sentences: Sequence[str], what: tuple[str, int, str], length: int
) -> tuple[str, list[int]]:
    """What is asked, as text and as ids: as many of the sentences as there is room for."""
    language, depth, number = what
    kept = [*sentences]
    while True:
        place = len(kept) * depth // 100
        inside = [*kept[:place], NEEDLES[language].format(number), *kept[place:]]
        text = "".join(inside) + QUESTIONS[language]
        prompt = _prompt(template, text)
        over = len(prompt) + NEW_TOKENS - length
        if over <= 0:
            return text, prompt
        del kept[-max(1, int(over * len(kept) / len(prompt))) :]


def ask(model: Any, template: ChatTemplate, lengths: Sequence[int]) -> dict[str, TaskScore]:
    """What a model finds at every length that its context and the memory have room for."""
    found: dict[str, TaskScore] = {}
    for length in _with_room(model, lengths):
        asked = list(texts(template, length))
        replies = replies_to(model, template, asked)
        right = tuple(
            100.0 * (one.number in template.parse(reply).content)
            for one, reply in zip(asked, replies, strict=True)
        )
        said = f"share of hidden numbers found in texts of {length} tokens, depths {DEPTHS} in per cent, Chinese and English, greedy"
        found[f"{PREFIX}/{length}"] = TaskScore(said, tuple(one.id for one in asked), right)
    return found


def _with_room(model: Any, lengths: Sequence[int]) -> Iterator[int]:
    """The lengths that can be asked; before anything is computed, a warning names the others."""
    from finetune.distributed.device import free_bytes
    from finetune.generation.generate import cache_tokens, context_length

    positions, free = context_length(model) or max(lengths), free_bytes()
    most = cache_tokens(model, free) // COPIES
    for length in lengths:
        if length > positions:
            console.warn(f"needle: {length} tokens are beyond the model's {positions} positions; left out")  # fmt: skip
        elif length > most:
            console.warn(
                f"needle: keys and values of {length} tokens, held {COPIES} times, do not fit into the "
                f"{free / 1e9:.1f} GB of memory that are free, which have room for {most}; left out"
            )
    fitting = [length for length in lengths if length <= min(positions, most)]
    if not fitting:
        raise ConfigError(
            f"needle: no length fits; ask for {min(positions, most)} tokens or fewer, such as --needle 1k"
        )
    yield from fitting


def replies_to(model: Any, template: ChatTemplate, asked: Sequence[Hidden]) -> list[list[int]]:
    """The ids of every reply, one text at a time; what a text has in common with a longer one is not read again."""
    from finetune.distributed.map_batches import evaluating
    from finetune.generation.batch import SharedPrefix
    from finetune.generation.decoder import Decoder, Decoding, Request

    deepest, replies = SharedPrefix(model, []), []
    with evaluating(model):
        for one in asked:
            same = _same(deepest.ids, one.prompt)
            decoder = Decoder(model, template.stop_ids)
            [row] = decoder.add([Request(one.prompt, Decoding(NEW_TOKENS))], deepest.first(same))
            while decoder.active:
                decoder.step()
            if row.error is not None:
                raise row.error
            if one.is_deepest:
                deepest = decoder.taken(row)
            replies.append(row.ids)
    return replies


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with, short of the whole of `other`."""
    most = min(len(one), len(other) - 1)
    return next((at for at in range(most) if one[at] != other[at]), most)


def sentence(language: str, draw: random.Random) -> str:
    """A sentence of the haystack, with its end."""
    words = [draw.choice(part) for part in _PARTS[language]]
    return f"{' '.join(words)}. " if language == "en" else f"{words[0]}，{''.join(words[1:])}。"


def _prompt(template: ChatTemplate, text: str) -> list[int]:
    return list(template.prompt(Conversation((Message("user", text),), location=PREFIX), 1))
