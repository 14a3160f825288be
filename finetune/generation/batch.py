"""The tensors of replies that are being written: keys, values, mask and positions of every row.

All rows end at the same column of the cache, so that one forward pass gives each its next token. A new
prompt is put in so that its last token stands where the others' last tokens stand; columns that a row
does not use are masked; positions count a row's own tokens, so where a row begins does not matter:

    mask of a batch whose row 0 has written 3 tokens       1 1 1 1 1 1 1 | 1 1 1
    and row 1, a prompt of 4 tokens, has just come in      0 0 0 0 0 0 1 | 1 1 1
    their positions                                   row 0: 0 1 2 ... 9, row 1: 0 1 2 3 in the last four

B rows, T columns, P tokens of a shared prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from finetune.data.chat.image import ImagePrompt
from finetune.models.cache_columns import CacheColumns
from finetune.models.kernels.products import one_by_one
from finetune.models.packed_attention import whole_rows

Prompt: TypeAlias = "Sequence[int] | npt.NDArray[np.int32]"

SHORTEST_PREFIX = 16
"""A shared prefix of fewer tokens is not worth a forward pass of its own."""
FIRST_PASS_TOKENS = 4096
"""Tokens, with padding, that prompts are read in at once: activations, not the cache, are large then."""


class SharedPrefix:
    """Keys and values of the tokens that all prompts begin with; none when those are few."""

    def __init__(self, model: Any, prompts: Sequence[Prompt]) -> None:
        self.ids: list[int] = []
        self.layers: list[tuple[Tensor, Tensor]] = []
        """Of every layer [1, heads, P, size], twice."""
        if ids := shared_prefix(prompts):
            made = self.more(model, ids)
            self.ids, self.layers = made.ids, made.layers

    @classmethod
    def kept(cls, ids: Sequence[int], layers: Sequence[tuple[Tensor, Tensor]]) -> SharedPrefix:
        """Keys and values that were computed for `ids` before."""
        prefix = cls(None, [])
        prefix.ids, prefix.layers = list(ids), list(layers)
        return prefix

    def first(self, tokens: int) -> SharedPrefix:
        """Those of so many first tokens."""
        layers = [(keys[:, :, :tokens], values[:, :, :tokens]) for keys, values in self.layers]
        return SharedPrefix.kept(self.ids[:tokens], layers)

    def more(self, model: Any, ids: Sequence[int]) -> SharedPrefix:
        """Those of the same tokens with `ids` behind them, which are computed."""
        cache, begin = self.cache(model, 1), len(self.ids)
        positions = torch.arange(begin, begin + len(ids), device=model.device)[None]
        _read(model, cache, torch.tensor([ids], device=model.device), positions)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        return SharedPrefix.kept([*self.ids, *ids], layers)

    def cache(self, model: Any, rows: int) -> Cache:
        """A cache of `rows` rows that have the prefix behind them."""
        cache = _new_cache(model)
        for layer, (keys, values) in zip(cache.layers, self.layers, strict=False):
            layer.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
        return cache


class Batch:
    """Rows that are written together; `prefill` adds some, `step` computes a token, `keep` drops some."""

    def __init__(self, model: Any, prefix: SharedPrefix) -> None:
        self.is_lost = False
        """An error came while rows were joined: none of them can go on."""
        self._model = model
        self._prefix = prefix
        self._cache: Any = None
        self._mask: Any = None  # int64 [B, T]
        self._positions: Any = None  # int64 [B], of each row's last token

    def __len__(self) -> int:
        return 0 if self._cache is None else int(self._mask.shape[0])

    def prefill(self, prompts: Sequence[Prompt], prefix: SharedPrefix | None = None) -> Tensor:
        """Adds rows behind those that are there; returns the logits [new rows, V] of their next token.

        `prefix` takes the place of what the prompts of the whole batch begin with.
        """
        prefix = prefix if prefix is not None else self._prefix
        device, common = self._model.device, len(prefix.ids)
        rests = [list(prompt[common:]) for prompt in prompts]
        width = max(map(len, rests))
        lengths = torch.tensor([len(rest) for rest in rests], device=device)
        own = (torch.arange(width, device=device) >= width - lengths[:, None]).long()  # [B, width]
        mask = torch.cat([own.new_ones(len(rests), common), own], dim=1)
        images = image_inputs(prompts, device)
        cache = prefix.cache(self._model, len(rests) if images else len({*beginnings(rests)}))
        if images:
            ids = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests], device=device)
            positions = _image_positions(self._model, ids, mask, images)
            even = min(map(len, rests)) == width
            logits = _forward(self._model, cache, ids, None if even else mask, positions, images)
            last = positions[..., -1]  # [B], of GLM-4.1V [3, B]: text counts on from the greatest
            last = last if last.dim() == 1 else last.amax(0)
        else:
            last = common + lengths - 1
            logits = self._read_wholes(cache, common, rests)
            if min(map(len, rests)) < width:
                _move_right(cache, common, lengths)
        self.is_lost = True  # until all layers are joined
        if len(self):
            cache = _joined(self._cache, cache)
            mask = torch.cat(_right_aligned(self._mask, mask, dim=1))
            last = torch.cat([self._positions, last])
        self._cache, self._mask, self._positions = cache, mask, last
        self.is_lost = False
        return logits

    def _read_wholes(self, cache: Any, common: int, rests: Sequence[list[int]]) -> Tensor:
        """Reads prompts that begin no other one; returns the logits [B, V] of all, and `cache` has rows for all.

        Padded on the right, where causal attention needs no mask.
        """
        device, holders = self._model.device, beginnings(rests)
        wholes = sorted({*holders})
        width = max(len(rests[whole]) for whole in wholes)
        ids = torch.tensor([rests[whole] + [0] * (width - len(rests[whole])) for whole in wholes], device=device)  # fmt: skip
        positions = torch.arange(common, common + width, device=device).expand_as(ids)
        ends = [[len(rest) - 1 for rest, own in zip(rests, holders, strict=True) if own == whole] for whole in wholes]  # fmt: skip
        most = max(map(len, ends))
        last = torch.tensor([[*own, *[0] * (most - len(own))] for own in ends], device=device)
        logits = _read(self._model, cache, ids, positions, last=last)  # [wholes x most, V]
        if len(wholes) == len(rests):
            return logits
        owners = [wholes.index(whole) for whole in holders]
        seen = [owners[:row].count(owner) for row, owner in enumerate(owners)]
        rows = torch.tensor(owners, device=device)
        for layer in cache.layers:
            here = rows.to(layer.keys.device)
            layer.hold(layer.keys[here], layer.values[here])
        return logits[rows * most + torch.tensor(seen, device=device)]

    def num_at_once(self, prompts: Sequence[Prompt]) -> int:
        """How many of the first of `prompts` one `prefill` may read; at least one."""
        widest = 0
        for number, prompt in enumerate(prompts):
            widest = max(widest, len(prompt) - len(self._prefix.ids))
            if number and (number + 1) * widest > FIRST_PASS_TOKENS:
                return number
        return len(prompts)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Adds a token to every row; returns the logits [B, V] of the next one."""
        ids = torch.tensor(tokens, device=self._model.device)[:, None]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self._positions = self._positions + 1
        mask = self._mask
        if takes_documents(self._model):  # what transformers would make of it at every step
            mask = mask.bool()[:, None, None]
        return _forward(self._model, self._cache, ids, mask, self._positions[:, None])

    def check(self, tokens: Sequence[int]) -> Tensor:
        """Adds several tokens to the only row; returns the logits [tokens, V] behind each, as steps would."""
        ids = torch.tensor([tokens], device=self._model.device)
        places = torch.arange(len(tokens), device=self._model.device)
        self._mask = torch.cat([self._mask, self._mask.new_ones(1, len(tokens))], dim=1)
        positions = self._positions[:, None] + 1 + places
        self._positions = positions[:, -1]
        mask = self._mask.bool()[:, None, None]
        with one_by_one():
            return _forward(self._model, self._cache, ids, mask, positions, last=places[None])

    def forget(self, tokens: int) -> None:
        """Takes the last tokens off again."""
        if tokens:
            self._mask, self._positions = self._mask[:, :-tokens], self._positions - tokens
            for layer in self._cache.layers:
                layer.crop(-tokens)

    def newest(self, tokens: int) -> list[Tensor]:
        """Keys and values of the last tokens, copied."""
        held = (part for layer in self._cache.layers for part in (layer.keys, layer.values))
        return [part[:, :, -tokens:].clone() for part in held]

    def keep(self, rows: Sequence[int]) -> None:
        """Forgets all other rows, and the columns that only they used."""
        if not rows:
            self._cache = None
            return
        chosen = torch.tensor(rows, device=self._model.device)
        self._mask, self._positions = self._mask[chosen], self._positions[chosen]
        unused = int(self._mask.any(dim=0).int().argmax())
        self._mask = self._mask[:, unused:]
        for layer in self._cache.layers:
            here = chosen.to(layer.keys.device)  # layers may lie on several accelerators
            layer.hold(layer.keys[here, :, unused:], layer.values[here, :, unused:])

    def taken(self, row: int, ids: Sequence[int]) -> SharedPrefix:
        """The keys and values of a row, of whose tokens `ids` are the first; copied."""
        own = self._mask[row].bool()
        tokens = min(len(ids), int(own.sum()))
        layers = [
            (layer.keys[row : row + 1, :, own][:, :, :tokens].clone(),
             layer.values[row : row + 1, :, own][:, :, :tokens].clone())
            for layer in self._cache.layers
        ]  # fmt: skip
        return SharedPrefix.kept(ids[:tokens], layers)

    def attend_prefill(self) -> None:
        """A forward pass like that of `prefill` for processes that share their weights with this one."""
        ids = torch.zeros(1, 2, dtype=torch.long, device=self._model.device)
        common = len(self._prefix.ids)
        positions = torch.arange(common, common + 2, device=self._model.device)[None]
        _forward(self._model, self._prefix.cache(self._model, 1), ids, None, positions)

    def attend_step(self) -> None:
        """The same like that of `step`: one token behind a cache that is not empty."""
        cache = _new_cache(self._model)
        blank = [
            torch.zeros(1, heads, 1, size, dtype=self._model.dtype, device=self._model.device)
            for heads, size in cached_sizes(self._model.config.get_text_config())
        ]
        for layer in cache.layers:
            layer.update(*blank)
        ids = torch.zeros(1, 1, dtype=torch.long, device=self._model.device)
        _forward(self._model, cache, ids, torch.ones_like(ids).expand(1, 2), ids + 1)


