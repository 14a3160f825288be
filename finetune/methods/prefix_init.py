"""What a prefix starts from: the keys and values that the base itself computes for a text.

A fresh prefix of N tokens then is the base with that text in front of every dialogue, to the last
bit of rounding: stored keys carry the rotations of positions 0 to N - 1, and real tokens begin at N.
Starting from real activations: Li & Liang 2021, arXiv:2101.00190; docs/methods.md has what it gains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def activations(model: PreTrainedModel, ids: Sequence[int]) -> list[Tensor]:
    """Return float32 [2, H, N, D] for every layer: keys and values of the N tokens `ids`."""
    text = torch.tensor([list(ids)], device=model.device)
    base = model.base_model
    reader = getattr(base, "language_model", base)  # GLM-4.1V's text model; its tower need not look
    with torch.no_grad(), _gathered(model):
        cache: Any = reader(input_ids=text, use_cache=True).past_key_values
    return [torch.stack([layer.keys[0], layer.values[0]]).float() for layer in cache.layers]


@contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    """Make ZeRO-3's parts whole around each module's own forward; every process must take part."""
    with ExitStack() as hooks:
        for module in model.modules():
            parts = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_id")]
            if parts:
                hooks.enter_context(_whole_while_it_runs(module, parts))
        yield


@contextmanager
def _whole_while_it_runs(module: nn.Module, parts: list[nn.Parameter]) -> Iterator[None]:
    import deepspeed

    gathering = ExitStack()

    def begin(*_: Any) -> None:
        gathering.enter_context(deepspeed.zero.GatheredParameters(parts))

    def end(*_: Any) -> None:
        gathering.close()

    before = module.register_forward_pre_hook(begin)
    after = module.register_forward_hook(end, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
