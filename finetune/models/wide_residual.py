"""float16 without overflow: the sum of the layers stays float32, and no product leaves float16's range.

    residual  float32    x + attention(norm(x)), then x + mlp(norm(x)); a few channels of some tokens
                         reach thousands and grow from layer to layer, and float16 ends at 65,504
    norm      float16    out of a float32 row: numbers of the size of its weight
    MLP       float16    silu(gate) x up is made in float32; a row with a number over LARGEST is divided
                         by a power of two, multiplied by the down projection, and multiplied back

Rows below LARGEST are not touched, so nothing is lost where float16 would have been right. For cards
without bfloat16 in hardware (V100, T4); in any other format nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from finetune.models import kernels
from finetune.models.kernels import torch_forms

LARGEST = 2048.0
"""What a row of the MLP's inner product may reach: sums of 32 times as much fit into float16."""


def down_projected(both: Tensor, down: Callable[[Tensor], Tensor]) -> Tensor:
    """Return down(silu(gate) x up) of [..., gate | up]; of a float16 model in float32."""
    if both.dtype is not torch.float16:
        return down(kernels.swiglu(both))
    product = torch_forms.swiglu(both.float())
    scale = row_scale(product)
    return down((product / scale).half()).float() * scale


def row_scale(rows: Tensor) -> Tensor:
    """Return the power of two [..., 1], at least 1, that brings each row down to LARGEST."""
    highest = rows.detach().abs().amax(dim=-1, keepdim=True)
    return (highest / LARGEST).clamp_min(1.0).log2().ceil().exp2()


def use_in(model: nn.Module, first_layer: nn.Module) -> None:
    """Let a float16 model add up its layers in float32."""
    # Sums of parts of a matrix product must not be made in float16 either.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    first_layer.register_forward_pre_hook(_widened, with_kwargs=True)
    model.sums_in_float32 = True  # type: ignore[assignment]


def _widened(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (args[0].float(), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": kwargs["hidden_states"].float()}
