"""Which part of the data a reply belongs to, so that a score can be looked at part by part."""

from __future__ import annotations

from bisect import bisect_left

from finetune.evaluation.corpus import is_chinese
from finetune.evaluation.metrics import text
from finetune.generation.prompts import ReplyPrompt

SLICES = ("source", "turns", "prompt_length", "kind", "language")
_LENGTHS = (64, 256, 1024, 4096)
_MOST_TURNS = 4


def slices_of(prompt: ReplyPrompt) -> dict[str, str]:
    """The value of every slice for one reply."""
    return {
        "source": prompt.where.rpartition(":")[0],
        "turns": f"{_MOST_TURNS} or more" if prompt.turns >= _MOST_TURNS else str(prompt.turns),
        "prompt_length": _length(len(prompt.prompt_ids)),
        "kind": "tool" if prompt.tools or prompt.reference.metadata else "plain",
        "language": language(text(prompt.reference)),
    }


def language(line: str) -> str:
    """`chinese` or `other`."""
    return "chinese" if is_chinese(line) else "other"


def _length(tokens: int) -> str:
    """A range of tokens.

    >>> _length(64), _length(65), _length(5000)
    ('1-64 tokens', '65-256 tokens', 'over 4096 tokens')
    """
    place = bisect_left(_LENGTHS, tokens)
    if place == len(_LENGTHS):
        return f"over {_LENGTHS[-1]} tokens"
    return f"{_LENGTHS[place - 1] + 1 if place else 1}-{_LENGTHS[place]} tokens"