def shared_prefix(prompts: Sequence[Prompt]) -> list[int]:
    """The ids that all of two or more prompts begin with, short of a whole prompt; [] when they are few.

    >>> shared_prefix([[1] * 20 + [2, 3], [1] * 20 + [4]]) == [1] * 20
    True
    """
    if len(prompts) < 2 or any(isinstance(prompt, ImagePrompt) for prompt in prompts):
        return []  # images look alike in ids
    first, last = list(min(prompts, key=list)), list(max(prompts, key=list))
    most = min(map(len, prompts)) - 1
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most)
    same = min(same, most)
    return [int(token) for token in first[:same]] if same >= SHORTEST_PREFIX else []


def beginnings(prompts: Sequence[Prompt]) -> list[int]:
    """For every prompt the place of one that begins with it and begins no other: its own, mostly.

    What a dialogue's second reply is asked with begins with what the first was asked with.

    >>> beginnings([[1], [1, 2], [3], [1, 2, 9]])
    [3, 3, 2, 3]
    """
    if any(isinstance(prompt, ImagePrompt) for prompt in prompts):
        return [*range(len(prompts))]  # images look alike in ids
    keys = [np.asarray(prompt, dtype=">i4").tobytes() for prompt in prompts]
    order = sorted(range(len(prompts)), key=keys.__getitem__)
    found = [*range(len(prompts))]
    for place in range(len(order) - 2, -1, -1):
        if keys[order[place + 1]].startswith(keys[order[place]]):
            found[order[place]] = found[order[place + 1]]
    return found


