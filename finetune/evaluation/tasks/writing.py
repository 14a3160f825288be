"""Texts of an asked length -> how near a model comes to it, and how much of what it writes is new.

    writing:500..4000     500, 1,000, 2,000 and 4,000 words; of Chinese, characters

The score of a length is LongBench-Write's (Bai et al. 2024): 100 when as much is written as is asked for,
0 from four times as much or a third of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from finetune import console
from finetune.data.dialogue.conversation import Conversation, Message
from finetune.evaluation.scores.pairs import repetition_rate
from finetune.evaluation.scores.texts import is_chinese, script_words
from finetune.evaluation.tasks.table import TaskScore

if TYPE_CHECKING:
    from finetune.data.chat.template import ChatTemplate

PREFIX = "writing"
TOKENS_A_WORD = 3
"""Tokens that a reply may have for each word that is asked for: twice what a long text takes."""
_ASKED = {
    "en": "Write an essay of {} words about {}. Write all of it, in one reply.",
    "zh": "写一篇{}字的文章，主题是{}。请在一次回答里写完。",
}
_TOPICS = {
    "en": ("the history of a small harbour town", "how a city could live without cars", "a teacher who changes a village", "what a forest is worth"),
    "zh": ("一座港口小镇的历史", "没有汽车的城市怎样生活", "一位改变了村庄的老师", "一片森林的价值"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wanted:
    """One text that is asked for."""

    id: str
    """`en:1000:0`: language, words, number of the topic."""
    words: int
    message: str


def wanted(words: int) -> Iterator[Wanted]:
    """Every topic of both languages."""
    for language, number in product(_ASKED, range(len(_TOPICS["en"]))):
        message = _ASKED[language].format(words, _TOPICS[language][number])
        yield Wanted(f"{language}:{words}:{number}", words, message)


def length_score(asked: int, written: int) -> float:
    """100 for a text of the asked length, less the longer or shorter it is."""
    if not written:
        return 0.0
    over = (written / asked - 1) / 3 if written > asked else (asked / written - 1) / 2
    return 100.0 * max(0.0, 1 - over)


def length_of(text: str) -> int:
    """Characters of Chinese, words of everything else; signs are not counted."""
    words = (word for word in script_words(text) if any(map(str.isalnum, word)))
    return sum(len(word) if is_chinese(word) else 1 for word in words)


def ask(
    model: Any, template: ChatTemplate, lengths: Sequence[int], batch_size: int
) -> dict[str, TaskScore]:
    """What a model writes where it is asked for so many words, greedy."""
    from finetune.generation.generate import context_length, generate

    found: dict[str, TaskScore] = {}
    for words in lengths:
        asked = list(wanted(words))
        prompts = template.prompts([(Conversation((Message("user", one.message),), location=PREFIX), 1) for one in asked])  # fmt: skip
        room = (context_length(model) or 1 << 20) - max(map(len, prompts))
        if room < TOKENS_A_WORD * words:
            console.warn(f"{PREFIX}: {words} words do not fit into the model's context; left out")
            continue
        replies = generate(
            model, template, prompts, max_new_tokens=TOKENS_A_WORD * words, batch_size=batch_size
        )
        texts = [template.parse(reply.ids).content for reply in replies]
        ids = tuple(one.id for one in asked)
        near = tuple(length_score(words, length_of(text)) for text in texts)
        new = tuple(100 - (repetition_rate(script_words(text)) or 0.0) for text in texts)
        said = f"texts of {words} words (Chinese: characters), both languages, greedy: "
        found[f"{PREFIX}/{words}"] = TaskScore(f"{said}nearness of the length, as in LongBench-Write", ids, near)  # fmt: skip
        found[f"{PREFIX}/{words}:new"] = TaskScore(f"{said}100 - repetition_rate", ids, new)
    return found
