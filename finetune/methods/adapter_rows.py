"""Adapters of one base in one batch: each row has what its own adapter adds, or nothing.

    y = x Wᵀ of all rows at once; of the rows of adapter a also + x Aₐᵀ (sₐ Bₐ)ᵀ

So a token of many models costs one pass through the base and little more, where a pass for each would read
all its weights again. The arithmetic of a row is that of `lora_forward`. A prefix needs no arithmetic of its
own: it is keys and values that a row's cache begins with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from finetune.methods.lora_forward import LoraLinear, LowRank
from finetune.methods.ptuning_v2 import EncodedPrefix, Prefix
from finetune.models.quantization import FourBits

ADAPTER = "default"
"""What PEFT calls the only adapter of a model."""


class AdapterRows:
    """A base as a model whose rows `choose` gives to adapters; forward passes are for one thread."""

    def __init__(self, base: Any) -> None:
        self._base = base
        self._layers: Mapping[str, Mapping[str, LoraLinear]] = {}
        """Of every adapter the layers by the names that the base has for them."""
        self._chosen: list[tuple[Mapping[str, LoraLinear], Tensor | None]] = []
        """The layers of an adapter, and its rows; None: all."""
        for name, module in base.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(partial(self._add, name))

    def __call__(self, **inputs: Any) -> Any:
        """The base's output, with what the chosen adapters add."""
        return self._base(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def put(self, name: str, adapted: Any) -> None:
        """One more adapter, such as `can_share` allows; from any thread."""
        layers = {
            place.removeprefix("base_model.model."): module
            for place, module in adapted.named_modules()
            if isinstance(module, LoraLinear)
        }
        self._layers = {**self._layers, name: layers}

    def drop(self, name: str) -> None:
        """Forgets an adapter; from any thread."""
        self._layers = {key: layers for key, layers in self._layers.items() if key != name}

    def choose(self, names: Sequence[str]) -> None:
        """Whose adapter each row has in the next forward passes; a name without one is the base's."""
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if name in self._layers:
                rows.setdefault(name, []).append(row)
        device = self._base.device
        self._chosen = [
            (self._layers[name], None if len(own) == len(names) else torch.tensor(own, device=device))
            for name, own in rows.items()
        ]  # fmt: skip

    def _add(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        for layers, rows in self._chosen:
            if name not in layers:
                continue
            layer: Any = layers[name]
            own = inputs[0] if rows is None else inputs[0][rows]
            onto = output if rows is None else output[rows]
            flat = onto.flatten(0, -2)  # a view: what is added to it is added to `onto`
            low = layer.lora_A[ADAPTER](own.flatten(0, -2))
            layer.lora_B[ADAPTER](low, onto=flat, scale=layer.scaling[ADAPTER])
            if rows is not None:
                output[rows] = onto


def prefix_of(adapted: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Of every layer the keys and values [1, H, N, D] of a P-Tuning v2 prefix of N tokens; [] of other models."""
    dtype = next(adapted.parameters()).dtype
    prefixes = [one for one in adapted.modules() if isinstance(one, Prefix | EncodedPrefix)]
    states = [one().detach().to(dtype) for one in prefixes]
    return [(state[0][None], state[1][None]) for state in states]


def can_share(adapted: Any) -> bool:
    """Whether an adapter is plain LoRA on plain layers, all that `AdapterRows` adds."""
    if not hasattr(adapted, "peft_config"):
        return False
    return all(
        not isinstance(module, AuxiliaryTrainingWrapper)
        and (not isinstance(module, BaseTunerLayer) or _is_plain(module))
        for module in adapted.modules()
    )


def _is_plain(layer: Any) -> bool:
    return (
        type(layer) is LoraLinear
        and isinstance(layer.base_layer, nn.Linear)
        and not isinstance(layer.base_layer, FourBits)
        and type(layer.lora_A[ADAPTER]) is LowRank
        and type(layer.lora_B[ADAPTER]) is LowRank
        and not layer.lora_variant
        and not layer.merged
    )