def cached_sizes(config: Any) -> list[tuple[int, int]]:
    """Heads, and the numbers of each, of a token's keys and of its values in the cache of a layer."""
    if latent := getattr(config, "kv_lora_rank", None):  # MLA keeps what both are made from
        return [(1, latent), (1, config.qk_rope_head_dim)]
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [(config.num_key_value_heads, int(size))] * 2


def image_inputs(prompts: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
    """`pixel_values` and the like of the prompts that show images; nothing when none does."""
    shown = [prompt for prompt in prompts if isinstance(prompt, ImagePrompt)]
    if not shown:
        return {}
    paths = [(path, "a prompt") for prompt in shown for path in prompt.paths]
    arrays = shown[0].spec.arrays(paths)
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def _image_positions(model: Any, ids: Tensor, mask: Tensor, images: dict[str, Tensor]) -> Tensor:
    """Positions of prompts among which some show an image: the patches' are the model's own affair.

    [B, T], of GLM-4.1V [3, B, T] (time, height, width).
    """
    given = {"input_ids": ids, "attention_mask": mask, **images}
    positions: Tensor = model._prepare_position_ids_for_generation(ids, given)
    return positions if positions.dim() == 2 else positions[-3:]


def _move_right(cache: Any, common: int, lengths: Tensor) -> None:
    """Let every row of a cache end at its last column; the first `common` columns stay."""
    for layer in cache.layers:
        width = layer.keys.shape[2] - common
        columns = (
            torch.arange(width, device=lengths.device) - width + lengths[:, None]
        )  # [B, width]
        source = (columns.clamp(min=0) + common)[:, None, :, None]

        def moved(held: Tensor, source: Tensor = source) -> Tensor:
            own = held.gather(2, source.expand(-1, held.shape[1], -1, held.shape[3]))
            return torch.cat([held[:, :, :common], own], dim=2) if common else own

        layer.hold(moved(layer.keys), moved(layer.values))


def _forward(
    model: Any,
    cache: Cache,
    ids: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    images: dict[str, Tensor] | None = None,
    last: Tensor | None = None,
) -> Tensor:
    """Logits [B, V] behind the last of `ids`, or behind each row's own, `last` [B, K], as [B x K, V].

    Without a mask attention is causal, and no mask of the new tokens times all is made.
    """
    known: dict[str, Any] = {}
    if mask is None and takes_documents(model):
        known["documents"] = whole_rows(ids.device)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1 if last is None else last,
        **known,
        **(images or {}),
    )
    logits: Tensor = output.logits[:, -1] if last is None else output.logits.flatten(0, 1)
    return logits.float()


def takes_documents(model: Any) -> bool:
    """Whether its attention is ours, or one that stands before ours."""
    return str(model.config.get_text_config()._attn_implementation).startswith("document")


def _read(
    model: Any, cache: Cache, ids: Tensor, positions: Tensor, last: Tensor | None = None
) -> Tensor:
    """Logits as of `_forward` without a mask; one long prompt goes through it in pieces."""
    width = ids.shape[1]
    if len(ids) > 1 or width <= FIRST_PASS_TOKENS:
        return _forward(model, cache, ids, None, positions, last=last)
    for first in range(0, width, FIRST_PASS_TOKENS):
        part = slice(first, first + FIRST_PASS_TOKENS)
        logits = _forward(model, cache, ids[:, part], None, positions[:, part])
    return logits


def _new_cache(model: Any) -> Cache:
    config = model.config.get_text_config()
    return Cache(layers=[CacheColumns() for _ in range(config.num_hidden_layers)])


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
