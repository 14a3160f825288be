"""`training.optimizer`: which optimizer updates the weights that a method trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

MUON = "muon"
STATE_BYTES = {"adamw_8bit": 2 + 2 * 4 / 256, "paged_adamw": 0.0, "paged_adamw_8bit": 0.0}
"""Of a trained number on a GPU: 8 bits twice and a scale for each 256; what is paged may be elsewhere."""


def matrices(model: Any) -> set[str]:
    """Names of the trained weights that Muon updates: matrices that are no table and no output layer."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = inner.get_output_embeddings()
    tables = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    } | ({id(head.weight)} if head is not None else set())
    return {
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.dim() == 2 and id(weight) not in tables
    }


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for the groups with `muon: True`, torch's fused AdamW for the others.

    Muon's update is scaled to the size of AdamW's (`match_rms_adamw`), so that one learning rate and one
    weight decay mean the same to both. Groups and states lie here, and are lent to the two for a step.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float
    ) -> None:
        listed = list(groups)
        parts: dict[bool, Any] = {}
        for is_muon in (True, False):
            weights = [w for group in listed if group["muon"] is is_muon for w in group["params"]]
            if weights and is_muon:
                parts[True] = torch.optim.Muon(weights, adjust_lr_fn="match_rms_adamw")
            elif weights:
                parts[False] = torch.optim.AdamW(weights, betas=betas, eps=eps, fused=True)
        # Every group says all that its part wants to know.
        super().__init__([parts[g["muon"]].defaults | g for g in listed if g["params"]], {})
        self._parts = parts

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all weights."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for is_muon, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if group["muon"] is is_muon]
            part.state = self.state
            part.step()
        return loss


def for_counting(model: Any, name: str) -> torch.optim.Optimizer:
    """The optimizer of a model that is counted; where bitsandbytes' would be, the one it stands in for."""
    trained = {n: w for n, w in model.named_parameters() if w.requires_grad}
    if name != MUON:
        return torch.optim.AdamW(list(trained.values()), lr=1e-4, fused=True)
    chosen = matrices(model)
    groups = [
        {"params": [w for n, w in trained.items() if (n in chosen) is is_muon], "muon": is_muon, "lr": 1e-4}
        for is_muon in (True, False)
    ]  # fmt: skip
    return MuonWithAdamW(groups, betas=(0.9, 0.999), eps=1e-8)
