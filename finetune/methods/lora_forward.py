"""LoRA's forward pass in the number format of the model.

    y = W x + dropout(x) Aᵀ (s B)ᵀ        x [T, in], A [r, in], B [out, r], s the scale

PEFT makes a float32 copy of x for adapters that are float32, multiplies in float32 and adds a product
of the size of y. Here x stays as it is, A and B are cast once a step, the scale is part of the cast of
B, and the last product is added where y lies. Weights, gradients and what is saved stay PEFT's float32
ones; whatever is not plain LoRA (DoRA, merged, several adapters in a batch) is left to PEFT. W may be
in 4 bits, see `models.quantization`.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from finetune.models.kernels.products import ReplyingLinear, rows_are_apart
from finetune.models.quantization import FourBits

_turn = 0


def _weights_have_moved(*_: Any) -> None:
    """What was cast is cast again. torch's fused optimizers change weights without counting a version."""
    global _turn
    _turn += 1


register_optimizer_step_post_hook(_weights_have_moved)


def use_input_format(model: nn.Module) -> None:
    """Let the LoRA layers of a PEFT model compute in their input's format."""
    layer: Any
    for layer in [module for module in model.modules() if _ours(module) is not None]:
        for low in (*layer.lora_A.values(), *layer.lora_B.values()):
            if type(low) is nn.Linear and getattr(low, "bias", None) is None:
                low.__class__ = LowRank
        layer.__class__ = _ours(layer)


def _ours(module: nn.Module) -> Any:
    """The class that takes the place of PEFT's; None where that stays."""
    if type(module) is Linear:
        return LoraLinear
    kind = type(module)
    is_narrow = kind.__name__ == "Linear4bit" and kind.__module__ == "peft.tuners.lora.bnb"
    return _four_bit_class() if is_narrow else None


class LowRank(nn.Linear):
    """A or B: a float32 weight that is multiplied in the format of what comes in."""

    _cast: tuple[tuple[Any, ...], Tensor] | None = None
    """The numbers, until the weight changes."""
    _attached: Tensor | None = None
    """The same with a gradient, until that has come: what stayed would keep the whole graph alive."""

    def forward(self, rows: Tensor, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Return rows [T, in] times scale x weightᵀ; with `onto` [T, out] added to it, in its place."""
        if len(rows) > 1 and rows_are_apart():
            alone = (slice(at, at + 1) for at in range(len(rows)))
            return torch.cat([self.forward(rows[at], None if onto is None else onto[at], scale) for at in alone])  # fmt: skip
        own = self.weight
        if own.dtype is rows.dtype and onto is not None:
            weight, alpha = own, scale  # nothing to cast: the scale is part of the product
        else:
            weight, alpha = self.cast(rows.dtype, scale), 1.0
        if onto is None:
            return nn.functional.linear(rows, weight)
        if hasattr(own, "ds_id"):  # DeepSpeed's hooks under ZeRO-3 return views
            return torch.addmm(onto, rows, weight.T, alpha=alpha)
        return onto.addmm_(rows, weight.T, alpha=alpha)

    def cast(self, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Return scale x weight in `dtype`, cast once for all passes of a step."""
        own = self.weight
        if own.dtype is dtype and scale == 1.0:
            return own
        key = _turn, id(own), own._version, dtype, scale, torch.is_inference_mode_enabled()
        kept = self.__dict__  # past nn.Module's own __setattr__, which looks for parameters
        cast = self._cast
        if cast is None or cast[0] != key:
            numbers = torch.empty_like(own, dtype=dtype, requires_grad=False)
            kept["_cast"] = cast = key, torch.mul(own.detach(), scale, out=numbers)
            kept["_attached"] = None
        if not (torch.is_grad_enabled() and own.requires_grad):
            return cast[1]
        attached = self._attached
        if attached is None:
            attached = _Attach.apply(own, cast[1], self, scale)  # type: ignore[no-untyped-call]
            kept["_attached"] = attached
        return attached

    @property
    def kept(self) -> Tensor | None:
        """What the passes of this step share."""
        return self._cast[1] if self._cast is not None else None

    def train(self, mode: bool = True) -> LowRank:
        """Between training and evaluation nothing is kept."""
        self._cast = self._attached = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {n: value for n, value in self.__dict__.items() if n not in ("_cast", "_attached")}


class _Attach(torch.autograd.Function):
    """The cast of a weight as a function of it; the gradient goes back to the weight's format."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, cast: Tensor, owner: LowRank, scale: float) -> Tensor:
        ctx.dtype, ctx.scale, ctx.owner = weight.dtype, scale, weakref.ref(owner)
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """One kernel: scaled and cast."""
        if (owner := ctx.owner()) is not None:
            owner.__dict__["_attached"] = None
        wide = torch.empty_like(grads[0], dtype=ctx.dtype)
        return torch.mul(grads[0], ctx.scale, out=wide), None, None, None


class PlainForward:
    """Goes before one of PEFT's layers, whose plain forward pass becomes ours."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return [..., out]."""
        if args or kwargs or not self._is_plain(x):
            out: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return out
        rows = x.flatten(
            0, -2
        )  # two dimensions: the result is no view, and can be added to in place
        out = self.base_layer(rows)
        for name in self.active_adapters:
            if name in self.lora_A:
                low = self.lora_A[name](self.lora_dropout[name](rows))
                out = self.lora_B[name](low, onto=out, scale=self.scaling[name])
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def _is_plain(self: Any, x: Tensor) -> bool:
        kind = x.device.type
        if _format_of(self.base_layer) is not x.dtype or x.dim() < 2:
            return False
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is not x.dtype:
            return False
        if self.disable_adapters or self.merged:
            return False
        downs, ups, variants = self.lora_A, self.lora_B, self.lora_variant
        for name in self.active_adapters:
            if name in variants:
                return False
            if name in downs and not (type(downs[name]) is LowRank and type(ups[name]) is LowRank):
                return False
        return True


def _format_of(base: Any) -> torch.dtype | None:
    """In what a layer computes; None where that is not known."""
    if isinstance(base, FourBits):
        return base.wide_dtype
    return base.weight.dtype if type(base) in (nn.Linear, ReplyingLinear) else None


class LoraLinear(PlainForward, Linear):
    """PEFT's layer."""


@cache
def _four_bit_class() -> Any:
    from peft.tuners.lora.bnb import Linear4bit

    class LoraFourBits(PlainForward, Linear4bit):
        """PEFT's layer around one in 4 bits."""

    return LoraFourBits
