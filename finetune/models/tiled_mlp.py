"""The MLP of a layer, tile by tile where a batch is long: its inner products are its largest tensors.

A tile is computed again in the backward pass, so that those of one tile exist at a time: 0.2 MB a token of
a 9B model otherwise. That is one more forward pass of the MLP, a share that falls with the length, as
attention grows with its square (docs/long_text.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finetune.models.wide_residual import down_projected

ABOVE = 32768
"""Tokens of a batch from which on it is tiled."""
TILE = 8192
"""Tokens of a tile."""

Project = Callable[[Tensor], Tensor]


def swiglu_mlp(hidden: Tensor, gate_up: Project, down: Project) -> Tensor:
    """Return down(silu(gate) x up) of [..., D], gate and up from one projection."""

    def of(rows: Tensor) -> Tensor:
        return down_projected(gate_up(rows), down)

    if hidden.shape[:-1].numel() <= ABOVE:
        return of(hidden)
    tiles = torch.split(hidden.flatten(0, -2), TILE)
    if torch.is_grad_enabled():
        made = [checkpoint(of, rows, use_reentrant=False) for rows in tiles]
    else:
        made = [of(rows) for rows in tiles]
    return torch.unflatten(torch.cat(made), 0, hidden.shape[:-1])
