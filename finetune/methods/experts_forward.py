"""LoRA's forward pass on routed experts, without making their weights anew.

    y = W_e x + B_e (s A_e x)        x: a token that goes to expert e; A_e [r, in], B_e [out, r], s the scale

PEFT adds s B_e A_e to the weights of all experts of a layer in every pass: as much memory again, and in the
backward pass the gradient of all of W. Here the tokens of each expert go through its A and its B, group by
group, as they go through its W. Names, shapes and what is saved stay PEFT's; whatever is not one plain adapter
is left to PEFT.

Legend: T tokens, K experts of a token, E experts, r the rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

_ALIGNED = 16
"""Bytes that rows of a grouped product are multiples of."""


def use_in(model: nn.Module) -> None:
    """Let the adapters of routed experts of a PEFT model compute so."""
    inside = {id(module.base_layer) for module in model.modules() if type(module) is ParamWrapper}
    module: Any
    for module in list(model.modules()):
        is_outside = type(module) is ParamWrapper and id(module) not in inside
        if is_outside and hasattr(module.get_base_layer(), "_apply_gate"):
            module.__class__ = ExpertsLora


class ExpertsLora(ParamWrapper):
    """PEFT's outermost wrapper of a layer's experts; the others lie in it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return [T, D] of tokens [T, D], the numbers of their experts [T, K] and the weights of these."""
        adapters = self._adapters()
        if adapters is None or kwargs or len(args) != 2:
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        return _mixed(self.get_base_layer(), adapters, x, *args)

    def _adapters(self) -> dict[str, tuple[Tensor, Tensor, float]] | None:
        """A, B and scale by the tensor that they are for; None where PEFT is to compute."""
        found: dict[str, tuple[Tensor, Tensor, float]] = {}
        wrapper: Any = self
        while isinstance(wrapper, ParamWrapper):
            if wrapper.disable_adapters or wrapper.merged or len(wrapper.active_adapters) != 1:
                return None
            (name,) = wrapper.active_adapters
            if name in wrapper.lora_A:
                if wrapper.r[name] * wrapper.get_param().element_size() % _ALIGNED:
                    return None
                a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
                found[wrapper.parameter_name] = (a, b, wrapper.scaling[name])
            wrapper = wrapper.base_layer
        return found


def _mixed(
    experts: Any,
    adapters: dict[str, tuple[Tensor, Tensor, float]],
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
) -> Tensor:
    """What transformers' grouped products give, with the adapters' beside them."""
    together = chosen.shape[-1]
    numbers, order = torch.sort(chosen.reshape(-1))
    counted = numbers.float() if x.device.type == "cpu" else numbers.int()  # as histc takes them
    per_expert = torch.histc(counted, bins=experts.num_experts, min=0, max=experts.num_experts - 1)
    ends = per_expert.cumsum(0, dtype=torch.int32)

    def product(rows: Tensor, name: str) -> Tensor:
        matrix = getattr(experts, name)
        rows = rows.to(matrix.dtype)
        out = F.grouped_mm(rows, matrix.transpose(-2, -1), offs=ends)
        if name in adapters:
            a, b, scale = adapters[name]
            down = a.to(matrix.dtype).view(experts.num_experts, -1, a.shape[-1])
            up = (b * scale).to(matrix.dtype).view(len(b), -1, experts.num_experts)
            low = F.grouped_mm(rows, down.transpose(-2, -1), offs=ends)
            out = out + F.grouped_mm(low, up.permute(2, 1, 0).contiguous(), offs=ends)
        return out

    inner = experts._apply_gate(product(x[order // together], "gate_up_proj"))
    out = product(inner, "down_proj") * weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return out[back].view(len(x), together, -1).sum(1).to(x.dtype)
