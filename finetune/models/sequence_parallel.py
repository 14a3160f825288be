"""Sequence parallelism (DeepSpeed-Ulysses, arXiv:2309.14509): processes that share the tokens of a row.

    everywhere else     each of N processes has T / N tokens of every row, with all heads
    in the attention    each has all T tokens, with 1 / N of the heads

One exchange of all with all goes before the attention and one behind it. Nothing else of a layer looks
at other tokens, so nothing else changes. GLM-4 has 32 heads of queries and 2 (4 in GLM-4-9B-Chat-1M) of
keys and values: where N is more, a head of keys and values goes to several processes.

Legend: B rows, T tokens, H heads, G key/value heads, C channels of a head, N parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from finetune.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Split:
    """Which part of every row this process has, and how it exchanges with those that have the others."""

    parts: int
    part: int
    exchange: Callable[[Tensor], Tensor]
    """[N, ...]: piece j goes to part j, and what comes from part j takes its place."""

    def own(self, rows: Tensor) -> Tensor:
        """Return [B, T/N], this part of rows [B, T]; N divides T."""
        return torch.unflatten(rows, 1, (self.parts, -1))[:, self.part]

    def own_and_next(self, rows: Tensor, filler: float) -> Tensor:
        """Return [B, T/N + 1], with the first of the next part, behind the last one `filler`."""
        width = rows.shape[1] // self.parts
        return F.pad(rows, (0, 1), value=filler).narrow(1, self.part * width, width + 1)

    def by_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return query [B, H/N, T, C], key and value of all tokens from those of T/N tokens."""
        spread = [query]
        for states in (key, value):
            copies = max(1, self.parts // states.shape[1])
            spread.append(states.repeat_interleave(copies, dim=1) if copies > 1 else states)
        pieces = [
            torch.unflatten(states, 1, (self.parts, -1)) for states in spread
        ]  # [B, N, h, T/N, C]
        sent = torch.cat(pieces, dim=2).transpose(0, 1)
        whole = _exchanged(sent, self).permute(1, 2, 0, 3, 4).flatten(2, 3)  # [B, h + 2 g, T, C]
        return torch.split(whole, [piece.shape[2] for piece in pieces], dim=1)

    def by_tokens(self, attended: Tensor) -> Tensor:
        """Return [B, T/N, H, C] from what the attention made of all tokens [B, T, H/N, C]."""
        sent = torch.unflatten(attended, 1, (self.parts, -1)).transpose(0, 1)  # [N, B, T/N, H/N, C]
        return _exchanged(sent, self).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def own_groups(self, states: Tensor) -> Tensor:
        """Return [2, g, S, C] of keys and values [2, G, S, C]: those of the heads that are here."""
        groups = states.shape[1]
        if groups >= self.parts:
            return torch.unflatten(states, 1, (self.parts, -1))[:, self.part]
        own = self.part * groups // self.parts
        return states[:, own : own + 1]


class _Exchange(torch.autograd.Function):
    """Its own transpose: a gradient goes back the way its piece has come."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return split.exchange(sent.contiguous())

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        """The same exchange."""
        return ctx.split.exchange(outer[0].contiguous()), None


def _exchanged(sent: Tensor, split: Split) -> Tensor:
    got: Tensor = _Exchange.apply(sent, split)  # type: ignore[no-untyped-call]
    return got


def _all_to_all(sent: Tensor, group: Any) -> Tensor:
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    return got


def split_of_this_process(parts: int) -> Split | None:
    """Neighbours in rank share their rows; every process calls this at the same point. None for 1 part."""
    if parts == 1:
        return None
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group(range(first, first + parts)) for first in range(0, world, parts)]
    return Split(parts, rank % parts, partial(_all_to_all, group=groups[rank // parts]))


def check_heads(parts: int, heads: int, groups: int) -> None:
    """Raises ConfigError where heads cannot be shared out over so many processes."""

    def fits(number: int) -> bool:
        return heads % number == 0 and (groups % number == 0 or number % groups == 0)

    if not fits(parts):
        able = ", ".join(str(number) for number in range(2, heads + 1) if fits(number))
        raise ConfigError(
            f"training.sequence_parallel is {parts}, but this model's {heads} attention heads ({groups} "
            f"of keys and values) can be shared out over {able} processes only; choose one of these"
        )
