"""What was computed of earlier requests, for those that begin alike: the next turn of a dialogue.

A dialogue comes back with one more question, and agents send the same system text and tools each time.
Of the tokens that a prompt has in common with one that is remembered nothing is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune.data.chat.image import ImagePrompt
from finetune.generation.batch import SHORTEST_PREFIX, SharedPrefix

MOST_TOKENS = 16_384
"""Of all that is remembered of one model; 0.7 GB of a 9B model in bfloat16."""


class KeptPrompts:
    """The last replies' keys and values with those of their prompts; the oldest go first."""

    def __init__(self, most_tokens: int = MOST_TOKENS, *, virtual: int = 0) -> None:
        """`virtual` first tokens of every prompt are no tokens of it, but a trained prefix."""
        self.used_tokens = 0
        """Tokens of prompts that needed no computing."""
        self._most = most_tokens
        self._virtual = virtual
        self._kept: list[SharedPrefix] = []

    def keep(self, found: SharedPrefix) -> None:
        """Remembers it in the place of what it goes on with."""
        if len(found.ids) > self._most:
            return
        self._kept = [one for one in self._kept if found.ids[: len(one.ids)] != one.ids]
        self._kept.append(found)
        while sum(len(one.ids) for one in self._kept) > self._most:
            del self._kept[0]

    def beginning_of(self, prompt: Sequence[int]) -> SharedPrefix | None:
        """What is remembered of the most tokens that a prompt begins with, short of all of it."""
        if isinstance(prompt, ImagePrompt) or not self._kept:
            return None  # images look alike in ids
        best = max(self._kept, key=lambda one: _common(one.ids, prompt))
        common = min(_common(best.ids, prompt), len(prompt) - 1)
        if common - self._virtual < SHORTEST_PREFIX:
            return None
        self._kept.remove(best)
        self._kept.append(best)
        self.used_tokens += common - self._virtual
        return best.first(common)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens are the same."""
    if one[: len(other)] == other[: len(one)]:
        return min(len(one), len(other))
    return next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
