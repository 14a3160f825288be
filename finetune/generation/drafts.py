"""Tokens that may come next because they stood in the prompt or the reply before (n-gram drafts).

A reply that quotes its prompt is written several tokens a pass: what followed the last tokens where they stood
before goes through the model behind them, and what the model would have chosen itself is kept, up to the first
token that is not the drafted one:

    prompt   ... the red house by the lake ...
    reply    It is the red       draft: house by the       chosen: house by a       three tokens, one pass

No token becomes another one. The pass gives every position what a step would give it, bit for bit: packed
products do not depend on how many rows there are, attention and small products are made row by row
(`products.one_by_one`). That is not believed but looked at, once for every model and length of a draft; where
a bit differs, nothing is drafted. So it goes with sampled and restricted replies, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from finetune.generation.batch import Batch, Prompt, takes_documents
from finetune.models.kernels.products import is_packed

SHORT, LONG = 3, 7
"""Tokens of a draft: a pass over 4 or 8."""
FOLLOWED = 3
"""Tokens that must have stood together before."""
LONGEST_PAUSE = 64
"""Steps without a draft, where none was right for long."""
MOVING = ("dynamic", "longrope")
"""Rotations that depend on how far a pass reaches."""

_exact: WeakKeyDictionary[Any, dict[tuple[str, int, int], bool]] = WeakKeyDictionary()
"""What `_is_exact` has found of a model, by adapter, threads and tokens."""


class Drafts:
    """What may follow in one reply; fewer and shorter drafts while they are wrong."""

    def __init__(self, prompt: Prompt, ids: Sequence[int], longest: int, adapter: str = "") -> None:
        self._prompt, self._ids, self._longest, self._adapter = prompt, ids, longest, adapter
        self._text: list[int] = []
        """Prompt and reply, as far as they have been read."""
        self._behind: dict[tuple[int, ...], int] = {}
        """Where the text went on behind some tokens when they came last."""
        self._length, self._pause, self._left = SHORT, 0, 0

    def next(self, model: Any, batch: Batch) -> list[int]:
        """3 or 7 tokens that may come next, where checking them at once pays and is exact; else none."""
        if not _can_be_checked(model):
            return []
        draft = self._found()
        tokens = [(self._ids or [0])[-1], *draft]
        return draft if draft and _is_exact(model, self._adapter, batch, tokens) else []

    def _found(self) -> list[int]:
        self._read()
        most = self._longest - len(self._ids) - 1
        length = self._length if self._length <= most else SHORT
        place = self._behind.get(tuple(self._text[-FOLLOWED:]))
        if place is None or length > most:
            return []
        if self._left:
            self._left -= 1
            return []
        # Where the text ends before, what has begun to repeat itself goes on.
        period = len(self._text) - place
        return [self._text[place + at % period] for at in range(length)]

    def judge(self, right: int) -> None:
        """Takes note of how many tokens of the last draft were right."""
        if right:
            self._length, self._pause = (LONG if right >= SHORT else SHORT), 0
        else:
            self._length, self._pause = SHORT, min(LONGEST_PAUSE, 2 * self._pause + 1)
        self._left = self._pause

    def _read(self) -> None:
        """Up to the newest token."""
        read = max(0, len(self._text) - len(self._prompt))
        for token in self._ids[read:] if self._text else [*self._prompt, *self._ids]:
            if len(self._text) >= FOLLOWED:
                self._behind[tuple(self._text[-FOLLOWED:])] = len(self._text)
            self._text.append(int(token))


def _can_be_checked(model: Any) -> bool:
    """Whether a pass over several tokens may be as exact as steps, and costs less."""
    config = model.config.get_text_config()
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    head = model.get_output_embeddings()
    return (
        head is not None
        and is_packed(head.weight)
        and takes_documents(model)
        and rotation not in MOVING
    )


def _is_exact(model: Any, adapter: str, batch: Batch, tokens: Sequence[int]) -> bool:
    """Whether a pass over so many tokens gives, bit for bit, what as many steps give.

    Logits, keys and values are compared behind the only row of `batch`, which stays as it is.
    """
    known = _exact.setdefault(model, {})
    kind = adapter, torch.get_num_threads(), len(tokens)
    if kind not in known:
        found = [batch.check(tokens), *batch.newest(len(tokens))]
        batch.forget(len(tokens))
        expected = [
            torch.cat([batch.step([token]) for token in tokens]),
            *batch.newest(len(tokens)),
        ]
        batch.forget(len(tokens))
        known[kind] = all(map(torch.equal, found, expected))
    return known[kind]
