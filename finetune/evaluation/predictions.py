"""What a model replied beside what it should have replied; lines of JSONL before and after scoring."""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from finetune.data.dialogue.conversation import Message
from finetune.storage.files import json_line, whole_file

if TYPE_CHECKING:
    from finetune.generation.prompts import ReplyPrompt

Scores: TypeAlias = dict[str, float | None]
"""Name -> value; None where the question does not arise (tool-call validity without tools)."""
SLICES = ("source", "category", "turns", "prompt_length", "kind", "language")
"""Parts of the data by which scores are looked at."""
_LETTERS = 400
"""Characters of a text that tell its language."""
_SCRIPTS = {
    "HANGUL": "korean", "THAI": "thai", "LAO": "lao", "KHMER": "khmer", "MYANMAR": "burmese", "GREEK": "greek",
    "HEBREW": "hebrew", "BENGALI": "bengali", "TAMIL": "tamil", "GEORGIAN": "georgian", "ARMENIAN": "armenian",
    "LATIN": "latin script", "CYRILLIC": "cyrillic script", "ARABIC": "arabic script", "DEVANAGARI": "devanagari script",
}  # fmt: skip
_KANA = ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")
_LENGTHS = (64, 256, 1024, 4096)
_MOST_TURNS = 4


@dataclass(frozen=True, slots=True)
class Prediction:
    """One reply beside its reference, and what it scores."""

    reply: Message
    reference: Message
    stopped: bool | None = None
    """A stop token ended the reply; otherwise it was cut at `max_new_tokens`. None: not known."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """The tools that the dialogue offers."""
    location: str = ""
    """`file:line` of the dialogue."""
    message: int = 0
    """Which message of the dialogue is the reference."""
    prompt: str = ""
    """The prompt as text, control tokens spelled out."""
    slices: dict[str, str] = field(default_factory=dict)
    """Which parts of the data it belongs to."""
    images: tuple[str, ...] = ()
    """Paths of the images that the prompt shows."""
    scores: Scores = field(default_factory=dict)
    counts: dict[str, list[float]] = field(default_factory=dict)
    """What is summed over replies for the scores that are no means."""

    @property
    def unscored_row(self) -> dict[str, Any]:
        """The line under which it is kept until it is scored; `read_unscored` takes it back."""
        return {
            "where": self.location,
            "message": self.message,
            "prompt": self.prompt,
            "reply": [self.reply.metadata, self.reply.content],
            "reference": [self.reference.metadata, self.reference.content],
            "stopped": self.stopped,
            "tools": list(self.tools),
            "slices": self.slices,
            "images": list(self.images),
        }

    @property
    def row(self) -> dict[str, Any]:
        """The line of a file of predictions: texts as they are compared, and scores."""
        row = {
            "where": self.location,
            "message": self.message,
            "prompt": self.prompt,
            "reference": text(self.reference),
            "prediction": text(self.reply),
            "stopped": self.stopped,
            "scores": self.scores,
            "counts": self.counts,
            "slices": self.slices,
        }
        return row | {"images": self.images} if self.images else row


def text(message: Message) -> str:
    """What is compared: a reply's text, or a call's name, a line break and its arguments."""
    metadata, content = message.metadata.strip(), message.content.strip()
    return f"{metadata}\n{content}" if metadata else content


def read_unscored(row: Mapping[str, Any]) -> Prediction:
    """The prediction of an `unscored_row`."""
    reply, reference = (
        Message("assistant", content, metadata)
        for metadata, content in (row["reply"], row["reference"])
    )
    return Prediction(
        reply=reply,
        reference=reference,
        stopped=row["stopped"],
        tools=tuple(row["tools"]),
        location=row["where"],
        message=row["message"],
        prompt=row["prompt"],
        slices=row["slices"],
        images=tuple(row["images"]),
    )


def predicted(prompt: ReplyPrompt, ids: tuple[int, ...], stopped: bool) -> Prediction:
    """The prediction that a model's new tokens are."""
    return Prediction(
        reply=prompt.template.parse(ids, prompt.tools),
        reference=prompt.reference,
        stopped=stopped,
        tools=tuple(prompt.tools),
        location=prompt.location,
        message=prompt.index,
        prompt=prompt.text,
        slices=slices_of(prompt),
        images=prompt.images,
    )


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Writes `predictions` as JSONL; the file appears when its last line is on the disk."""
    with whole_file(path) as file:
        for prediction in predictions:
            file.write(json_line(prediction.row))


def slices_of(prompt: ReplyPrompt) -> dict[str, str]:
    """The value of every slice for one reply."""
    return {
        "source": prompt.location.rpartition(":")[0],
        "category": prompt.conversation.category,
        "turns": f"{_MOST_TURNS} or more" if prompt.turns >= _MOST_TURNS else str(prompt.turns),
        "prompt_length": _length(len(prompt.prompt_ids)),
        "kind": "tool" if prompt.tools or prompt.reference.metadata else "plain",
        "language": language(text(prompt.reference)),
    }


def language(line: str) -> str:
    """The language of a text, or its script where languages share one; a guess by its letters.

    >>> language("你好，GLM"), language("Привет"), language("今日は"), language("hi"), language("17")
    ('chinese', 'cyrillic script', 'japanese', 'latin script', 'other')
    """
    letters = filter(str.isalpha, line[:_LETTERS])
    scripts = Counter(unicodedata.name(one, "").partition(" ")[0] for one in letters)
    kana = sum(scripts[name] for name in _KANA)
    counts = Counter[str]()
    for name, number in scripts.items():
        if name not in (*_KANA, "CJK"):
            counts[_SCRIPTS.get(name, "other")] += number
    # A Chinese character says as much as two Latin letters or more.
    counts["chinese"] = 0 if kana else 3 * scripts["CJK"]
    counts["japanese"] = kana + scripts["CJK"] if kana else 0
    [(name, number)] = counts.most_common(1)
    return name if number else "other"


def _length(tokens: int) -> str:
    """A range of tokens.

    >>> _length(64), _length(65), _length(5000)
    ('1-64 tokens', '65-256 tokens', 'over 4096 tokens')
    """
    number = bisect_left(_LENGTHS, tokens)
    if number == len(_LENGTHS):
        return f"over {_LENGTHS[-1]} tokens"
    return f"{_LENGTHS[number - 1] + 1 if number else 1}-{_LENGTHS[number]} tokens"
