"""QLoRA (Dettmers et al. 2023, arXiv:2305.14314): frozen linear layers in 4 bits, by bitsandbytes.

    y = x Wᵀ        W [out, in], read from 4 bits into the format of x

bitsandbytes makes W wide in every product: in the forward pass, in the recomputed one, and in the
backward pass. Under activation checkpointing ours keeps the W of the recomputed pass for the backward
pass that follows at once: two times a step in place of three, for the W of one decoder layer more at the
peak. Once a step would need the W of all layers at a time, which is what 4 bits are there to spare.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.distributed.device import local_device
from finetune.errors import ModelError

BLOCK = 64
"""Weights that share a scale; bitsandbytes on a CPU takes whole blocks in a row only."""


def four_bits(dtype: torch.dtype, kept: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that load NF4 weights of all but `kept`, computed with in `dtype`.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            "model.quantization: nf4 needs bitsandbytes, which is not installed; "
            "pip install 'glm4-finetune[qlora]', or leave model.quantization out"
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(kept),
    )
    return {"quantization_config": config, "device_map": {"": local_device()}}


class FourBits(nn.Module):
    """A linear layer with a frozen weight that is made wide when it is multiplied."""

    weight: Any
    bias: Any
    _recomputed_in: Any = None
    """A weak reference to the layer of the model that may be recomputed."""

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of the weight when it is wide, and of what it is multiplied with."""
        raise NotImplementedError

    def wide(self) -> Tensor:
        """Return the weight [out, in]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] of [..., in]."""
        layer = self._recomputed_in() if self._recomputed_in is not None else None
        keeps = layer is not None and layer.gradient_checkpointing and layer.training
        out: Tensor = _Product.apply(x, self, self.bias, keeps)  # type: ignore[no-untyped-call]
        return out


class _Product(torch.autograd.Function):
    """x times the wide weight; `keeps` saves that for the backward pass, which else makes it again.

    What is saved inside a checkpointed layer is dropped at the end of its forward pass by torch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FourBits, bias: Tensor | None, keeps: bool) -> Tensor:
        wide = layer.wide()
        if ctx.needs_input_grad[0]:
            ctx.layer = layer
            ctx.save_for_backward(wide if keeps else None)
        return F.linear(x, wide, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Of x; the weight and its bias are frozen."""
        (kept,) = ctx.saved_tensors
        return grads[0] @ (ctx.layer.wide() if kept is None else kept), None, None, None


def know_checkpoints(model: nn.Module) -> None:
    """Tell every layer in 4 bits which layer of the model recomputes it."""
    for outer in model.modules():
        if isinstance(outer, GradientCheckpointingLayer):
            for inner in outer.modules():
                if isinstance(inner, FourBits):
                    inner.__dict__["_recomputed_in"] = weakref.ref(outer)


FEW_ROWS = 64
"""Up to so many rows are multiplied by bitsandbytes' own kernels where nothing is learnt."""


@cache
def _layer_class() -> Any:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    class FourBitLinear(FourBits, Linear4bit):
        """bitsandbytes' layer; where it learns, its products are ours."""

        @property
        def wide_dtype(self) -> torch.dtype:
            dtype: torch.dtype = self.weight.quant_state.dtype
            return dtype

        def wide(self) -> Tensor:
            wide: Tensor = dequantize_4bit(self.weight.view(-1, 1), self.weight.quant_state)
            return wide

        def forward(self, x: Tensor) -> Tensor:
            few = x.numel() <= FEW_ROWS * x.shape[-1] and not torch.is_grad_enabled()
            if x.dtype is not self.wide_dtype or (few and x.is_cuda):
                out: Tensor = Linear4bit.forward(self, x)
                return out
            return super().forward(x)

    return FourBitLinear


def take_over(model: nn.Module) -> None:
    """Let the products of a model that was loaded in 4 bits be ours."""
    from bitsandbytes.nn import Linear4bit

    module: Any
    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = _layer_class()
            # On some processors it would lay the weight out anew in evaluation, and learn nothing then.
            module.support_avx512bf16_for_cpu = False
    know_checkpoints(model)


def check_widths(model: nn.Module) -> None:
    """Refuse on a CPU what its kernels cannot multiply.

    Raises:
        ModelError: A quantised layer's width is no multiple of 64.
    """
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        on_cpu = isinstance(module, Linear4bit) and module.weight.device.type == "cpu"
        if on_cpu and module.in_features % BLOCK:
            raise ModelError(
                f"model.quantization: nf4 on a CPU needs widths that {BLOCK} divides, but {name} "
                f"takes {module.in_features} numbers; leave model.quantization out, or use a GPU"
            )
