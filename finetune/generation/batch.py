"""Replies to a list of prompts by a batch whose finished rows are refilled at once.

A row that has stopped makes room for the next prompt instead of running along until the slowest ends,
keys and values are written in place, and what all prompts begin with is computed once.

All rows end at the same column of the cache: a new prompt is put in so that its last token stands
where the others' last tokens stand. Columns a row does not use are masked; positions count a row's own
tokens, so where a row begins does not matter.

B rows, T columns, P tokens of a common beginning.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from finetune.distributed.map_batches import Poll
from finetune.distributed.processes import any_rank, is_sharded

Choose = Callable[[Tensor, Sequence[int]], list[int]]
"""Logits [B, V] and the number of the prompt in every row -> the next tokens."""
Done = tuple[tuple[int, ...], bool]
"""New tokens before the stop, and whether there was one."""
SHORTEST_BEGINNING = 16
"""A common beginning of fewer tokens is not worth a forward pass of its own."""
FIRST_PASS_TOKENS = 16384
"""Tokens, with padding, that prompts are read in at once: activations, not the cache, are large then."""
_HEADROOM = 64  # columns that a buffer grows by


class Beginning:
    """Keys and values of the tokens that all prompts begin with; none when those are few."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        self.ids = common_beginning(prompts)
        self.layers: list[tuple[Tensor, Tensor]] = []
        """Of every layer [1, heads, P, size], twice."""
        if not self.ids:
            return
        cache = _new_cache(model)
        ids = torch.tensor([self.ids], device=model.device)
        _forward(model, cache, ids, torch.ones_like(ids), torch.arange(len(self.ids), device=model.device)[None])  # fmt: skip
        self.layers = [(layer.keys, layer.values) for layer in cache.layers]

    def cache(self, model: Any, rows: int) -> Cache:
        """A cache of `rows` rows that have the beginning behind them."""
        cache = _new_cache(model)
        for layer, (keys, values) in zip(cache.layers, self.layers, strict=False):
            layer.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
        return cache


