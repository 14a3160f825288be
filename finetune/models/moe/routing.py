"""Which experts the tokens of a training step went to, counted where they are routed.

Legend: L mixture layers, E experts of a layer, K experts of a token, T tokens.

Counting is one kernel a layer and waits for nothing; the numbers leave the device when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class ExpertUse:
    """How often each expert was chosen since the last `read`, layer by layer."""

    def __init__(self, layers: Sequence[int], experts: int) -> None:
        self.layers = tuple(layers)
        """Numbers of the mixture layers."""
        self.experts = experts
        self._counts: list[Tensor | None] = [None] * len(self.layers)
        self._open = False
        self._real: Tensor | None = None

    @contextmanager
    def counting(self, real: Tensor | None) -> Iterator[None]:
        """Count inside; `real` is bool [B, T], or None where every token counts.

        Layers that are recomputed run in the backward pass, outside, and are counted once.
        """
        self._open, self._real = True, real
        try:
            yield
        finally:
            self._open, self._real = False, None

    def add(self, place: int, chosen: Tensor) -> None:
        """Count the experts `chosen` [T, K] of the layer at `place`, where counting is on."""
        if not self._open:
            return
        with torch.no_grad():
            counts = self._counts[place]
            if counts is None:
                counts = torch.zeros(self.experts, dtype=torch.float32, device=chosen.device)
                self._counts[place] = counts
            ones = torch.ones_like(chosen, dtype=torch.float32)
            if self._real is not None and self._real.numel() == len(chosen):
                ones = ones * self._real.reshape(-1, 1).to(chosen.device)
            counts.scatter_add_(0, chosen.flatten(), ones.flatten())

    def read(self) -> list[float]:
        """Return the L x E numbers, layer after layer, and begin again at zero."""
        held = [counts for counts in self._counts if counts is not None]
        self._counts = [None] * len(self.layers)
        if len(held) < len(self.layers):
            return [0.0] * (len(self.layers) * self.experts)
        first = held[0].device  # layers may be shared out over several
        together = torch.stack([counts.to(first, non_blocking=True) for counts in held])
        numbers: list[float] = together.double().flatten().tolist()
        return numbers


@dataclass(frozen=True)
class Balance:
    """How evenly a layer's tokens are shared out."""

    layer: int
    largest_share: float
    """Of the expert that was chosen most, of all choices: 1 / E is even."""
    entropy: float
    """Of the shares, from 0 (one expert takes all) to 1 (all are alike)."""


def balances(layers: Sequence[int], numbers: Sequence[float]) -> list[Balance]:
    """The balance of every layer that was used, of L x E counts."""
    found = []
    counts = torch.tensor(numbers, dtype=torch.float64).view(len(layers), -1)
    for layer, row in zip(layers, counts, strict=True):
        if not float(row.sum()):
            continue
        shares = row / row.sum()
        entropy = -(shares * shares.clamp_min(1e-300).log()).sum()
        evenness = float(entropy / torch.tensor(float(len(row))).log()) if len(row) > 1 else 1.0
        found.append(Balance(layer, float(shares.max()), evenness))
    return found


def figures(use: ExpertUse | None, total: Callable[[list[float]], list[float]]) -> dict[str, float]:
    """What a log line says of the experts since the last one; `total` adds up the counts of all processes.

    `experts_share_N` and `experts_entropy_N` of each mixture layer N, and the largest and lowest of them.
    """
    if use is None:
        return {}
    found = balances(use.layers, total(use.read()))
    if not found:
        return {}
    by_layer = {f"experts_share_{one.layer}": one.largest_share for one in found}
    by_layer |= {f"experts_entropy_{one.layer}": one.entropy for one in found}
    return by_layer | {
        "experts_largest_share": max(one.largest_share for one in found),
        "experts_lowest_entropy": min(one.entropy for one in found),
    }


class Router(nn.Module):
    """Goes before transformers' router: scores in float32 whatever surrounds it, and counts its choices."""

    use: ExpertUse | None = None
    place = 0
    """Among the mixture layers."""
    e_score_correction_bias: Tensor

    def forward(self, hidden_states: Tensor) -> Any:
        """Return logits [T, E], weights and numbers of the chosen experts [T, K]."""
        # Autocast would round the scores to bfloat16: other experts than in evaluation.
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits, weights, chosen = super().forward(hidden_states)
        if self.use is not None:
            self.use.add(self.place, chosen)
        return logits, weights, chosen

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As a module's own; the bias, which decides between close scores, stays float32 (DeepSpeed casts all)."""
        before = self.e_score_correction_bias
        module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.e_score_correction_bias
        if after.dtype is not torch.float32:
            self.e_score_correction_bias = before.to(after.device, torch.float32)
        return module


def expert_use(model: nn.Module) -> ExpertUse | None:
    """The counts of a model that is a mixture, whatever is wrapped around it."""
    for module in model.modules():
        found = getattr(module, "expert_use", None)
        if isinstance(found, ExpertUse):
            return found
    return None