class Refill:
    """The batch: `run` takes prompts until none waits and none is unfinished."""

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        slots: int,
        choose: Choose,
        beginning: Beginning,
    ) -> None:
        self._model = model
        self._stop_ids = frozenset(stop_ids)
        self._max_new_tokens = max_new_tokens
        self._slots = slots
        self._choose = choose
        self._beginning = beginning
        self._rows: list[int] = []
        """The prompt in every row."""
        self._cache: Any = None
        self._mask: Any = None  # int64 [B, T]
        self._positions: Any = None  # int64 [B], of each row's last token
        self._replies: dict[int, list[int]] = {}
        self._done: dict[int, Done] = {}

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        should_stop: Poll | None,
    ) -> list[Done]:
        """The replies to `prompts`, in their order; fewer when `should_stop` returned True.

        Every round is one forward pass, also in a process that has nothing left while others share
        its weights.

        Args:
            prompts: token ids.
            numbers: what `choose` knows the prompts by.
            should_stop: polled at every forward pass.
        """
        waiting = deque(range(len(prompts)))
        self._numbers = numbers
        together = is_sharded(self._model)
        while True:
            busy = bool(waiting) or any(row not in self._done for row in self._rows)
            stop = should_stop is not None and should_stop()
            if together:
                busy, stop = any_rank(busy), any_rank(stop)
            if stop or not busy:
                break
            self._round(prompts, waiting)
        return [self._done[place] for place in range(len(prompts)) if place in self._done]

    def _round(self, prompts: Sequence[Sequence[int]], waiting: deque[int]) -> None:
        active = [row for row in self._rows if row not in self._done]
        free = self._slots - len(active)
        if waiting and (not active or free >= max(1, self._slots // 4)):
            chosen = self._next(prompts, waiting, free)
            self._put_in(chosen, [prompts[place] for place in chosen])
        elif active:
            if not waiting and 2 * len(active) <= len(self._rows):
                self._keep_active()
            self._go_on()
        else:  # the others have work, and need this process's part of the weights
            ids = torch.zeros(1, 1, dtype=torch.long, device=self._model.device)
            _forward(self._model, _new_cache(self._model), ids, torch.ones_like(ids), ids)

    def _next(self, prompts: Sequence[Sequence[int]], waiting: deque[int], free: int) -> list[int]:
        """Takes as many as there is room for, and as their first pass may be large."""
        chosen: list[int] = []
        widest = 0
        while waiting and len(chosen) < free:
            widest = max(widest, len(prompts[waiting[0]]) - len(self._beginning.ids))
            if chosen and (len(chosen) + 1) * widest > FIRST_PASS_TOKENS:
                break
            chosen.append(waiting.popleft())
        return chosen

    def _put_in(self, chosen: list[int], prompts: list[Sequence[int]]) -> None:
        """Computes new prompts and joins them to the rows that are not finished."""
        device, common = self._model.device, len(self._beginning.ids)
        rests = [list(prompt[common:]) for prompt in prompts]
        width = max(map(len, rests))
        ids = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests], device=device)
        lengths = torch.tensor([len(rest) for rest in rests], device=device)
        own = (torch.arange(width, device=device) >= width - lengths[:, None]).long()  # [B, width]
        mask = torch.cat([own.new_ones(len(rests), common), own], dim=1)
        positions = (own.cumsum(1) - 1).clamp(min=0) + common
        cache = self._beginning.cache(self._model, len(rests))
        logits = _forward(self._model, cache, ids, mask, positions)
        self._keep_active()
        if self._rows:
            cache = _joined(self._cache, cache)
            mask = torch.cat(_right_aligned(self._mask, mask, dim=1))
            last = torch.cat([self._positions, positions[:, -1]])
        else:
            last = positions[:, -1]
        self._cache, self._mask, self._positions = cache, mask, last
        self._rows += chosen
        self._take(chosen, logits)

    def _go_on(self) -> None:
        """One more token for every row."""
        last = [(self._replies[row] or [0])[-1] for row in self._rows]
        ids = torch.tensor(last, device=self._model.device)[:, None]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(last), 1)], dim=1)
        self._positions = self._positions + 1
        logits = _forward(self._model, self._cache, ids, self._mask, self._positions[:, None])
        self._take(self._rows, logits)

    def _take(self, rows: Sequence[int], logits: Tensor) -> None:
        """Adds the next token to every row that is not finished."""
        tokens = self._choose(logits, [self._numbers[row] for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            reply = self._replies.setdefault(row, [])
            if row in self._done:
                continue
            if token in self._stop_ids:
                self._done[row] = tuple(reply), True
                continue
            reply.append(token)
            if len(reply) == self._max_new_tokens:
                self._done[row] = tuple(reply), False

    def _keep_active(self) -> None:
        """Forgets finished rows, and the columns that only they used."""
        places = [place for place, row in enumerate(self._rows) if row not in self._done]
        if len(places) == len(self._rows):
            return
        self._rows = [self._rows[place] for place in places]
        if not places:
            self._cache = None
            return
        chosen = torch.tensor(places, device=self._model.device)
        self._mask, self._positions = self._mask[chosen], self._positions[chosen]
        unused = int(self._mask.any(dim=0).int().argmax())
        self._mask = self._mask[:, unused:]
        for layer in self._cache.layers:
            layer.hold(layer.keys[chosen, :, unused:], layer.values[chosen, :, unused:])


class _Columns(DynamicLayer):
    """Keys and values in buffers with room to the right, so that a step copies one column."""

    keys: Tensor
    values: Tensor
    _key_buffer: Tensor
    _value_buffer: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds columns; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.hold(key_states, value_states)
            return self.keys, self.values
        begin, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if end > self._key_buffer.shape[2]:
            self._make_room(end)
        self._key_buffer[:, :, begin:end] = key_states
        self._value_buffer[:, :, begin:end] = value_states
        self.keys, self.values = self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]
        return self.keys, self.values

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Takes these columns in the place of what was there."""
        self.keys, self.values = keys, values
        self._key_buffer, self._value_buffer = keys, values

    def _make_room(self, columns: int) -> None:
        missing = columns + _HEADROOM - self.keys.shape[2]

        def wider(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, 0, 0, missing))

        self._key_buffer, self._value_buffer = wider(self.keys), wider(self.values)


def common_beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The ids that all of two or more prompts begin with, short of a whole prompt; [] when they are few.

    >>> common_beginning([[1] * 20 + [2, 3], [1] * 20 + [4]]) == [1] * 20
    True
    """
    if len(prompts) < 2:
        return []
    first, last = list(min(prompts, key=list)), list(max(prompts, key=list))
    most = min(map(len, prompts)) - 1
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most)
    same = min(same, most)
    return [int(token) for token in first[:same]] if same >= SHORTEST_BEGINNING else []


def _forward(model: Any, cache: Cache, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Logits [B, V] behind the last of `ids`."""
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = output.logits[:, -1].float()
    return logits


def _new_cache(model: Any) -> Cache:
    config = model.config.get_text_config()
    return Cache(layers=[_Columns() for _ in range(config.num_hidden_layers)])


def _joined(cache: Any, other: Any) -> Any:
    """The rows of both, ending at the same column."""
    for layer, more in zip(cache.layers, other.layers, strict=True):
        keys = torch.cat(_right_aligned(layer.keys, more.keys, dim=2))
        values = torch.cat(_right_aligned(layer.values, more.values, dim=2))
        layer.hold(keys, values)
    return cache


def _right_aligned(one: Tensor, other: Tensor, *, dim: int) -> list[Tensor]:
    """Both with as many columns, zeros on the left of the narrower."""
    width = max(one.shape[dim], other.shape[dim])

    def padded(tensor: Tensor) -> Tensor:
        missing = width - tensor.shape[dim]
        if not missing:
            return tensor
        shape = [*tensor.shape]
        shape[dim] = missing
        return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)

    return [padded(one), padded(other)]
